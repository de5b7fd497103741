/* ratios.h: the steps of the ratio code, SPEC.md section 4.3; private. */
#ifndef SKL_RATIOS_H
#define SKL_RATIOS_H

#include "skl.h"

/* 2^31, the weight before the first ratio; SPEC.md section 4.3. */
#define SKL_RATIO_ONE UINT32_C(2147483648)

/* T[q] = round(2^31 * 2^(-q^2 / 1024)). */
extern const uint32_t skl_ratio_table[128];

/* One step of the ratio code: the decoded weight after v and code q. */
static inline uint32_t skl_ratio_step(uint32_t v, uint8_t q)
{
    return (uint32_t)(((uint64_t)v * skl_ratio_table[q & 127]) >> 31);
}

/* As skl_expand, for offsets that are known to rise, from anywhere, and a scale_log2 known to be in 0..30; weights may
 * be NULL: not wanted.  Returns whether any weight reaches 0. */
int skl_expand_from(uint32_t num_positions, const int64_t *offsets, const uint8_t *codes, uint32_t scale_log2,
                    float *weights);

#endif
