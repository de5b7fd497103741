/* skl.h: the whole C interface of sklformat.
 *
 * C knows the bytes of one sequence: pure functions on the caller's memory, without allocation, files, locale or
 * threads; only the ring asks the system for anything, to sleep and to wake.  Every access is bounded by an argument.
 * Numbers are computed rounded to nearest and with subnormals, whatever the calling thread has set, and that is found
 * again afterwards.  Status is never also a length.  The text between the cffi marks is plain C that cffi reads too,
 * so that each declaration exists once. */
#ifndef SKL_H
#define SKL_H

#include <stddef.h>
#include <stdint.h>

/* [cffi] */

/* ---- status ---------------------------------------------------------------------------------------------- */

/* The values are pinned; errors.py turns each into an exception. */
typedef enum skl_status {
    SKL_OK = 0,
    SKL_ERR_ARG = 1,         /* an argument contradicts the contract, skl_fault says how */
    SKL_ERR_DST_SMALL = 2,   /* the destination has no room */
    SKL_ERR_TRUNCATED = 3,   /* the source ends early */
    SKL_ERR_CORRUPT = 4,     /* the source contradicts SPEC.md, skl_fault says how */
    SKL_ERR_UNSUPPORTED = 5, /* not a value this library knows */
    SKL_ERR_CLOSED = 6,      /* ring: the other side is gone */
    SKL_ERR_TIMEOUT = 7      /* ring: nothing happened in time */
} skl_status;

/* What is wrong with a record, and where; filled beside SKL_ERR_ARG and SKL_ERR_CORRUPT. */
typedef enum skl_reason {
    SKL_REASON_NONE = 0,
    SKL_REASON_SHAPE = 1,         /* sizes contradict each other; value: the size that was expected */
    SKL_REASON_ID_RANGE = 2,      /* value: the id, >= vocab_size */
    SKL_REASON_ID_ORDER = 3,      /* value: an id that does not rise */
    SKL_REASON_COUNT_RANGE = 4,   /* value: a count outside 1..rounds */
    SKL_REASON_COUNT_SUM = 5,     /* value: the sum of the counts, not rounds */
    SKL_REASON_WEIGHT_RANGE = 6,  /* value: index of a weight that is not in (0, scale] */
    SKL_REASON_NUM_RECORDS = 7,   /* value: number of records of the position, beyond its field */
    SKL_REASON_RATIO_ZERO = 8,    /* value: a code that takes the weight to 0 */
    SKL_REASON_RESERVED = 9,      /* value: number of a record of the sequence whose reserved bit is set */
    SKL_REASON_TOKEN_RANGE = 10,  /* value: a token of the sequence, >= vocab_size; position: its place */
    SKL_REASON_PADDING = 11,      /* padding that is not zero */
    SKL_REASON_NOT_FINITE = 12,   /* a logit that is NaN or +inf, or a row without any finite logit */
    SKL_REASON_ID_TWICE = 13      /* value: an id that comes twice in the position */
} skl_reason;

typedef struct skl_fault {
    uint32_t reason;   /* skl_reason */
    uint64_t position; /* position in the sequence */
    uint64_t value;
} skl_fault;

/* ---- codec: one block's payload, SPEC.md section 5 --------------------------------------------------------- */

typedef enum skl_kind { SKL_KIND_COUNTS = 1, SKL_KIND_RATIOS = 2 } skl_kind;
typedef enum skl_profile { SKL_PROFILE_R24 = 1, SKL_PROFILE_R24W = 2, SKL_PROFILE_R32 = 3 } skl_profile;

/* Optional columns, as in the header; they lie in this order, without padding. */
typedef enum skl_column {
    SKL_COLUMN_LABEL_LOGPROB = 1,  /* 2 bytes a position */
    SKL_COLUMN_ENTROPY = 2,        /* 2 bytes a position */
    SKL_COLUMN_DOCUMENT_START = 4, /* 1 bit a token, whole bytes */
    SKL_COLUMN_RECORD_LOGPROB = 8  /* 2 bytes a record */
} skl_column;

/* Everything that fixes where the bytes of a payload lie. */
typedef struct skl_shape {
    uint32_t kind;              /* skl_kind */
    uint32_t profile;           /* skl_profile */
    uint32_t record_count_size; /* bytes of a position's number of records: 1 or 2 */
    uint32_t token_size;        /* bytes of a token: 0 (not stored), 2, 3 or 4 */
    uint32_t columns;           /* skl_column bits of the optional columns that are there */
    uint32_t vocab_size;        /* ids and tokens are below */
    uint32_t rounds;            /* kind counts: the counts of a position sum to it */
    uint32_t num_positions;     /* T */
    uint64_t num_records;       /* (id, code) pairs over all positions */
} skl_shape;

