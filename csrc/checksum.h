/* checksum.h: what checksum.c and its kernels share; private. */
#ifndef SKL_CHECKSUM_H
#define SKL_CHECKSUM_H

#include <stdint.h>
#include <string.h>

#define SKL_STRIPE 64       /* bytes that are mixed into the eight sums at a time, */
#define SKL_STRIPES 16      /* and how often, each with a key 8 bytes further, before the sums are scrambled */
#define SKL_SECRET_SIZE 192 /* SKL_STRIPES steps of 8 bytes, and one whole key */

/* Eight bytes as a little-endian number. */
static inline __attribute__((always_inline)) uint64_t skl_load_word(const uint8_t *from)
{
    uint64_t word;
    memcpy(&word, from, sizeof word);
    return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? word : __builtin_bswap64(word);
}

#endif
