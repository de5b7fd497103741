/* batch.c: many sequences at once, from their payloads to the arrays of a training step.  SPEC.md section 5. */
#include "codec.h"
#include "environment.h"
#include "faults.h"
#include "kernels.h"

#include <string.h>

#define ROW_AHEAD 8192

/* The records of row b, which begin at number first of the batch: decoded, or as they are stored. */
static skl_status fill_records(const skl_shape *shape, uint32_t scale_log2, const uint8_t *src, uint64_t src_len,
                               const skl_batch *batch, uint32_t b, uint64_t first, uint8_t *codes, skl_fault *fault)
{
    int64_t *const offsets = batch->offsets + (uint64_t)b * batch->row_positions;
    if (batch->records != NULL) {
        uint8_t *const dst = batch->records + first * skl_record_size(shape);
        return skl_copy_records(shape, src, src_len, (int64_t)first, offsets, dst, fault);
    }
    const skl_record_arrays arrays = {.base = (int64_t)first,
                                      .offsets = offsets,
                                      .token_ids = batch->token_ids,
                                      .codes = codes,
                                      .probs = batch->probs};
    return skl_decode_records(shape, scale_log2, src, src_len, &arrays, fault);
}

/* The tokens of row b to inputs and labels; from src unless they are given. */
static skl_status fill_tokens(const skl_shape *shape, const uint8_t *src, const skl_batch *batch, uint32_t b,
                              skl_fault *fault)
{
    const skl_kernels *const kernels = skl_current_kernels();
    const size_t n = (size_t)shape->num_positions + 1, first = (size_t)b * batch->row_positions;
    uint32_t *const tokens = batch->tokens + first + b;
    if (!batch->tokens_given)
        kernels->widen_tokens(shape->token_size, src + skl_tokens_offset(shape), n, tokens);
    if (kernels->split_tokens(tokens, n, batch->input_ids + first, batch->labels + first) < shape->vocab_size)
        return SKL_OK;
    const skl_status status = batch->tokens_given ? SKL_ERR_ARG : SKL_ERR_CORRUPT;
    size_t bad = 0;
    while (bad + 1 < n && tokens[bad] < shape->vocab_size)
        bad++;
    return skl_fail(status, fault, SKL_REASON_TOKEN_RANGE, bad, tokens[bad]);
}

/* A position without record carries no target: no label either.  The numbers of records lie at the payload's begin. */
static void ignore_empty(const skl_shape *shape, const uint8_t *src, int64_t *labels, int64_t ignored_label)
{
    const size_t n = shape->num_positions;
    if (shape->record_count_size == 1) {
        const uint8_t *const first = memchr(src, 0, n);
        for (size_t t = first == NULL ? n : (size_t)(first - src); t < n; t++)
            labels[t] = src[t] ? labels[t] : ignored_label;
    } else {
        for (size_t t = 0; t < n; t++)
            labels[t] = src[2 * t] | src[2 * t + 1] ? labels[t] : ignored_label;
    }
}

/* Where documents begin in row b, and how far each input is from there. */
static skl_status fill_starts(const skl_shape *shape, const uint8_t *src, const skl_batch *batch, uint32_t b,
                              skl_fault *fault)
{
    const uint64_t n = shape->num_positions, first = (uint64_t)b * batch->row_positions;
    const uint64_t at = n > 0 ? skl_starts_offset(shape) : 0;
    int64_t place = 0;
    if ((n + 1) % 8 != 0 && n > 0 && src[at + (n + 1) / 8] >> (n + 1) % 8 != 0)
        return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_PADDING, n, at + (n + 1) / 8);
    for (uint64_t t = 0; t < batch->row_positions; t++) {
        const uint8_t start = t < n && src[at + t / 8] >> t % 8 & 1;
        place = start ? 0 : place;
        batch->starts[first + t] = start;
        batch->positions[first + t] = place++;
    }
    return SKL_OK;
}

/* Ask for the beginning of a row while the one before is decoded, which asks for the rest itself. */
static void prefetch_row(const uint8_t *src, uint64_t src_len)
{
    for (uint64_t i = 0; i < src_len && i < ROW_AHEAD; i += 64)
        __builtin_prefetch(src + i);
}

static void pad_row(const skl_batch *batch, uint64_t first, uint32_t used)
{
    for (uint64_t i = first + used; i < first + batch->row_positions; i++) {
        batch->input_ids[i] = 0;
        batch->labels[i] = batch->ignored_label;
        batch->offsets[i + 1] = batch->offsets[first + used];
    }
}

skl_status skl_decode_batch(const skl_shape *shape, uint32_t scale_log2, const uint8_t *const *sources,
                            const uint64_t *source_lens, const uint32_t *num_positions, const uint32_t *num_records,
                            const skl_batch *batch, uint8_t *codes, uint32_t *row, skl_fault *fault)
{
    SKL_DEFAULT_ENVIRONMENT;
    skl_shape row_shape = *shape;
    uint64_t total = 0;
    batch->offsets[0] = 0;
    *row = 0;
    if ((!batch->tokens_given && shape->token_size == 0) || scale_log2 > 30 ||
        (batch->starts != NULL && !(shape->columns & SKL_COLUMN_DOCUMENT_START)))
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 0);
    for (uint32_t b = 0; b < batch->num_rows; b++) {
        *row = b;
        row_shape.num_positions = num_positions[b];
        row_shape.num_records = num_records[b];
        if (row_shape.num_positions > batch->row_positions || row_shape.num_records > batch->num_records - total)
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, batch->row_positions);
        if (row_shape.num_positions == 0 && row_shape.num_records > 0)
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 0);
        if (b + 1 < batch->num_rows)
            prefetch_row(sources[b + 1], source_lens[b + 1]);
        if (row_shape.num_positions > 0) {
            SKL_TRY(fill_records(&row_shape, scale_log2, sources[b], source_lens[b], batch, b, total, codes, fault));
            SKL_TRY(fill_tokens(&row_shape, sources[b], batch, b, fault));
            ignore_empty(&row_shape, sources[b], batch->labels + (uint64_t)b * batch->row_positions,
                         batch->ignored_label);
        }
        if (batch->starts != NULL)
            SKL_TRY(fill_starts(&row_shape, sources[b], batch, b, fault));
        total += row_shape.num_records;
        pad_row(batch, (uint64_t)b * batch->row_positions, row_shape.num_positions);
    }
    return total == batch->num_records ? SKL_OK : skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, total);
}
