/* batch.c: many sequences at once, from their payloads to the arrays of a training step.  SPEC.md section 5. */
#include "kernels.h"
#include "records.h"

/* n >= 2 tokens of one row to inputs and labels; returns the first that is not below vocab_size, or n. */
static inline __attribute__((always_inline)) uint64_t split(const uint8_t *src, uint32_t size, uint64_t n,
                                                            uint32_t vocab_size, int64_t *restrict input_ids,
                                                            int64_t *restrict labels)
{
    const uint32_t last = skl_load_token(src, size, n - 1);
    uint32_t largest = last;
    for (uint64_t i = 0; i < n - 1; i++) {
        const uint32_t token = skl_load_token(src, size, i);
        largest = token > largest ? token : largest;
        input_ids[i] = token;
    }
    for (uint64_t i = 1; i < n - 1; i++)
        labels[i - 1] = input_ids[i];
    labels[n - 2] = last;
    if (largest < vocab_size)
        return n;
    uint64_t first = 0;
    while (first < n - 1 && input_ids[first] < (int64_t)vocab_size)
        first++;
    return first;
}

/* One copy of the loop for each size of a token. */
static uint64_t split_tokens(const void *src, uint32_t size, uint64_t n, uint32_t vocab_size, int64_t *input_ids,
                             int64_t *labels)
{
    switch (size) {
    case 2: return split(src, 2, n, vocab_size, input_ids, labels);
    case 3: return split(src, 3, n, vocab_size, input_ids, labels);
    default: return split(src, 4, n, vocab_size, input_ids, labels);
    }
}

static uint64_t split_given(const uint32_t *tokens, uint64_t n, uint32_t vocab_size, int64_t *restrict input_ids,
                            int64_t *restrict labels)
{
    uint64_t first = n;
    for (uint64_t i = 0; i < n - 1; i++) {
        input_ids[i] = tokens[i];
        labels[i] = tokens[i + 1];
    }
    for (uint64_t i = n; i-- > 0;)
        first = tokens[i] >= vocab_size ? i : first;
    return first;
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
                            const uint32_t *tokens, const skl_batch *batch, uint8_t *codes, uint32_t *row,
                            skl_fault *fault)
{
    skl_shape of_row = *shape;
    uint64_t total = 0;
    batch->offsets[0] = 0;
    *row = 0;
    if (tokens == NULL && shape->token_size == 0)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 0);
    for (uint32_t b = 0; b < batch->num_rows; b++) {
        const uint64_t first = (uint64_t)b * batch->row_positions;
        *row = b;
        of_row.num_positions = num_positions[b];
        of_row.num_records = num_records[b];
        if (of_row.num_positions > batch->row_positions || of_row.num_records > batch->num_records - total)
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, batch->row_positions);
        if (of_row.num_positions > 0) {
            const skl_status status =
                skl_decode_records(&of_row, sources[b], source_lens[b], (int64_t)total, batch->offsets + first,
                                   batch->token_ids, codes, fault);
            if (status != SKL_OK)
                return status;
            const uint64_t n = (uint64_t)of_row.num_positions + 1;
            int64_t *const input_ids = batch->input_ids + first, *const labels = batch->labels + first;
            const uint64_t bad =
                tokens != NULL
                    ? split_given(tokens + (uint64_t)b * (batch->row_positions + UINT64_C(1)), n, shape->vocab_size,
                                  input_ids, labels)
                    : split_tokens(sources[b] + skl_tokens_offset(&of_row), shape->token_size, n, shape->vocab_size,
                                   input_ids, labels);
            if (bad < n)
                return skl_fail(tokens != NULL ? SKL_ERR_ARG : SKL_ERR_CORRUPT, fault, SKL_REASON_TOKEN_RANGE, bad,
                                shape->vocab_size);
            if (shape->kind == SKL_KIND_RATIOS && batch->probs != NULL) {
                const skl_status expanded = skl_expand_from(of_row.num_positions, batch->offsets + first, codes,
                                                            scale_log2, batch->probs);
                if (expanded != SKL_OK)
                    return expanded;
            }
        }
        total += of_row.num_records;
        pad_row(batch, first, of_row.num_positions);
    }
    if (total != batch->num_records)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, total);
    if (shape->kind == SKL_KIND_COUNTS && batch->probs != NULL)
        skl_current_kernels()->divide(codes, (size_t)total, shape->rounds, batch->probs);
    return SKL_OK;
}
