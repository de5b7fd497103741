/* kernels_records_portable.h: no steps, since the plain loops of kernels_records.h do all the work. */
#ifndef SKL_KERNELS_RECORDS_PORTABLE_H
#define SKL_KERNELS_RECORDS_PORTABLE_H

#include "kernels.h"

SKL_INLINE size_t pack_steps(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                             const uint8_t *codes, size_t n, uint8_t *dst, skl_pack_seen *seen)
{
    (void)size, (void)id_bits, (void)vocab_size, (void)token_ids, (void)codes, (void)n, (void)dst, (void)seen;
    return 0;
}

SKL_INLINE size_t sum_steps(const uint8_t *bytes, size_t n, uint32_t *sum)
{
    (void)bytes, (void)n, (void)sum;
    return 0;
}

SKL_INLINE size_t unpack_steps(skl_record_format format, skl_scan *scan, const uint8_t *begin_marks,
                               const uint8_t *src, size_t n, uint32_t *token_ids, uint8_t *codes)
{
    (void)format, (void)scan, (void)begin_marks, (void)src, (void)n, (void)token_ids, (void)codes;
    return 0;
}

SKL_INLINE size_t widen_steps(const uint8_t *src, size_t n, uint32_t *tokens)
{
    (void)src, (void)n, (void)tokens;
    return 0;
}

SKL_INLINE void stream_offset(int64_t *to, int64_t offset)
{
    *to = offset;
}

static void settle(void)
{
}

static void divide(const uint8_t *restrict codes, size_t n, uint32_t rounds, float *restrict quotients)
{
    const float by = (float)rounds;
    for (size_t i = 0; i < n; i++)
        quotients[i] = (float)codes[i] / by;
}

#endif
