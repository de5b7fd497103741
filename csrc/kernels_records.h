/* kernels_records.h: records and tokens to arrays, with the checks that look at every record.
 *
 * Included by kernels_portable.c, and so compiled for each instruction set; the plain loops are the truth, and finish
 * what the vectors leave.  Reads at most 64 bytes beyond the records or tokens, which SPEC.md section 5.1 grants. */
#ifndef SKL_KERNELS_RECORDS_H
#define SKL_KERNELS_RECORDS_H

#include "kernels.h"

#include <math.h>
#include <string.h>
#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#define SKL_VECTORS
#endif

#define SPECIALISED static inline __attribute__((always_inline))

/* Where a record has its id and code, and for what else one copy of the loop is made. */
typedef struct layout {
    uint32_t size, id_bits;
    int counts, stream;
} layout;

/* Far enough that records and numbers of records arrive from memory before their turn. */
#define RECORDS_AHEAD 8192
#define NUMBERS_AHEAD 512

/* ---- vectors ------------------------------------------------------------------------------------------------------
 *
 * How counts are checked: a position that starts has `rounds` left, each count takes its part away, and nothing is left
 * where the next one starts.  With byte i of a vector holding mark - code, what is left after record i is the sum of the
 * bytes up to i.  Eight at a time these sums are the bytes of one 64-bit product with 0x0101010101010101, exact as long
 * as each of them lies in 0..127; the first that does not shows in its own byte, since no byte below it has carried. */

#if defined(__AVX512BW__)

#define STEP 64u

/* 16 records of 3 bytes to integers. */
SPECIALISED __m512i widen_threes(const uint8_t *src)
{
    const __m512i spread = _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
    const __m512i bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(spread, _mm512_loadu_si512(src)), bytes);
}

typedef struct balance {
    __m512i left, negative; /* before the vector, in each 64 bits; bytes of all sums so far */
    __mmask64 open;         /* positions that started before the one before them was complete */
} balance;

SPECIALISED void check_counts(balance *at, __m512i marks, __m512i codes)
{
    const __m512i none = _mm512_setzero_si512();
    const __m512i low_bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8));
    const __m512i inside =
        _mm512_mullo_epi64(_mm512_sub_epi64(marks, codes), _mm512_set1_epi64(0x0101010101010101));
    const __m512i eights = _mm512_sub_epi64(_mm512_sad_epu8(marks, none), _mm512_sad_epu8(codes, none));
    __m512i upto = _mm512_add_epi64(eights, _mm512_alignr_epi64(eights, none, 7));
    upto = _mm512_add_epi64(upto, _mm512_alignr_epi64(upto, none, 6));
    upto = _mm512_add_epi64(upto, _mm512_alignr_epi64(upto, none, 4));
    const __m512i base = _mm512_add_epi64(at->left, _mm512_sub_epi64(upto, eights));
    const __m512i left = _mm512_add_epi64(inside, _mm512_shuffle_epi8(base, low_bytes));
    at->open |= _mm512_mask_cmpneq_epi8_mask(_mm512_test_epi8_mask(marks, marks), _mm512_add_epi8(left, codes), marks);
    at->negative = _mm512_or_si512(at->negative, left);
    at->left = _mm512_add_epi64(at->left, _mm512_permutexvar_epi64(_mm512_set1_epi64(7), upto));
}

/* Whole steps of 64 records; returns how many records are done.  The counts of a step are checked beside the unpacking
 * of the next one: a chain of sums by itself would leave the processor waiting. */
