/* fuzz_batch.c: a batch is what its rows are one by one, padded; the first row at fault is named with its fault, and
 * no row touches what another wrote or what lies outside.
 *
 * Input: 24 bytes of shape, a byte of flags (rows, whose tokens, room that does not fit), then the payloads. */
#include "input.h"

#include <math.h>

enum { MAX_ROWS = 4 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    skl_shape shape = take_shape(&in);
    const uint32_t flags = (uint32_t)take(&in, 1);
    static const char *const tables[] = {"portable", "neon", "avx2", "avx512"};
    const skl_status used_table = skl_use_kernels(tables[size % 3]); /* unsupported: the table of the run before */
    LAW(used_table == SKL_OK || used_table == SKL_ERR_UNSUPPORTED);
    const uint32_t num_rows = flags % (MAX_ROWS + 1), scale_log2 = flags & 8 ? 31 : shape.rounds % 31;
    uint64_t payload_size = 0;
    if (skl_payload_size(&shape, &payload_size) != SKL_OK || payload_size > 4096 || shape.num_records > 4096)
        payload_size = shape.num_records = shape.num_positions = 0;

    uint8_t *sources[MAX_ROWS];
    uint64_t source_lens[MAX_ROWS];
    uint32_t num_positions[MAX_ROWS], num_records[MAX_ROWS];
    skl_batch batch;
    memset(&batch, 0, sizeof batch);
    batch.num_rows = num_rows;
    batch.row_positions = shape.num_positions + (flags >> 5 & 3);
    batch.ignored_label = -100;
    for (uint32_t b = 0; b < num_rows; b++) {
        const int empty = (flags & 128) != 0 && b % 2 == 1;
        num_positions[b] = empty ? 0 : shape.num_positions;
        num_records[b] = empty ? 0 : (uint32_t)shape.num_records;
        batch.num_records += num_records[b];
        /* Every row its own memory; the rows differ in one byte that moves with the input's size. */
        source_lens[b] = payload_size + 64;
        sources[b] = room(source_lens[b], 1);
        memset(sources[b], 0, (size_t)source_lens[b]);
        const size_t used = in.size < payload_size ? in.size : (size_t)payload_size;
        memcpy(sources[b], in.data, used);
        if (b == 1 && used > 0 && size % 3 == 0)
            sources[b][size % used] ^= 1;
    }
    if (size % 16 == 5)
        batch.num_records += 1;
    if (size % 16 == 6 && batch.num_records > 0)
        batch.num_records -= 1;
    if (size % 16 == 7 && batch.row_positions > 0)
        batch.row_positions -= 1;
    const uint64_t cells = (uint64_t)num_rows * batch.row_positions, n = batch.num_records;
    batch.input_ids = room(cells, sizeof *batch.input_ids);
    batch.labels = room(cells, sizeof *batch.labels);
    batch.offsets = room(cells + 1, sizeof *batch.offsets);
    batch.token_ids = room(n, sizeof *batch.token_ids);
    batch.probs = room(n, sizeof *batch.probs);
    const int with_starts = (shape.columns & SKL_COLUMN_DOCUMENT_START) != 0 && size % 2 == 0;
    batch.starts = with_starts ? room(cells, 1) : NULL;
    batch.positions = with_starts ? room(cells, sizeof *batch.positions) : NULL;
    uint8_t *codes = room(n, 1);
    const uint64_t num_tokens = (uint64_t)num_rows * (batch.row_positions + UINT64_C(1));
    batch.tokens = room(num_tokens, sizeof *batch.tokens);
    batch.tokens_given = flags & 16;
    for (uint64_t i = 0; batch.tokens_given && i < num_tokens; i++)
        batch.tokens[i] = in.size > 0 ? in.data[i % in.size] : 0;
    uint32_t row = 0;
    skl_fault fault = {0, 0, 0};
    const skl_status status = skl_decode_batch(&shape, scale_log2, (const uint8_t *const *)sources, source_lens,
                                               num_positions, num_records, &batch, codes, &row, &fault);
    LAW(status == SKL_OK || status == SKL_ERR_CORRUPT || status == SKL_ERR_ARG);
    if (status == SKL_OK)
        LAW(batch.offsets[0] == 0 && batch.offsets[cells] == (int64_t)n);

