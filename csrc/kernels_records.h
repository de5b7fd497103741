/* kernels_records.h: records to ids and codes, and the checks that look at every record.
 *
 * Included by kernels_portable.c, and so compiled for each instruction set; the plain loops are the truth, and finish
 * what the vectors leave.  Reads at most SKL_OVERREAD bytes beyond the records, which SPEC.md section 5.1 grants. */
#ifndef SKL_KERNELS_RECORDS_H
#define SKL_KERNELS_RECORDS_H

#include "kernels.h"

#include <string.h>
#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define SPECIALISED static inline __attribute__((always_inline))

/* Where a record has its id and code. */
typedef struct layout {
    uint32_t size, id_bits, code_mask;
} layout;

#if defined(__AVX512BW__)

/* 16 records at a time; returns how many are done. */
SPECIALISED size_t unpack_vectors(layout at, uint32_t vocab_size, const uint8_t *src, size_t n, uint32_t *token_ids,
                                  uint8_t *codes, skl_scan *scan)
{
    const __m512i spread = _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
    const __m512i bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    const __m512i id_mask = _mm512_set1_epi32((int)((UINT32_C(1) << at.id_bits) - 1));
    const __m512i code_mask = _mm512_set1_epi32((int)at.code_mask);
    const __m512i last_id = _mm512_set1_epi32((int)(vocab_size - 1));
    __m512i before = _mm512_set1_epi32(-1), reserved = _mm512_setzero_si512();
    __mmask16 large = 0, zeros = 0;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512i records = _mm512_loadu_si512(src + at.size * i);
        if (at.size == 3)
            records = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(spread, records), bytes);
        const __m512i ids = _mm512_and_si512(records, id_mask);
        const __m512i values = _mm512_and_si512(_mm512_srli_epi32(records, at.id_bits), code_mask);
        reserved = _mm512_or_si512(reserved, records);
        large = (__mmask16)(large | _mm512_cmpgt_epi32_mask(ids, last_id));
        zeros = (__mmask16)(zeros | _mm512_testn_epi32_mask(values, values));
        scan->falls += (uint64_t)__builtin_popcount(
            _mm512_cmple_epi32_mask(ids, _mm512_alignr_epi32(ids, before, 15)));
        before = ids;
        _mm512_storeu_si512(token_ids + i, ids);
        _mm_storeu_si128((__m128i *)(void *)(codes + i), _mm512_cvtepi32_epi8(values));
    }
    scan->large |= large != 0;
    scan->zeros |= zeros != 0;
    scan->reserved |= at.size == 4 && _mm512_movepi32_mask(reserved) != 0;
    return i;
}

#elif defined(__AVX2__)

/* 8 records at a time; returns how many are done. */
SPECIALISED size_t unpack_vectors(layout at, uint32_t vocab_size, const uint8_t *src, size_t n, uint32_t *token_ids,
                                  uint8_t *codes, skl_scan *scan)
{
    const __m256i bytes = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0, 1, 2, -1, 3, 4, 5,
                                           -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                                               12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i halves = _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1);
    const __m256i rotate = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    const __m256i id_mask = _mm256_set1_epi32((int)((UINT32_C(1) << at.id_bits) - 1));
    const __m256i code_mask = _mm256_set1_epi32((int)at.code_mask);
    const __m256i last_id = _mm256_set1_epi32((int)(vocab_size - 1));
    const __m128i shift = _mm_cvtsi32_si128((int)at.id_bits);
    __m256i before = _mm256_set1_epi32(-1), reserved = _mm256_setzero_si256();
    __m256i large = reserved, zeros = reserved;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const uint8_t *from = src + at.size * i;
        __m256i records;
        if (at.size == 3)
            records = _mm256_shuffle_epi8(
                _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)from)),
                                        _mm_loadu_si128((const __m128i *)(const void *)(from + 12)), 1),
                bytes);
        else
            records = _mm256_loadu_si256((const __m256i *)(const void *)from);
        const __m256i ids = _mm256_and_si256(records, id_mask);
        const __m256i values = _mm256_and_si256(_mm256_srl_epi32(records, shift), code_mask);
        const __m256i rotated = _mm256_permutevar8x32_epi32(ids, rotate);
        const __m256i rises = _mm256_cmpgt_epi32(ids, _mm256_blend_epi32(rotated, before, 1));
        before = rotated;
        reserved = _mm256_or_si256(reserved, records);
        large = _mm256_or_si256(large, _mm256_cmpgt_epi32(ids, last_id));
        zeros = _mm256_or_si256(zeros, _mm256_cmpeq_epi32(values, _mm256_setzero_si256()));
        scan->falls += 8 - (uint64_t)__builtin_popcount((uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(rises)));
        _mm256_storeu_si256((__m256i *)(void *)(token_ids + i), ids);
        _mm_storel_epi64((__m128i *)(void *)(codes + i), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(
                                                             _mm256_shuffle_epi8(values, low_bytes), halves)));
    }
    scan->large |= _mm256_movemask_epi8(large) != 0;
    scan->zeros |= _mm256_movemask_epi8(zeros) != 0;
    scan->reserved |= at.size == 4 && _mm256_movemask_ps(_mm256_castsi256_ps(reserved)) != 0;
    return i;
}

#else

SPECIALISED size_t unpack_vectors(layout at, uint32_t vocab_size, const uint8_t *src, size_t n, uint32_t *token_ids,
                                  uint8_t *codes, skl_scan *scan)
{
    (void)at, (void)vocab_size, (void)src, (void)n, (void)token_ids, (void)codes, (void)scan;
    return 0;
}

#endif

SPECIALISED void unpack_as(layout at, uint32_t vocab_size, const uint8_t *src, size_t n, uint32_t *token_ids,
                           uint8_t *codes, skl_scan *scan)
{
    size_t i = unpack_vectors(at, vocab_size, src, n, token_ids, codes, scan);
    for (; i < n; i++) {
        const uint8_t *from = src + at.size * i;
        const uint32_t record = (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 |
                                (at.size == 4 ? (uint32_t)from[3] << 24 : 0);
        const uint32_t id = record & ((UINT32_C(1) << at.id_bits) - 1);
        const uint32_t code = record >> at.id_bits & at.code_mask;
        scan->reserved |= at.size == 4 && record >> 31;
        scan->large |= id >= vocab_size;
        scan->zeros |= code == 0;
        scan->falls += i > 0 && id <= token_ids[i - 1];
        token_ids[i] = id;
        codes[i] = (uint8_t)code;
    }
}

static void unpack(uint32_t profile, uint32_t vocab_size, const uint8_t *src, size_t n, uint32_t *token_ids,
                   uint8_t *codes, skl_scan *scan)
{
    memset(scan, 0, sizeof *scan);
    /* One copy of the loop for each profile. */
    if (profile == SKL_PROFILE_R24)
        unpack_as((layout){3, 17, 127}, vocab_size, src, n, token_ids, codes, scan);
    else if (profile == SKL_PROFILE_R24W)
        unpack_as((layout){3, 18, 63}, vocab_size, src, n, token_ids, codes, scan);
    else
        unpack_as((layout){4, 24, 127}, vocab_size, src, n, token_ids, codes, scan);
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

static void divide(const uint8_t *restrict codes, size_t n, uint32_t rounds, float *restrict quotients)
{
    const float by = (float)rounds;
    for (size_t i = 0; i < n; i++)
        quotients[i] = (float)codes[i] / by;
}

#undef SPECIALISED

#endif
