/* bits.h: a float32 as the integer of the same bits, and back; private. */
#ifndef SKL_BITS_H
#define SKL_BITS_H

#include "exact.h"

#include <stdint.h>
#include <string.h>

/* Of positive floats the bits rise with the value, so that these sort as integers. */
static inline __attribute__((always_inline)) uint32_t skl_float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline __attribute__((always_inline)) float skl_bits_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#endif
