/* kernels_avx2.c: 16 lanes in two registers; CMakeLists.txt gives the flags.
 *
 * How many instructions an exponential takes limits the sum of a block, and most processors add, compare and multiply
 * floats in two of their four units alone.  So a block is looked at first, in integers, whether it has anything to
 * clamp; p * 2^n is added as it is multiplied; and bfloat16 is taken apart without a shuffle. */
#define SKL_KERNELS_AVX2 /* what kernels_table.h makes of this file */
#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

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

#define CHAINS 4 /* registers whose exponentials are made side by side: one would wait for each step of its own */
#define EACH(n) for (size_t i = 0; i < (n); i++)

/* Exponentials of the logits in n registers: x to p, and the factor of each.  z and the factor of 2 in p as in
 * kernels_portable.c; max and min give their second argument where one is NaN, and change nothing that is plain. */
SKL_INLINE void exponential_parts(size_t n, __m256 *x, __m256 *factors, __m256 scale, __m256 offset, int plain)
{
    const __m256 magic = _mm256_set1_ps(12583038.0f);
    __m256 f[CHAINS], z[CHAINS];
    EACH(n) f[i] = _mm256_fmsub_ps(x[i], scale, offset);
    if (!plain)
        EACH(n) f[i] = _mm256_min_ps(_mm256_set1_ps(129.0f), _mm256_max_ps(_mm256_set1_ps(-126.0f), f[i]));
    EACH(n) z[i] = _mm256_add_ps(f[i], magic);
    EACH(n) f[i] = _mm256_sub_ps(f[i], _mm256_sub_ps(z[i], magic));
    EACH(n) factors[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(z[i]), 23));
    EACH(n) x[i] = _mm256_fmadd_ps(_mm256_set1_ps(0x1.5c08e6p-9f), f[i], _mm256_set1_ps(0x1.3d0c52p-6f));
    EACH(n) x[i] = _mm256_fmadd_ps(x[i], f[i], _mm256_set1_ps(0x1.c6b6e4p-4f));
    EACH(n) x[i] = _mm256_fmadd_ps(x[i], f[i], _mm256_set1_ps(0x1.ebf918p-2f));
    EACH(n) x[i] = _mm256_fmadd_ps(x[i], f[i], _mm256_set1_ps(0x1.62e428p+0f));
    EACH(n) x[i] = _mm256_fmadd_ps(x[i], f[i], _mm256_set1_ps(2.0f));
}

SKL_INLINE lanes exponential_lanes(lanes x, lanes scale, lanes offset)
{
    __m256 p[CHAINS] = {x.low, x.high}, factors[CHAINS];
    exponential_parts(2, p, factors, scale.low, offset.low, 0);
    return (lanes){_mm256_mul_ps(p[0], factors[0]), _mm256_mul_ps(p[1], factors[1])};
}

/* What the sum of a block takes beside its row.  Logits are plain where d lies in [-126, 128], so that nothing need be
 * clamped.  That shows in 16 bits of each, the upper ones of float32: as signed numbers these are at most `most`, which
 * no logit above 0 may pass, and as unsigned ones at most `least`, which none below 0 may. */
typedef struct sum_terms {
    __m256 scale, offset;
    __m256i most, least;
    int any_plain;
} sum_terms;

/* The 16 bits that stand for a bound, or for one nearer to 0. */
SKL_INLINE uint32_t bound_bits(uint32_t dtype, float bound)
{
    uint32_t bits;
    memcpy(&bits, &bound, sizeof bits);
    if (dtype == SKL_DTYPE_FLOAT16)
        return (uint32_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(bound), _MM_FROUND_TO_ZERO), 0);
    return bits >> 16;
}

/* The logit farthest from 0 that has these 16 bits. */
SKL_INLINE float farthest_logit(uint32_t dtype, uint32_t bits)
{
    if (dtype == SKL_DTYPE_FLOAT16)
        return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128((int)bits)));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)(bits << 16 | 0xffffu))));
}

SKL_INLINE sum_terms make_sum_terms(uint32_t dtype, float scale, float offset)
{
    const uint32_t most = bound_bits(dtype, (127.0f + offset) / scale);
    const uint32_t least = bound_bits(dtype, (-125.0f + offset) / scale);
    /* d rises with the logit, so that what holds for the outermost two holds for all between. */
    return (sum_terms){.scale = _mm256_set1_ps(scale),
                       .offset = _mm256_set1_ps(offset),
                       .most = _mm256_set1_epi16((short)most),
                       .least = _mm256_set1_epi16((short)least),
                       .any_plain = most < 0x8000u && least >= 0x8000u &&
                                    fmaf(farthest_logit(dtype, most), scale, -offset) <= 128.0f &&
                                    fmaf(farthest_logit(dtype, least), scale, -offset) >= -126.0f};
}