    /* Records that are left as they are take no fault from what is in them, and the rest is the same. */
    skl_batch packed = batch;
    packed.offsets = room(cells + 1, sizeof *packed.offsets);
    packed.records = room(n, shape.profile == SKL_PROFILE_R32 ? 4 : 3);
    packed.token_ids = NULL;
    packed.probs = NULL;
    uint32_t packed_row = 0;
    skl_fault packed_fault = {0, 0, 0};
    const skl_status of_packed =
        skl_decode_batch(&shape, scale_log2, (const uint8_t *const *)sources, source_lens, num_positions, num_records,
                         &packed, NULL, &packed_row, &packed_fault);
    LAW(status != SKL_OK || of_packed == SKL_OK);
    if (status == SKL_OK)
        LAW(memcmp(packed.offsets, batch.offsets, (cells + 1) * sizeof *packed.offsets) == 0);
    free(packed.offsets);
    free(packed.records);

    for (uint32_t b = 0; b < num_rows && num_positions[b] <= batch.row_positions; b++) {
        skl_shape of_row = shape;
        of_row.num_positions = num_positions[b];
        of_row.num_records = num_records[b];
        if (of_row.num_positions == 0)
            continue;
        const uint64_t positions = of_row.num_positions, first = (uint64_t)b * batch.row_positions;
        int64_t *offsets = room(positions + 1, sizeof *offsets);
        uint32_t *token_ids = room(of_row.num_records, sizeof *token_ids);
        uint8_t *row_codes = room(of_row.num_records, 1);
        uint32_t *stored = room(positions + 1, sizeof *stored);
        float *weights = room(of_row.num_records, sizeof *weights);
        skl_fault alone = {0, 0, 0};
        const skl_status expected = skl_decode(&of_row, sources[b], source_lens[b], offsets, token_ids, row_codes,
                                               batch.tokens_given ? NULL : stored, NULL, &alone);
        if (status == SKL_OK) {
            LAW(expected == SKL_OK);
            const uint32_t *const used = batch.tokens + b * (batch.row_positions + UINT64_C(1));
            LAW(batch.tokens_given || memcmp(used, stored, (positions + 1) * sizeof *used) == 0);
            LAW(of_row.kind == SKL_KIND_COUNTS ||
                skl_expand(of_row.num_positions, of_row.num_records, offsets, row_codes, scale_log2, weights) ==
                    SKL_OK);
            const int64_t base = batch.offsets[first];
            for (uint64_t t = 0; t < positions; t++) {
                LAW(batch.input_ids[first + t] == used[t]);
                LAW(batch.labels[first + t] == (offsets[t + 1] == offsets[t] ? -100 : (int64_t)used[t + 1]));
                LAW(!with_starts || batch.positions[first + t] ==
                                        (t == 0 || batch.starts[first + t] ? 0 : batch.positions[first + t - 1] + 1));
                LAW(used[t] < shape.vocab_size && used[t + 1] < shape.vocab_size);
                LAW(batch.offsets[first + t + 1] == base + offsets[t + 1]);
            }
            for (uint64_t t = positions; t < batch.row_positions; t++) {
                LAW(batch.input_ids[first + t] == 0 && batch.labels[first + t] == -100);
                LAW(batch.offsets[first + t + 1] == base + (int64_t)of_row.num_records);
            }
            for (uint64_t i = 0; i < of_row.num_records; i++) {
                LAW(batch.token_ids[(uint64_t)base + i] == token_ids[i]);
                const float prob = batch.probs[(uint64_t)base + i];
                if (of_row.kind == SKL_KIND_RATIOS)
                    LAW(prob == weights[i]);
                else
                    LAW(fabsf(prob - (float)row_codes[i] / (float)shape.rounds) <= 1e-7f);
            }
        } else if (status == SKL_ERR_CORRUPT && row == b && !(with_starts && expected == SKL_OK)) {
            LAW(expected == SKL_ERR_CORRUPT && alone.reason == fault.reason && alone.position == fault.position);
        }
        free(offsets);
        free(token_ids);
        free(row_codes);
        free(stored);
        free(weights);
    }
    for (uint32_t b = 0; b < num_rows; b++)
        free(sources[b]);
    free(batch.input_ids);
    free(batch.labels);
    free(batch.offsets);
    free(batch.token_ids);
    free(batch.probs);
    free(batch.starts);
    free(batch.positions);
    free(codes);
    free(batch.tokens);
    return 0;
}
