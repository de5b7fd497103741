/* points.c: the points of a position, and the ids that they meet; sampler.c says how. */
#include "points.h"

#include <math.h>
#include <string.h>

#define WORD_BITS 53 /* of a uniform */

/* The second level of the block that was asked for last. */
typedef struct block_view {
    size_t block; /* SIZE_MAX: none yet */
    float e[SKL_BLOCK];
    double groups[SKL_GROUPS + 1]; /* running totals */
    size_t last;                   /* the last group that holds anything */
    size_t found;                  /* place in the block of the id that was found last */
    double until;                  /* targets below it are that id's too */
} block_view;

/* The 53-bit uniforms of a position as integers, in order of rounds. */
static void uniforms(const skl_sampling *s, uint32_t position, uint32_t rounds, uint64_t *words)
{
    const uint32_t key[2] = {(uint32_t)s->seed, (uint32_t)(s->seed >> 32)};
    for (uint32_t r = 0; r < rounds; r += 2) {
        const uint32_t counter[4] = {r / 2, position, (uint32_t)s->sequence, (uint32_t)(s->sequence >> 32)};
        uint32_t out[4];
        skl_philox(counter, key, out);
        words[r] = ((uint64_t)out[1] << 32 | out[0]) >> 11;
        if (r + 1 < rounds)
            words[r + 1] = ((uint64_t)out[3] << 32 | out[2]) >> 11;
    }
}

/* Sort uniforms, n of them: into about n buckets by their upper bits, then what is left inside the buckets.
 * spare, bucket_next: scratch [n]. */
static void sort_uniforms(uint64_t *words, size_t n, uint64_t *spare, uint32_t *bucket_next)
{
    uint32_t shift = WORD_BITS;
    while (n >> (WORD_BITS - shift + 1) > 0)
        shift--;
    const size_t buckets = (size_t)1 << (WORD_BITS - shift);
    memset(bucket_next, 0, buckets * sizeof *bucket_next);
    for (size_t i = 0; i < n; i++)
        bucket_next[words[i] >> shift]++;
    for (size_t b = 0, sum = 0; b < buckets; b++) { /* from sizes to where the next word of each bucket goes */
        const uint32_t size = bucket_next[b];
        bucket_next[b] = (uint32_t)sum;
        sum += size;
    }
    for (size_t i = 0; i < n; i++)
        spare[bucket_next[words[i] >> shift]++] = words[i];
    for (size_t i = 0; i < n; i++) {
        size_t j = i;
        for (; j > 0 && words[j - 1] > spare[i]; j--)
            words[j] = words[j - 1];
        words[j] = spare[i];
    }
}

/* Exponentials of one block, 0 beyond the row. */
static void block_exponentials(const skl_row *row, const skl_level *level, size_t block, float *e)
{
    const size_t n = skl_block_length(row, block);
    memset(e + n, 0, (SKL_BLOCK - n) * sizeof *e);
    row->kernels->exponentials(row->dtype, skl_block_start(row, block), n, level->scale, level->offset, e);
}

static void make_block(const skl_row *row, const skl_level *level, size_t block, block_view *view)
{
    double totals[SKL_GROUPS];
    view->block = block;
    view->until = -INFINITY;
    block_exponentials(row, level, block, view->e);
    row->kernels->group_totals(view->e, totals);
    view->groups[0] = 0.0;
    view->last = 0;
    for (size_t j = 0; j < SKL_GROUPS; j++) {
        view->groups[j + 1] = view->groups[j] + totals[j];
        if (view->groups[j + 1] > view->groups[j])
            view->last = j;
    }
}

