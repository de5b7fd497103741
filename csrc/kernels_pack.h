/* kernels_pack.h: ids and codes to records, and the checks that look at every record.
 *
 * The counterpart of kernels_records.h, included where that is.  The plain loop is the truth, and finishes what the
 * vectors leave.  Ids and codes may be anything here: what a caller hands over was not checked before. */
#ifndef SKL_KERNELS_PACK_H
#define SKL_KERNELS_PACK_H

#include "kernels.h"

#include <string.h>
#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define SPECIALISED static inline __attribute__((always_inline))

#if defined(__AVX512BW__)

/* 16 records at a time; returns how many are done. */
SPECIALISED size_t pack_vectors(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                                const uint8_t *codes, size_t n, uint8_t *dst, skl_seen *seen)
{
    const __m512i bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m512i gather = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
    const __m512i last_id = _mm512_set1_epi32((int)(vocab_size - 1));
    __m512i before = _mm512_setzero_si512();
    __mmask16 large = 0, zeros = 0;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512i ids = _mm512_loadu_si512(token_ids + i);
        const __m512i values = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(codes + i)));
        const __m512i records = _mm512_or_si512(ids, _mm512_slli_epi32(values, id_bits));
        const uint32_t falls = _mm512_cmple_epu32_mask(ids, _mm512_alignr_epi32(ids, before, 15));
        seen->falls += (uint64_t)__builtin_popcount(i == 0 ? falls & ~UINT32_C(1) : falls);
        large = (__mmask16)(large | _mm512_cmpgt_epu32_mask(ids, last_id));
        zeros = (__mmask16)(zeros | _mm512_testn_epi32_mask(values, values));
        before = ids;
        if (size == 4)
            _mm512_storeu_si512(dst + 4 * i, records);
        else
            _mm512_mask_storeu_epi32(dst + 3 * i, 0x0fff,
                                     _mm512_permutexvar_epi32(gather, _mm512_shuffle_epi8(records, bytes)));
    }
    seen->large |= large != 0;
    seen->zeros |= zeros != 0;
    return i;
}

#elif defined(__AVX2__)

/* 8 records at a time; returns how many are done. */
SPECIALISED size_t pack_vectors(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                                const uint8_t *codes, size_t n, uint8_t *dst, skl_seen *seen)
{
    const __m256i bytes = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1, 0, 1, 2, 4, 5, 6, 8,
                                           9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256i gather = _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 7, 7);
    const __m256i rotate = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    const __m256i flip = _mm256_set1_epi32(INT32_MIN); /* compares as if without sign */
    const __m256i last_id = _mm256_set1_epi32((int)((vocab_size - 1) ^ UINT32_C(0x80000000)));
    const __m128i shift = _mm_cvtsi32_si128((int)id_bits);
    __m256i before = flip, large = _mm256_setzero_si256(), zeros = large;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i ids = _mm256_loadu_si256((const __m256i *)(const void *)(token_ids + i));
        const __m256i values = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(codes + i)));
        const __m256i records = _mm256_or_si256(ids, _mm256_sll_epi32(values, shift));
        const __m256i flipped = _mm256_xor_si256(ids, flip);
        const __m256i rotated = _mm256_permutevar8x32_epi32(flipped, rotate);
        const __m256i rises = _mm256_cmpgt_epi32(flipped, _mm256_blend_epi32(rotated, before, 1));
        const uint32_t falls = ~(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(rises)) & 0xff;
        seen->falls += (uint64_t)__builtin_popcount(i == 0 ? falls & ~UINT32_C(1) : falls);
        before = rotated;
        large = _mm256_or_si256(large, _mm256_cmpgt_epi32(flipped, last_id));
        zeros = _mm256_or_si256(zeros, _mm256_cmpeq_epi32(values, _mm256_setzero_si256()));
        if (size == 4) {
            _mm256_storeu_si256((__m256i *)(void *)(dst + 4 * i), records);
        } else {
            const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(records, bytes), gather);
            _mm_storeu_si128((__m128i *)(void *)(dst + 3 * i), _mm256_castsi256_si128(packed));
            _mm_storel_epi64((__m128i *)(void *)(dst + 3 * i + 16), _mm256_extracti128_si256(packed, 1));
        }
    }
    seen->large |= _mm256_movemask_epi8(large) != 0;
    seen->zeros |= _mm256_movemask_epi8(zeros) != 0;
    return i;
}

