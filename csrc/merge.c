/* merge.c: the sorted draws of a position become (token id, count) pairs. */
#include "records.h"

skl_status skl_merge_draws(uint32_t num_positions, uint32_t rounds, const uint32_t *draws, int64_t *offsets,
                           uint32_t *token_ids, uint8_t *counts, skl_fault *fault)
{
    if (rounds < 1 || rounds > 127)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, rounds);
    int64_t last = -1; /* the pair being counted */
    offsets[0] = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        const uint32_t *row = draws + (size_t)t * rounds;
        token_ids[++last] = row[0];
        counts[last] = 1;
        for (uint32_t i = 1; i < rounds; i++) {
            if (row[i] < row[i - 1])
                return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_ID_ORDER, t, row[i]);
            if (row[i] == row[i - 1]) {
                counts[last]++;
            } else {
                token_ids[++last] = row[i];
                counts[last] = 1;
            }
        }
        offsets[t + 1] = last + 1;
    }
    return SKL_OK;
}
