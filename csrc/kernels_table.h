/* kernels_table.h: the record kernels and the table; what every kernels_<set>.c ends with.
 *
 * The including file defines one of SKL_KERNELS_PORTABLE, SKL_KERNELS_AVX2 and SKL_KERNELS_AVX512, and has the
 * sampler's kernels.  That define alone chooses kernels_records_<set>.h: the compiler's flags, such as -march=native,
 * do not.  There, each instruction set has
 *
 *   pack_steps, sum_steps, unpack_steps, widen_steps
 *                    what the plain loops of kernels_pack.h and kernels_records.h do, for as many items as make whole
 *                    steps; they return how many, and the loops do the rest
 *   stream_offset    a store past the caches, where there is one
 *   settle, divide   as in skl_kernels */
#ifndef SKL_KERNELS_TABLE_H
#define SKL_KERNELS_TABLE_H

#if defined(SKL_KERNELS_PORTABLE) + defined(SKL_KERNELS_AVX2) + defined(SKL_KERNELS_AVX512) != 1
#error "the including file defines its instruction set"
#elif defined(SKL_KERNELS_PORTABLE)
#define TABLE skl_kernels_portable
#define TABLE_NAME "portable"
#include "kernels_records_portable.h"
#elif defined(SKL_KERNELS_AVX2)
#define TABLE skl_kernels_avx2
#define TABLE_NAME "avx2"
#include "kernels_records_avx2.h"
#else
#define TABLE skl_kernels_avx512
#define TABLE_NAME "avx512"
#include "kernels_records_avx512.h"
#endif

#include "kernels_pack.h"
#include "kernels_records.h"

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
