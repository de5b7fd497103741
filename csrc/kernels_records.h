/* kernels_records.h: records and tokens to arrays, with the checks that look at every record.
 *
 * Included by kernels_table.h, which says what steps are.  The plain loops are the truth.  Reads at most 64 bytes
 * beyond the records or tokens, which SPEC.md section 5.1 grants. */
#ifndef SKL_KERNELS_RECORDS_H
#define SKL_KERNELS_RECORDS_H

#include "kernels.h"

#include <string.h>

/* Far enough that numbers of records arrive from memory before their turn. */
#define NUMBERS_AHEAD 512

/* ---- records ----------------------------------------------------------------------------------------------- */

SKL_INLINE void unpack_as(skl_record_format format, skl_scan *scan, const uint8_t *begin_marks, const uint8_t *src,
                          size_t n, uint32_t *token_ids, uint8_t *codes)
{
    size_t i = unpack_steps(format, scan, begin_marks, src, n, token_ids, codes);
    skl_scan seen = *scan; /* of its own, so that what is stored cannot change it */
    for (; i < n; i++) {
        const uint8_t *const from = src + format.size * i;
        const uint32_t record = (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 |
                                (format.size == 4 ? (uint32_t)from[3] << 24 : 0);
        const uint32_t id = record & ((UINT32_C(1) << format.id_bits) - 1);
        const uint32_t code = record >> format.id_bits & 127;
        seen.reserved |= format.size == 4 && record >> 31;
        seen.bad |= (uint32_t)(id >= seen.vocab_size) |
                    ((uint32_t)(begin_marks[i] == 0) & (uint32_t)(id <= seen.last_id) &
                     (uint32_t)(format.counts || code == 0));
        if (format.counts) {
            seen.bad |= (uint32_t)(begin_marks[i] != 0) & (uint32_t)(seen.rounds_left != 0);
            seen.rounds_left = begin_marks[i] != 0 ? begin_marks[i] : seen.rounds_left;
            seen.bad |= (uint32_t)(code == 0) | (uint32_t)(code > seen.rounds_left);
            seen.rounds_left -= code;
        }
        seen.last_id = token_ids[i] = id;
        codes[i] = (uint8_t)code;
    }
    *scan = seen;
}

/* One copy of the loop for each profile, kind and way to store. */
#define UNPACK(size, id_bits, counts)                                                                                 \
    (scan->stream                                                                                                     \
         ? unpack_as((skl_record_format){size, id_bits, counts, 1}, scan, begin_marks, src, n, token_ids, codes)      \
         : unpack_as((skl_record_format){size, id_bits, counts, 0}, scan, begin_marks, src, n, token_ids, codes))

static void unpack(skl_scan *scan, const uint8_t *begin_marks, const uint8_t *src, size_t n, uint32_t *token_ids,
                   uint8_t *codes)
{
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
}
#undef UNPACK

SKL_INLINE void mark_as(uint32_t size, int stream, skl_position_walk *walk, uint64_t first, size_t n,
                        uint8_t *begin_marks)
{
    const uint8_t *const numbers = walk->numbers;
    const int64_t base = walk->base + (int64_t)first;
    uint64_t begin = walk->next_begin - first;
    uint32_t t = walk->position;
    for (size_t ahead = 0; ahead < NUMBERS_AHEAD; ahead += 64)
        __builtin_prefetch(numbers + (size_t)size * t + NUMBERS_AHEAD + ahead);
    while (begin < n && t < walk->num_positions) {
        const uint8_t *const number = numbers + (size_t)size * t;
        begin_marks[begin] = walk->begin_mark;
        begin += size == 1 ? number[0] : (uint32_t)number[0] | (uint32_t)number[1] << 8;
        t++;
        if (stream)
            stream_offset(walk->offsets + t, base + (int64_t)begin);
        else
            walk->offsets[t] = base + (int64_t)begin;
    }
    walk->next_begin = begin + first;
    walk->position = t;
}

static void mark_begins(skl_position_walk *walk, uint64_t first, size_t n, uint8_t *begin_marks)
{
    memset(begin_marks, 0, n);
    if (walk->record_count_size == 2)
        mark_as(2, 0, walk, first, n, begin_marks);
    else if (walk->stream)
        mark_as(1, 1, walk, first, n, begin_marks);
    else
        mark_as(1, 0, walk, first, n, begin_marks);
}

/* ---- tokens ------------------------------------------------------------------------------------------------ */

/* Token i of a column of tokens of 2, 3 or 4 bytes; 3 are read as 4, of which the zero bytes after every payload make
 * the last one readable. */
SKL_INLINE uint32_t load_token(const uint8_t *src, uint32_t size, uint64_t i)
{
    const uint8_t *const bytes = src + i * size;
    uint32_t token = (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8;
    if (size > 2)
        token |= (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
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
    if (size == 3)
        i = widen_steps(src, n, tokens);
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

#endif