/* Find the id at `target`, which is not below the one before in this block; its exponential is positive. */
static void find_in_block(block_view *view, double target)
{
    /* Counts instead of early exits: which of the 16 it will be, nothing could predict. */
    size_t j = 0, l = 0;
    for (size_t i = 1; i <= SKL_GROUPS; i++)
        j += view->groups[i] <= target;
    j = j < view->last ? j : view->last;
    const float *const e = view->e + j * SKL_LANES;
    double running[SKL_LANES], sum = view->groups[j];
    for (size_t i = 0; i < SKL_LANES; i++)
        running[i] = sum += (double)e[i];
    for (size_t i = 0; i < SKL_LANES; i++)
        l += running[i] <= target;
    view->until = j < view->last ? view->groups[j + 1] : INFINITY;
    if (l == SKL_LANES) /* rounding left none: the last one that can be drawn */
        while (!(e[--l] > 0.0f))
            continue;
    else if (running[l] < view->until)
        view->until = running[l];
    view->found = j * SKL_LANES + l;
}

/* Points of one position to (id, count) pairs, with p / q in ratios where p is given; returns how many. */
static size_t draw_points(const skl_sampling *s, uint32_t position, const skl_row *row, const skl_level *q,
                          const skl_level *p, const skl_points_scratch *scratch, uint32_t *token_ids)
{
    const int systematic = s->sampler == SKL_SAMPLER_SYSTEMATIC;
    uniforms(s, position, systematic ? 1 : s->rounds, scratch->words);
    if (!systematic)
        sort_uniforms(scratch->words, s->rounds, scratch->spare, scratch->counts);
    const double shift = (double)scratch->words[0] * 0x1p-53, step = q->total / (double)s->rounds;
    size_t last = row->num_blocks - 1;
    while (last > 0 && !(q->cdf[last + 1] > q->cdf[last]))
        last--;
    block_view view = {.block = SIZE_MAX};
    float p_exponentials[SKL_BLOCK];
    size_t block = 0, n = 0;
    for (uint32_t i = 0; i < s->rounds; i++) {
        const double x =
            systematic ? ((double)i + shift) * step : (double)scratch->words[i] * 0x1p-53 * q->total;
        while (block + 8 <= last && q->cdf[block + 8] <= x)
            block += 8;
        while (block < last && q->cdf[block + 1] <= x)
            block++;
        if (view.block != block) {
            make_block(row, q, block, &view);
            if (p != NULL)
                block_exponentials(row, p, block, p_exponentials);
        }
        const double share = (x - q->cdf[block]) / (q->cdf[block + 1] - q->cdf[block]);
        const double target = share * view.groups[SKL_GROUPS];
        if (target < view.until) {
            scratch->counts[n - 1]++;
            continue;
        }
        find_in_block(&view, target);
        token_ids[n] = (uint32_t)(block * SKL_BLOCK + view.found);
        scratch->counts[n] = 1;
        if (p != NULL)
            scratch->ratios[n] = (double)p_exponentials[view.found] / (double)view.e[view.found];
        n++;
    }
    return n;
}

/* Importance weights count * p / q, either summing to 1 or with their true factor; the smallest are left out. */
static size_t weigh(const skl_sampling *s, const skl_level *q, const skl_level *p, const skl_points_scratch *scratch,
                    size_t n, uint32_t *token_ids, float *weights)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        scratch->ratios[i] *= (double)scratch->counts[i];
        sum += scratch->ratios[i];
    }
    const double divisor = s->self_normalise ? sum : (double)s->rounds * (p->total / q->total);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        const double weight = scratch->ratios[i] / divisor;
        if (weight >= SKL_SMALLEST_WEIGHT) { /* false for 0 / 0 too */
            token_ids[kept] = token_ids[i];
            weights[kept++] = (float)weight;
        }
    }
    return kept;
}

size_t skl_draw_position(const skl_sampling *s, uint32_t position, const skl_row *row, const skl_level *q,
                         const skl_level *p, const skl_points_scratch *scratch, uint32_t *token_ids, uint8_t *counts,
                         float *weights)
{
    const size_t n = draw_points(s, position, row, q, p, scratch, token_ids);
    if (p != NULL)
        return weigh(s, q, p, scratch, n, token_ids, weights);
    for (size_t i = 0; i < n; i++) {
        if (counts != NULL)
            counts[i] = (uint8_t)scratch->counts[i];
        else
            weights[i] = (float)((double)scratch->counts[i] / (double)s->rounds);
    }
    return n;
}
