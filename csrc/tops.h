/* tops.h: topk and topp records of one position; private. */
#ifndef SKL_TOPS_H
#define SKL_TOPS_H

#include "rows.h"

/* Take the most probable ids of one position; returns how many, at most k and vocab_size.
 *
 * sampling: topk or topp, and known to be in range; level: of the logits themselves; maxima [num_blocks]: the largest
 * logit of each block.
 * keys: scratch [k]; token_ids, weights: room for as many records, of which those too small are left out. */
size_t skl_top_position(const skl_sampling *sampling, const skl_row *row, const skl_level *level, const float *maxima,
                        uint64_t *keys, uint32_t *token_ids, float *weights);

#endif