/* Size in bytes of the payload, without padding.  SKL_OK or SKL_ERR_ARG (unknown field values, overflow). */
skl_status skl_payload_size(const skl_shape *shape, uint64_t *size);

/* Write one payload; codes are counts or ratio codes.
 *
 * offsets [num_positions + 1], token_ids and codes [num_records], tokens [num_positions + 1] (NULL iff token_size
 * is 0), columns: their bytes as they lie in the payload (NULL iff there are none); what they mean is the caller's to
 * check, in both directions.
 * dst, dst_cap: room; *written: bytes written, skl_payload_size's.
 * Refuses every record that a reader could not trust: SKL_ERR_ARG with *fault; also SKL_ERR_DST_SMALL. */
skl_status skl_encode(const skl_shape *shape, const int64_t *offsets, const uint32_t *token_ids,
                      const uint8_t *codes, const uint32_t *tokens, const uint8_t *columns, uint8_t *dst,
                      size_t dst_cap, size_t *written, skl_fault *fault);

/* Read one payload and check every record; src, src_len include the padding, which must be zero.
 *
 * Outputs as in skl_encode; tokens and columns may be NULL where the caller does not want them.
 * SKL_ERR_ARG, SKL_ERR_TRUNCATED or SKL_ERR_CORRUPT with *fault; the outputs are then unspecified. */
skl_status skl_decode(const skl_shape *shape, const uint8_t *src, size_t src_len, int64_t *offsets,
                      uint32_t *token_ids, uint8_t *codes, uint32_t *tokens, uint8_t *columns,
                      skl_fault *fault);

/* ---- batches: sequences straight into the arrays that a training step takes --------------------------------- */

/* B rows of T positions each; a sequence that is shorter is padded on the right. */
typedef struct skl_batch {
    uint32_t num_rows;      /* B */
    uint32_t row_positions; /* T */
    uint64_t num_records;   /* of all rows */
    int64_t ignored_label;  /* the label where there is none */
    uint32_t tokens_given;  /* 0: tokens are taken from the payloads */
    uint32_t *tokens;       /* [B, T + 1]: given, or written; undefined where padded */
    int64_t *input_ids;     /* [B, T]: tokens but the last; 0 where padded */
    int64_t *labels;        /* [B, T]: tokens but the first; ignored_label where padded or without record */
    int64_t *offsets;       /* [B * T + 1]: records of each position; none where padded */
    uint32_t *token_ids;    /* [num_records] */
    float *probs;           /* [num_records]: count / rounds, or the weight; NULL: not wanted */
    uint8_t *starts;        /* [B, T]: 1 where an input begins a document, else 0; NULL: not wanted */
    int64_t *positions;     /* [B, T]: place of each input in its document, or in what the row has of it; from 0 on where
                             * a row begins, and on where it is padded; NULL with starts */
    uint8_t *records;       /* [num_records * bytes of a record]: of all rows as stored, for who decodes and checks them:
                             * then token_ids, probs and codes are not written, and may be NULL; NULL: decoded here */
} skl_batch;

/* Decode and check the payloads of a batch.
 *
 * shape: of every row, its num_positions and num_records aside.
 * sources, source_lens [B]: payloads with their padding; num_positions, num_records [B]: of each, 0 positions for a
 * row that is empty.
 * codes: scratch, num_records bytes.  *row: the row at fault.
 * As skl_decode; SKL_ERR_ARG too where the rows do not fit the batch, there are no tokens, tokens given are not below
 * vocab_size, scale_log2 is not in 0..30, or starts are wanted that the shape does not have. */
skl_status skl_decode_batch(const skl_shape *shape, uint32_t scale_log2, const uint8_t *const *sources,
                            const uint64_t *source_lens, const uint32_t *num_positions, const uint32_t *num_records,
                            const skl_batch *batch, uint8_t *codes, uint32_t *row, skl_fault *fault);

/* ---- columns: whether those of many payloads are sound ------------------------------------------------------- */

