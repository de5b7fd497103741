/* codec.c: one sequence's records, tokens and columns to bytes and back.  SPEC.md sections 4 and 5.
 *
 * Both directions run the same check of the records, so that nothing can be written which a reader refuses. */
#include "codec.h"

#include "faults.h"
#include "kernels.h"
#include "ratios.h"

#include <string.h>

/* ---- little-endian bytes ----------------------------------------------------------------------------------- */

static inline uint32_t load_bytes(const uint8_t *src, uint32_t size)
{
    uint32_t value = 0;
    for (uint32_t i = 0; i < size; i++)
        value |= (uint32_t)src[i] << (8 * i);
    return value;
}

static inline void store_bytes(uint8_t *dst, uint32_t value, uint32_t size)
{
    for (uint32_t i = 0; i < size; i++)
        dst[i] = (uint8_t)(value >> (8 * i));
}

/* ---- shape: where the columns lie -------------------------------------------------------------------------- */

static inline uint32_t id_bits(const skl_shape *shape)
{
    return shape->profile == SKL_PROFILE_R24 ? 17 : shape->profile == SKL_PROFILE_R24W ? 18 : 24;
}

static inline uint32_t record_size(const skl_shape *shape)
{
    return shape->profile == SKL_PROFILE_R32 ? 4 : 3;
}

static inline uint32_t max_code(const skl_shape *shape)
{
    return shape->profile == SKL_PROFILE_R24W ? 63 : 127;
}

static int known_shape(const skl_shape *shape)
{
    const int counts = shape->kind == SKL_KIND_COUNTS;
    return (counts || shape->kind == SKL_KIND_RATIOS) && shape->profile >= SKL_PROFILE_R24 &&
           shape->profile <= SKL_PROFILE_R32 && (counts || shape->profile != SKL_PROFILE_R24W) &&
           (shape->record_count_size == 1 || shape->record_count_size == 2) &&
           (shape->token_size == 0 || (shape->token_size >= 2 && shape->token_size <= 4)) &&
           shape->columns < 2 * SKL_COLUMN_RECORD_LOGPROB && shape->vocab_size >= 1 &&
           shape->vocab_size <= UINT32_C(1) << id_bits(shape) &&
           (shape->token_size != 2 || shape->vocab_size <= UINT32_C(1) << 16) &&
           (!counts || (shape->rounds >= 1 && shape->rounds <= max_code(shape))) &&
           shape->num_records <= (uint64_t)shape->num_positions * 65535;
}

typedef struct payload_layout {
    uint64_t records, tokens, columns, end; /* byte offsets in the payload; the numbers of records lie at 0 */
} payload_layout;

/* Bytes of the optional columns. */
static uint64_t columns_size(const skl_shape *shape)
{
    const uint64_t positions = shape->num_positions;
    uint64_t size = 0;
    size += shape->columns & SKL_COLUMN_LABEL_LOGPROB ? 2 * positions : 0;
    size += shape->columns & SKL_COLUMN_ENTROPY ? 2 * positions : 0;
    size += shape->columns & SKL_COLUMN_DOCUMENT_START ? (positions + 8) / 8 : 0;
    size += shape->columns & SKL_COLUMN_RECORD_LOGPROB ? 2 * shape->num_records : 0;
    return size;
}

/* No overflow: every term is below 2^50. */
static payload_layout layout_of(const skl_shape *shape)
{
    const uint64_t positions = shape->num_positions;
    payload_layout layout;
    layout.records = positions * shape->record_count_size;
    layout.tokens = layout.records + shape->num_records * record_size(shape);
    layout.columns = layout.tokens + (positions + 1) * shape->token_size;
    layout.end = layout.columns + columns_size(shape);
    return layout;
}

skl_status skl_payload_size(const skl_shape *shape, uint64_t *size)
{
    if (!known_shape(shape))
        return SKL_ERR_ARG;
    *size = layout_of(shape).end;
    return SKL_OK;
}

/* ---- what a reader may trust -------------------------------------------------------------------------------- */

