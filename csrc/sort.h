/* sort.h: keys, ids and weights in order, in memory that the caller has; private. */
#ifndef SKL_SORT_H
#define SKL_SORT_H

#include "bits.h"

#include <stddef.h>
#include <stdint.h>

/* Keys; up to so many, looking at every pair is faster than deciding what to look at. */
#define SKL_FEW_KEYS 48

/* Smaller key: larger weight, then lower id.  weight > 0. */
static inline uint64_t skl_weight_key(float weight, uint32_t token_id)
{
    return (uint64_t)(~skl_float_bits(weight)) << 32 | token_id;
}

/* The weight of a key; its id is the lower half. */
static inline float skl_key_weight(uint64_t key)
{
    return skl_bits_float(~(uint32_t)(key >> 32));
}

/* Sort n keys ascending, in place. */
void skl_sort_keys(uint64_t *keys, size_t n);

/* Sort n ids ascending, in place; keys: scratch [n]. */
void skl_sort_ids(uint32_t *token_ids, size_t n, uint64_t *keys);

/* The keys [n] of n weights above 0 and their ids, ascending. */
void skl_sort_weights(const float *weights, const uint32_t *token_ids, size_t n, uint64_t *keys);

/* As skl_sort_weights, for n <= SKL_FEW_KEYS and ids that rise. */
void skl_sort_few_weights(const float *weights, const uint32_t *token_ids, size_t n, uint64_t *keys);

#endif
