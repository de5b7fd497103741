/* points.h: multinomial and systematic records of one position; private. */
#ifndef SKL_POINTS_H
#define SKL_POINTS_H

#include "rows.h"

/* Room for the points of one position, the caller's. */
typedef struct skl_points_scratch {
    uint64_t *words, *spare; /* [rounds] */
    double *ratios;          /* [rounds] */
    uint32_t *counts;        /* [rounds] */
} skl_points_scratch;

/* Draw the records of one position; returns how many, at most rounds and vocab_size.
 *
 * sampling: multinomial or systematic, and known to be in range; q: the level that is drawn from, with a total above 0.
 * p: NULL, or the level that weights p / q belong to: weights are then written, and token_ids in the end hold those
 * ids alone whose weight is not too small.
 * token_ids and counts or weights: room for as many records; counts NULL: weights, count / rounds where p is NULL. */
size_t skl_draw_position(const skl_sampling *sampling, uint32_t position, const skl_row *row, const skl_level *q,
                         const skl_level *p, const skl_points_scratch *scratch, uint32_t *token_ids, uint8_t *counts,
                         float *weights);

#endif