SPECIALISED size_t unpack_steps(layout of, skl_scan *scan, const uint8_t *marks, const uint8_t *src, size_t n,
                                uint32_t *token_ids, uint8_t *codes)
{
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i id_mask = _mm512_set1_epi32((int)((UINT32_C(1) << of.id_bits) - 1)), none = _mm512_setzero_si512();
    __m512i ids = _mm512_set1_epi32((int)scan->before), largest = none, smallest = _mm512_set1_epi8(-1);
    __m512i reserved = none, marks_before = none, codes_before = none;
    balance sums = {_mm512_set1_epi64((long long)scan->left), none, 0};
    __mmask64 unordered = 0;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        __m512i values[4];
        __mmask16 falls[4];
        for (size_t ahead = 0; ahead < of.size; ahead++)
            __builtin_prefetch(src + of.size * i + RECORDS_AHEAD + 64 * ahead);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            const uint8_t *const from = src + of.size * (i + 16 * j);
            const __m512i records = of.size == 3 ? widen_threes(from) : _mm512_loadu_si512(from);
            const __m512i before = ids;
            ids = _mm512_and_si512(records, id_mask);
            values[j] = _mm512_srli_epi32(of.size == 3 ? records : _mm512_slli_epi32(records, 1),
                                          of.size == 3 ? of.id_bits : 25);
            falls[j] = _mm512_cmple_epi32_mask(ids, _mm512_alignr_epi32(ids, before, 15));
            largest = _mm512_max_epu32(largest, ids);
            reserved = _mm512_or_si512(reserved, records);
            if (of.stream)
                _mm512_stream_si512((__m512i *)(void *)(token_ids + i + 16 * j), ids);
            else
                _mm512_storeu_si512(token_ids + i + 16 * j, ids);
        }
        const __m512i these = _mm512_permutexvar_epi32(
            in_order, _mm512_packus_epi16(_mm512_packus_epi32(values[0], values[1]),
                                          _mm512_packus_epi32(values[2], values[3])));
        const __m512i these_marks = _mm512_loadu_si512(marks + i);
        _mm512_storeu_si512(codes + i, these);
        __mmask64 inside = _mm512_testn_epi8_mask(these_marks, these_marks);
        if (of.counts) {
            check_counts(&sums, marks_before, codes_before);
            marks_before = these_marks;
            codes_before = these;
            smallest = _mm512_min_epu8(smallest, these);
        } else { /* ids need not rise where the weight falls */
            inside &= _mm512_testn_epi8_mask(these, these);
        }
        unordered |= inside & _mm512_kunpackd(_mm512_kunpackw(falls[3], falls[2]),
                                              _mm512_kunpackw(falls[1], falls[0]));
    }
    check_counts(&sums, marks_before, codes_before);
    scan->left = (uint64_t)_mm_cvtsi128_si64(_mm512_castsi512_si128(sums.left));
    scan->before = (uint32_t)_mm_extract_epi32(_mm512_extracti32x4_epi32(ids, 3), 3);
    scan->reserved |= of.size == 4 && _mm512_movepi32_mask(reserved) != 0;
    scan->bad |= unordered != 0 || sums.open != 0 || _mm512_movepi8_mask(sums.negative) != 0 ||
                 _mm512_testn_epi8_mask(smallest, smallest) != 0 ||
                 _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32((int)scan->vocab_size)) != 0;
    return i;
}

SPECIALISED size_t widen_steps(const uint8_t *src, size_t n, uint32_t *tokens)
{
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_si512(tokens + i, widen_threes(src + 3 * i));
    return i;
}

#elif defined(__AVX2__)

#define STEP 32u

/* 8 records of 3 bytes to integers. */
SPECIALISED __m256i widen_threes(const uint8_t *src)
{
    const __m256i bytes = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0, 1, 2, -1, 3, 4, 5,
                                           -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const __m128i low = _mm_loadu_si128((const __m128i *)(const void *)src);
    const __m128i high = _mm_loadu_si128((const __m128i *)(const void *)(src + 12));
    return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), bytes);
}

typedef struct balance {
    __m256i left, negative, open; /* as above */
} balance;

