/* codec.h: the parts of decoding that batches take singly; private. */
#ifndef SKL_CODEC_H
#define SKL_CODEC_H

#include "skl.h"

/* Where the records of one sequence go.  The arrays are the caller's, who may have several sequences in them: the
 * records of this one begin at base. */
typedef struct skl_record_arrays {
    int64_t base;
    int64_t *offsets;    /* [num_positions + 1]: this sequence's alone, from base on */
    uint32_t *token_ids; /* [base + num_records] */
    uint8_t *codes;      /* [base + num_records] */
    float *probs;        /* [base + num_records]: count / rounds, or the weight; NULL: not wanted */
} skl_record_arrays;

/* As skl_decode, but only the records.
 *
 * scale_log2: of the weights, 0..30; without meaning for kind counts, or where probs is NULL.
 * SKL_OK; SKL_ERR_ARG, SKL_ERR_TRUNCATED or SKL_ERR_CORRUPT with *fault, what is in the arrays is then unspecified. */
skl_status skl_decode_records(const skl_shape *shape, uint32_t scale_log2, const uint8_t *src, size_t src_len,
                              const skl_record_arrays *arrays, skl_fault *fault);

/* Count through the positions and copy the records as they are stored, num_records of the profile's size, to dst.
 *
 * What the numbers of records and the padding must be is checked; what is in the records is not.
 * offsets [num_positions + 1]: from base on.  As skl_decode_records. */
skl_status skl_copy_records(const skl_shape *shape, const uint8_t *src, size_t src_len, int64_t base, int64_t *offsets,
                            uint8_t *dst, skl_fault *fault);

/* Bytes of a record. */
uint32_t skl_record_size(const skl_shape *shape);

/* Where the tokens lie in a payload, in bytes; shape is one that skl_payload_size knows. */
uint64_t skl_tokens_offset(const skl_shape *shape);

/* Where the columns do. */
uint64_t skl_columns_offset(const skl_shape *shape);

/* Where the column document_start lies, if the shape has it. */
uint64_t skl_starts_offset(const skl_shape *shape);

#endif
