/* fuzz_encode.c: any records under any shape are refused with a reason, or encode to bytes that decode to them.
 *
 * Input: 14 bytes of shape, a byte for each position's number of records, then 5 bytes a record, tokens, columns. */
#include "input.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t token_sizes[4] = {0, 2, 3, 4};
    input in = {data, size};
    const uint32_t flags = (uint32_t)take(&in, 1);
    skl_shape shape;
    shape.kind = (uint32_t)take(&in, 1) % 4;
    shape.profile = (uint32_t)take(&in, 1) % 5;
    shape.record_count_size = (uint32_t)take(&in, 1) % 4;
    shape.token_size = (uint32_t)take(&in, 1);
    shape.token_size = flags & 1 ? token_sizes[shape.token_size % 4] : shape.token_size % 6;
    shape.columns = (uint32_t)take(&in, 1) % 17;
    shape.rounds = (uint32_t)take(&in, 1);
    shape.vocab_size = (uint32_t)take(&in, 4);
    shape.num_positions = (uint32_t)take(&in, 1) % 64;
    const uint32_t scale = 1 + (uint32_t)take(&in, 1); /* long positions need few bytes of input */
    const uint32_t start = (uint32_t)take(&in, 1);

    int64_t *offsets = room(shape.num_positions + UINT64_C(1), sizeof *offsets);
    offsets[0] = flags & 2 ? start : 0;
    for (uint32_t t = 0; t < shape.num_positions; t++) {
        const int64_t n = (int64_t)take(&in, 1);
        offsets[t + 1] = offsets[t] + (flags & 4 ? n - 8 : n * scale / 16);
        if (offsets[t + 1] > 600) /* long positions, but not many, so that runs stay short */
            offsets[t + 1] = offsets[t] > 600 ? offsets[t] : 600;
        if (flags & 8 && offsets[t + 1] > offsets[t] + 8)
            offsets[t + 1] = offsets[t] + 8;
    }
    const int64_t last = offsets[shape.num_positions];
    shape.num_records = last < 0 ? 0 : (uint64_t)last;
    if (flags & 16)
        shape.num_records += 1;
    uint32_t *token_ids = room(shape.num_records, sizeof *token_ids);
    uint8_t *codes = room(shape.num_records, 1);
    for (uint64_t i = 0; i < shape.num_records; i++) {
        token_ids[i] = (uint32_t)take(&in, 4);
        codes[i] = (uint8_t)take(&in, 1);
        if (flags & 32) { /* likelier to be valid: few ids, small codes */
            token_ids[i] = (uint32_t)i;
            codes[i] &= 7;
        }
    }
    uint32_t *tokens = NULL;
    if (shape.token_size != 0) {
        tokens = room(shape.num_positions + UINT64_C(1), sizeof *tokens);
        for (uint64_t i = 0; i <= shape.num_positions; i++)
            tokens[i] = (uint32_t)take(&in, shape.token_size > 4 ? 4 : shape.token_size);
    }
    const uint64_t num_bytes = columns_size(&shape);
    uint8_t *columns = shape.columns == 0 ? NULL : room(num_bytes, 1);
    for (uint64_t i = 0; i < num_bytes; i++)
        columns[i] = (uint8_t)take(&in, 1);

    uint64_t payload_size = 0;
    const skl_status known = skl_payload_size(&shape, &payload_size);
    uint8_t *dst = room(payload_size, 1);
    size_t written = 0;
    skl_fault fault = {0, 0, 0};
    const skl_status status = skl_encode(&shape, offsets, token_ids, codes, tokens, columns, dst,
                                         (size_t)payload_size, &written, &fault);
    LAW(status == SKL_OK || (status == SKL_ERR_ARG && fault.reason != SKL_REASON_NONE));
    if (status == SKL_OK) {
        LAW(known == SKL_OK && written == payload_size);
        LAW((tokens == NULL && columns == NULL) ||
            skl_encode(&shape, offsets, token_ids, codes, columns == NULL ? NULL : tokens, NULL, dst,
                       (size_t)payload_size, &written, &fault) == SKL_ERR_ARG);
        uint8_t *src = room(payload_size + 64, 1);
        memset(src, 0, (size_t)payload_size + 64);
        memcpy(src, dst, (size_t)payload_size);
        int64_t *offsets_back = room(shape.num_positions + UINT64_C(1), sizeof *offsets);
        uint32_t *ids_back = room(shape.num_records, sizeof *token_ids);
        uint8_t *codes_back = room(shape.num_records, 1);
        uint32_t *tokens_back = tokens == NULL ? NULL : room(shape.num_positions + UINT64_C(1), sizeof *tokens);
        uint8_t *columns_back = columns == NULL ? NULL : room(num_bytes, 1);
        LAW(skl_decode(&shape, src, (size_t)payload_size + 64, offsets_back, ids_back, codes_back, tokens_back,
                       columns_back, &fault) == SKL_OK);
        LAW(memcmp(offsets, offsets_back, (shape.num_positions + UINT64_C(1)) * sizeof *offsets) == 0);
        LAW(memcmp(token_ids, ids_back, (size_t)shape.num_records * sizeof *token_ids) == 0);
        LAW(memcmp(codes, codes_back, (size_t)shape.num_records) == 0);
        LAW(tokens == NULL ||
            memcmp(tokens, tokens_back, (shape.num_positions + UINT64_C(1)) * sizeof *tokens) == 0);
        LAW(columns == NULL || memcmp(columns, columns_back, (size_t)num_bytes) == 0);
        free(src);
        free(offsets_back);
        free(ids_back);
        free(codes_back);
        free(tokens_back);
        free(columns_back);
    }
    free(offsets);
    free(token_ids);
    free(codes);
    free(tokens);
    free(columns);
    free(dst);
    return 0;
}
