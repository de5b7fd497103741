/* kernels_lanes.h: the sampler's kernels for registers that hold 16 lanes.
 *
 * Included by kernels_avx2.c, kernels_avx512.c and kernels_neon.c, which define `lanes`, load_one, what is done to lanes
 * one by one, and block_sum with the sum_terms that it takes; the order of operations is that of kernels_portable.c.  What does not fill a block
 * goes through a block padded with -inf, whose exponential is 0. */
#ifndef SKL_KERNELS_LANES_H
#define SKL_KERNELS_LANES_H

#include "kernels.h"

#include <math.h>
#include <string.h>

/* Far enough that a line arrives from memory before its turn; 4 to 16 KiB measure alike. */
#define PREFETCH_BYTES 8192

/* Ask for the lines of the block that lies PREFETCH_BYTES ahead, often in the next row; it need not exist. */
SKL_INLINE void prefetch_block(const unsigned char *row, size_t size)
{
    for (size_t i = 0; i < SKL_BLOCK * size; i += 64)
        __builtin_prefetch((const void *)((uintptr_t)row + PREFETCH_BYTES + i));
}

SKL_INLINE void widen_as(uint32_t dtype, const unsigned char *row, size_t n, float *values)
{
    size_t i = 0;
    for (; i + SKL_LANES <= n; i += SKL_LANES)
        store_lanes(values + i, load_lanes(dtype, row + i * skl_logit_size(dtype)));
    for (; i < n; i++)
        values[i] = load_one(dtype, row + i * skl_logit_size(dtype));
}

/* The n < SKL_BLOCK logits that end a row, as a block. */
SKL_INLINE void pad_block(uint32_t dtype, const unsigned char *row, size_t n, float *block)
{
    for (size_t i = n; i < SKL_BLOCK; i++)
        block[i] = -INFINITY;
    widen_as(dtype, row, n, block);
}

SKL_INLINE lanes block_maximum(uint32_t dtype, const unsigned char *row)
{
    lanes most = fill_lanes(-INFINITY);
    for (size_t j = 0; j < SKL_GROUPS; j++)
        most = larger_lanes(most, load_lanes(dtype, row + j * SKL_LANES * skl_logit_size(dtype)));
    return most;
}

SKL_INLINE void maxima_as(uint32_t dtype, const unsigned char *row, size_t n, float *maxima)
{
    for (; n >= SKL_BLOCK; n -= SKL_BLOCK, row += SKL_BLOCK * skl_logit_size(dtype))
        *maxima++ = largest_lane(block_maximum(dtype, row));
    if (n > 0) {
        float block[SKL_BLOCK];
        pad_block(dtype, row, n, block);
        *maxima = largest_lane(block_maximum(SKL_DTYPE_FLOAT32, (const unsigned char *)block));
    }
}

SKL_INLINE void cdf_as(uint32_t dtype, const unsigned char *row, size_t n, float scale, float offset, double *cdf,
                       float *maxima)
{
    const sum_terms terms = make_sum_terms(dtype, scale, offset);
    double running = 0.0;
    size_t b = 0;
    cdf[0] = running;
    for (; n >= SKL_BLOCK; n -= SKL_BLOCK, row += SKL_BLOCK * skl_logit_size(dtype), b++) {
        prefetch_block(row, skl_logit_size(dtype));
        running += (double)block_sum(dtype, row, &terms, maxima == NULL ? NULL : maxima + b);
        cdf[b + 1] = running;
    }
    if (n > 0) {
        float block[SKL_BLOCK];
        const sum_terms widened = make_sum_terms(SKL_DTYPE_FLOAT32, scale, offset);
        pad_block(dtype, row, n, block);
        running += (double)block_sum(SKL_DTYPE_FLOAT32, (const unsigned char *)block, &widened,
                                     maxima == NULL ? NULL : maxima + b);
        cdf[b + 1] = running;
    }
}

SKL_INLINE void exponentials_as(uint32_t dtype, const unsigned char *row, size_t n, float scale, float offset,
                                float *e)
{
    const lanes scales = fill_lanes(scale), offsets = fill_lanes(offset);
    size_t i = 0;
    for (; i + SKL_LANES <= n; i += SKL_LANES)
        store_lanes(e + i, exponential_lanes(load_lanes(dtype, row + i * skl_logit_size(dtype)), scales, offsets));
    if (i < n) {
        float some[SKL_LANES];
        for (size_t l = 0; l < SKL_LANES; l++)
            some[l] = i + l < n ? load_one(dtype, row + (i + l) * skl_logit_size(dtype)) : -INFINITY;
        store_lanes(some, exponential_lanes(load_lanes(SKL_DTYPE_FLOAT32, (const unsigned char *)some), scales,
                                            offsets));
        memcpy(e + i, some, (n - i) * sizeof *e);
    }
}

static void group_totals(const float *e, double *totals)
{
    for (size_t j = 0; j < SKL_GROUPS; j++)
        totals[j] = sum_doubled(load_lanes(SKL_DTYPE_FLOAT32, (const unsigned char *)(e + j * SKL_LANES)));
}

#endif