SPECIALISED void check_counts(balance *at, __m256i marks, __m256i codes)
{
    const __m256i none = _mm256_setzero_si256();
    const __m256i low_bytes = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0,
                                               8, 8, 8, 8, 8, 8, 8, 8);
    __m256i inside = _mm256_sub_epi64(marks, codes); /* times 0x0101010101010101 */
    inside = _mm256_add_epi64(inside, _mm256_slli_epi64(inside, 8));
    inside = _mm256_add_epi64(inside, _mm256_slli_epi64(inside, 16));
    inside = _mm256_add_epi64(inside, _mm256_slli_epi64(inside, 32));
    const __m256i eights = _mm256_sub_epi64(_mm256_sad_epu8(marks, none), _mm256_sad_epu8(codes, none));
    __m256i upto = _mm256_add_epi64(eights, _mm256_slli_si256(eights, 8));
    upto = _mm256_add_epi64(upto, _mm256_blend_epi32(none, _mm256_permute4x64_epi64(upto, 0x55), 0xf0));
    const __m256i base = _mm256_add_epi64(at->left, _mm256_sub_epi64(upto, eights));
    const __m256i left = _mm256_add_epi64(inside, _mm256_shuffle_epi8(base, low_bytes));
    const __m256i complete = _mm256_cmpeq_epi8(_mm256_add_epi8(left, codes), marks);
    at->open = _mm256_or_si256(at->open, _mm256_andnot_si256(complete, _mm256_cmpgt_epi8(marks, none)));
    at->negative = _mm256_or_si256(at->negative, left);
    at->left = _mm256_add_epi64(at->left, _mm256_permute4x64_epi64(upto, 0xff));
}

/* Whole steps of 32 records, as above. */
SPECIALISED size_t unpack_steps(layout of, skl_scan *scan, const uint8_t *marks, const uint8_t *src, size_t n,
                                uint32_t *token_ids, uint8_t *codes)
{
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i rotate = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    const __m256i id_mask = _mm256_set1_epi32((int)((UINT32_C(1) << of.id_bits) - 1)), none = _mm256_setzero_si256();
    __m256i before = _mm256_set1_epi32((int)scan->before), largest = none, smallest = _mm256_set1_epi8(-1);
    __m256i reserved = none, marks_before = none, codes_before = none, unordered = none;
    balance sums = {_mm256_set1_epi64x((long long)scan->left), none, none};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        __m256i values[4], falls[4];
        for (size_t ahead = 0; ahead < (of.size + 1) / 2; ahead++)
            __builtin_prefetch(src + of.size * i + RECORDS_AHEAD + 64 * ahead);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            const uint8_t *const from = src + of.size * (i + 8 * j);
            const __m256i records =
                of.size == 3 ? widen_threes(from) : _mm256_loadu_si256((const __m256i *)(const void *)from);
            const __m256i ids = _mm256_and_si256(records, id_mask);
            const __m256i rotated = _mm256_permutevar8x32_epi32(ids, rotate);
            values[j] = _mm256_srli_epi32(of.size == 3 ? records : _mm256_slli_epi32(records, 1),
                                          of.size == 3 ? (int)of.id_bits : 25);
            falls[j] = _mm256_cmpgt_epi32(ids, _mm256_blend_epi32(rotated, before, 1)); /* rises, in fact */
            before = rotated;
            largest = _mm256_max_epu32(largest, ids);
            reserved = _mm256_or_si256(reserved, records);
            if (of.stream)
                _mm256_stream_si256((__m256i *)(void *)(token_ids + i + 8 * j), ids);
            else
                _mm256_storeu_si256((__m256i *)(void *)(token_ids + i + 8 * j), ids);
        }
        const __m256i these = _mm256_permutevar8x32_epi32(
            _mm256_packus_epi16(_mm256_packus_epi32(values[0], values[1]), _mm256_packus_epi32(values[2], values[3])),
            in_order);
        const __m256i rises = _mm256_permutevar8x32_epi32(
            _mm256_packs_epi16(_mm256_packs_epi32(falls[0], falls[1]), _mm256_packs_epi32(falls[2], falls[3])),
            in_order);
        const __m256i these_marks = _mm256_loadu_si256((const __m256i *)(const void *)(marks + i));
        _mm256_storeu_si256((__m256i *)(void *)(codes + i), these);
        __m256i inside = _mm256_cmpeq_epi8(these_marks, none);
        if (of.counts) {
            check_counts(&sums, marks_before, codes_before);
            marks_before = these_marks;
            codes_before = these;
            smallest = _mm256_min_epu8(smallest, these);
        } else {
            inside = _mm256_and_si256(inside, _mm256_cmpeq_epi8(these, none));
        }
        unordered = _mm256_or_si256(unordered, _mm256_andnot_si256(rises, inside));
    }
    check_counts(&sums, marks_before, codes_before);
    const __m256i last_id = _mm256_set1_epi32((int)(scan->vocab_size - 1));
    const __m256i wrong = _mm256_or_si256(_mm256_or_si256(unordered, sums.open), _mm256_cmpeq_epi8(smallest, none));
    scan->left = (uint64_t)_mm_cvtsi128_si64(_mm256_castsi256_si128(sums.left));
    scan->before = (uint32_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(before)); /* rotated: the last comes first */
    scan->reserved |= of.size == 4 && _mm256_movemask_ps(_mm256_castsi256_ps(reserved)) != 0;
    scan->bad |= _mm256_movemask_epi8(_mm256_or_si256(wrong, _mm256_cmpgt_epi32(largest, last_id))) != 0 ||
                 _mm256_movemask_epi8(sums.negative) != 0;
    return i;
}

