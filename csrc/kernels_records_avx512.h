/* kernels_records_avx512.h: records 16 and 64 at a time; kernels_table.h says what steps are. */
#ifndef SKL_KERNELS_RECORDS_AVX512_H
#define SKL_KERNELS_RECORDS_AVX512_H

#include "kernels_x86.h"

/* 16 records at a time. */
SKL_INLINE size_t pack_steps(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                             const uint8_t *codes, size_t n, uint8_t *dst, skl_pack_seen *seen)
{
    const __m512i bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m512i gather = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
    const __m512i last_id = _mm512_set1_epi32((int)(vocab_size - 1));
    __m512i ids_before = _mm512_setzero_si512();
    __mmask16 large_ids = 0, zero_codes = 0;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512i ids = _mm512_loadu_si512(token_ids + i);
        const __m512i wide_codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(codes + i)));
        const __m512i records = _mm512_or_si512(ids, _mm512_slli_epi32(wide_codes, id_bits));
        const uint32_t not_rising = _mm512_cmple_epu32_mask(ids, _mm512_alignr_epi32(ids, ids_before, 15));
        seen->ids_not_rising += (uint64_t)__builtin_popcount(i == 0 ? not_rising & ~UINT32_C(1) : not_rising);
        large_ids = (__mmask16)(large_ids | _mm512_cmpgt_epu32_mask(ids, last_id));
        zero_codes = (__mmask16)(zero_codes | _mm512_testn_epi32_mask(wide_codes, wide_codes));
        ids_before = ids;
        if (size == 4)
            _mm512_storeu_si512(dst + 4 * i, records);
        else
            _mm512_mask_storeu_epi32(dst + 3 * i, 0x0fff,
                                     _mm512_permutexvar_epi32(gather, _mm512_shuffle_epi8(records, bytes)));
    }
    seen->large_id |= large_ids != 0;
    seen->zero_code |= zero_codes != 0;
    return i;
}

/* Sum of bytes, 32 at a time: few positions have more records.  A masked load touches nothing beyond n. */
SKL_INLINE size_t sum_steps(const uint8_t *bytes, size_t n, uint32_t *sum)
{
    const size_t all = n;
    for (; n > 0; bytes += 32) {
        const size_t some = n < 32 ? n : 32;
        const __m256i part = _mm256_maskz_loadu_epi8(UINT32_MAX >> (32 - some), bytes);
        const __m256i quarters = _mm256_sad_epu8(part, _mm256_setzero_si256());
        const __m128i halves =
            _mm_add_epi64(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256(quarters, 1));
        *sum += (uint32_t)(_mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1));
        n -= some;
    }
    return all;
}

#define STEP 64u

/* 16 records of 3 bytes to integers. */
SKL_INLINE __m512i widen_threes(const uint8_t *src)
{
    const __m512i spread = _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
    const __m512i bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(spread, _mm512_loadu_si512(src)), bytes);
}

/* What kernels_x86.h tells of: the rounds that the open position has left before the next records. */
typedef struct count_sums {
    __m512i rounds_left; /* in each 64 bits */
    __m512i negative;    /* bytes of all that was left so far, ored: a set sign shows one that did not lie in 0..127 */
    __mmask64 open;      /* positions that began before the one before them was complete */
} count_sums;

SKL_INLINE void check_counts(count_sums *sums, __m512i begin_marks, __m512i codes)
{
    const __m512i none = _mm512_setzero_si512();
    const __m512i low_bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8));
    const __m512i inside =
        _mm512_mullo_epi64(_mm512_sub_epi64(begin_marks, codes), _mm512_set1_epi64(0x0101010101010101));
    const __m512i eights = _mm512_sub_epi64(_mm512_sad_epu8(begin_marks, none), _mm512_sad_epu8(codes, none));
    __m512i upto = _mm512_add_epi64(eights, _mm512_alignr_epi64(eights, none, 7));
    upto = _mm512_add_epi64(upto, _mm512_alignr_epi64(upto, none, 6));
    upto = _mm512_add_epi64(upto, _mm512_alignr_epi64(upto, none, 4));
    const __m512i left_before = _mm512_add_epi64(sums->rounds_left, _mm512_sub_epi64(upto, eights));
    const __m512i left_after = _mm512_add_epi64(inside, _mm512_shuffle_epi8(left_before, low_bytes));
    const __mmask64 begins = _mm512_test_epi8_mask(begin_marks, begin_marks);
    sums->open |= _mm512_mask_cmpneq_epi8_mask(begins, _mm512_add_epi8(left_after, codes), begin_marks);
    sums->negative = _mm512_or_si512(sums->negative, left_after);
    sums->rounds_left = _mm512_add_epi64(sums->rounds_left, _mm512_permutexvar_epi64(_mm512_set1_epi64(7), upto));
}