#else

SPECIALISED size_t pack_vectors(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                                const uint8_t *codes, size_t n, uint8_t *dst, skl_seen *seen)
{
    (void)size, (void)id_bits, (void)vocab_size, (void)token_ids, (void)codes, (void)n, (void)dst, (void)seen;
    return 0;
}

#endif

SPECIALISED void pack_as(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                         const uint8_t *codes, size_t n, uint8_t *dst, skl_seen *seen)
{
    size_t i = pack_vectors(size, id_bits, vocab_size, token_ids, codes, n, dst, seen);
    for (; i < n; i++) {
        const uint32_t record = token_ids[i] | (uint32_t)codes[i] << id_bits;
        seen->large |= token_ids[i] >= vocab_size;
        seen->zeros |= codes[i] == 0;
        seen->falls += i > 0 && token_ids[i] <= token_ids[i - 1];
        for (uint32_t byte = 0; byte < size; byte++)
            dst[size * i + byte] = (uint8_t)(record >> (8 * byte));
    }
}

static void pack(uint32_t profile, uint32_t vocab_size, const uint32_t *token_ids, const uint8_t *codes, size_t n,
                 uint8_t *dst, skl_seen *seen)
{
    memset(seen, 0, sizeof *seen);
    /* One copy of the loop for each profile. */
    if (profile == SKL_PROFILE_R24)
        pack_as(3, 17, vocab_size, token_ids, codes, n, dst, seen);
    else if (profile == SKL_PROFILE_R24W)
        pack_as(3, 18, vocab_size, token_ids, codes, n, dst, seen);
    else
        pack_as(4, 24, vocab_size, token_ids, codes, n, dst, seen);
}

/* Sum of n bytes, n * 255 < 2^32. */
SPECIALISED uint32_t sum_bytes(const uint8_t *bytes, size_t n)
{
    uint32_t sum = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    for (; n > 0; bytes += 32) { /* a masked load touches nothing beyond n; few positions have more than 32 records */
        const size_t some = n < 32 ? n : 32;
        const __m256i part = _mm256_maskz_loadu_epi8(UINT32_MAX >> (32 - some), bytes);
        const __m256i quarters = _mm256_sad_epu8(part, _mm256_setzero_si256());
        const __m128i halves =
            _mm_add_epi64(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256(quarters, 1));
        sum += (uint32_t)(_mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1));
        n -= some;
    }
#else
    for (; n >= 8; n -= 8, bytes += 8) {
        uint64_t eight;
        memcpy(&eight, bytes, sizeof eight);
        const uint64_t pairs = (eight & UINT64_C(0x00ff00ff00ff00ff)) + (eight >> 8 & UINT64_C(0x00ff00ff00ff00ff));
        sum += (uint32_t)(pairs * UINT64_C(0x0001000100010001) >> 48);
    }
    for (size_t i = 0; i < n; i++)
        sum += bytes[i];
#endif
    return sum;
}

static int sums_differ(const int64_t *offsets, uint32_t num_positions, const uint8_t *codes, uint32_t rounds)
{
    uint32_t bad = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        const size_t n = (size_t)(offsets[t + 1] - offsets[t]);
        bad |= (uint32_t)(n > 0) & (uint32_t)(sum_bytes(codes + offsets[t], n) != rounds);
    }
    return bad != 0;
}

#undef SPECIALISED

#endif
