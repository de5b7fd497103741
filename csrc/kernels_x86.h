/* kernels_x86.h: what kernels_avx2.c and kernels_avx512.c do alike.
 *
 * How counts are checked: a position that starts has `rounds` left, each count takes its part away, and nothing is left
 * where the next one starts.  With byte i of a vector holding mark - code, what is left after record i is the sum of
 * the bytes up to i.  Eight at a time these sums are the bytes of one 64-bit product with 0x0101010101010101, exact as
 * long as each of them lies in 0..127; the first that does not shows in its own byte, since no byte below it has
 * carried. */
#ifndef SKL_KERNELS_X86_H
#define SKL_KERNELS_X86_H

#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

SKL_INLINE float load_one(uint32_t dtype, const unsigned char *from)
{
    uint32_t bits = 0;
    memcpy(&bits, from, skl_logit_size(dtype));
    if (dtype == SKL_DTYPE_FLOAT16)
        return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128((int)bits)));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)(dtype == SKL_DTYPE_FLOAT32 ? bits : bits << 16))));
}

/* Far enough that records arrive from memory before their turn. */
#define RECORDS_AHEAD 8192

/* To memory, past the caches. */
SKL_INLINE void stream_offset(int64_t *to, int64_t offset)
{
    _mm_stream_si64((long long *)(void *)to, offset);
}

/* Streamed stores become visible in the order of the program. */
static void settle(void)
{
    _mm_sfence();
}

/* What a division would round to, at a fraction of its time: one correction suffices for integers below 128. */
static void divide(const uint8_t *restrict codes, size_t n, uint32_t rounds, float *restrict quotients)
{
    const float by = (float)rounds, inverse = 1.0f / by;
    for (size_t i = 0; i < n; i++) {
        const float code = (float)codes[i], near = code * inverse;
        quotients[i] = fmaf(fmaf(-near, by, code), inverse, near);
    }
}

#endif
