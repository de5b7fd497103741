/* sampler.c: sparse records from rows of logits.
 *
 * One pass over a row gives a float32 sum of exponentials for each block of 256 ids (kernels_portable.c fixes it bit
 * by bit); the sums, added up in float64, are the first level of the distribution function.  A point x in [0, Z) picks
 * a block there; its place inside the block, stretched to the block's own float64 total, picks the id.  Only blocks
 * that hold a point are read again.  So an id of probability 1e-12 is drawn as often as it should be, which a single
 * float32 running sum could not do.
 *
 *   first level    C[0] = 0, C[b + 1] = C[b] + sum[b] in float64; Z = C[B]
 *   second level   group j of a block is its ids 16 j .. 16 j + 15; its total is the float64 sum over lanes l and
 *                  l + 8, then l + 4, l + 2, l + 1; totals are added up in order of j, then the ids of one group in
 *                  order
 *   point          x in block b: r = (x - C[b]) / (C[b + 1] - C[b]); the id is the first whose running sum passes
 *                  r * (total of the block), the last of positive probability where rounding leaves none
 *   uniform        round r: the 64-bit word r mod 2 (low half first) of the Philox block r / 2, counter
 *                  (r / 2, position, sequence low, sequence high), key (seed low, seed high); u = (word >> 11) * 2^-53
 *   multinomial    x = u * Z for the uniforms in ascending order
 *   systematic     x = (i + u) * (Z / rounds) with the uniform of round 0
 *   offset         integer nearest to scale * m, m the largest logit of the first block that has one above -2^20;
 *                  where Z then passes 2^100, m is the row's largest */
#include "environment.h"
#include "faults.h"
#include "points.h"
#include "rows.h"
#include "tops.h"

#include <math.h>

#define LARGEST_LOGIT 0x1p20f /* beyond it float32 has no room left for differences that matter */
#define LARGEST_TOTAL 0x1p100
#define MAX_VOCAB (UINT32_C(1) << 24)
#define MAX_ROUNDS UINT32_C(65535)
#define LOG2_E 1.4426950408889634

/* Id of the first logit that no row may hold; 0 where every one is -inf or hardly more. */
static size_t first_bad_id(const skl_row *row)
{
    float values[SKL_BLOCK];
    for (size_t block = 0; block < row->num_blocks; block++) {
        const size_t n = skl_block_length(row, block);
        row->kernels->widen(row->dtype, skl_block_start(row, block), n, values);
        for (size_t i = 0; i < n; i++)
            if (!(values[i] <= LARGEST_LOGIT))
                return block * SKL_BLOCK + i;
    }
    return 0;
}

static void fill_level(const skl_row *row, skl_level *level, float *maxima)
{
    row->kernels->block_cdf(row->dtype, row->logits, row->vocab_size, level->scale, level->offset, level->cdf, maxima);
    level->total = level->cdf[row->num_blocks];
}

/* Whether the sums alone show that no logit is too large: an exponential is at most their total, 2^100. */
static int surely_small(const skl_level *level)
{
    return level->total <= LARGEST_TOTAL &&
           (double)level->offset + 128.0 <= (double)level->scale * LARGEST_LOGIT;
}

/* First level of p^t, and the maxima of the blocks unless NULL; 0 where the row has a logit it may not have, or
 * none. */
static int make_level(const skl_row *row, double temperature, skl_level *level, float *maxima)
{
    level->scale = (float)(temperature * LOG2_E);
    float largest = -INFINITY;
    for (size_t b = 0; b < row->num_blocks && !(largest > -LARGEST_LOGIT); b++)
        row->kernels->block_maxima(row->dtype, skl_block_start(row, b), skl_block_length(row, b), &largest);
    if (!(largest > -LARGEST_LOGIT && largest <= LARGEST_LOGIT))
        return 0;
    level->offset = rintf(level->scale * largest);
    fill_level(row, level, maxima);
    if (surely_small(level))
        return 1;
    for (size_t b = 0; b < row->num_blocks; b++) {
        float most;
        row->kernels->block_maxima(row->dtype, skl_block_start(row, b), skl_block_length(row, b), &most);
        largest = most > largest ? most : largest;
    }
    if (largest > LARGEST_LOGIT)
        return 0;
    if (!(level->total <= LARGEST_TOTAL)) { /* true for NaN */
        level->offset = rintf(level->scale * largest);
        fill_level(row, level, maxima);
    }
    return level->total <= LARGEST_TOTAL; /* false for NaN */
}

static int is_top(const skl_sampling *s)
{
    return s->sampler == SKL_SAMPLER_TOPK || s->sampler == SKL_SAMPLER_TOPP;
}