/* The first fault of one position, which has n >= 1 records; SKL_OK if it has none. */
static skl_status check_position(const skl_shape *shape, const uint32_t *token_ids, const uint8_t *codes, uint64_t n,
                                 uint64_t position, skl_status status, skl_fault *fault)
{
    uint32_t v = SKL_RATIO_ONE;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        const int counts = shape->kind == SKL_KIND_COUNTS;
        if (token_ids[i] >= shape->vocab_size)
            return skl_fail(status, fault, SKL_REASON_ID_RANGE, position, token_ids[i]);
        if (i > 0 && token_ids[i] <= token_ids[i - 1] && (counts || codes[i] == 0))
            return skl_fail(status, fault, SKL_REASON_ID_ORDER, position, token_ids[i]);
        if (counts && (codes[i] == 0 || codes[i] > shape->rounds))
            return skl_fail(status, fault, SKL_REASON_COUNT_RANGE, position, codes[i]);
        if (!counts && (codes[i] > 127 || (v = skl_ratio_step(v, codes[i])) == 0))
            return skl_fail(status, fault, SKL_REASON_RATIO_ZERO, position, codes[i]);
        sum += codes[i];
    }
    if (shape->kind == SKL_KIND_COUNTS && sum != shape->rounds)
        return skl_fail(status, fault, SKL_REASON_COUNT_SUM, position, sum);
    return SKL_OK;
}

/* Whether any position breaks a rule of kind counts, from what one pass over the records saw.
 *
 * The pass counts the ids that do not rise over the whole column; at the starts of positions they may.  The two numbers
 * differ iff one does not rise inside a position. */
static int counts_are_bad(const skl_shape *shape, const int64_t *offsets, const uint32_t *token_ids,
                          const uint8_t *codes, const skl_pack_seen *seen)
{
    uint64_t not_rising = seen->ids_not_rising;
    for (uint32_t t = 0; t < shape->num_positions; t++) {
        const int64_t begin = offsets[t];
        not_rising -= begin > offsets[0] && begin < offsets[t + 1] && token_ids[begin] <= token_ids[begin - 1];
    }
    return not_rising != 0 || seen->large_id || seen->zero_code ||
           skl_current_kernels()->sums_differ(offsets, shape->num_positions, codes, shape->rounds);
}

/* Whether any position breaks a rule of kind ratios; the pass over the records saw the ids. */
static int ratios_are_bad(const skl_shape *shape, const int64_t *offsets, const uint32_t *token_ids,
                          const uint8_t *codes, const skl_pack_seen *seen)
{
    uint32_t bad = seen->large_id;
    for (uint32_t t = 0; t < shape->num_positions; t++) {
        uint32_t v = SKL_RATIO_ONE, last_id = 0;
        for (int64_t i = offsets[t]; i < offsets[t + 1]; i++) {
            const uint32_t same_weight = codes[i] == 0 && i > offsets[t];
            bad |= (codes[i] > 127) | (same_weight & (token_ids[i] <= last_id));
            last_id = token_ids[i];
            v = skl_ratio_step(v, codes[i]); /* once 0, always 0 */
        }
        bad |= v == 0;
    }
    return bad != 0;
}

static skl_status check_records(const skl_shape *shape, const int64_t *offsets, const uint32_t *token_ids,
                                const uint8_t *codes, skl_status status, skl_fault *fault)
{
    for (uint32_t t = 0; t < shape->num_positions; t++) {
        const int64_t begin = offsets[t];
        const uint64_t n = (uint64_t)(offsets[t + 1] - begin);
        if (n > 0)
            SKL_TRY(check_position(shape, token_ids + begin, codes + begin, n, t, status, fault));
    }
    return SKL_OK;
}

static skl_status check_tokens(const skl_shape *shape, const uint32_t *tokens, skl_status status, skl_fault *fault)
{
    for (uint64_t i = 0; i <= shape->num_positions; i++)
        if (tokens[i] >= shape->vocab_size)
            return skl_fail(status, fault, SKL_REASON_TOKEN_RANGE, i, tokens[i]);
    return SKL_OK;
}

/* ---- encode ------------------------------------------------------------------------------------------------- */

