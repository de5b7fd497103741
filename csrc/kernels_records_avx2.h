/* kernels_records_avx2.h: records 8 and 32 at a time; kernels_table.h says what steps are. */
#ifndef SKL_KERNELS_RECORDS_AVX2_H
#define SKL_KERNELS_RECORDS_AVX2_H

#include "kernels_x86.h"

/* 8 records at a time. */
SKL_INLINE size_t pack_steps(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                             const uint8_t *codes, size_t n, uint8_t *dst, skl_pack_seen *seen)
{
    const __m256i bytes = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1, 0, 1, 2, 4, 5, 6, 8,
                                           9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256i gather = _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 7, 7);
    const __m256i rotate = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    const __m256i flip = _mm256_set1_epi32(INT32_MIN); /* compares as if without sign */
    const __m256i last_id = _mm256_set1_epi32((int)((vocab_size - 1) ^ UINT32_C(0x80000000)));
    const __m128i shift = _mm_cvtsi32_si128((int)id_bits);
    __m256i ids_before = flip, large_ids = _mm256_setzero_si256(), zero_codes = large_ids;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i ids = _mm256_loadu_si256((const __m256i *)(const void *)(token_ids + i));
        const __m256i wide_codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(codes + i)));
        const __m256i records = _mm256_or_si256(ids, _mm256_sll_epi32(wide_codes, shift));
        const __m256i flipped = _mm256_xor_si256(ids, flip);
        const __m256i rotated = _mm256_permutevar8x32_epi32(flipped, rotate);
        const __m256i rising = _mm256_cmpgt_epi32(flipped, _mm256_blend_epi32(rotated, ids_before, 1));
        const uint32_t not_rising = ~(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(rising)) & 0xff;
        seen->ids_not_rising += (uint64_t)__builtin_popcount(i == 0 ? not_rising & ~UINT32_C(1) : not_rising);
        ids_before = rotated;
        large_ids = _mm256_or_si256(large_ids, _mm256_cmpgt_epi32(flipped, last_id));
        zero_codes = _mm256_or_si256(zero_codes, _mm256_cmpeq_epi32(wide_codes, _mm256_setzero_si256()));
        if (size == 4) {
            _mm256_storeu_si256((__m256i *)(void *)(dst + 4 * i), records);
        } else {
            const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(records, bytes), gather);
            _mm_storeu_si128((__m128i *)(void *)(dst + 3 * i), _mm256_castsi256_si128(packed));
            _mm_storel_epi64((__m128i *)(void *)(dst + 3 * i + 16), _mm256_extracti128_si256(packed, 1));
        }
    }
    seen->large_id |= _mm256_movemask_epi8(large_ids) != 0;
    seen->zero_code |= _mm256_movemask_epi8(zero_codes) != 0;
    return i;
}

/* Positions are too short for it. */
SKL_INLINE size_t sum_steps(const uint8_t *bytes, size_t n, uint32_t *sum)
{
    (void)bytes, (void)n, (void)sum;
    return 0;
}

#define STEP 32u

/* 8 records of 3 bytes to integers. */
SKL_INLINE __m256i widen_threes(const uint8_t *src)
{
    const __m256i bytes = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0, 1, 2, -1, 3, 4, 5,
                                           -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const __m128i low = _mm_loadu_si128((const __m128i *)(const void *)src);
    const __m128i high = _mm_loadu_si128((const __m128i *)(const void *)(src + 12));
    return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), bytes);
}

/* As in kernels_records_avx512.h, with bytes of -1 where a position is open. */
typedef struct count_sums {
    __m256i rounds_left, negative, open;
} count_sums;

SKL_INLINE void check_counts(count_sums *sums, __m256i begin_marks, __m256i codes)
{
    const __m256i none = _mm256_setzero_si256();
    const __m256i low_bytes = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0,
                                               8, 8, 8, 8, 8, 8, 8, 8);
    __m256i inside = _mm256_sub_epi64(begin_marks, codes); /* times 0x0101010101010101 */
    inside = _mm256_add_epi64(inside, _mm256_slli_epi64(inside, 8));
    inside = _mm256_add_epi64(inside, _mm256_slli_epi64(inside, 16));
    inside = _mm256_add_epi64(inside, _mm256_slli_epi64(inside, 32));
    const __m256i eights = _mm256_sub_epi64(_mm256_sad_epu8(begin_marks, none), _mm256_sad_epu8(codes, none));
    __m256i upto = _mm256_add_epi64(eights, _mm256_slli_si256(eights, 8));
    upto = _mm256_add_epi64(upto, _mm256_blend_epi32(none, _mm256_permute4x64_epi64(upto, 0x55), 0xf0));
    const __m256i left_before = _mm256_add_epi64(sums->rounds_left, _mm256_sub_epi64(upto, eights));
    const __m256i left_after = _mm256_add_epi64(inside, _mm256_shuffle_epi8(left_before, low_bytes));
    const __m256i complete = _mm256_cmpeq_epi8(_mm256_add_epi8(left_after, codes), begin_marks);
    sums->open = _mm256_or_si256(sums->open, _mm256_andnot_si256(complete, _mm256_cmpgt_epi8(begin_marks, none)));
    sums->negative = _mm256_or_si256(sums->negative, left_after);
    sums->rounds_left = _mm256_add_epi64(sums->rounds_left, _mm256_permute4x64_epi64(upto, 0xff));
}

