/* sampler.c: sparse records from rows of logits.
 *
 * One pass over a row gives a float32 sum of exponentials for each block of 256 ids (kernels_portable.c fixes it bit
 * by bit); the sums, added up in float64, are the first level of the distribution function.  A point x in [0, Z) picks
 * a block there; its place inside the block, stretched to the block's own float64 total, picks the id.  Only blocks
 * that hold a point are read again.  So an id of probability 1e-12 is drawn as often as it should be, which a single
 * float32 running sum could not do.
 *
 *   first level    C[0] = 0, C[b + 1] = C[b] + sum[b] in float64; Z = C[B]
 *   second level   group j of a block is its ids 16 j .. 16 j + 15; its total is the float64 sum over lanes l and l + 8,
 *                  then l + 4, l + 2, l + 1; totals are added up in order of j, then the ids of one group in order
 *   point          x in block b: r = (x - C[b]) / (C[b + 1] - C[b]); the id is the first whose running sum passes
 *                  r * (total of the block), the last of positive probability where rounding leaves none
 *   uniform        round r: the 64-bit word r mod 2 (low half first) of the Philox block r / 2, counter
 *                  (r / 2, position, sequence low, sequence high), key (seed low, seed high); u = (word >> 11) * 2^-53
 *   multinomial    x = u * Z for the uniforms in ascending order
 *   systematic     x = (i + u) * (Z / rounds) with the uniform of round 0
 *   offset         integer nearest to scale * m, m the largest logit of the first block that has one above -2^20;
 *                  where Z then passes 2^100, m is the row's largest */
#include "kernels.h"
#include "records.h"

#include <math.h>
#include <string.h>

#define LARGEST_LOGIT 0x1p20f /* beyond it float32 has no room left for differences that matter */
#define LARGEST_TOTAL 0x1p100
#define SMALLEST_WEIGHT 0x1p-126 /* below it float32 is subnormal, and some processes flush that to 0 */
#define MAX_VOCAB (UINT32_C(1) << 24)
#define MAX_ROUNDS UINT32_C(65535)
#define GROUPS (SKL_BLOCK / SKL_LANES)
#define LOG2_E 1.4426950408889634

/* The first level for one exponent. */
typedef struct level {
    float scale, offset;
    double *cdf; /* [num_blocks + 1] */
    double total;
} level;

typedef struct row_view {
    const skl_kernels *kernels;
    uint32_t dtype;
    const unsigned char *logits;
    size_t vocab_size, num_blocks;
    float *sums; /* [num_blocks], scratch */
} row_view;

/* The second level of the block that was asked for last. */
typedef struct block_view {
    size_t block; /* SIZE_MAX: none yet */
    float e[SKL_BLOCK];
    double groups[GROUPS + 1];
    size_t last; /* the last group that holds anything */
} block_view;

typedef struct scratch_view {
    float *sums;
    double *cdf, *cdf_of_p, *ratios;
    uint64_t *keys;
    uint32_t *counts;
} scratch_view;

void skl_philox(const uint32_t *counter, const uint32_t *key, uint32_t *out)
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t a = UINT64_C(0xD2511F53) * c0, b = UINT64_C(0xCD9E8D57) * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += UINT32_C(0x9E3779B9);
        k1 += UINT32_C(0xBB67AE85);
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

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