skl_status skl_draw_sizes(const skl_sampling *s, uint64_t *num_scratch, uint64_t *records_per_position)
{
    const int top = is_top(s);
    if (s->sampler < SKL_SAMPLER_MULTINOMIAL || s->sampler > SKL_SAMPLER_TOPP || s->dtype < SKL_DTYPE_FLOAT32 ||
        s->dtype > SKL_DTYPE_BFLOAT16 || s->vocab_size < 1 || s->vocab_size > MAX_VOCAB ||
        (uint64_t)s->first_position + s->num_positions > UINT64_C(1) << 32 || s->self_normalise > 1)
        return SKL_ERR_ARG;
    if (top ? s->k < 1 || s->k > MAX_ROUNDS || s->proposal_temperature != 1.0
            : s->rounds < 1 || s->rounds > MAX_ROUNDS ||
                  !(s->proposal_temperature >= 0.001 && s->proposal_temperature <= 100.0))
        return SKL_ERR_ARG;
    if (s->sampler == SKL_SAMPLER_TOPP && !(s->p > 0.0 && s->p <= 1.0))
        return SKL_ERR_ARG;
    const uint64_t num_blocks = (s->vocab_size + SKL_BLOCK - 1) / SKL_BLOCK, keys = top ? s->k : s->rounds;
    *records_per_position = keys < s->vocab_size ? keys : s->vocab_size;
    /* maxima, two levels, words, spare, ratios, counts: cut_scratch lays them out in this order */
    *num_scratch = (num_blocks + 1) / 2 + 2 * (num_blocks + 1) + 3 * keys + (keys + 1) / 2;
    return SKL_OK;
}

/* The caller's scratch in parts, each of which begins at a multiple of 8 bytes. */
typedef struct scratch_view {
    float *maxima;             /* [num_blocks] */
    double *q_cdf, *p_cdf;     /* [num_blocks + 1] */
    skl_points_scratch points; /* num_keys each, rounds or k; topk and topp keep their keys in its words */
} scratch_view;

static scratch_view cut_scratch(uint64_t *scratch, size_t num_blocks, size_t num_keys)
{
    scratch_view view;
    view.maxima = (float *)scratch;
    view.q_cdf = (double *)(scratch + (num_blocks + 1) / 2);
    view.p_cdf = view.q_cdf + num_blocks + 1;
    view.points.words = (uint64_t *)(view.p_cdf + num_blocks + 1);
    view.points.spare = view.points.words + num_keys;
    view.points.ratios = (double *)(view.points.spare + num_keys);
    view.points.counts = (uint32_t *)(view.points.ratios + num_keys);
    return view;
}

/* Whether the arguments of skl_draw agree with each other; *per_position: the most records a position can have. */
static skl_status check_call(const skl_sampling *s, uint64_t num_logits, uint64_t num_scratch, const uint8_t *counts,
                             const float *weights, uint64_t *per_position, skl_fault *fault)
{
    uint64_t needed;
    const int importance = s->proposal_temperature != 1.0;
    if (skl_draw_sizes(s, &needed, per_position) != SKL_OK || (counts == NULL) == (weights == NULL) ||
        (counts != NULL && (is_top(s) || importance || s->rounds > 127)))
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_NONE, 0, 0);
    if (num_scratch < needed)
        return SKL_ERR_DST_SMALL;
    if (s->num_positions > 0) {
        const uint64_t gaps = s->num_positions - 1;
        if (num_logits < s->vocab_size || (gaps > 0 && s->row_stride > (num_logits - s->vocab_size) / gaps))
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, gaps, num_logits);
    }
    return SKL_OK;
}

skl_status skl_draw(const skl_sampling *s, const void *logits, uint64_t num_logits, uint64_t *scratch,
                    uint64_t num_scratch, int64_t *offsets, uint32_t *token_ids, uint8_t *counts, float *weights,
                    uint64_t num_records, skl_fault *fault)
{
    SKL_DEFAULT_ENVIRONMENT;
    uint64_t per_position = 0;
    SKL_TRY(check_call(s, num_logits, num_scratch, counts, weights, &per_position, fault));
    const size_t num_blocks = (s->vocab_size + SKL_BLOCK - 1) / SKL_BLOCK;
    const scratch_view view = cut_scratch(scratch, num_blocks, is_top(s) ? s->k : s->rounds);
    const int importance = s->proposal_temperature != 1.0;
    skl_row row = {skl_current_kernels(), s->dtype, logits, s->vocab_size, num_blocks};
    skl_level q = {.cdf = view.q_cdf}, p = {.cdf = view.p_cdf};
    uint64_t total = 0;
    offsets[0] = 0;
    for (uint32_t t = 0; t < s->num_positions; t++) {
        const uint32_t position = s->first_position + t;
        row.logits = (const unsigned char *)logits + t * s->row_stride * skl_logit_size(s->dtype);
        if (num_records - total < per_position)
            return SKL_ERR_DST_SMALL;
        if (!make_level(&row, s->proposal_temperature, &q, is_top(s) ? view.maxima : NULL) ||
            (importance && !make_level(&row, 1.0, &p, NULL)))
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_NOT_FINITE, position, first_bad_id(&row));
        uint8_t *const counts_out = counts == NULL ? NULL : counts + total;
        float *const weights_out = weights == NULL ? NULL : weights + total;
        total += is_top(s) ? skl_top_position(s, &row, &q, view.maxima, view.points.words, token_ids + total,
                                              weights_out)
                           : skl_draw_position(s, position, &row, &q, importance ? &p : NULL, &view.points,
                                               token_ids + total, counts_out, weights_out);
        offsets[t + 1] = (int64_t)total;
    }
    return SKL_OK;
}
