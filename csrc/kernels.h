/* kernels.h: the vector work of sampler and codec, one table for each instruction set; private. */
#ifndef SKL_KERNELS_H
#define SKL_KERNELS_H

#include "skl.h"

/* Ids a block of the two-level CDF covers, and lanes of every sum inside it. */
#define SKL_BLOCK 256
#define SKL_LANES 16
#define SKL_GROUPS (SKL_BLOCK / SKL_LANES)

/* What a pass over the records of a block saw. */
typedef struct skl_scan {
    uint32_t reserved; /* a bit that must be 0 is set */
    uint32_t large;    /* an id is not below vocab_size */
    uint32_t zeros;    /* a code is 0 */
    uint64_t falls;    /* ids that are not above the id before them, positions not regarded */
} skl_scan;

/* Every table gives the same bits for the same input; kernels_portable.c writes the arithmetic out.
 *
 * dtype: skl_dtype.  row: n logits, nothing outside is read; blocks are ceil(n / SKL_BLOCK).  The exponential of a
 * logit x is 2^(scale * x - offset), 0 where scale * x - offset <= -125.5; NaN stays NaN. */
typedef struct skl_kernels {
    const char *name;
    /* The logits as float32. */
    void (*widen)(uint32_t dtype, const void *row, size_t n, float *values);
    /* Largest logit of each block; NaN does not count, -inf where nothing does. */
    void (*block_maxima)(uint32_t dtype, const void *row, size_t n, float *maxima);
    /* 0, then the running sum of the exponentials up to the end of each block: cdf [blocks + 1].  maxima [blocks] as
     * block_maxima gives them, or NULL. */
    void (*block_cdf)(uint32_t dtype, const void *row, size_t n, float scale, float offset, double *cdf,
                      float *maxima);
    /* The exponentials themselves. */
    void (*exponentials)(uint32_t dtype, const void *row, size_t n, float scale, float offset, float *e);
    /* Sums [SKL_GROUPS] of SKL_LANES exponentials each, of e [SKL_BLOCK]. */
    void (*group_totals)(const float *e, double *totals);
    /* n ids and codes to records of a profile; with anything that scan reports, the records have no meaning. */
    void (*pack)(uint32_t profile, uint32_t vocab_size, const uint32_t *token_ids, const uint8_t *codes, size_t n,
                 uint8_t *dst, skl_scan *scan);
    /* n records of a profile to ids and codes; at least 64 bytes after them are readable. */
    void (*unpack)(uint32_t profile, uint32_t vocab_size, const uint8_t *src, size_t n, uint32_t *token_ids,
                   uint8_t *codes, skl_scan *scan);
    /* Whether the counts of any position that has some sum to something else than rounds. */
    int (*sums_differ)(const int64_t *offsets, uint32_t num_positions, const uint8_t *codes, uint32_t rounds);
    /* codes[i] / rounds, rounded once. */
    void (*divide)(const uint8_t *codes, size_t n, uint32_t rounds, float *quotients);
} skl_kernels;

extern const skl_kernels skl_kernels_portable;
#ifdef SKL_X86_KERNELS
extern const skl_kernels skl_kernels_avx2;
extern const skl_kernels skl_kernels_avx512;
#endif

/* One copy of a loop for each type, so that none asks for the type inside. */
#define SKL_FOR_DTYPE(dtype, call)                                                                                    \
    switch (dtype) {                                                                                                  \
    case SKL_DTYPE_FLOAT32: call(SKL_DTYPE_FLOAT32); break;                                                           \
    case SKL_DTYPE_FLOAT16: call(SKL_DTYPE_FLOAT16); break;                                                           \
    default: call(SKL_DTYPE_BFLOAT16); break;                                                                         \
    }

/* The table in use: the widest the processor can run, unless skl_use_kernels chose another. */
const skl_kernels *skl_current_kernels(void);

#endif
