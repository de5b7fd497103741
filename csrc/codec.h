/* codec.h: the parts of decoding that batches take singly; private. */
#ifndef SKL_CODEC_H
#define SKL_CODEC_H

#include "skl.h"

/* codec.c: as skl_decode, but only the records, which go to base and after in token_ids, codes and probs;
 * offsets [num_positions + 1] start at base.  probs: count / rounds, or the weight; NULL: not wanted. */
skl_status skl_decode_records(const skl_shape *shape, uint32_t scale_log2, const uint8_t *src, size_t src_len,
                              int64_t base, int64_t *offsets, uint32_t *token_ids, uint8_t *codes, float *probs,
                              skl_fault *fault);

/* codec.c: where the tokens lie in a payload of a shape that is known. */
uint64_t skl_tokens_offset(const skl_shape *shape);

#endif
