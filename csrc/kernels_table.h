/* kernels_table.h: the record kernels and the table; what every kernels_<set>.c ends with.
 *
 * The including file defines one of SKL_KERNELS_PORTABLE, SKL_KERNELS_AVX2 and SKL_KERNELS_AVX512, and has the
 * sampler's kernels.  That define alone chooses the steps: the compiler's flags, such as -march=native, do not. */
#ifndef SKL_KERNELS_TABLE_H
#define SKL_KERNELS_TABLE_H

#if defined(SKL_KERNELS_PORTABLE)
#define TABLE skl_kernels_portable
#define TABLE_NAME "portable"
#include "kernels_records_portable.h"
#elif defined(SKL_KERNELS_AVX2)
#define TABLE skl_kernels_avx2
#define TABLE_NAME "avx2"
#include "kernels_records_avx2.h"
#elif defined(SKL_KERNELS_AVX512)
#define TABLE skl_kernels_avx512
#define TABLE_NAME "avx512"
#include "kernels_records_avx512.h"
#else
#error "define the instruction set of this file"
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
