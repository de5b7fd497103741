/* checksum.c: XXH3-64, as its published specification has it.  SPEC.md section 6.
 *
 * Up to 240 bytes: words under the secret, multiplied in pairs.  Beyond: eight sums over stripes of 64 bytes, which
 * the kernels make, and these multiplied in pairs. */
#include "checksum.h"

#include "kernels.h"

#define PRIME32_1 UINT64_C(0x9E3779B1)
#define PRIME32_2 UINT64_C(0x85EBCA77)
#define PRIME32_3 UINT64_C(0xC2B2AE3D)
#define PRIME64_1 UINT64_C(0x9E3779B185EBCA87)
#define PRIME64_2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define PRIME64_3 UINT64_C(0x165667B19E3779F9)
#define PRIME64_4 UINT64_C(0x85EBCA77C2B2AE63)
#define PRIME64_5 UINT64_C(0x27D4EB2F165667C5)
#define PRIME_MIX_1 UINT64_C(0x165667919E3779F9)
#define PRIME_MIX_2 UINT64_C(0x9FB21C651E98DF25)

static const uint8_t plain_secret[SKL_SECRET_SIZE] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* ---- mixing ------------------------------------------------------------------------------------------------- */

static inline uint32_t load_half(const uint8_t *from)
{
    return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

static inline uint64_t rotate(uint64_t value, uint32_t bits)
{
    return value << bits | value >> (64 - bits);
}

/* The halves of the 128-bit product of a and b, one over the other. */
static inline uint64_t fold_product(uint64_t a, uint64_t b)
{
    const uint64_t low_a = a & UINT32_MAX, high_a = a >> 32, low_b = b & UINT32_MAX, high_b = b >> 32;
    const uint64_t cross = (low_a * low_b >> 32) + high_a * low_b;
    const uint64_t middle = (cross & UINT32_MAX) + low_a * high_b;
    return (a * b) ^ (high_a * high_b + (cross >> 32) + (middle >> 32));
}

static inline uint64_t mix_pair(const uint8_t *src, const uint8_t *secret, uint64_t seed)
{
    return fold_product(skl_load_word(src) ^ (skl_load_word(secret) + seed),
                        skl_load_word(src + 8) ^ (skl_load_word(secret + 8) - seed));
}

static inline uint64_t spread(uint64_t hash)
{
    hash = (hash ^ hash >> 37) * PRIME_MIX_1;
    return hash ^ hash >> 32;
}

static inline uint64_t spread_far(uint64_t hash)
{
    hash = (hash ^ hash >> 33) * PRIME64_2;
    hash = (hash ^ hash >> 29) * PRIME64_3;
    return hash ^ hash >> 32;
}

/* ---- by length ---------------------------------------------------------------------------------------------- */

static uint64_t of_1_to_3(const uint8_t *src, size_t len, uint64_t seed)
{
    const uint32_t bytes = (uint32_t)src[0] << 16 | (uint32_t)src[len / 2] << 24 | src[len - 1] | (uint32_t)len << 8;
    const uint64_t key = (uint64_t)(load_half(plain_secret) ^ load_half(plain_secret + 4)) + seed;
    return spread_far(bytes ^ key);
}

static uint64_t of_4_to_8(const uint8_t *src, size_t len, uint64_t seed)
{
    const uint64_t mixed = seed ^ (uint64_t)__builtin_bswap32((uint32_t)seed) << 32;
    const uint64_t key = (skl_load_word(plain_secret + 8) ^ skl_load_word(plain_secret + 16)) - mixed;
    uint64_t hash = (load_half(src + len - 4) + ((uint64_t)load_half(src) << 32)) ^ key;
    hash = (hash ^ rotate(hash, 49) ^ rotate(hash, 24)) * PRIME_MIX_2;
    hash = (hash ^ ((hash >> 35) + len)) * PRIME_MIX_2;
    return hash ^ hash >> 28;
}

static uint64_t of_9_to_16(const uint8_t *src, size_t len, uint64_t seed)
{
    const uint64_t low_key = (skl_load_word(plain_secret + 24) ^ skl_load_word(plain_secret + 32)) + seed;
    const uint64_t high_key = (skl_load_word(plain_secret + 40) ^ skl_load_word(plain_secret + 48)) - seed;
    const uint64_t low = skl_load_word(src) ^ low_key, high = skl_load_word(src + len - 8) ^ high_key;
    return spread(len + __builtin_bswap64(low) + high + fold_product(low, high));
}

/* Pairs of words from both ends. */
static uint64_t of_17_to_128(const uint8_t *src, size_t len, uint64_t seed)
{
    uint64_t hash = len * PRIME64_1;
    for (size_t i = 0; i <= (len - 1) / 32; i++)
        hash += mix_pair(src + 16 * i, plain_secret + 32 * i, seed) +
                mix_pair(src + len - 16 * (i + 1), plain_secret + 32 * i + 16, seed);
    return spread(hash);
}

static uint64_t of_129_to_240(const uint8_t *src, size_t len, uint64_t seed)
{
    uint64_t hash = len * PRIME64_1;
    for (size_t i = 0; i < 8; i++)
        hash += mix_pair(src + 16 * i, plain_secret + 16 * i, seed);
    hash = spread(hash);
    for (size_t i = 8; i < len / 16; i++)
        hash += mix_pair(src + 16 * i, plain_secret + 16 * (i - 8) + 3, seed);
    return spread(hash + mix_pair(src + len - 16, plain_secret + 119, seed));
}

static uint64_t of_more(const uint8_t *src, size_t len, uint64_t seed)
{
    uint8_t secret[SKL_SECRET_SIZE];
    for (size_t i = 0; i < SKL_SECRET_SIZE; i += 8) {
        const uint64_t word = skl_load_word(plain_secret + i) + (i % 16 == 0 ? seed : 0 - seed);
        const uint64_t bytes = SKL_LITTLE_ENDIAN ? word : __builtin_bswap64(word);
        memcpy(secret + i, &bytes, sizeof bytes);
    }
    uint64_t sums[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    const skl_kernels *const kernels = skl_current_kernels();
    kernels->mix_stripes(sums, src, (len - 1) / SKL_STRIPE, secret);
    kernels->mix_stripes(sums, src + len - SKL_STRIPE, 1, secret + SKL_SECRET_SIZE - SKL_STRIPE - 7);
    uint64_t hash = len * PRIME64_1;
    for (size_t i = 0; i < 8; i += 2)
        hash += fold_product(sums[i] ^ skl_load_word(secret + 11 + 8 * i),
                             sums[i + 1] ^ skl_load_word(secret + 19 + 8 * i));
    return spread(hash);
}

uint64_t skl_checksum(const uint8_t *src, size_t len, uint64_t seed)
{
    if (len > 240)
        return of_more(src, len, seed);
    if (len > 128)
        return of_129_to_240(src, len, seed);
    if (len > 16)
        return of_17_to_128(src, len, seed);
    if (len > 8)
        return of_9_to_16(src, len, seed);
    if (len > 3)
        return of_4_to_8(src, len, seed);
    if (len > 0)
        return of_1_to_3(src, len, seed);
    return spread_far(seed ^ skl_load_word(plain_secret + 56) ^ skl_load_word(plain_secret + 64));
}
