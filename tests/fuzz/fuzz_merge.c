/* fuzz_merge.c: sorted draws become (id, count) pairs that spell the same draws; unsorted ones are refused.
 *
 * Input: flags, rounds, then 1 or 4 bytes a draw. */
#include "input.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    const uint32_t flags = (uint32_t)take(&in, 1);
    const uint32_t rounds = (uint32_t)take(&in, 1) % 130;
    const size_t width = flags & 1 ? 4 : 1;
    const uint32_t positions = rounds == 0 ? 1 : (uint32_t)(in.size / width / rounds);
    const uint64_t n = (uint64_t)positions * rounds;
    uint32_t *draws = room(n, sizeof *draws);
    for (uint64_t i = 0; i < n; i++) {
        draws[i] = (uint32_t)take(&in, width);
        if (flags & 2 && i % rounds != 0) /* steps instead of ids: sorted unless they wrap */
            draws[i] += draws[i - 1];
    }
    int64_t *offsets = room(positions + UINT64_C(1), sizeof *offsets);
    uint32_t *token_ids = room(n, sizeof *token_ids);
    uint8_t *counts = room(n, 1);
    skl_fault fault = {0, 0, 0};
    const skl_status status = skl_merge_draws(positions, rounds, draws, offsets, token_ids, counts, &fault);
    if (rounds < 1 || rounds > 127) {
        LAW(status == SKL_ERR_ARG && fault.reason == SKL_REASON_SHAPE);
    } else if (status == SKL_OK) {
        LAW(offsets[0] == 0);
        for (uint32_t t = 0; t < positions; t++) {
            const uint32_t *row = draws + (size_t)t * rounds;
            uint32_t taken = 0;
            for (int64_t i = offsets[t]; i < offsets[t + 1]; i++) {
                LAW(counts[i] >= 1 && (i == offsets[t] || token_ids[i - 1] < token_ids[i]));
                for (uint32_t j = 0; j < counts[i]; j++)
                    LAW(taken < rounds && row[taken++] == token_ids[i]);
            }
            LAW(taken == rounds);
        }
    } else {
        LAW(status == SKL_ERR_ARG && fault.reason == SKL_REASON_ID_ORDER && fault.position < positions);
        const uint32_t *row = draws + (size_t)fault.position * rounds;
        int unsorted = 0;
        for (uint32_t i = 1; i < rounds; i++)
            unsorted |= row[i] < row[i - 1];
        LAW(unsorted);
    }
    free(draws);
    free(offsets);
    free(token_ids);
    free(counts);
    return 0;
}