SKL_INLINE void store_ids(int stream, uint32_t *to, __m512i ids)
{
    if (stream)
        _mm512_stream_si512((__m512i *)(void *)to, ids);
    else
        _mm512_storeu_si512(to, ids);
}

/* Whole steps of 64 records.  The counts of a step are checked beside the unpacking of the next one: a chain of sums by
 * itself would leave the processor waiting. */
SKL_INLINE size_t unpack_steps(skl_record_format format, skl_scan *scan, const uint8_t *begin_marks,
                               const uint8_t *src, size_t n, uint32_t *token_ids, uint8_t *codes)
{
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i id_mask = _mm512_set1_epi32((int)((UINT32_C(1) << format.id_bits) - 1));
    const __m512i none = _mm512_setzero_si512();
    __m512i ids = _mm512_set1_epi32((int)scan->last_id), largest = none, smallest = _mm512_set1_epi8(-1);
    __m512i reserved = none, last_marks = none, last_codes = none;
    count_sums sums = {_mm512_set1_epi64((long long)scan->rounds_left), none, 0};
    __mmask64 unordered = 0;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        __m512i wide_codes[4];
        __mmask16 not_rising[4];
        for (size_t ahead = 0; ahead < format.size; ahead++)
            __builtin_prefetch(src + format.size * i + RECORDS_AHEAD + 64 * ahead);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            const uint8_t *const from = src + format.size * (i + 16 * j);
            const __m512i records = format.size == 3 ? widen_threes(from) : _mm512_loadu_si512(from);
            const __m512i ids_before = ids;
            ids = _mm512_and_si512(records, id_mask);
            wide_codes[j] = _mm512_srli_epi32(format.size == 3 ? records : _mm512_slli_epi32(records, 1),
                                              format.size == 3 ? format.id_bits : 25);
            not_rising[j] = _mm512_cmple_epi32_mask(ids, _mm512_alignr_epi32(ids, ids_before, 15));
            largest = _mm512_max_epu32(largest, ids);
            reserved = _mm512_or_si512(reserved, records);
            store_ids(format.stream, token_ids + i + 16 * j, ids);
        }
        const __m512i step_codes = _mm512_permutexvar_epi32(
            in_order, _mm512_packus_epi16(_mm512_packus_epi32(wide_codes[0], wide_codes[1]),
                                          _mm512_packus_epi32(wide_codes[2], wide_codes[3])));
        const __m512i step_marks = _mm512_loadu_si512(begin_marks + i);
        _mm512_storeu_si512(codes + i, step_codes);
        __mmask64 inside = _mm512_testn_epi8_mask(step_marks, step_marks);
        if (format.counts) {
            check_counts(&sums, last_marks, last_codes);
            last_marks = step_marks;
            last_codes = step_codes;
            smallest = _mm512_min_epu8(smallest, step_codes);
        } else { /* ids need not rise where the weight falls */
            inside &= _mm512_testn_epi8_mask(step_codes, step_codes);
        }
        unordered |= inside & _mm512_kunpackd(_mm512_kunpackw(not_rising[3], not_rising[2]),
                                              _mm512_kunpackw(not_rising[1], not_rising[0]));
    }
    check_counts(&sums, last_marks, last_codes);
    scan->rounds_left = (uint64_t)_mm_cvtsi128_si64(_mm512_castsi512_si128(sums.rounds_left));
    scan->last_id = (uint32_t)_mm_extract_epi32(_mm512_extracti32x4_epi32(ids, 3), 3);
    scan->reserved |= format.size == 4 && _mm512_movepi32_mask(reserved) != 0;
    scan->bad |= unordered != 0 || sums.open != 0 || _mm512_movepi8_mask(sums.negative) != 0 ||
                 _mm512_testn_epi8_mask(smallest, smallest) != 0 ||
                 _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32((int)scan->vocab_size)) != 0;
    return i;
}

SKL_INLINE size_t widen_steps(const uint8_t *src, size_t n, uint32_t *tokens)
{
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_si512(tokens + i, widen_threes(src + 3 * i));
    return i;
}

#endif
