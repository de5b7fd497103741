/* rows.h: what sampler.c, points.c and tops.c share; private. */
#ifndef SKL_ROWS_H
#define SKL_ROWS_H

#include "kernels.h"
#include "faults.h"

#define SMALLEST_WEIGHT 0x1p-126 /* below it float32 is subnormal, and some processes flush that to 0 */

/* The first level for one exponent. */
typedef struct level {
    float scale, offset;
    double *cdf; /* [num_blocks + 1] */
    double total;
} level;

typedef struct row_view {
    const skl_kernels *kernels;
    uint32_t dtype;
    const unsigned char *logits;
    size_t vocab_size, num_blocks;
} row_view;

/* Room for one position; num_keys is its rounds or its k. */
typedef struct scratch_view {
    float *maxima;          /* [num_blocks] */
    double *cdf, *cdf_of_p; /* [num_blocks + 1] */
    uint64_t *keys, *spare; /* [num_keys] */
    double *ratios;         /* [num_keys] */
    uint32_t *counts;       /* [num_keys] */
} scratch_view;

static inline size_t logit_size(uint32_t dtype)
{
    return dtype == SKL_DTYPE_FLOAT32 ? 4 : 2;
}

static inline const unsigned char *block_start(const row_view *row, size_t block)
{
    return row->logits + block * SKL_BLOCK * logit_size(row->dtype);
}

static inline size_t block_length(const row_view *row, size_t block)
{
    const size_t left = row->vocab_size - block * SKL_BLOCK;
    return left < SKL_BLOCK ? left : SKL_BLOCK;
}

/* points.c: multinomial and systematic records of one position, of q and with weights p / q where `of_p` is given;
 * returns how many. */
size_t skl_draw_position(const skl_sampling *s, uint32_t position, const row_view *row, const level *q,
                         const level *of_p, const scratch_view *scratch, uint32_t *token_ids, uint8_t *counts,
                         float *weights);

/* tops.c: topk and topp records of one position; scratch holds the maxima of its blocks.  Returns how many. */
size_t skl_top_position(const skl_sampling *s, const row_view *row, const level *lv, const scratch_view *scratch,
                        uint32_t *token_ids, float *weights);

#endif