SPECIALISED size_t widen_steps(const uint8_t *src, size_t n, uint32_t *tokens)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_si256((__m256i *)(void *)(tokens + i), widen_threes(src + 3 * i));
    return i;
}

#endif

/* ---- the truth ---------------------------------------------------------------------------------------------------- */

SPECIALISED void unpack_as(layout of, skl_scan *scan, const uint8_t *marks, const uint8_t *src, size_t n,
                           uint32_t *token_ids, uint8_t *codes)
{
    size_t i = 0;
#ifdef SKL_VECTORS
    i = unpack_steps(of, scan, marks, src, n, token_ids, codes);
#endif
    skl_scan seen = *scan; /* of its own, so that what is stored cannot change it */
    for (; i < n; i++) {
        const uint8_t *from = src + of.size * i;
        const uint32_t record = (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 |
                                (of.size == 4 ? (uint32_t)from[3] << 24 : 0);
        const uint32_t id = record & ((UINT32_C(1) << of.id_bits) - 1);
        const uint32_t code = record >> of.id_bits & 127;
        seen.reserved |= of.size == 4 && record >> 31;
        seen.bad |= (uint32_t)(id >= seen.vocab_size) |
                    ((uint32_t)(marks[i] == 0) & (uint32_t)(id <= seen.before) & (uint32_t)(of.counts || code == 0));
        if (of.counts) {
            seen.bad |= (uint32_t)(marks[i] != 0) & (uint32_t)(seen.left != 0);
            seen.left = marks[i] != 0 ? marks[i] : seen.left;
            seen.bad |= (uint32_t)(code == 0) | (uint32_t)(code > seen.left);
            seen.left -= code;
        }
        seen.before = token_ids[i] = id;
        codes[i] = (uint8_t)code;
    }
    *scan = seen;
}

static void unpack(skl_scan *scan, const uint8_t *marks, const uint8_t *src, size_t n, uint32_t *token_ids,
                   uint8_t *codes)
{
    /* One copy of the loop for each profile, kind and way to store. */
#define UNPACK(size, id_bits, counts)                                                                                 \
    (scan->stream ? unpack_as((layout){size, id_bits, counts, 1}, scan, marks, src, n, token_ids, codes)              \
                  : unpack_as((layout){size, id_bits, counts, 0}, scan, marks, src, n, token_ids, codes))
    if (scan->profile == SKL_PROFILE_R24W)
        UNPACK(3, 18, 1);
    else if (scan->profile == SKL_PROFILE_R24 && scan->counts)
        UNPACK(3, 17, 1);
    else if (scan->profile == SKL_PROFILE_R24)
        UNPACK(3, 17, 0);
    else if (scan->counts)
        UNPACK(4, 24, 1);
    else
        UNPACK(4, 24, 0);
#undef UNPACK
}

SPECIALISED void mark_as(uint32_t size, int stream, skl_starts *at, uint64_t first, size_t n, uint8_t *marks)
{
    const uint8_t *const numbers = at->numbers;
    const int64_t base = at->base + (int64_t)first;
    uint64_t place = at->place - first;
    uint32_t t = at->position;
    for (size_t ahead = 0; ahead < NUMBERS_AHEAD; ahead += 64)
        __builtin_prefetch(numbers + (size_t)size * t + NUMBERS_AHEAD + ahead);
    while (place < n && t < at->num_positions) {
        const uint8_t *const number = numbers + (size_t)size * t;
        marks[place] = at->mark;
        place += size == 1 ? number[0] : (uint32_t)number[0] | (uint32_t)number[1] << 8;
        t++;
#ifdef SKL_VECTORS
        if (stream) {
            _mm_stream_si64((long long *)(void *)(at->offsets + t), base + (int64_t)place);
            continue;
        }
#endif
        at->offsets[t] = base + (int64_t)place;
    }
    (void)stream;
    at->place = place + first;
    at->position = t;
}

static void mark_starts(skl_starts *at, uint64_t first, size_t n, uint8_t *marks)
{
    memset(marks, 0, n);
    if (at->record_count_size == 2)
        mark_as(2, 0, at, first, n, marks);
    else if (at->stream)
        mark_as(1, 1, at, first, n, marks);
    else
        mark_as(1, 0, at, first, n, marks);
}

/* Streamed stores become visible in the order of the program. */
static void settle(void)
{
#ifdef SKL_VECTORS
    _mm_sfence();
#endif
}

/* ---- tokens and probabilities ------------------------------------------------------------------------------------------ */

/* Token i of a column of tokens of 2, 3 or 4 bytes; 3 are read as 4, of which the zero bytes after every payload make
 * the last one readable. */
SPECIALISED uint32_t load_token(const uint8_t *src, uint32_t size, uint64_t i)
{
    const uint8_t *at = src + i * size;
    uint32_t token = (uint32_t)at[0] | (uint32_t)at[1] << 8;
    if (size > 2)
        token |= (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
    return size == 3 ? token & 0xffffff : token;
}

static void widen_tokens(uint32_t size, const uint8_t *src, size_t n, uint32_t *restrict tokens)
{
    size_t i = 0;
    if (size == 2)
        for (; i < n; i++) {
            uint16_t token;
            memcpy(&token, src + 2 * i, sizeof token);
            tokens[i] = SKL_LITTLE_ENDIAN ? token : __builtin_bswap16(token);
        }
#ifdef SKL_VECTORS
    if (size == 3)
        i = widen_steps(src, n, tokens);
#endif
    for (; i < n; i++)
        tokens[i] = load_token(src, size, i);
}

/* n >= 2 tokens to the n - 1 inputs and labels; returns the largest. */
static uint32_t split_tokens(const uint32_t *restrict tokens, size_t n, int64_t *restrict input_ids,
                             int64_t *restrict labels)
{
    uint32_t largest = tokens[0];
    for (size_t i = 0; i < n - 1; i++) {
        input_ids[i] = tokens[i];
        labels[i] = tokens[i + 1];
        largest = tokens[i + 1] > largest ? tokens[i + 1] : largest;
    }
    return largest;
}

static void divide(const uint8_t *restrict codes, size_t n, uint32_t rounds, float *restrict quotients)
{
    const float by = (float)rounds;
#ifdef __FMA__
    /* What a division would round to, at a fraction of its time: one correction suffices for integers below 128. */
    const float inverse = 1.0f / by;
    for (size_t i = 0; i < n; i++) {
        const float code = (float)codes[i], near = code * inverse;
        quotients[i] = fmaf(fmaf(-near, by, code), inverse, near);
    }
#else
    for (size_t i = 0; i < n; i++)
        quotients[i] = (float)codes[i] / by;
#endif
}

#undef SPECIALISED

#endif
