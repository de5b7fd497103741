/* fuzz_decode.c: any bytes under any shape give records that encode to the same bytes, or a status, and touch no
 * memory outside of what they were given; every table of kernels says the same.
 *
 * Input: 24 bytes of shape, then the payload. */
#include "input.h"

typedef struct decoded {
    int64_t *offsets;
    uint32_t *token_ids, *tokens;
    uint8_t *codes;
    uint8_t *columns;
    skl_fault fault;
    skl_status status;
} decoded;

static decoded decode(const skl_shape *shape, const uint8_t *src, size_t src_len, int whole)
{
    const uint64_t positions = shape->num_positions;
    decoded out;
    memset(&out, 0, sizeof out);
    out.offsets = room(positions + 1, sizeof *out.offsets);
    out.token_ids = room(shape->num_records, sizeof *out.token_ids);
    out.codes = room(shape->num_records, 1);
    if (whole) /* also where none are stored: then they stay as they are */
        out.tokens = room(positions + 1, sizeof *out.tokens);
    if (whole && shape->columns != 0)
        out.columns = room(columns_size(shape), 1);
    out.status = skl_decode(shape, src, src_len, out.offsets, out.token_ids, out.codes, out.tokens, out.columns,
                            &out.fault);
    return out;
}

static void drop(decoded *out)
{
    free(out->offsets);
    free(out->token_ids);
    free(out->codes);
    free(out->tokens);
    free(out->columns);
}

static int same(const skl_shape *shape, const decoded *a, const decoded *b)
{
    const size_t positions = shape->num_positions, records = (size_t)shape->num_records;
    if (a->status != b->status || a->fault.reason != b->fault.reason || a->fault.position != b->fault.position ||
        a->fault.value != b->fault.value)
        return 0;
    return a->status != SKL_OK || (memcmp(a->offsets, b->offsets, (positions + 1) * sizeof *a->offsets) == 0 &&
                                   memcmp(a->token_ids, b->token_ids, records * sizeof *a->token_ids) == 0 &&
                                   memcmp(a->codes, b->codes, records) == 0);
}

/* What a decoder may trust, checked without its help. */
static void check_accepted(const skl_shape *shape, const decoded *out)
{
    LAW(out->offsets[0] == 0 && (uint64_t)out->offsets[shape->num_positions] == shape->num_records);
    for (uint32_t t = 0; t < shape->num_positions; t++) {
        uint32_t sum = 0;
        LAW(out->offsets[t] <= out->offsets[t + 1]);
        for (int64_t i = out->offsets[t]; i < out->offsets[t + 1]; i++) {
            LAW(out->token_ids[i] < shape->vocab_size);
            LAW(shape->kind != SKL_KIND_COUNTS || i == out->offsets[t] || out->token_ids[i - 1] < out->token_ids[i]);
            LAW(shape->kind != SKL_KIND_COUNTS || out->codes[i] >= 1);
            sum += out->codes[i];
        }
        LAW(shape->kind != SKL_KIND_COUNTS || sum == shape->rounds || out->offsets[t] == out->offsets[t + 1]);
    }
    if (shape->kind == SKL_KIND_RATIOS) {
        float *weights = room(shape->num_records, sizeof *weights);
        LAW(skl_expand(shape->num_positions, shape->num_records, out->offsets, out->codes, 0, weights) == SKL_OK);
        for (uint32_t t = 0; t < shape->num_positions; t++)
            for (int64_t i = out->offsets[t]; i < out->offsets[t + 1]; i++)
                LAW(weights[i] > 0.0f && weights[i] <= (i == out->offsets[t] ? 1.0f : weights[i - 1]));
        free(weights);
    }
}

static void check_encodes_again(const skl_shape *shape, const decoded *out, const uint8_t *src, uint64_t size)
{
    const uint32_t *tokens = shape->token_size == 0 ? NULL : out->tokens;
    uint8_t *dst = room(size, 1);
    size_t written = 0;
    skl_fault fault;
    if (size > 0)
        LAW(skl_encode(shape, out->offsets, out->token_ids, out->codes, tokens, out->columns, dst,
                       (size_t)size - 1, &written, &fault) == SKL_ERR_DST_SMALL);
    LAW(skl_encode(shape, out->offsets, out->token_ids, out->codes, tokens, out->columns, dst, (size_t)size, &written,
                   &fault) == SKL_OK);
    LAW(written == size && memcmp(dst, src, (size_t)size) == 0);
    free(dst);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const tables[] = {"portable", "neon", "avx2", "avx512"};
    input in = {data, size};
    const int padded = size > 0 && (data[0] & 4) != 0;
    const int whole = size > 0 && (data[0] & 8) == 0;
    const skl_shape shape = take_shape(&in);
    uint64_t payload_size = 0;
    const skl_status known = skl_payload_size(&shape, &payload_size);
    LAW(known == SKL_OK || known == SKL_ERR_ARG);
    /* Padded: the payload ends where the shape says, if the input is long enough. */
    size_t used = in.size;
    if (padded && known == SKL_OK && payload_size < used)
        used = (size_t)payload_size;
    const size_t src_len = used + (padded ? 64 : 0);
    uint8_t *src = room(src_len, 1);
    memset(src, 0, src_len);
    memcpy(src, in.data, used);

    if (known != SKL_OK || payload_size + 64 > src_len) {
        /* Refused before any output is touched, whatever the shape claims. */
        skl_fault fault;
        const skl_status status = skl_decode(&shape, src, src_len, NULL, NULL, NULL, NULL, NULL, &fault);
        LAW(status == (known != SKL_OK ? SKL_ERR_ARG : SKL_ERR_TRUNCATED));
        free(src);
        return 0;
    }
    LAW(skl_use_kernels("portable") == SKL_OK);
    decoded first = decode(&shape, src, src_len, whole);
    LAW(first.status == SKL_OK || first.status == SKL_ERR_CORRUPT);
    if (first.status == SKL_OK) {
        check_accepted(&shape, &first);
        if (whole)
            check_encodes_again(&shape, &first, src, payload_size);
    }
    for (size_t i = 1; i < sizeof tables / sizeof *tables; i++) {
        if (skl_use_kernels(tables[i]) != SKL_OK)
            continue;
        decoded other = decode(&shape, src, src_len, whole);
        LAW(same(&shape, &first, &other));
        drop(&other);
    }
    drop(&first);
    free(src);
    return 0;
}
