/* kernels_portable.c: the sampler's arithmetic, lane by lane.
 *
 * This is the truth: kernels_avx2.c, kernels_avx512.c and kernels_neon.c do the same operations 4 to 16 at a time.  The
 * result never depends on which one ran, because every operation below is one IEEE operation, rounded to nearest, in
 * this order:
 *
 *   x        the logit as float32 (exact from float16 and bfloat16)
 *   d        fma(x, scale, -offset).  scale and offset are float32, offset an integer
 *   n, f     d = n + f, n the integer nearest to d (ties to even), f in [-0.5, 0.5]; exact
 *   p        2^f by a polynomial of degree 5, Horner's rule with fma; relative error <= 2.2e-7
 *   e        p * 2^n, exact; 0 for d <= -125.5, so that no subnormal number ever appears; beyond float32's range
 *            infinity, or NaN where d itself is infinite: no total survives either
 *
 *   block sum    lane l holds e[l] + e[16 + l] + ... + e[240 + l], added in this order; then lanes l and l + 8, l and
 *                l + 4, l and l + 2, l and l + 1 are added.  Ids beyond the row add 0.
 *   C            C[0] = 0, C[b + 1] = C[b] + sum of block b, in float64
 *   group total  the 16 e of a group as float64, lanes l and l + 8, l and l + 4, l and l + 2, l and l + 1 added
 *
 * fma is a fused multiply-add: fmaf, an instruction wherever the compiler's target has it.  On x86 without it
 * (before 2013) the C library computes it, correctly and slowly.  No other operation is ever fused
 * (-ffp-contract=off). */
#define SKL_KERNELS_PORTABLE /* what kernels_table.h makes of this file */
#include "bits.h"
#include "kernels.h"

#include <math.h>
#include <string.h>

/* float16 to float32 in integers but for one exact subtraction, which normalises what was subnormal. */
SKL_INLINE float half_to_float(uint16_t half)
{
    const uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    const uint32_t special = exponent == 0x0f800000u ? 0x38000000u : 0u;
    const uint32_t rebased = magnitude + 0x38000000u + special;
    const float subnormal = skl_bits_float(rebased + 0x00800000u) - skl_bits_float(0x38800000u);
    const uint32_t bits = exponent == 0 ? skl_float_bits(subnormal) : rebased;
    return skl_bits_float(bits | (uint32_t)(half & 0x8000u) << 16);
}

/* Logit i of a row, which need not be aligned. */
SKL_INLINE float load(uint32_t dtype, const unsigned char *row, size_t i)
{
    uint16_t half;
    if (dtype == SKL_DTYPE_FLOAT32) {
        float value;
        memcpy(&value, row + 4 * i, sizeof value);
        return value;
    }
    memcpy(&half, row + 2 * i, sizeof half);
    return dtype == SKL_DTYPE_BFLOAT16 ? skl_bits_float((uint32_t)half << 16) : half_to_float(half);
}

/* The integer n + 126 stands in the low bits of z, so that p carries a factor of 2; the comparisons are false for NaN,
 * which so passes through. */
SKL_INLINE float exponential(float x, float scale, float offset)
{
    const float raw = fmaf(x, scale, -offset);
    const float above = raw < -126.0f ? -126.0f : raw;
    const float d = above > 129.0f ? 129.0f : above; /* n = 129 makes the factor infinite */
    const float z = d + 12583038.0f;                 /* 1.5 * 2^23 + 126 */
    const float f = d - (z - 12583038.0f);
    float p = 0x1.5c08e6p-9f;
    p = fmaf(p, f, 0x1.3d0c52p-6f);
    p = fmaf(p, f, 0x1.c6b6e4p-4f);
    p = fmaf(p, f, 0x1.ebf918p-2f);
    p = fmaf(p, f, 0x1.62e428p+0f);
    p = fmaf(p, f, 2.0f);
    return p * skl_bits_float(skl_float_bits(z) << 23);
}

SKL_INLINE void widen_as(uint32_t dtype, const unsigned char *row, size_t n, float *values)
{
    for (size_t i = 0; i < n; i++)
        values[i] = load(dtype, row, i);
}

SKL_INLINE void exponentials_as(uint32_t dtype, const unsigned char *row, size_t n, float scale, float offset,
                                float *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = exponential(load(dtype, row, i), scale, offset);
}

/* Largest of a block, -inf in place of NaN; order does not matter to it. */
SKL_INLINE float largest(const float *values)
{
    float candidates[SKL_BLOCK];
    for (size_t i = 0; i < SKL_BLOCK; i++)
        candidates[i] = values[i] > -INFINITY ? values[i] : -INFINITY;
    for (size_t width = SKL_BLOCK / 2; width > 0; width /= 2)
        for (size_t i = 0; i < width; i++)
            candidates[i] = candidates[i + width] > candidates[i] ? candidates[i + width] : candidates[i];
    return candidates[0];
}

SKL_INLINE float sum_lanes(const float *e)
{
    float lanes[SKL_LANES];
    for (size_t l = 0; l < SKL_LANES; l++)
        lanes[l] = e[l];
    for (size_t j = SKL_LANES; j < SKL_BLOCK; j += SKL_LANES)
        for (size_t l = 0; l < SKL_LANES; l++)
            lanes[l] += e[j + l];
    for (size_t width = SKL_LANES / 2; width > 0; width /= 2)
        for (size_t l = 0; l < width; l++)
            lanes[l] += lanes[l + width];
    return lanes[0];
}

SKL_INLINE void maxima_as(uint32_t dtype, const unsigned char *row, size_t n, float *maxima)
{
    float values[SKL_BLOCK];
    for (; n > 0; row += SKL_BLOCK * skl_logit_size(dtype)) {
        const size_t some = n < SKL_BLOCK ? n : SKL_BLOCK;
        for (size_t i = some; i < SKL_BLOCK; i++)
            values[i] = -INFINITY;
        widen_as(dtype, row, some, values);
        *maxima++ = largest(values);
        n -= some;
    }
}

SKL_INLINE void cdf_as(uint32_t dtype, const unsigned char *row, size_t n, float scale, float offset, double *cdf,
                       float *maxima)
{
    float e[SKL_BLOCK];
    double running = 0.0;
    if (maxima != NULL)
        maxima_as(dtype, row, n, maxima);
    *cdf++ = running;
    for (; n > 0; row += SKL_BLOCK * skl_logit_size(dtype)) {
        const size_t some = n < SKL_BLOCK ? n : SKL_BLOCK;
        memset(e + some, 0, (SKL_BLOCK - some) * sizeof *e);
        exponentials_as(dtype, row, some, scale, offset, e);
        running += (double)sum_lanes(e);
        *cdf++ = running;
        n -= some;
    }
}

static void group_totals(const float *e, double *totals)
{
    for (size_t j = 0; j < SKL_GROUPS; j++) {
        double lanes[SKL_LANES];
        for (size_t l = 0; l < SKL_LANES; l++)
            lanes[l] = (double)e[j * SKL_LANES + l];
        for (size_t width = SKL_LANES / 2; width > 0; width /= 2)
            for (size_t l = 0; l < width; l++)
                lanes[l] += lanes[l + width];
        totals[j] = lanes[0];
    }
}

#include "kernels_table.h"
