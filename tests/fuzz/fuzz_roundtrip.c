/* fuzz_roundtrip.c: weights become ratio codes that decode to weights which become the same codes again; what cannot
 * be a weight is refused.
 *
 * Input: flags, scale_log2, number of positions, a byte for each position's number of weights, then 8 bytes a weight:
 * its id and its bits. */
#include "input.h"

typedef struct codes {
    int64_t *offsets;
    uint32_t *token_ids;
    uint8_t *codes;
    skl_status status;
} codes;

static codes quantise(uint32_t positions, const int64_t *offsets, const uint32_t *token_ids, const float *weights,
                      uint32_t scale_log2, size_t num_keys)
{
    const uint64_t n = (uint64_t)offsets[positions];
    uint64_t *keys = room(num_keys, sizeof *keys);
    codes out;
    out.offsets = room(positions + UINT64_C(1), sizeof *out.offsets);
    out.token_ids = room(n, sizeof *out.token_ids);
    out.codes = room(n, 1);
    skl_fault fault = {0, 0, 0};
    out.status = skl_quantise(positions, n, offsets, token_ids, weights, scale_log2, keys, num_keys, out.offsets,
                              out.token_ids, out.codes, &fault);
    LAW(out.status == SKL_OK || out.status == SKL_ERR_ARG || out.status == SKL_ERR_DST_SMALL);
    LAW(out.status != SKL_ERR_ARG || fault.reason != SKL_REASON_NONE);
    skl_fault twice = {0, 0, 0};
    const skl_status distinct = skl_check_distinct(positions, n, offsets, token_ids, keys, num_keys, &twice);
    LAW(out.status != SKL_OK || distinct == SKL_OK);
    LAW(fault.reason != SKL_REASON_ID_TWICE || (distinct == SKL_ERR_CORRUPT && twice.position == fault.position));
    free(keys);
    return out;
}

static void drop(codes *out)
{
    free(out->offsets);
    free(out->token_ids);
    free(out->codes);
}

/* Codes to bytes and back, in the profile that holds their ids. */
static void check_bytes(uint32_t positions, const codes *out)
{
    skl_shape shape = {SKL_KIND_RATIOS, SKL_PROFILE_R32, 2, 0, 0, UINT32_C(1) << 24, 0, positions,
                       (uint64_t)out->offsets[positions]};
    uint64_t size = 0;
    LAW(skl_payload_size(&shape, &size) == SKL_OK);
    uint8_t *bytes = room(size + 64, 1);
    memset(bytes, 0, (size_t)size + 64);
    int64_t *offsets = room(positions + UINT64_C(1), sizeof *offsets);
    uint32_t *token_ids = room(shape.num_records, sizeof *token_ids);
    uint8_t *back = room(shape.num_records, 1);
    size_t written = 0;
    skl_fault fault;
    LAW(skl_encode(&shape, out->offsets, out->token_ids, out->codes, NULL, NULL, bytes, (size_t)size, &written,
                   &fault) == SKL_OK);
    LAW(skl_decode(&shape, bytes, (size_t)size + 64, offsets, token_ids, back, NULL, NULL, &fault) == SKL_OK);
    LAW(memcmp(offsets, out->offsets, (positions + UINT64_C(1)) * sizeof *offsets) == 0);
    LAW(memcmp(token_ids, out->token_ids, (size_t)shape.num_records * sizeof *token_ids) == 0);
    LAW(memcmp(back, out->codes, (size_t)shape.num_records) == 0);
    free(bytes);
    free(offsets);
    free(token_ids);
    free(back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    const uint32_t flags = (uint32_t)take(&in, 1);
    const uint32_t scale_log2 = (uint32_t)take(&in, 1) % 33;
    const uint32_t positions = (uint32_t)take(&in, 1) % 32;
    int64_t *offsets = room(positions + UINT64_C(1), sizeof *offsets);
    offsets[0] = 0;
    size_t longest = 0;
    for (uint32_t t = 0; t < positions; t++) {
        size_t n = (size_t)take(&in, 1);
        if (!(flags & 16)) /* short positions make many runs */
            n %= 48;
        longest = n > longest ? n : longest;
        offsets[t + 1] = offsets[t] + (int64_t)n;
    }
    const uint64_t n = (uint64_t)offsets[positions];
    uint32_t *token_ids = room(n, sizeof *token_ids);
    float *weights = room(n, sizeof *weights);
    for (uint64_t i = 0; i < n; i++) {
        token_ids[i] = (uint32_t)take(&in, 4) & 0xffffff;
        uint32_t bits = (uint32_t)take(&in, 4);
        if (flags & 1) { /* likelier to be valid: a distinct id, and a weight in (0, 2^scale_log2] */
            token_ids[i] = (uint32_t)(i * 2654435761u) & 0xffffff;
            const uint32_t top = (127 + scale_log2) << 23;
            bits = 1 + (flags & 2 ? top - 1 - bits % (UINT32_C(36) << 23) : bits % top);
        }
        memcpy(weights + i, &bits, sizeof bits);
    }
    if (flags & 4 && positions > 0)
        offsets[positions / 2] += 300; /* offsets that fall, or do not begin at 0 */

    codes once = quantise(positions, offsets, token_ids, weights, scale_log2,
                          flags & 8 && longest > 0 ? longest - 1 : longest);
    if (once.status == SKL_OK) {
        const uint64_t kept = (uint64_t)once.offsets[positions];
        LAW(kept <= n);
        float *expanded = room(kept, sizeof *expanded);
        LAW(skl_expand(positions, kept, once.offsets, once.codes, scale_log2, expanded) == SKL_OK);
        codes twice = quantise(positions, once.offsets, once.token_ids, expanded, scale_log2, longest);
        LAW(twice.status == SKL_OK);
        LAW(memcmp(once.offsets, twice.offsets, (positions + UINT64_C(1)) * sizeof *offsets) == 0);
        LAW(memcmp(once.token_ids, twice.token_ids, (size_t)kept * sizeof *token_ids) == 0);
        LAW(memcmp(once.codes, twice.codes, (size_t)kept) == 0);
        check_bytes(positions, &once);
        LAW(skl_expand(positions, kept, once.offsets, once.codes, 31, expanded) == SKL_ERR_ARG);
        if (kept > 0) {
            once.offsets[0] = 1;
            LAW(skl_expand(positions, kept, once.offsets, once.codes, scale_log2, expanded) == SKL_ERR_ARG);
            once.offsets[0] = 0;
            once.offsets[positions] = -1;
            LAW(skl_expand(positions, kept, once.offsets, once.codes, scale_log2, expanded) == SKL_ERR_ARG);
        }
        free(expanded);
        drop(&twice);
    }
    drop(&once);
    free(offsets);
    free(token_ids);
    free(weights);
    return 0;
}