/* Whether the columns of a batch hold what SPEC.md section 5.1 allows; arguments as in skl_decode_batch.
 * SKL_OK, SKL_ERR_CORRUPT, SKL_ERR_ARG or SKL_ERR_TRUNCATED. */
skl_status skl_check_columns(const skl_shape *shape, uint32_t num_rows, const uint8_t *const *sources,
                             const uint64_t *source_lens, const uint32_t *num_positions, const uint32_t *num_records);

/* ---- stats: what the records of many payloads add up to ----------------------------------------------------- */

/* Sums over the positions of a row that have records; the last three over all that the columns hold. */
typedef enum skl_stats_sum {
    SKL_STATS_POSITIONS = 0,
    SKL_STATS_RECORDS = 1,
    SKL_STATS_MASS = 2,           /* of the weights; of counts 1 each */
    SKL_STATS_ENTROPY = 3,        /* -w log w of the weights, nats */
    SKL_STATS_TOP = 4,            /* the largest weight */
    SKL_STATS_RIGHT = 5,          /* whether it is the label's; 1 / n where n are as large */
    SKL_STATS_LABEL = 6,          /* the label's weight, 0 where it has no record */
    SKL_STATS_HITS = 7,           /* whether the label has a record */
    SKL_STATS_OTHER_HITS = 8,     /* whether the label of the position half a sequence away has one here */
    SKL_STATS_UNSEEN = 9,         /* counts of 1 / rounds: what Good and Turing expect of tokens without record */
    SKL_STATS_LABEL_LOGPROB = 10, /* the column */
    SKL_STATS_EXACT_ENTROPY = 11, /* the column */
    SKL_STATS_DOCUMENTS = 12,     /* bits of the column document_start */
    SKL_STATS_SUMS = 13
} skl_stats_sum;

/* Bins of the largest weight, over 0..1. */
#define SKL_STATS_BINS 20

typedef struct skl_stats {
    uint32_t most_positions;   /* room of the scratch, of one row */
    uint64_t most_records;
    uint32_t num_uniques;      /* room of uniques */
    uint32_t num_buckets;      /* stretches of bucket_positions each; the last takes what follows it too */
    uint32_t bucket_positions;
    uint32_t num_ids;
    const uint32_t *ids;       /* [num_ids] tokens to be counted */
    int64_t *offsets;          /* scratch [most_positions + 1] */
    uint32_t *tokens;          /* scratch [most_positions + 1] */
    uint32_t *token_ids;       /* scratch [most_records] */
    uint8_t *codes;            /* scratch [most_records] */
    float *weights;            /* scratch [most_records]; of kind counts unused */
    double *rows;              /* [num_rows, SKL_STATS_SUMS] */
    uint64_t *uniques;         /* [num_uniques]: positions by their number of records, the last for all above */
    uint64_t *sizes;           /* [256]: records by their count; of ratios by the powers of two that they are below 1 */
    uint64_t *id_counts;       /* [num_ids]: how often each is a token */
    double *bins;              /* [SKL_STATS_BINS, 3]: positions, largest weights, RIGHT, by the largest weight */
    double *buckets;           /* [num_buckets, 5]: positions, HITS, OTHER_HITS, UNSEEN, LABEL, by place */
} skl_stats;

/* Decode and check the payloads of a batch, write the sums of each to rows, and add to the tables.
 *
 * Arguments as in skl_decode_batch; without stored tokens there are no labels.  Columns are checked as
 * skl_check_columns does.  As skl_decode; after a fault the results are unspecified. */
skl_status skl_gather_stats(const skl_shape *shape, uint32_t scale_log2, uint32_t num_rows,
                            const uint8_t *const *sources, const uint64_t *source_lens, const uint32_t *num_positions,
                            const uint32_t *num_records, const skl_stats *stats, uint32_t *row, skl_fault *fault);

/* ---- ratios: weights as 7-bit ratios to the decoded predecessor, SPEC.md section 4.3 ------------------------ */

/* Quantise the weights of one sequence into ratio codes in canonical order.
 *
 * offsets [num_positions + 1], rising from 0 to num_records.
 * token_ids, weights [num_records]: weights in (0, 2^scale_log2], ids distinct within a position and in any order.
 * keys: scratch for the longest position, num_keys of them.
 * out_offsets [num_positions + 1]; out_token_ids, out_codes: room for num_records.
 * Weights too small for the code are left out.  SKL_OK, SKL_ERR_ARG with *fault, SKL_ERR_DST_SMALL (keys). */