SKL_INLINE void store_ids(int stream, uint32_t *to, __m256i ids)
{
    if (stream)
        _mm256_stream_si256((__m256i *)(void *)to, ids);
    else
        _mm256_storeu_si256((__m256i *)(void *)to, ids);
}

/* Whole steps of 32 records, as there. */
SKL_INLINE size_t unpack_steps(skl_record_format format, skl_scan *scan, const uint8_t *begin_marks,
                               const uint8_t *src, size_t n, uint32_t *token_ids, uint8_t *codes)
{
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i rotate = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    const __m256i id_mask = _mm256_set1_epi32((int)((UINT32_C(1) << format.id_bits) - 1));
    const __m256i none = _mm256_setzero_si256();
    __m256i ids_before = _mm256_set1_epi32((int)scan->last_id), largest = none, smallest = _mm256_set1_epi8(-1);
    __m256i reserved = none, last_marks = none, last_codes = none, unordered = none;
    count_sums sums = {_mm256_set1_epi64x((long long)scan->rounds_left), none, none};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        __m256i wide_codes[4], rising[4];
        for (size_t ahead = 0; ahead < (format.size + 1) / 2; ahead++)
            __builtin_prefetch(src + format.size * i + RECORDS_AHEAD + 64 * ahead);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            const uint8_t *const from = src + format.size * (i + 8 * j);
            const __m256i records =
                format.size == 3 ? widen_threes(from) : _mm256_loadu_si256((const __m256i *)(const void *)from);
            const __m256i ids = _mm256_and_si256(records, id_mask);
            const __m256i rotated = _mm256_permutevar8x32_epi32(ids, rotate); /* the last comes first */
            wide_codes[j] = _mm256_srli_epi32(format.size == 3 ? records : _mm256_slli_epi32(records, 1),
                                              format.size == 3 ? (int)format.id_bits : 25);
            rising[j] = _mm256_cmpgt_epi32(ids, _mm256_blend_epi32(rotated, ids_before, 1));
            ids_before = rotated;
            largest = _mm256_max_epu32(largest, ids);
            reserved = _mm256_or_si256(reserved, records);
            store_ids(format.stream, token_ids + i + 8 * j, ids);
        }
        const __m256i step_codes = _mm256_permutevar8x32_epi32(
            _mm256_packus_epi16(_mm256_packus_epi32(wide_codes[0], wide_codes[1]),
                                _mm256_packus_epi32(wide_codes[2], wide_codes[3])),
            in_order);
        const __m256i step_rising = _mm256_permutevar8x32_epi32(
            _mm256_packs_epi16(_mm256_packs_epi32(rising[0], rising[1]), _mm256_packs_epi32(rising[2], rising[3])),
            in_order);
        const __m256i step_marks = _mm256_loadu_si256((const __m256i *)(const void *)(begin_marks + i));
        _mm256_storeu_si256((__m256i *)(void *)(codes + i), step_codes);
        __m256i inside = _mm256_cmpeq_epi8(step_marks, none);
        if (format.counts) {
            check_counts(&sums, last_marks, last_codes);
            last_marks = step_marks;
            last_codes = step_codes;
            smallest = _mm256_min_epu8(smallest, step_codes);
        } else {
            inside = _mm256_and_si256(inside, _mm256_cmpeq_epi8(step_codes, none));
        }
        unordered = _mm256_or_si256(unordered, _mm256_andnot_si256(step_rising, inside));
    }
    check_counts(&sums, last_marks, last_codes);
    const __m256i last_id = _mm256_set1_epi32((int)(scan->vocab_size - 1));
    const __m256i wrong = _mm256_or_si256(_mm256_or_si256(unordered, sums.open), _mm256_cmpeq_epi8(smallest, none));
    scan->rounds_left = (uint64_t)_mm_cvtsi128_si64(_mm256_castsi256_si128(sums.rounds_left));
    scan->last_id = (uint32_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(ids_before));
    scan->reserved |= format.size == 4 && _mm256_movemask_ps(_mm256_castsi256_ps(reserved)) != 0;
    scan->bad |= _mm256_movemask_epi8(_mm256_or_si256(wrong, _mm256_cmpgt_epi32(largest, last_id))) != 0 ||
                 _mm256_movemask_epi8(sums.negative) != 0;
    return i;
}

SKL_INLINE size_t widen_steps(const uint8_t *src, size_t n, uint32_t *tokens)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_si256((__m256i *)(void *)(tokens + i), widen_threes(src + 3 * i));
    return i;
}

#endif
