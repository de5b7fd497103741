/* rows.h: rows of logits by blocks, and the levels of their distribution functions; private.  sampler.c says how. */
#ifndef SKL_ROWS_H
#define SKL_ROWS_H

#include "kernels.h"

/* Below it float32 is subnormal, and some processes flush that to 0. */
#define SKL_SMALLEST_WEIGHT 0x1p-126

/* The logits of one position. */
typedef struct skl_row {
    const skl_kernels *kernels;
    uint32_t dtype;              /* skl_dtype */
    const unsigned char *logits; /* the caller's, of any alignment */
    size_t vocab_size, num_blocks;
} skl_row;

/* The first level of a row for one exponent. */
typedef struct skl_level {
    float scale, offset; /* as the kernels take them */
    double *cdf;         /* [num_blocks + 1] */
    double total;        /* the last of them */
} skl_level;

/* The first logit of a block below num_blocks. */
static inline const unsigned char *skl_block_start(const skl_row *row, size_t block)
{
    return row->logits + block * SKL_BLOCK * skl_logit_size(row->dtype);
}

/* Logits of a block below num_blocks: SKL_BLOCK, or what the row ends with. */
static inline size_t skl_block_length(const skl_row *row, size_t block)
{
    const size_t rest = row->vocab_size - block * SKL_BLOCK;
    return rest < SKL_BLOCK ? rest : SKL_BLOCK;
}

#endif