skl_status skl_encode(const skl_shape *shape, const int64_t *offsets, const uint32_t *token_ids,
                      const uint8_t *codes, const uint32_t *tokens, const uint8_t *columns, uint8_t *dst,
                      size_t dst_cap, size_t *written, skl_fault *fault)
{
    if (!known_shape(shape) || (tokens == NULL) != (shape->token_size == 0) ||
        (columns == NULL) != (shape->columns == 0))
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 0);
    const payload_layout layout = layout_of(shape);
    if (layout.end > dst_cap)
        return SKL_ERR_DST_SMALL;
    SKL_TRY(skl_check_offsets(shape->num_positions, offsets, shape->num_records, fault));
    skl_pack_seen seen;
    skl_current_kernels()->pack(shape->profile, shape->vocab_size, token_ids, codes, (size_t)shape->num_records,
                                dst + layout.records, &seen);
    if ((shape->kind == SKL_KIND_COUNTS ? counts_are_bad : ratios_are_bad)(shape, offsets, token_ids, codes, &seen))
        SKL_TRY(check_records(shape, offsets, token_ids, codes, SKL_ERR_ARG, fault));
    if (shape->token_size != 0)
        SKL_TRY(check_tokens(shape, tokens, SKL_ERR_ARG, fault));

    const uint32_t most = shape->record_count_size == 1 ? 255 : 65535;
    for (uint32_t t = 0; t < shape->num_positions; t++) {
        const uint64_t n = (uint64_t)(offsets[t + 1] - offsets[t]);
        if (n > most)
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_NUM_RECORDS, t, n);
        store_bytes(dst + (size_t)t * shape->record_count_size, (uint32_t)n, shape->record_count_size);
    }
    if (shape->token_size != 0)
        for (uint64_t i = 0; i <= shape->num_positions; i++)
            store_bytes(dst + layout.tokens + i * shape->token_size, tokens[i], shape->token_size);
    for (uint64_t i = layout.columns; i < layout.end; i++)
        dst[i] = columns[i - layout.columns];
    *written = (size_t)layout.end;
    return SKL_OK;
}

/* ---- decode ------------------------------------------------------------------------------------------------- */

#define WINDOW 8192u                 /* records unpacked at a time; their marks stay in the first-level cache */
#define STREAMED (UINT64_C(1) << 24) /* bytes of results from which on they would push all else out of the caches */

/* Which record has the reserved bit; the last, should the bytes have changed since it was seen. */
static skl_status fail_reserved(const skl_shape *shape, const int64_t *offsets, const uint8_t *records,
                                skl_fault *fault)
{
    uint64_t i = 0;
    uint32_t position = 0;
    while (i + 1 < shape->num_records && records[4 * i + 3] < 128)
        i++;
    while (position + 1 < shape->num_positions && offsets[position + 1] - offsets[0] <= (int64_t)i)
        position++;
    return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_RESERVED, position, i);
}

static skl_status check_padding(const uint8_t *src, size_t begin, size_t end, uint32_t num_positions, skl_fault *fault)
{
    uint8_t any = 0;
    for (size_t i = begin; i < end; i++)
        any |= src[i];
    if (any == 0)
        return SKL_OK;
    while (begin + 1 < end && src[begin] == 0)
        begin++;
    return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_PADDING, num_positions, begin);
}

/* Unpack the records, a window at a time, and count through the positions; *walk and *scan then hold what was seen. */
static void unpack_records(const skl_shape *shape, const uint8_t *records, const skl_record_arrays *arrays,
                           skl_position_walk *walk, skl_scan *scan)
{
    const skl_kernels *const kernels = skl_current_kernels();
    uint32_t *const token_ids = arrays->token_ids + arrays->base;
    uint8_t *const codes = arrays->codes + arrays->base;
    float *const probs = scan->counts && arrays->probs != NULL ? arrays->probs + arrays->base : NULL;
    _Alignas(64) uint8_t begin_marks[WINDOW];
    for (uint64_t done = 0; done < shape->num_records;) {
        const uint64_t rest = shape->num_records - done;
        size_t n = rest < WINDOW ? (size_t)rest : WINDOW;
        const size_t to_line = (64 - (uintptr_t)(token_ids + done) % 64) % 64 / sizeof *token_ids;
        if (scan->stream && to_line > 0)
            n = n < to_line ? n : to_line;
        kernels->mark_begins(walk, done, n, begin_marks);
        kernels->unpack(scan, begin_marks, records + done * record_size(shape), n, token_ids + done, codes + done);
        if (probs != NULL)
            kernels->divide(codes + done, n, shape->rounds, probs + done);
        done += n;
    }
    /* Positions without records follow, or the numbers are wrong. */
    const uint32_t size = shape->record_count_size;
    for (; walk->position < shape->num_positions; walk->position++) {
        walk->next_begin += load_bytes(walk->numbers + (size_t)walk->position * size, size);
        walk->offsets[walk->position + 1] = walk->base + (int64_t)walk->next_begin;
    }
    if (scan->stream)
        kernels->settle();
}