SKL_INLINE int is_plain_block(uint32_t dtype, const unsigned char *row, const sum_terms *terms)
{
    const size_t step = dtype == SKL_DTYPE_FLOAT32 ? 64 : 32; /* of 16 logits */
    __m256i most = terms->most, least = terms->least;
    for (size_t j = 0; j < SKL_GROUPS; j++, row += step) {
        __m256i sixteen = _mm256_loadu_si256((const __m256i *)(const void *)(row + (step == 64 ? 2 : 0)));
        if (dtype == SKL_DTYPE_FLOAT32) /* the upper halves of two registers */
            sixteen = _mm256_blend_epi16(sixteen, _mm256_loadu_si256((const __m256i *)(const void *)(row + 32)), 0xaa);
        most = _mm256_max_epi16(most, sixteen);
        least = _mm256_max_epu16(least, sixteen);
    }
    const __m256i beyond = _mm256_or_si256(_mm256_xor_si256(most, terms->most), _mm256_xor_si256(least, terms->least));
    return _mm256_testz_si256(beyond, beyond);
}

/* 16 logits as two registers: eight and eight, or of bfloat16 the even and the odd ones, which is less work. */
SKL_INLINE void load_pair(uint32_t dtype, const unsigned char *from, __m256 *pair)
{
    if (dtype == SKL_DTYPE_BFLOAT16) {
        const __m256i halves = _mm256_loadu_si256((const __m256i *)(const void *)from);
        pair[0] = _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
        pair[1] = _mm256_castsi256_ps(_mm256_and_si256(halves, _mm256_set1_epi32((int)0xffff0000u)));
    } else {
        const lanes x = load_lanes(dtype, from);
        pair[0] = x.low;
        pair[1] = x.high;
    }
}

/* As sum_lanes, of the even lanes and the odd ones. */
SKL_INLINE float sum_even_odd(__m256 even, __m256 odd)
{
    const __m128 even_four = _mm_add_ps(_mm256_castps256_ps128(even), _mm256_extractf128_ps(even, 1));
    const __m128 odd_four = _mm_add_ps(_mm256_castps256_ps128(odd), _mm256_extractf128_ps(odd, 1));
    const __m128 low = _mm_unpacklo_ps(even_four, odd_four), high = _mm_unpackhi_ps(even_four, odd_four);
    const __m128 two_pairs = _mm_add_ps(low, high);
    const __m128 two = _mm_add_ps(two_pairs, _mm_movehl_ps(two_pairs, two_pairs));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* p * 2^n is exact, so that adding it in the same instruction rounds as adding it alone does. */
SKL_INLINE float sum_block_as(uint32_t dtype, const unsigned char *row, const sum_terms *terms, int plain,
                              float *maximum)
{
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    lanes most = fill_lanes(-INFINITY);
    for (size_t j = 0; j < SKL_GROUPS; j += CHAINS / 2) {
        __m256 p[CHAINS], factors[CHAINS];
        for (size_t i = 0; i < CHAINS; i += 2)
            load_pair(dtype, row + (j + i / 2) * SKL_LANES * skl_logit_size(dtype), p + i);
        if (maximum != NULL)
            for (size_t i = 0; i < CHAINS; i += 2)
                most = larger_lanes(most, (lanes){p[i], p[i + 1]});
        exponential_parts(CHAINS, p, factors, terms->scale, terms->offset, plain);
        EACH(CHAINS) sums[i % 2] = _mm256_fmadd_ps(p[i], factors[i], sums[i % 2]);
    }
    if (maximum != NULL)
        *maximum = largest_lane(most);
    return dtype == SKL_DTYPE_BFLOAT16 ? sum_even_odd(sums[0], sums[1]) : sum_lanes((lanes){sums[0], sums[1]});
}

/* Sum of the exponentials of a block; its largest logit too where that is wanted. */
SKL_INLINE float block_sum(uint32_t dtype, const unsigned char *row, const sum_terms *terms, float *maximum)
{
    if (terms->any_plain && is_plain_block(dtype, row, terms))
        return sum_block_as(dtype, row, terms, 1, maximum);
    return sum_block_as(dtype, row, terms, 0, maximum);
}

#include "kernels_x86.h"

#include "kernels_lanes.h"
#include "kernels_table.h"