skl_status skl_quantise(uint32_t num_positions, uint64_t num_records, const int64_t *offsets,
                        const uint32_t *token_ids, const float *weights, uint32_t scale_log2, uint64_t *keys,
                        size_t num_keys, int64_t *out_offsets, uint32_t *out_token_ids, uint8_t *out_codes,
                        skl_fault *fault);

/* Look for an id that comes twice in a position, which the order of kind ratios does not show.
 *
 * offsets [num_positions + 1], rising from 0 to num_records; token_ids [num_records].
 * keys: scratch for the longest position, num_keys of them.
 * SKL_OK, SKL_ERR_CORRUPT or SKL_ERR_ARG (offsets) with *fault, SKL_ERR_DST_SMALL (keys). */
skl_status skl_check_distinct(uint32_t num_positions, uint64_t num_records, const int64_t *offsets,
                              const uint32_t *token_ids, uint64_t *keys, size_t num_keys, skl_fault *fault);

/* Ratio codes [num_records] back to weights [num_records]; offsets [num_positions + 1], rising from 0 to num_records.
 * SKL_OK or SKL_ERR_ARG (offsets, or scale_log2 not in 0..30). */
skl_status skl_expand(uint32_t num_positions, uint64_t num_records, const int64_t *offsets, const uint8_t *codes,
                      uint32_t scale_log2, float *weights);

/* ---- sampler: records from teacher logits, kernels_portable.c and sampler.c hold the arithmetic ------------- */

typedef enum skl_dtype { SKL_DTYPE_FLOAT32 = 1, SKL_DTYPE_FLOAT16 = 2, SKL_DTYPE_BFLOAT16 = 3 } skl_dtype;

typedef enum skl_sampler {
    SKL_SAMPLER_MULTINOMIAL = 1, /* rounds independent draws */
    SKL_SAMPLER_SYSTEMATIC = 2,  /* rounds evenly spaced points with one common shift */
    SKL_SAMPLER_TOPK = 3,        /* the k most probable ids, equal logits by lower id */
    SKL_SAMPLER_TOPP = 4         /* the fewest most probable ids that hold a mass of p, at most k */
} skl_sampler;

/* One call: rows of consecutive positions of one sequence. */
typedef struct skl_sampling {
    uint32_t sampler;            /* skl_sampler */
    uint32_t dtype;              /* skl_dtype of the logits */
    uint32_t vocab_size;         /* V, 1..2^24 */
    uint32_t num_positions;      /* T */
    uint64_t row_stride;         /* logits from a position to the next, any */
    uint32_t rounds;             /* multinomial, systematic: 1..65535 */
    uint32_t k;                  /* topk, topp: 1..65535 */
    double p;                    /* topp: in (0, 1] */
    double proposal_temperature; /* multinomial, systematic: t of the proposal q ~ p^t, in [0.001, 100]; else 1 */
    uint32_t self_normalise;     /* t other than 1: 1: weights sum to 1 (slightly biased); 0: unbiased */
    uint64_t seed;
    uint64_t sequence;
    uint32_t first_position; /* position of the first row; first_position + num_positions <= 2^32 */
} skl_sampling;

/* Sizes a call needs: scratch in 8-byte words, and the most records a position can have.
 * SKL_OK or SKL_ERR_ARG: a field outside its range. */
skl_status skl_draw_sizes(const skl_sampling *sampling, uint64_t *num_scratch, uint64_t *records_per_position);

/* Draw the records of every position, ids ascending.
 *
 * logits: num_logits values of dtype, 1 or more rows of V every row_stride; any alignment.
 * scratch [num_scratch]; offsets [T + 1]; token_ids and counts or weights: room for num_records.
 * counts, weights: exactly one is given; counts needs multinomial or systematic, t = 1 and rounds <= 127.
 * weights: counts / rounds, importance weights (t other than 1), or probabilities (topk, topp);
 * those below 2^-126 are left out.
 * Only ids with a probability above 0 are drawn; logits -inf, and those whose probability is below about 2^-125 of
 * the largest, have none.  NaN, a logit above 2^20 and a row without one above -2^20 are refused.  Records depend on
 * (row, seed, sequence, position) and on nothing else.
 * SKL_OK, SKL_ERR_DST_SMALL, SKL_ERR_ARG with *fault (NOT_FINITE: position is first_position + row, value the id). */
