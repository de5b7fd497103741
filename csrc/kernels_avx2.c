/* kernels_avx2.c: 16 lanes in two registers; CMakeLists.txt gives the flags. */
#define SKL_KERNELS_AVX2 /* what kernels_table.h makes of this file */
#include "kernels.h"

#include <immintrin.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

typedef struct lanes {
    __m256 low, high;
} lanes;

SKL_INLINE lanes fill_lanes(float value)
{
    return (lanes){_mm256_set1_ps(value), _mm256_set1_ps(value)};
}

SKL_INLINE __m256 load_eight(uint32_t dtype, const unsigned char *from)
{
    if (dtype == SKL_DTYPE_FLOAT32)
        return _mm256_loadu_ps((const float *)(const void *)from);
    const __m128i halves = _mm_loadu_si128((const __m128i *)(const void *)from);
    if (dtype == SKL_DTYPE_FLOAT16)
        return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

SKL_INLINE lanes load_lanes(uint32_t dtype, const unsigned char *from)
{
    return (lanes){load_eight(dtype, from), load_eight(dtype, from + (dtype == SKL_DTYPE_FLOAT32 ? 32 : 16))};
}

SKL_INLINE void store_lanes(float *to, lanes a)
{
    _mm256_storeu_ps(to, a.low);
    _mm256_storeu_ps(to + 8, a.high);
}

SKL_INLINE lanes add_lanes(lanes a, lanes b)
{
    return (lanes){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

/* a where b is NaN. */
SKL_INLINE lanes larger_lanes(lanes a, lanes b)
{
    return (lanes){_mm256_max_ps(b.low, a.low), _mm256_max_ps(b.high, a.high)};
}

SKL_INLINE float largest_lane(lanes a)
{
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

SKL_INLINE float sum_lanes(lanes a)
{
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* As sum_lanes, in float64. */
SKL_INLINE double sum_doubled(lanes a)
{
    const __m256d even = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.low)),
                                       _mm256_cvtps_pd(_mm256_castps256_ps128(a.high)));
    const __m256d odd = _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a.low, 1)),
                                      _mm256_cvtps_pd(_mm256_extractf128_ps(a.high, 1)));
    const __m256d four = _mm256_add_pd(even, odd);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

/* max and min give their second argument where one is NaN; z and the factor of 2 in p as in kernels_portable.c. */
SKL_INLINE __m256 exponential_eight(__m256 x, __m256 scale, __m256 offset)
{
    const __m256 raw = _mm256_fmsub_ps(x, scale, offset);
    const __m256 d = _mm256_min_ps(_mm256_set1_ps(129.0f), _mm256_max_ps(_mm256_set1_ps(-126.0f), raw));
    const __m256 z = _mm256_add_ps(d, _mm256_set1_ps(12583038.0f));
    const __m256 f = _mm256_sub_ps(d, _mm256_sub_ps(z, _mm256_set1_ps(12583038.0f)));
    __m256 p = _mm256_set1_ps(0x1.5c08e6p-9f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.3d0c52p-6f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.c6b6e4p-4f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.ebf918p-2f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.62e428p+0f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.0f));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(z), 23)));
}

SKL_INLINE lanes exponential_lanes(lanes x, lanes scale, lanes offset)
{
    return (lanes){exponential_eight(x.low, scale.low, offset.low),
                   exponential_eight(x.high, scale.high, offset.high)};
}

#include "kernels_lanes.h"
#include "kernels_table.h"