/* Few keys: insertion is faster than the heap; the result is the same. */
static void sort_points(uint64_t *keys, size_t n)
{
    if (n > 96) {
        skl_sort_keys(keys, n);
        return;
    }
    for (size_t i = 1; i < n; i++) {
        const uint64_t key = keys[i];
        size_t j = i;
        for (; j > 0 && keys[j - 1] > key; j--)
            keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

static size_t logit_size(uint32_t dtype)
{
    return dtype == SKL_DTYPE_FLOAT32 ? 4 : 2;
}

static const unsigned char *block_start(const row_view *row, size_t block)
{
    return row->logits + block * SKL_BLOCK * logit_size(row->dtype);
}

static size_t block_length(const row_view *row, size_t block)
{
    const size_t left = row->vocab_size - block * SKL_BLOCK;
    return left < SKL_BLOCK ? left : SKL_BLOCK;
}

/* Id of the first logit that no row may hold; 0 where every one is -inf or hardly more. */
static size_t first_bad_id(const row_view *row)
{
    float values[SKL_BLOCK];
    for (size_t block = 0; block < row->num_blocks; block++) {
        const size_t n = block_length(row, block);
        row->kernels->widen(row->dtype, block_start(row, block), n, values);
        for (size_t i = 0; i < n; i++)
            if (!(values[i] <= LARGEST_LOGIT))
                return block * SKL_BLOCK + i;
    }
    return 0;
}

static void fill_level(const row_view *row, level *lv)
{
    row->kernels->block_sums(row->dtype, row->logits, row->vocab_size, lv->scale, lv->offset, row->sums);
    double running = 0.0;
    lv->cdf[0] = 0.0;
    for (size_t b = 0; b < row->num_blocks; b++) {
        running += (double)row->sums[b];
        lv->cdf[b + 1] = running;
    }
    lv->total = running;
}

/* First level of p^t; 0 where the row has a logit it may not have, or none. */
static int make_level(const row_view *row, double temperature, level *lv)
{
    lv->scale = (float)(temperature * LOG2_E);
    float largest = -INFINITY;
    for (size_t b = 0; b < row->num_blocks && !(largest > -LARGEST_LOGIT); b++)
        row->kernels->block_maxima(row->dtype, block_start(row, b), block_length(row, b), &largest);
    if (!(largest > -LARGEST_LOGIT && largest <= LARGEST_LOGIT))
        return 0;
    lv->offset = rintf(lv->scale * largest);
    fill_level(row, lv);
    if (lv->total <= LARGEST_TOTAL)
        return 1;
    row->kernels->block_maxima(row->dtype, row->logits, row->vocab_size, row->sums);
    for (size_t b = 0; b < row->num_blocks; b++)
        largest = row->sums[b] > largest ? row->sums[b] : largest;
    if (largest > LARGEST_LOGIT)
        return 0;
    lv->offset = rintf(lv->scale * largest);
    fill_level(row, lv);
    return lv->total <= LARGEST_TOTAL; /* false for NaN */
}

/* Exponentials of one block, 0 beyond the row. */
static void block_exponentials(const row_view *row, const level *lv, size_t block, float *e)
{
    const size_t n = block_length(row, block);
    for (size_t i = n; i < SKL_BLOCK; i++)
        e[i] = 0.0f;
    row->kernels->exponentials(row->dtype, block_start(row, block), n, lv->scale, lv->offset, e);
}

static void make_block(const row_view *row, const level *lv, size_t block, block_view *view)
{
    view->block = block;
    block_exponentials(row, lv, block, view->e);
    view->groups[0] = 0.0;
    view->last = 0;
    for (size_t j = 0; j < GROUPS; j++) {
        double lanes[SKL_LANES];
        for (size_t l = 0; l < SKL_LANES; l++)
            lanes[l] = (double)view->e[j * SKL_LANES + l];
        for (size_t width = SKL_LANES / 2; width > 0; width /= 2)
            for (size_t l = 0; l < width; l++)
                lanes[l] += lanes[l + width];
        view->groups[j + 1] = view->groups[j] + lanes[0];
        if (view->groups[j + 1] > view->groups[j])
            view->last = j;
    }
}

/* Place in the block of the share r in [0, 1] of its total; its exponential is positive. */
static size_t find_in_block(const block_view *view, double r)
{
    const double target = r * view->groups[GROUPS];
    size_t j = 0;
    while (j < view->last && view->groups[j + 1] <= target)
        j++;
    double running = view->groups[j];
    size_t found = 0;
    for (size_t l = 0; l < SKL_LANES; l++) {
        const size_t i = j * SKL_LANES + l;
        if (view->e[i] > 0.0f)
            found = i;
        running += (double)view->e[i];
        if (running > target)
            break;
    }
    return found;
}

/* Points of one position to (id, count) pairs, with p / q where `of_p` is given; returns how many. */
static size_t draw_points(const skl_sampling *s, uint32_t position, const row_view *row, const level *q,
                          const level *of_p, const scratch_view *scratch, uint32_t *token_ids)
{
    const int systematic = s->sampler == SKL_SAMPLER_SYSTEMATIC;
    uniforms(s, position, systematic ? 1 : s->rounds, scratch->keys);
    if (!systematic)
        sort_points(scratch->keys, s->rounds);
    const double shift = (double)scratch->keys[0] * 0x1p-53, step = q->total / (double)s->rounds;
    size_t last = row->num_blocks - 1;
    while (last > 0 && !(q->cdf[last + 1] > q->cdf[last]))
        last--;
    block_view view = {.block = SIZE_MAX};
    float e_of_p[SKL_BLOCK];
    size_t block = 0, n = 0;
    for (uint32_t i = 0; i < s->rounds; i++) {
        const double x =
            systematic ? ((double)i + shift) * step : (double)scratch->keys[i] * 0x1p-53 * q->total;
        while (block < last && q->cdf[block + 1] <= x)
            block++;
        if (view.block != block) {
            make_block(row, q, block, &view);
            if (of_p != NULL)
                block_exponentials(row, of_p, block, e_of_p);
        }
        const size_t place =
            find_in_block(&view, (x - q->cdf[block]) / (q->cdf[block + 1] - q->cdf[block]));
        const uint32_t id = (uint32_t)(block * SKL_BLOCK + place);
        if (n > 0 && token_ids[n - 1] == id) {
            scratch->counts[n - 1]++;
            continue;
        }
        token_ids[n] = id;
        scratch->counts[n] = 1;
        if (of_p != NULL)
            scratch->ratios[n] = (double)e_of_p[place] / (double)view.e[place];
        n++;
    }
    return n;
}

/* Importance weights count * p / q, either summing to 1 or with their true factor; the smallest are left out. */
static size_t weigh(const skl_sampling *s, const level *q, const level *of_p, const scratch_view *scratch, size_t n,
                    uint32_t *token_ids, float *weights)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        scratch->ratios[i] *= (double)scratch->counts[i];
        sum += scratch->ratios[i];
    }
    const double divisor = s->self_normalise ? sum : (double)s->rounds * (of_p->total / q->total);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        const double weight = scratch->ratios[i] / divisor;
        if (weight >= SMALLEST_WEIGHT) { /* false for 0 / 0 too */
            token_ids[kept] = token_ids[i];
            weights[kept++] = (float)weight;
        }
    }
    return kept;
}

