/* kernels_table.h: what every kernels_<set>.c ends with: its record kernels, and its table.
 *
 * The including file has the sampler's kernels: group_totals, and widen_as, maxima_as, cdf_as and exponentials_as, of
 * which one copy is made here for each type of logits.  It defines one of SKL_KERNELS_PORTABLE, SKL_KERNELS_AVX2,
 * SKL_KERNELS_AVX512 and SKL_KERNELS_NEON, which alone chooses kernels_records_<set>.h: the compiler's flags, such as
 * -march=native, do not.  There, or in kernels_neon.c itself, each instruction set has
 *
 *   pack_steps, sum_steps, unpack_steps, widen_steps
 *                    what the plain loops of kernels_pack.h and kernels_records.h do, for as many items as make whole
 *                    steps; they return how many, and the loops do the rest
 *   stream_offset    a store past the caches, where there is one
 *   settle, divide   as in skl_kernels */
#ifndef SKL_KERNELS_TABLE_H
#define SKL_KERNELS_TABLE_H

#if defined(SKL_KERNELS_PORTABLE) + defined(SKL_KERNELS_AVX2) + defined(SKL_KERNELS_AVX512) +                           \
        defined(SKL_KERNELS_NEON) !=                                                                                  \
    1
#error "the including file defines its instruction set"
#elif defined(SKL_KERNELS_PORTABLE)
#define TABLE skl_kernels_portable
#define TABLE_NAME "portable"
#include "kernels_records_portable.h"
#elif defined(SKL_KERNELS_AVX2)
#define TABLE skl_kernels_avx2
#define TABLE_NAME "avx2"
#include "kernels_records_avx2.h"
#elif defined(SKL_KERNELS_NEON)
#define TABLE skl_kernels_neon
#define TABLE_NAME "neon"
#else
#define TABLE skl_kernels_avx512
#define TABLE_NAME "avx512"
#include "kernels_records_avx512.h"
#endif

#include "kernels_pack.h"
#include "kernels_records.h"

/* One copy of a loop for each type, so that none asks for the type inside. */
#define FOR_DTYPE(dtype, loop, ...)                                                                                   \
    switch (dtype) {                                                                                                  \
    case SKL_DTYPE_FLOAT32: loop(SKL_DTYPE_FLOAT32, __VA_ARGS__); break;                                              \
    case SKL_DTYPE_FLOAT16: loop(SKL_DTYPE_FLOAT16, __VA_ARGS__); break;                                              \
    default: loop(SKL_DTYPE_BFLOAT16, __VA_ARGS__); break;                                                            \
    }

static void widen(uint32_t dtype, const void *row, size_t n, float *values)
{
    FOR_DTYPE(dtype, widen_as, row, n, values)
}

static void block_maxima(uint32_t dtype, const void *row, size_t n, float *maxima)
{
    FOR_DTYPE(dtype, maxima_as, row, n, maxima)
}

static void block_cdf(uint32_t dtype, const void *row, size_t n, float scale, float offset, double *cdf,
                      float *maxima)
{
    if (maxima == NULL)
        FOR_DTYPE(dtype, cdf_as, row, n, scale, offset, cdf, NULL)
    else
        FOR_DTYPE(dtype, cdf_as, row, n, scale, offset, cdf, maxima)
}

static void exponentials(uint32_t dtype, const void *row, size_t n, float scale, float offset, float *e)
{
    FOR_DTYPE(dtype, exponentials_as, row, n, scale, offset, e)
}

const skl_kernels TABLE = {
    .name = TABLE_NAME,
    .widen = widen,
    .block_maxima = block_maxima,
    .block_cdf = block_cdf,
    .exponentials = exponentials,
    .group_totals = group_totals,
    .pack = pack,
    .sums_differ = sums_differ,
    .mark_begins = mark_begins,
    .unpack = unpack,
    .settle = settle,
    .widen_tokens = widen_tokens,
    .split_tokens = split_tokens,
    .divide = divide,
};

#endif