skl_status skl_decode_records(const skl_shape *shape, uint32_t scale_log2, const uint8_t *src, size_t src_len,
                              const skl_record_arrays *arrays, skl_fault *fault)
{
    if (!known_shape(shape))
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 0);
    const payload_layout layout = layout_of(shape);
    if (layout.end + 64 > src_len)
        return SKL_ERR_TRUNCATED;
    SKL_TRY(check_padding(src, (size_t)layout.end, src_len, shape->num_positions, fault));

    const int counts = shape->kind == SKL_KIND_COUNTS;
    const int stream = shape->num_records * 5 + shape->num_positions * UINT64_C(8) >= STREAMED;
    skl_scan scan = {.profile = shape->profile, .vocab_size = shape->vocab_size, .counts = counts, .stream = stream};
    skl_position_walk walk = {.numbers = src,
                              .offsets = arrays->offsets,
                              .base = arrays->base,
                              .num_positions = shape->num_positions,
                              .record_count_size = shape->record_count_size,
                              .stream = stream,
                              .begin_mark = (uint8_t)(counts ? shape->rounds : 1)};
    arrays->offsets[0] = arrays->base;
    unpack_records(shape, src + layout.records, arrays, &walk, &scan);
    if (walk.next_begin != shape->num_records)
        return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_SHAPE, shape->num_positions, walk.next_begin);
    if (scan.reserved)
        return fail_reserved(shape, arrays->offsets, src + layout.records, fault);
    if (scan.bad || scan.rounds_left != 0 ||
        (!counts &&
         skl_expand_from(shape->num_positions, arrays->offsets, arrays->codes, scale_log2, arrays->probs)))
        return check_records(shape, arrays->offsets, arrays->token_ids, arrays->codes, SKL_ERR_CORRUPT, fault);
    return SKL_OK;
}

skl_status skl_copy_records(const skl_shape *shape, const uint8_t *src, size_t src_len, int64_t base, int64_t *offsets,
                            uint8_t *dst, skl_fault *fault)
{
    if (!known_shape(shape))
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 0);
    const payload_layout layout = layout_of(shape);
    if (layout.end + 64 > src_len)
        return SKL_ERR_TRUNCATED;
    SKL_TRY(check_padding(src, (size_t)layout.end, src_len, shape->num_positions, fault));
    const uint32_t size = shape->record_count_size;
    uint64_t counted = 0;
    offsets[0] = base;
    for (uint32_t t = 0; t < shape->num_positions; t++) {
        counted += load_bytes(src + (size_t)t * size, size);
        offsets[t + 1] = base + (int64_t)counted;
    }
    if (counted != shape->num_records)
        return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_SHAPE, shape->num_positions, counted);
    if (counted > 0)
        memcpy(dst, src + layout.records, (size_t)(layout.tokens - layout.records));
    return SKL_OK;
}

uint32_t skl_record_size(const skl_shape *shape)
{
    return record_size(shape);
}

uint64_t skl_tokens_offset(const skl_shape *shape)
{
    return layout_of(shape).tokens;
}

uint64_t skl_starts_offset(const skl_shape *shape)
{
    skl_shape before = *shape;
    before.columns &= SKL_COLUMN_LABEL_LOGPROB | SKL_COLUMN_ENTROPY;
    return layout_of(&before).end;
}

uint64_t skl_columns_offset(const skl_shape *shape)
{
    return layout_of(shape).columns;
}

skl_status skl_decode(const skl_shape *shape, const uint8_t *src, size_t src_len, int64_t *offsets,
                      uint32_t *token_ids, uint8_t *codes, uint32_t *tokens, uint8_t *columns,
                      skl_fault *fault)
{
    const skl_record_arrays arrays = {.offsets = offsets, .token_ids = token_ids, .codes = codes};
    SKL_TRY(skl_decode_records(shape, 0, src, src_len, &arrays, fault));
    const payload_layout layout = layout_of(shape);
    if (tokens != NULL && shape->token_size != 0) {
        const size_t num_tokens = (size_t)shape->num_positions + 1;
        skl_current_kernels()->widen_tokens(shape->token_size, src + layout.tokens, num_tokens, tokens);
        SKL_TRY(check_tokens(shape, tokens, SKL_ERR_CORRUPT, fault));
    }
    if (columns != NULL)
        for (uint64_t i = layout.columns; i < layout.end; i++)
            columns[i - layout.columns] = src[i];
    return SKL_OK;
}
