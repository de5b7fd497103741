/* quantise.c: positive weights as 7-bit ratios to the decoded predecessor.  SPEC.md section 4.3. */
#include "bits.h"
#include "distinct.h"
#include "environment.h"
#include "faults.h"
#include "ratios.h"
#include "sort.h"

#include <math.h>

#define MANY 32 /* records, whose heights are computed together */

/* Smallest code whose step from v is at most limit; 128 where there is none. */
static uint32_t first_code(uint32_t v, uint32_t limit)
{
    uint32_t low = 0, high = 128;
    while (low < high) {
        const uint32_t mid = (low + high) / 2;
        if (skl_ratio_step(v, (uint8_t)mid) <= limit)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

/* From here on the steps of v fall strictly with the code and do not reach 0: 2^31 / (T[126] - T[127]) is 295 228. */
#define STRICT (UINT32_C(1) << 19)

/* The step of `code` from v where it is nearest_code(v, u), for v >= STRICT, u < v and code < 127; 0: it is not. */
static uint32_t nearest_step(uint32_t v, uint32_t u, uint32_t code)
{
    const uint32_t here = skl_ratio_step(v, (uint8_t)code);
    const uint64_t square = (uint64_t)u * u;
    const int above = code == 0 || (uint64_t)skl_ratio_step(v, (uint8_t)(code - 1)) * here > square;
    const int below = (uint64_t)skl_ratio_step(v, (uint8_t)(code + 1)) * here <= square;
    return above & below ? here : 0;
}

/* 1024 log2, wrong by up to 0.02: on this scale the code q lies q^2 below v. */
static inline float height(float value)
{
    const uint32_t bits = skl_float_bits(value);
    const float m = skl_bits_float((bits & UINT32_C(0x007fffff)) | UINT32_C(0x3f800000));
    float log2 = 0.043928627f;
    log2 = log2 * m - 0.4094756f;
    log2 = log2 * m + 1.6101775f;
    log2 = log2 * m - 3.5202188f;
    log2 = log2 * m + 5.0697565f;
    log2 = log2 * m - 2.7941537f;
    return 1024.0f * ((float)(int32_t)(bits >> 23) + log2);
}

/* The code of a weight that lies `drop` below v.  Between the codes q and q + 1 the border is half way, q^2 + q + 1/2
 * below v: (q + 1/2)^2, and a quarter that the caller takes off. */
static float guess_code(float drop)
{
    const float root = sqrtf(drop > 0.0f ? drop : 0.0f);
    return root < 126.0f ? (root + 0x1.8p23f) - 0x1.8p23f : 126.0f; /* to the nearest integer */
}

/* Code whose step from v is nearest to u in the logarithm; 128: u is less than half of the smallest step. */
static uint32_t nearest_code(uint32_t v, uint32_t u)
{
    if (u >= v)
        return 0;
    const uint32_t last = first_code(v, 0) - 1; /* the last code that does not reach 0: 127 where none does */
    const uint32_t smallest = skl_ratio_step(v, (uint8_t)last);
    if (2 * (uint64_t)u < smallest)
        return 128;
    if (u <= smallest)
        return first_code(v, smallest);
    const uint32_t below = first_code(v, u);
    const uint32_t a = skl_ratio_step(v, (uint8_t)(below - 1));
    const uint32_t b = skl_ratio_step(v, (uint8_t)below);
    return (uint64_t)a * b > (uint64_t)u * u ? below : first_code(v, a);
}

static int ids_rise(const uint32_t *token_ids, size_t n)
{
    uint32_t not_rising = 0;
    for (size_t i = 1; i < n; i++)
        not_rising |= token_ids[i] <= token_ids[i - 1];
    return !not_rising;
}

static void fill_heights(const uint64_t *restrict keys, size_t n, float *restrict heights)
{
    for (size_t i = 0; i < n; i++)
        heights[i] = height(skl_key_weight(keys[i]));
}

/* Weights of one position, sorted in keys by (weight descending, id ascending), to codes; returns how many are kept.
 *
 * Each code waits for the one before it, so that guessing it is made short, and what does not wait is done for many. */
static size_t quantise_sorted(uint64_t *keys, size_t n, uint32_t scale_log2, uint32_t *out_token_ids,
                              uint8_t *out_codes)
{
    const double to_fixed = (double)SKL_RATIO_ONE / (double)(UINT64_C(1) << scale_log2);
    const float one_height = 1024.0f * (float)(31 - (int32_t)scale_log2) + 0.25f; /* of v over that of its weight */
    float heights[MANY];
    uint32_t v = SKL_RATIO_ONE;
    float v_height = height((float)v) - one_height;
    size_t kept = 0, group = 0;
    for (size_t i = 0;; i++) { /* up to n, where the last group is completed */
        uint32_t code = 128, step = 0;
        if (i < n) {
            if (i % MANY == 0)
                fill_heights(keys + i, n - i < MANY ? n - i : MANY, heights);
            const uint32_t u = (uint32_t)((double)skl_key_weight(keys[i]) * to_fixed + 0.5);
            const float guess = guess_code(v_height - heights[i % MANY]);
            code = (uint32_t)guess;
            if (u < v && v >= STRICT && (step = nearest_step(v, u, code)) != 0) {
                v_height -= guess * guess;
            } else {
                code = nearest_code(v, u);
                step = skl_ratio_step(v, (uint8_t)code); /* without meaning for 128 */
                v_height = height((float)step) - one_height;
            }
        }
        if (code != 0) { /* the group of equal decoded weights [group, kept) is complete: its ids ascend */
            if (kept - group > 1)
                skl_sort_ids(out_token_ids + group, kept - group, keys + group);
            group = kept;
        }
        if (code == 128)
            break; /* the weights that follow are no larger */
        out_token_ids[kept] = (uint32_t)keys[i];
        out_codes[kept] = (uint8_t)code;
        v = step;
        kept++;
    }
    return kept;
}

skl_status skl_quantise(uint32_t num_positions, uint64_t num_records, const int64_t *offsets,
                        const uint32_t *token_ids, const float *weights, uint32_t scale_log2, uint64_t *keys,
                        size_t num_keys, int64_t *out_offsets, uint32_t *out_token_ids, uint8_t *out_codes,
                        skl_fault *fault)
{
    SKL_DEFAULT_ENVIRONMENT;
    if (scale_log2 > 30)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 30);
    SKL_TRY(skl_check_offsets(num_positions, offsets, num_records, fault));
    const float scale = (float)(UINT64_C(1) << scale_log2);
    skl_id_table table = {.position = 0};
    int64_t total = 0;
    out_offsets[0] = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        const int64_t begin = offsets[t];
        const size_t n = (size_t)(offsets[t + 1] - begin);
        if (n > num_keys)
            return SKL_ERR_DST_SMALL;
        for (size_t i = 0; i < n; i++) {
            const float weight = weights[begin + (int64_t)i];
            if (!(weight > 0.0f && weight <= scale)) /* NaN too */
                return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_WEIGHT_RANGE, t, (uint64_t)begin + i);
        }
        if (n <= SKL_FEW_KEYS && ids_rise(token_ids + begin, n)) {
            skl_sort_few_weights(weights + begin, token_ids + begin, n, keys);
        } else {
            uint64_t twice;
            if (skl_comes_twice(&table, token_ids + begin, n, keys, &twice)) /* it would be two targets for one token */
                return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_ID_TWICE, t, twice);
            skl_sort_weights(weights + begin, token_ids + begin, n, keys);
        }
        total += (int64_t)quantise_sorted(keys, n, scale_log2, out_token_ids + total, out_codes + total);
        out_offsets[t + 1] = total;
    }
    return SKL_OK;
}
