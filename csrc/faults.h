/* faults.h: what codec.c, ratios.c and sampler.c share; private. */
#ifndef SKL_FAULTS_H
#define SKL_FAULTS_H

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

/* Sort ascending. */
void skl_sort_keys(uint64_t *keys, size_t n);

static inline skl_status skl_fail(skl_status status, skl_fault *fault, skl_reason reason, uint64_t position,
                                  uint64_t value)
{
    fault->reason = reason;
    fault->position = position;
    fault->value = value;
    return status;
}

/* offsets must rise from 0 to num_records; a caller's error otherwise. */
static inline skl_status skl_check_offsets(uint32_t num_positions, const int64_t *offsets, uint64_t num_records,
                                           skl_fault *fault)
{
    if (offsets[0] != 0 || (uint64_t)offsets[num_positions] != num_records)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, num_positions, num_records);
    for (uint32_t t = 0; t < num_positions; t++)
        if (offsets[t + 1] < offsets[t])
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, t, num_records);
    return SKL_OK;
}

/* Token i of a column of tokens of 2, 3 or 4 bytes; 3 are read as 4, of which the zero bytes after every payload make
 * the last one readable. */
static inline __attribute__((always_inline)) uint32_t skl_load_token(const uint8_t *src, uint32_t size, uint64_t i)
{
    const uint8_t *at = src + i * size;
    uint32_t token = (uint32_t)at[0] | (uint32_t)at[1] << 8;
    if (size > 2)
        token |= (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
    return size == 3 ? token & 0xffffff : token;
}

/* codec.c: as skl_decode, but only the records, which go to base and after in token_ids, codes and probs;
 * offsets [num_positions + 1] start at base.  probs: count / rounds, or the weight; NULL: not wanted. */
skl_status skl_decode_records(const skl_shape *shape, uint32_t scale_log2, const uint8_t *src, size_t src_len,
                              int64_t base, int64_t *offsets, uint32_t *token_ids, uint8_t *codes, float *probs,
                              skl_fault *fault);

/* ratios.c: as skl_expand, for offsets that rise from anywhere and a scale that is known; weights may be NULL.
 * Returns whether any weight reaches 0. */
int skl_expand_from(uint32_t num_positions, const int64_t *offsets, const uint8_t *codes, uint32_t scale_log2,
                    float *weights);

/* codec.c: where the tokens lie in a payload of a shape that is known. */
uint64_t skl_tokens_offset(const skl_shape *shape);

#endif
