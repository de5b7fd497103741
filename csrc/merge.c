/* merge.c: the sorted draws of a position become (token id, count) pairs. */
#include "faults.h"

static skl_status fail_unsorted(uint32_t position, uint32_t rounds, const uint32_t *row, skl_fault *fault)
{
    uint32_t i = 1;
    while (i + 1 < rounds && row[i] >= row[i - 1])
        i++;
    return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_ID_ORDER, position, row[i]);
}

skl_status skl_merge_draws(uint32_t num_positions, uint32_t rounds, const uint32_t *draws, int64_t *offsets,
                           uint32_t *token_ids, uint8_t *counts, skl_fault *fault)
{
    if (rounds < 1 || rounds > 127)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, rounds);
    size_t last = 0; /* the pair that the next draw begins */
    offsets[0] = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        const uint32_t *row = draws + (size_t)t * rounds;
        uint32_t unsorted = 0, last_id = row[0], count = 0;
        for (uint32_t i = 0; i < rounds; i++) { /* no branch depends on a draw: where runs end, nothing could predict */
            const uint32_t same = row[i] == last_id;
            unsorted |= row[i] < last_id;
            last += !same;
            count = (same ? count : 0) + 1;
            token_ids[last] = last_id = row[i];
            counts[last] = (uint8_t)count;
        }
        if (unsorted)
            return fail_unsorted(t, rounds, row, fault);
        offsets[t + 1] = (int64_t)++last;
    }
    return SKL_OK;
}
