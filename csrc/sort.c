/* sort.c: keys and weights in order, without allocation. */
#include "sort.h"

#include <string.h>

/* Few keys: each goes where as many are smaller; no branch depends on a key. */
static void sort_few(uint64_t *keys, size_t n)
{
    uint64_t sorted[SKL_FEW_KEYS];
    for (size_t i = 0; i < n; i++) {
        size_t place = 0;
        for (size_t j = 0; j < i; j++)
            place += keys[j] <= keys[i];
        for (size_t j = i + 1; j < n; j++)
            place += keys[j] < keys[i];
        sorted[place] = keys[i];
    }
    memcpy(keys, sorted, n * sizeof *keys);
}

/* Many: heap sort, in place, no recursion, no allocation, the same time whatever the keys are. */
void skl_sort_keys(uint64_t *keys, size_t n)
{
    if (n <= SKL_FEW_KEYS) {
        sort_few(keys, n);
        return;
    }
    for (size_t start = n / 2, end = n; end > 1;) {
        if (start > 0) {
            start--;
        } else {
            end--;
            const uint64_t top = keys[0];
            keys[0] = keys[end];
            keys[end] = top;
        }
        size_t root = start;
        for (size_t child = 2 * root + 1; child < end; child = 2 * root + 1) {
            if (child + 1 < end && keys[child] < keys[child + 1])
                child++;
            if (keys[root] >= keys[child])
                break;
            const uint64_t swap = keys[root];
            keys[root] = keys[child];
            keys[child] = swap;
            root = child;
        }
    }
}

/* Each key is placed where as many weights are larger.  The loops are written for vectors: EIGHT places at a time. */
void skl_sort_few_weights(const float *weights, const uint32_t *token_ids, size_t n, uint64_t *keys)
{
    enum { EIGHT = 8 };
    float padded[SKL_FEW_KEYS];
    int32_t places[SKL_FEW_KEYS];
    uint8_t equal[SKL_FEW_KEYS];
    memset(padded, 0, sizeof padded);
    memset(equal, 0, sizeof equal);
    memcpy(padded, weights, n * sizeof *weights);
    for (size_t j = 0; j < n; j += EIGHT) {
        int32_t larger[EIGHT] = {0};
        for (size_t i = 0; i < n; i++)
            for (size_t lane = 0; lane < EIGHT; lane++)
                larger[lane] += weights[i] > padded[j + lane];
        memcpy(places + j, larger, sizeof larger);
    }
    for (size_t i = 0; i < n; i++) { /* equal weights: in order of ids */
        const size_t place = (size_t)places[i];
        keys[place + equal[place]++] = skl_weight_key(weights[i], token_ids[i]);
    }
}

void skl_sort_ids(uint32_t *token_ids, size_t n, uint64_t *keys)
{
    for (size_t i = 0; i < n; i++)
        keys[i] = token_ids[i];
    skl_sort_keys(keys, n);
    for (size_t i = 0; i < n; i++)
        token_ids[i] = (uint32_t)keys[i];
}

void skl_sort_weights(const float *weights, const uint32_t *token_ids, size_t n, uint64_t *keys)
{
    for (size_t i = 0; i < n; i++)
        keys[i] = skl_weight_key(weights[i], token_ids[i]);
    skl_sort_keys(keys, n);
}
