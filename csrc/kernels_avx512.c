/* kernels_avx512.c: 16 lanes in one register; CMakeLists.txt gives the flags. */
#define SKL_KERNELS_AVX512 /* what kernels_table.h makes of this file */
#include "kernels.h"

#include <immintrin.h>
#include <math.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__) ||             \
    !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
#endif

typedef __m512 lanes;

SKL_INLINE lanes fill_lanes(float value)
{
    return _mm512_set1_ps(value);
}

SKL_INLINE lanes load_lanes(uint32_t dtype, const unsigned char *from)
{
    if (dtype == SKL_DTYPE_FLOAT32)
        return _mm512_loadu_ps(from);
    const __m256i halves = _mm256_loadu_si256((const __m256i *)(const void *)from);
    if (dtype == SKL_DTYPE_FLOAT16)
        return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

SKL_INLINE void store_lanes(float *to, lanes a)
{
    _mm512_storeu_ps(to, a);
}

SKL_INLINE lanes add_lanes(lanes a, lanes b)
{
    return _mm512_add_ps(a, b);
}

/* a where b is NaN. */
SKL_INLINE lanes larger_lanes(lanes a, lanes b)
{
    return _mm512_max_ps(b, a);
}

SKL_INLINE float largest_lane(lanes a)
{
    return _mm512_reduce_max_ps(a);
}

SKL_INLINE float sum_lanes(lanes a)
{
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* As sum_lanes, in float64. */
SKL_INLINE double sum_doubled(lanes a)
{
    const __m512d eight = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)),
                                        _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

/* scalef multiplies by 2^n, infinite or NaN where that is too much; the comparison is true for NaN. */
SKL_INLINE lanes exponential_lanes(lanes x, lanes scale, lanes offset)
{
    const __m512 d = _mm512_fmsub_ps(x, scale, offset);
    const __m512 n = _mm512_roundscale_ps(d, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(d, n);
    __m512 p = _mm512_set1_ps(0x1.5c08e6p-10f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3d0c52p-7f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c6b6e4p-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebf918p-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e428p-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(d, _mm512_set1_ps(-125.5f), _CMP_NLE_UQ), p, n);
}

/* What the sum of a block takes beside its row. */
typedef struct sum_terms {
    lanes scale, offset;
} sum_terms;

SKL_INLINE sum_terms make_sum_terms(uint32_t dtype, float scale, float offset)
{
    (void)dtype;
    return (sum_terms){fill_lanes(scale), fill_lanes(offset)};
}

/* Sum of the exponentials of a block; its largest logit too where that is wanted. */
SKL_INLINE float block_sum(uint32_t dtype, const unsigned char *row, const sum_terms *terms, float *maximum)
{
    const lanes first = load_lanes(dtype, row);
    lanes sum = exponential_lanes(first, terms->scale, terms->offset);
    lanes most = larger_lanes(fill_lanes(-INFINITY), first);
    for (size_t j = 1; j < SKL_GROUPS; j++) {
        const lanes x = load_lanes(dtype, row + j * SKL_LANES * skl_logit_size(dtype));
        sum = add_lanes(sum, exponential_lanes(x, terms->scale, terms->offset));
        if (maximum != NULL)
            most = larger_lanes(most, x);
    }
    if (maximum != NULL)
        *maximum = largest_lane(most);
    return sum_lanes(sum);
}

#include "kernels_x86.h"

#include "kernels_lanes.h"
#include "kernels_table.h"
