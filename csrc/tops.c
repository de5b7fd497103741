/* tops.c: the most probable ids of a row. */
#include "tops.h"

#include "bits.h"
#include "sort.h"

#include <math.h>

/* Larger key: larger logit, then lower id.  -0 counts as 0. */
static uint64_t rank_key(float logit, uint32_t id)
{
    const uint32_t bits = skl_float_bits(logit + 0.0f);
    const uint32_t rank = bits & UINT32_C(0x80000000) ? ~bits : bits | UINT32_C(0x80000000);
    return (uint64_t)rank << 32 | (uint32_t)~id;
}

/* The logit of a key. */
static float key_logit(uint64_t key)
{
    const uint32_t rank = (uint32_t)(key >> 32);
    return skl_bits_float(rank & UINT32_C(0x80000000) ? rank ^ UINT32_C(0x80000000) : ~rank);
}

/* Keep the `room` largest keys in a heap whose top is the smallest of them. */
static void heap_offer(uint64_t *heap, size_t room, size_t *used, uint64_t key)
{
    size_t hole; /* where the key goes, once those in its way have moved */
    if (*used < room) {
        for (hole = (*used)++; hole > 0 && heap[(hole - 1) / 2] > key; hole = (hole - 1) / 2)
            heap[hole] = heap[(hole - 1) / 2];
        heap[hole] = key;
        return;
    }
    if (key <= heap[0])
        return;
    hole = 0;
    for (size_t child = 1; child < room; child = 2 * hole + 1) {
        if (child + 1 < room && heap[child + 1] < heap[child])
            child++;
        if (heap[child] >= key)
            break;
        heap[hole] = heap[child];
        hole = child;
    }
    heap[hole] = key;
}

/* Keys of the k largest logits, or of all, as a heap; returns how many. */
static size_t top_keys(const skl_row *row, const float *maxima, size_t k, uint64_t *heap)
{
    /* k blocks have a logit of at least the k-th largest maximum, so that the k-th largest logit has that too */
    size_t used = 0;
    for (size_t b = 0; b < row->num_blocks; b++)
        heap_offer(heap, k, &used, rank_key(maxima[b], UINT32_MAX));
    const float least = used == k ? key_logit(heap[0]) : -INFINITY;
    used = 0;
    float values[SKL_BLOCK];
    for (size_t b = 0; b < row->num_blocks; b++) {
        if (maxima[b] < least || (used == k && rank_key(maxima[b], 0) < heap[0]))
            continue;
        const size_t n = skl_block_length(row, b);
        row->kernels->widen(row->dtype, skl_block_start(row, b), n, values);
        for (size_t i = 0; i < n; i++)
            if (values[i] >= least)
                heap_offer(heap, k, &used, rank_key(values[i], (uint32_t)(b * SKL_BLOCK + i)));
    }
    return used;
}

static double exponential_of(const skl_row *row, const skl_level *level, uint32_t id)
{
    float e;
    row->kernels->exponentials(row->dtype, row->logits + id * skl_logit_size(row->dtype), 1, level->scale,
                               level->offset, &e);
    return (double)e;
}

/* How many of the n keys, which it sorts, the nucleus of mass p takes; n + 1: it needs more than these. */
static size_t nucleus(const skl_row *row, const skl_level *level, double p, uint64_t *keys, size_t n)
{
    skl_sort_keys(keys, n);
    double mass = 0.0;
    for (size_t taken = 1; taken <= n; taken++) {
        mass += exponential_of(row, level, ~(uint32_t)keys[n - taken]);
        if (p < 1.0 && mass >= p * level->total)
            return taken;
    }
    return n + 1;
}

size_t skl_top_position(const skl_sampling *s, const skl_row *row, const skl_level *level, const float *maxima,
                        uint64_t *keys, uint32_t *token_ids, float *weights)
{
    const size_t cap = s->k < s->vocab_size ? s->k : s->vocab_size;
    size_t taken, n;
    if (s->sampler == SKL_SAMPLER_TOPK) {
        taken = n = top_keys(row, maxima, cap, keys);
    } else { /* nuclei are small on most rows: look at few ids first */
        for (size_t look = cap < 64 ? cap : 64;; look = look < cap / 8 ? look * 8 : cap) {
            n = top_keys(row, maxima, look, keys);
            taken = nucleus(row, level, s->p, keys, n);
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
        const double weight = exponential_of(row, level, (uint32_t)chosen[i]) / level->total;
        if (weight >= SKL_SMALLEST_WEIGHT) {
            token_ids[kept] = (uint32_t)chosen[i];
            weights[kept++] = (float)weight;
        }
    }
    return kept;
}