skl_status skl_draw(const skl_sampling *sampling, const void *logits, uint64_t num_logits, uint64_t *scratch,
                    uint64_t num_scratch, int64_t *offsets, uint32_t *token_ids, uint8_t *counts, float *weights,
                    uint64_t num_records, skl_fault *fault);

/* One block of Philox4x32-10: counter [4], key [2] to out [4]. */
void skl_philox(const uint32_t *counter, const uint32_t *key, uint32_t *out);

/* The kernels in use: "avx512", "avx2", "neon" or "portable"; all give the same records. */
const char *skl_kernels_name(void);

/* Use these kernels from now on, in every thread.  SKL_OK or SKL_ERR_UNSUPPORTED: not on this processor. */
skl_status skl_use_kernels(const char *name);

/* ---- draws to records ------------------------------------------------------------------------------------- */

/* Merge the sorted draws of each position into (token id, count) pairs.
 *
 * draws [num_positions * rounds], each row of rounds ids ascending; rounds 1..127.
 * offsets [num_positions + 1]; token_ids, counts: room for num_positions * rounds, offsets[num_positions] written.
 * SKL_OK or SKL_ERR_ARG with *fault (rounds out of range, a row that is not sorted). */
skl_status skl_merge_draws(uint32_t num_positions, uint32_t rounds, const uint32_t *draws, int64_t *offsets,
                           uint32_t *token_ids, uint8_t *counts, skl_fault *fault);

/* ---- ring: frames from one producer to one consumer in shared memory ------------------------------------------ */

/* The memory is the caller's: zero-filled, mapped by both sides, aligned to a page, 4096 bytes of control words and
 * a power of two >= 4096 of data.  One side pushes, the other peeks and releases.  Every function returns
 * SKL_ERR_ARG for memory of another size, SKL_ERR_UNSUPPORTED where it holds no ring of this version or the system
 * has no futex, and SKL_ERR_CORRUPT where its words contradict each other.
 * A frame lies in one piece, its payload on a cache line.  timeout_ns limits each wait; 0 does not wait. */

typedef enum skl_side { SKL_SIDE_PRODUCER = 0, SKL_SIDE_CONSUMER = 1 } skl_side;

typedef struct skl_frame {
    uint64_t offset; /* of the payload, from the start of the memory */
    uint64_t length; /* of the payload, in bytes */
    uint64_t number; /* frames before this one */
    uint64_t tag;    /* the producer's */
    uint32_t type;   /* the producer's */
} skl_frame;

typedef struct skl_ring_words {
    uint64_t capacity;   /* bytes of data */
    uint64_t durable;    /* what the consumer set last */
    uint64_t pushed;     /* frames */
    uint64_t popped;     /* frames */
    uint64_t wait_ns;    /* time the producer waited for room */
    uint64_t high_water; /* most bytes in use that the producer saw before a push */
    uint32_t producer_closed;
    uint32_t consumer_closed;
} skl_ring_words;

/* Make the memory a ring, before the other side sees it. */
skl_status skl_ring_init(void *memory, size_t memory_len);

/* Producer: append a frame of the parts one after the other; type is not UINT32_MAX.
 * SKL_OK, SKL_ERR_CLOSED (the consumer is), SKL_ERR_TIMEOUT (no room in time, push again), SKL_ERR_ARG (frame
 * larger than the ring's data less 64). */
skl_status skl_ring_push(void *memory, size_t memory_len, uint32_t type, uint64_t tag, const void *const *parts,
                         const size_t *lengths, size_t num_parts, uint64_t timeout_ns);

/* Consumer: the oldest frame, without taking it; its payload stays until skl_ring_release.
 * SKL_OK, SKL_ERR_CLOSED (the producer is, and nothing is left), SKL_ERR_TIMEOUT. */
skl_status skl_ring_peek(void *memory, size_t memory_len, uint64_t timeout_ns, skl_frame *frame);

/* Consumer: hand the space of the frame last peeked back.  SKL_ERR_ARG where none was. */
skl_status skl_ring_release(void *memory, size_t memory_len);

/* Consumer: publish how far its output is safe. */
skl_status skl_ring_set_durable(void *memory, size_t memory_len, uint64_t durable);

/* Either side (skl_side): no more pushes, or no more pops; wakes the other side. */
skl_status skl_ring_close(void *memory, size_t memory_len, uint32_t side);

/* Either side: the words, each read by itself. */
skl_status skl_ring_state(void *memory, size_t memory_len, skl_ring_words *state);

/* [/cffi] */

#endif
