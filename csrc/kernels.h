/* kernels.h: the vector work of sampler and codec, one table for each instruction set; private. */
#ifndef SKL_KERNELS_H
#define SKL_KERNELS_H

#include "exact.h"
#include "skl.h"

/* Ids a block of the two-level CDF covers, and lanes of every sum inside it. */
#define SKL_BLOCK 256
#define SKL_LANES 16
#define SKL_GROUPS (SKL_BLOCK / SKL_LANES)

/* Code that is compiled into each caller, with what the caller knows of the arguments. */
#define SKL_INLINE static inline __attribute__((always_inline))

#define SKL_LITTLE_ENDIAN (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)

/* Bytes of a logit. */
SKL_INLINE size_t skl_logit_size(uint32_t dtype)
{
    return dtype == SKL_DTYPE_FLOAT32 ? 4 : 2;
}

/* What a pass over ids and codes to pack saw. */
typedef struct skl_pack_seen {
    uint32_t large_id;       /* an id is not below vocab_size */
    uint32_t zero_code;      /* a code is 0 */
    uint64_t ids_not_rising; /* how many ids are not above the id before them, positions not regarded */
} skl_pack_seen;

/* Where a record has its id and code, and for what else one copy of a loop is made. */
typedef struct skl_record_format {
    uint32_t size, id_bits;
    int counts, stream; /* as in skl_scan */
} skl_record_format;

/* A pass over the records of a sequence, in as many calls as the caller likes. */
typedef struct skl_scan {
    uint32_t profile, vocab_size;
    int counts;           /* kind counts; else ratios */
    int stream;           /* results go past the caches; token_ids is then on a cache line */
    uint32_t last_id;     /* where the pass stands: the id of the record before */
    uint64_t rounds_left; /* and what the open position's counts have not taken of its rounds; 0 at first */
    uint32_t reserved;    /* what it saw: a bit that must be 0 is set */
    uint32_t bad;         /* a record or position breaks a rule of SPEC.md section 4, but that no weight may reach 0 */
} skl_scan;

/* A pass over the numbers of records, beside it. */
typedef struct skl_position_walk {
    const uint8_t *numbers; /* [num_positions], of record_count_size bytes each */
    int64_t *offsets;       /* [num_positions + 1], the first is base */
    int64_t base;
    uint64_t next_begin; /* where the pass stands: the record that the next position begins with */
    uint32_t position;   /* and that position's number; both 0 at first */
    uint32_t num_positions, record_count_size;
    int stream;
    uint8_t begin_mark; /* of a record that begins a position: for counts its rounds, for ratios 1 */
} skl_position_walk;

/* Every table gives the same bits for the same input; kernels_portable.c writes the arithmetic out.
 *
 * dtype: skl_dtype.  row: n logits, nothing outside is read; blocks are ceil(n / SKL_BLOCK).  The exponential of a
 * logit x is 2^(scale * x - offset), 0 where scale * x - offset <= -125.5; NaN stays NaN. */
typedef struct skl_kernels {
    const char *name;
    /* The logits as float32. */
    void (*widen)(uint32_t dtype, const void *row, size_t n, float *values);
    /* Largest logit of each block; NaN does not count, -inf where nothing does. */
    void (*block_maxima)(uint32_t dtype, const void *row, size_t n, float *maxima);
    /* 0, then the running sum of the exponentials up to the end of each block: cdf [blocks + 1].  maxima [blocks] as
     * block_maxima gives them, or NULL. */
    void (*block_cdf)(uint32_t dtype, const void *row, size_t n, float scale, float offset, double *cdf,
                      float *maxima);
    /* The exponentials themselves. */
    void (*exponentials)(uint32_t dtype, const void *row, size_t n, float scale, float offset, float *e);
    /* Sums [SKL_GROUPS] of SKL_LANES exponentials each, of e [SKL_BLOCK]. */
    void (*group_totals)(const float *e, double *totals);
    /* n ids and codes to records of a profile; with anything that is seen, the records have no meaning. */
    void (*pack)(uint32_t profile, uint32_t vocab_size, const uint32_t *token_ids, const uint8_t *codes, size_t n,
                 uint8_t *dst, skl_pack_seen *seen);
    /* Whether the counts of any position that has some sum to something else than rounds. */
    int (*sums_differ)(const int64_t *offsets, uint32_t num_positions, const uint8_t *codes, uint32_t rounds);
    /* Begin marks [n] of the records first and after: walk->begin_mark where a position begins, else 0; and the
     * offsets of these positions. */
    void (*mark_begins)(skl_position_walk *walk, uint64_t first, size_t n, uint8_t *begin_marks);
    /* n records to ids and codes, with their begin marks [n].  At least 64 bytes after the records are readable. */
    void (*unpack)(skl_scan *scan, const uint8_t *begin_marks, const uint8_t *src, size_t n, uint32_t *token_ids,
                   uint8_t *codes);
    /* After the last call that streams. */
    void (*settle)(void);
    /* n tokens of 2, 3 or 4 bytes; at least 64 bytes after them are readable. */
    void (*widen_tokens)(uint32_t size, const uint8_t *src, size_t n, uint32_t *tokens);
    /* n >= 2 tokens of a row to n - 1 inputs and labels; returns the largest. */
    uint32_t (*split_tokens)(const uint32_t *tokens, size_t n, int64_t *input_ids, int64_t *labels);
    /* codes[i] / rounds, rounded once; both below 128. */
    void (*divide)(const uint8_t *codes, size_t n, uint32_t rounds, float *quotients);
} skl_kernels;

extern const skl_kernels skl_kernels_portable;
#ifdef SKL_X86_KERNELS
extern const skl_kernels skl_kernels_avx2;
extern const skl_kernels skl_kernels_avx512;
#endif
#ifdef SKL_NEON_KERNELS
extern const skl_kernels skl_kernels_neon;
#endif

/* The table in use: the widest the processor can run, unless skl_use_kernels chose another. */
const skl_kernels *skl_current_kernels(void);

#endif
