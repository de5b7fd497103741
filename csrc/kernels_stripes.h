/* kernels_stripes.h: the sums of XXH3-64 over 64 bytes at a time; checksum.c says what comes before and after them.
 *
 * Included by kernels_table.h.  The plain loops are the truth: the two halves of each word, under its key, are
 * multiplied into its own sum, and the word itself is added to its neighbour's. */
#ifndef SKL_KERNELS_STRIPES_H
#define SKL_KERNELS_STRIPES_H

#include "checksum.h"
#include "kernels.h"

#define SCRAMBLE_PRIME UINT32_C(0x9E3779B1)

#if defined(SKL_KERNELS_PORTABLE)

typedef struct sums {
    uint64_t words[8];
} sums;

SKL_INLINE sums load_sums(const uint64_t *from)
{
    sums a;
    memcpy(a.words, from, sizeof a.words);
    return a;
}

SKL_INLINE void store_sums(uint64_t *to, sums a)
{
    memcpy(to, a.words, sizeof a.words);
}

SKL_INLINE sums mix_stripe(sums a, const uint8_t *src, const uint8_t *secret)
{
    for (size_t i = 0; i < 8; i++) {
        const uint64_t word = skl_load_word(src + 8 * i), keyed = word ^ skl_load_word(secret + 8 * i);
        a.words[i ^ 1] += word;
        a.words[i] += (keyed & UINT32_MAX) * (keyed >> 32);
    }
    return a;
}

SKL_INLINE sums scramble(sums a, const uint8_t *secret)
{
    for (size_t i = 0; i < 8; i++) {
        const uint64_t word = a.words[i];
        a.words[i] = (word ^ word >> 47 ^ skl_load_word(secret + 8 * i)) * SCRAMBLE_PRIME;
    }
    return a;
}

#elif defined(SKL_KERNELS_AVX2)

typedef struct sums {
    __m256i low, high;
} sums;

SKL_INLINE __m256i load_four(const void *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

SKL_INLINE sums load_sums(const uint64_t *from)
{
    return (sums){load_four(from), load_four(from + 4)};
}

SKL_INLINE void store_sums(uint64_t *to, sums a)
{
    _mm256_storeu_si256((__m256i *)(void *)to, a.low);
    _mm256_storeu_si256((__m256i *)(void *)(to + 4), a.high);
}

SKL_INLINE __m256i mix_four(__m256i a, const uint8_t *src, const uint8_t *secret)
{
    const __m256i words = load_four(src), keyed = _mm256_xor_si256(words, load_four(secret));
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    return _mm256_add_epi64(a, _mm256_add_epi64(product, _mm256_shuffle_epi32(words, 0x4e)));
}

SKL_INLINE sums mix_stripe(sums a, const uint8_t *src, const uint8_t *secret)
{
    return (sums){mix_four(a.low, src, secret), mix_four(a.high, src + 32, secret + 32)};
}

SKL_INLINE __m256i scramble_four(__m256i a, const uint8_t *secret)
{
    const __m256i prime = _mm256_set1_epi64x(SCRAMBLE_PRIME);
    const __m256i keyed = _mm256_xor_si256(_mm256_xor_si256(a, _mm256_srli_epi64(a, 47)), load_four(secret));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
}

SKL_INLINE sums scramble(sums a, const uint8_t *secret)
{
    return (sums){scramble_four(a.low, secret), scramble_four(a.high, secret + 32)};
}

#else

typedef __m512i sums;

SKL_INLINE sums load_sums(const uint64_t *from)
{
    return _mm512_loadu_si512(from);
}

SKL_INLINE void store_sums(uint64_t *to, sums a)
{
    _mm512_storeu_si512(to, a);
}

SKL_INLINE sums mix_stripe(sums a, const uint8_t *src, const uint8_t *secret)
{
    const __m512i words = _mm512_loadu_si512(src), keyed = _mm512_xor_si512(words, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    return _mm512_add_epi64(a, _mm512_add_epi64(product, _mm512_shuffle_epi32(words, _MM_PERM_BADC)));
}

SKL_INLINE sums scramble(sums a, const uint8_t *secret)
{
    const __m512i prime = _mm512_set1_epi64(SCRAMBLE_PRIME);
    const __m512i keyed = _mm512_xor_si512(_mm512_xor_si512(a, _mm512_srli_epi64(a, 47)), _mm512_loadu_si512(secret));
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(keyed, 32), prime);
    return _mm512_add_epi64(_mm512_mul_epu32(keyed, prime), _mm512_slli_epi64(high, 32));
}

#endif

static void mix_stripes(uint64_t *words, const uint8_t *src, size_t num_stripes, const uint8_t *secret)
{
    sums a = load_sums(words);
    for (; num_stripes >= SKL_STRIPES; num_stripes -= SKL_STRIPES) {
        for (size_t i = 0; i < SKL_STRIPES; i++, src += SKL_STRIPE)
            a = mix_stripe(a, src, secret + 8 * i);
        a = scramble(a, secret + 8 * SKL_STRIPES);
    }
    for (size_t i = 0; i < num_stripes; i++, src += SKL_STRIPE)
        a = mix_stripe(a, src, secret + 8 * i);
    store_sums(words, a);
}

#endif