/* Multinomial and systematic records of one position; returns how many. */
static size_t draw_position(const skl_sampling *s, uint32_t position, const row_view *row, const level *q,
                            const level *of_p, const scratch_view *scratch, uint32_t *token_ids, uint8_t *counts,
                            float *weights)
{
    const size_t n = draw_points(s, position, row, q, of_p, scratch, token_ids);
    if (of_p != NULL)
        return weigh(s, q, of_p, scratch, n, token_ids, weights);
    for (size_t i = 0; i < n; i++) {
        if (counts != NULL)
            counts[i] = (uint8_t)scratch->counts[i];
        else
            weights[i] = (float)((double)scratch->counts[i] / (double)s->rounds);
    }
    return n;
}

/* Larger key: larger logit, then lower id.  -0 counts as 0. */
static uint64_t rank_key(float logit, uint32_t id)
{
    const float value = logit + 0.0f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = bits & UINT32_C(0x80000000) ? ~bits : bits | UINT32_C(0x80000000);
    return (uint64_t)bits << 32 | (uint32_t)~id;
}

/* The logit of a key. */
static float key_logit(uint64_t key)
{
    const uint32_t rank = (uint32_t)(key >> 32);
    const uint32_t bits = rank & UINT32_C(0x80000000) ? rank ^ UINT32_C(0x80000000) : ~rank;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Keep the `room` largest keys in a heap whose top is the smallest of them. */
static void heap_offer(uint64_t *heap, size_t room, size_t *used, uint64_t key)
{
    size_t at;
    if (*used < room) {
        for (at = (*used)++; at > 0 && heap[(at - 1) / 2] > key; at = (at - 1) / 2)
            heap[at] = heap[(at - 1) / 2];
        heap[at] = key;
        return;
    }
    if (key <= heap[0])
        return;
    at = 0;
    for (size_t child = 1; child < room; child = 2 * at + 1) {
        if (child + 1 < room && heap[child + 1] < heap[child])
            child++;
        if (heap[child] >= key)
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = key;
}

/* Keys of the k largest logits, or of all, as a heap; row->sums holds the blocks' maxima.  Returns how many. */
static size_t top_keys(const row_view *row, size_t k, uint64_t *heap)
{
    /* k blocks have a logit of at least the k-th largest maximum, so that the k-th largest logit has that too */
    size_t used = 0;
    for (size_t b = 0; b < row->num_blocks; b++)
        heap_offer(heap, k, &used, rank_key(row->sums[b], UINT32_MAX));
    const float least = used == k ? key_logit(heap[0]) : -INFINITY;
    used = 0;
    float values[SKL_BLOCK];
    for (size_t b = 0; b < row->num_blocks; b++) {
        if (row->sums[b] < least || (used == k && rank_key(row->sums[b], 0) < heap[0]))
            continue;
        const size_t n = block_length(row, b);
        row->kernels->widen(row->dtype, block_start(row, b), n, values);
        for (size_t i = 0; i < n; i++)
            if (values[i] >= least)
                heap_offer(heap, k, &used, rank_key(values[i], (uint32_t)(b * SKL_BLOCK + i)));
    }
    return used;
}

static double exponential_of(const row_view *row, const level *lv, uint32_t id)
{
    float e;
    row->kernels->exponentials(row->dtype, row->logits + id * logit_size(row->dtype), 1, lv->scale, lv->offset, &e);
    return (double)e;
}

/* How many of the n keys, which it sorts, the nucleus of mass p takes; n + 1: it needs more than these. */
static size_t nucleus(const row_view *row, const level *lv, double p, uint64_t *keys, size_t n)
{
    skl_sort_keys(keys, n);
    double mass = 0.0;
    for (size_t taken = 1; taken <= n; taken++) {
        mass += exponential_of(row, lv, ~(uint32_t)keys[n - taken]);
        if (p < 1.0 && mass >= p * lv->total)
            return taken;
    }
    return n + 1;
}

/* topk and topp records of one position; returns how many. */
static size_t top_position(const skl_sampling *s, const row_view *row, const level *lv, uint64_t *keys,
                           uint32_t *token_ids, float *weights)
{
    const size_t cap = s->k < s->vocab_size ? s->k : s->vocab_size;
    row->kernels->block_maxima(row->dtype, row->logits, row->vocab_size, row->sums);
    size_t taken, n;
    if (s->sampler == SKL_SAMPLER_TOPK) {
        taken = n = top_keys(row, cap, keys);
    } else { /* nuclei are small on most rows: look at few ids first */
        for (size_t look = cap < 64 ? cap : 64;; look = look < cap / 8 ? look * 8 : cap) {
            n = top_keys(row, look, keys);
            taken = nucleus(row, lv, s->p, keys, n);
            if (taken <= n || look == cap)
                break;
        }
        taken = taken < n ? taken : n;
    }
    uint64_t *const chosen = keys + (n - taken); /* the largest; for topk all */
    for (size_t i = 0; i < taken; i++)
        chosen[i] = ~(uint32_t)chosen[i];
    skl_sort_keys(chosen, taken);
    size_t kept = 0;
    for (size_t i = 0; i < taken; i++) {
        const double weight = exponential_of(row, lv, (uint32_t)chosen[i]) / lv->total;
        if (weight >= SMALLEST_WEIGHT) {
            token_ids[kept] = (uint32_t)chosen[i];
            weights[kept++] = (float)weight;
        }
    }
    return kept;
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
    /* sums, two levels, keys, ratios, counts: cut_scratch lays them out in this order */
    *num_scratch = (num_blocks + 1) / 2 + 2 * (num_blocks + 1) + keys + keys + (keys + 1) / 2;
    return SKL_OK;
}

/* Every part begins at a multiple of 8 bytes. */
static scratch_view cut_scratch(uint64_t *scratch, size_t num_blocks, size_t num_keys)
{
    scratch_view view;
    view.sums = (float *)scratch;
    view.cdf = (double *)(scratch + (num_blocks + 1) / 2);
    view.cdf_of_p = view.cdf + num_blocks + 1;
    view.ratios = view.cdf_of_p + num_blocks + 1;
    view.keys = (uint64_t *)(view.ratios + num_keys);
    view.counts = (uint32_t *)(view.keys + num_keys);
    return view;
}

/* Whether the arguments of skl_draw agree with each other; *needed as skl_draw_sizes. */
static skl_status check_call(const skl_sampling *s, uint64_t num_logits, uint64_t num_scratch, const uint8_t *counts,
                             const float *weights, uint64_t *needed, skl_fault *fault)
{
    uint64_t per_position;
    const int importance = s->proposal_temperature != 1.0;
    if (skl_draw_sizes(s, needed, &per_position) != SKL_OK || (counts == NULL) == (weights == NULL) ||
        (counts != NULL && (is_top(s) || importance || s->rounds > 127)))
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_NONE, 0, 0);
    if (num_scratch < *needed)
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
    uint64_t needed, per_position = 0;
    const skl_status status = check_call(s, num_logits, num_scratch, counts, weights, &needed, fault);
    if (status != SKL_OK)
        return status;
    (void)skl_draw_sizes(s, &needed, &per_position);
    const size_t num_blocks = (s->vocab_size + SKL_BLOCK - 1) / SKL_BLOCK;
    const scratch_view view = cut_scratch(scratch, num_blocks, is_top(s) ? s->k : s->rounds);
    const int importance = s->proposal_temperature != 1.0;
    row_view row = {skl_current_kernels(), s->dtype, logits, s->vocab_size, num_blocks, view.sums};
    level q = {.cdf = view.cdf}, of_p = {.cdf = view.cdf_of_p};
    uint64_t total = 0;
    offsets[0] = 0;
    for (uint32_t t = 0; t < s->num_positions; t++) {
        const uint32_t position = s->first_position + t;
        row.logits = (const unsigned char *)logits + t * s->row_stride * logit_size(s->dtype);
        if (num_records - total < per_position)
            return SKL_ERR_DST_SMALL;
        if (!make_level(&row, s->proposal_temperature, &q) || (importance && !make_level(&row, 1.0, &of_p)))
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_NOT_FINITE, position, first_bad_id(&row));
        uint8_t *const counts_out = counts == NULL ? NULL : counts + total;
        float *const weights_out = weights == NULL ? NULL : weights + total;
        total += is_top(s) ? top_position(s, &row, &q, view.keys, token_ids + total, weights_out)
                           : draw_position(s, position, &row, &q, importance ? &of_p : NULL, &view,
                                           token_ids + total, counts_out, weights_out);
        offsets[t + 1] = (int64_t)total;
    }
    return SKL_OK;
}
