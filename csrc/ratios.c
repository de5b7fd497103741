/* ratios.c: positive weights as 7-bit ratios to the decoded predecessor.  SPEC.md section 4.3. */
#include "faults.h"

#include <math.h>
#include <string.h>

#define MARK_BITS 13 /* 12 ids meet in 1 position of 124, and then are sorted */

const uint32_t skl_ratio_table[128] = {
    2147483648u, 2146030505u, 2141676973u, 2134440703u, 2124350982u, 2111448536u, 2095785251u, 2077423834u,
    2056437387u, 2032908925u, 2006930832u, 1978604253u, 1948038440u, 1915350050u, 1880662405u, 1844104720u,
    1805811301u, 1765920730u, 1724575029u, 1681918831u, 1638098541u, 1593261510u, 1547555228u, 1501126526u,
    1454120821u, 1406681375u, 1358948606u, 1311059430u, 1263146652u, 1215338407u, 1167757650u, 1120521696u,
    1073741824u, 1027522926u, 981963222u, 937154024u, 893179563u, 850116863u, 808035676u, 766998459u,
    727060411u, 688269547u, 650666822u, 614286287u, 579155293u, 545294717u, 512719224u, 481437553u,
    451452825u, 422762871u, 395360569u, 369234198u, 344367798u, 320741532u, 298332053u, 277112863u,
    257054673u, 238125757u, 220292288u, 203518674u, 187767873u, 173001696u, 159181093u, 146266429u,
    134217728u, 122994916u, 112558031u, 102867424u, 93883937u, 85569062u, 77885085u, 70795211u,
    64263668u, 58255803u, 52738154u, 47678514u, 43045975u, 38810964u, 34945267u, 31422038u,
    28215802u, 25302445u, 22659202u, 20264636u, 18098603u, 16142223u, 14377841u, 12788985u,
    11360319u, 10077598u, 8927617u, 7898164u, 6977965u, 6156636u, 5424632u, 4773194u,
    4194304u, 3680635u, 3225505u, 2822830u, 2467083u, 2153252u, 1876800u, 1633628u,
    1420040u, 1232707u, 1068639u, 925155u, 799853u, 690586u, 595439u, 512706u,
    440872u, 378589u, 324665u, 278045u, 237798u, 203101u, 173232u, 147556u,
    125515u, 106622u, 90451u, 76628u, 64830u, 54774u, 46216u, 38942u,
};

#define MANY 32 /* records, whose heights are computed together */
#define FEW 48 /* keys; up to so many, looking at every pair is faster than deciding what to look at */

/* Few keys: each goes where as many are smaller; no branch depends on a key. */
static void sort_few(uint64_t *keys, size_t n)
{
    uint64_t sorted[FEW];
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
    if (n <= FEW) {
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

/* Bits of a positive float rise with it, so that weights sort as integers. */
static uint32_t float_bits(float value)
{
    union {
        float value;
        uint32_t bits;
    } view = {.value = value};
    return view.bits;
}

static float bits_float(uint32_t bits)
{
    union {
        uint32_t bits;
        float value;
    } view = {.bits = bits};
    return view.value;
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
    const uint32_t bits = float_bits(value);
    const float m = bits_float((bits & UINT32_C(0x007fffff)) | UINT32_C(0x3f800000));
    float log2 = 0.043928627f;
    log2 = log2 * m - 0.4094756f;
    log2 = log2 * m + 1.6101775f;
    log2 = log2 * m - 3.5202188f;
    log2 = log2 * m + 5.0697565f;
    log2 = log2 * m - 2.7941537f;
    return 1024.0f * ((float)(int32_t)(bits >> 23) + log2);
}

/* Between the codes q and q + 1 the border is half way, q^2 + q + 1/2 below v: (q + 1/2)^2, and a quarter that the
 * caller takes off. */
static float guess_code(float fall)
{
    const float root = sqrtf(fall > 0.0f ? fall : 0.0f);
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

static int rise(const uint32_t *token_ids, size_t n)
{
    uint32_t fall = 0;
    for (size_t i = 1; i < n; i++)
        fall |= token_ids[i] <= token_ids[i - 1];
    return !fall;
}

/* Marks of the ids of one position after the other, so that a table is cleared once in many positions. */
typedef struct marks {
    uint8_t of[1 << MARK_BITS]; /* the position that marked the place last */
    uint8_t position;           /* 1..255 */
} marks;

/* Whether two ids of a position fall on one place; where none do, none are equal. */
static int places_meet(marks *table, const uint32_t *token_ids, size_t n)
{
    if (++table->position == 0) {
        memset(table, 0, sizeof *table);
        table->position = 1;
    }
    uint32_t met = 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t *const place = table->of + (token_ids[i] * UINT32_C(2654435769) >> (32 - MARK_BITS));
        met |= *place == table->position;
        *place = table->position;
    }
    return met != 0;
}

/* Whether an id comes twice; *twice: one that does.  Sorts in keys, n of them. */
static int comes_twice(marks *table, const uint32_t *token_ids, size_t n, uint64_t *keys, uint64_t *twice)
{
    if (!places_meet(table, token_ids, n))
        return 0;
    for (size_t i = 0; i < n; i++)
        keys[i] = token_ids[i];
    skl_sort_keys(keys, n);
    for (size_t i = 1; i < n; i++)
        if (keys[i] == keys[i - 1]) {
            *twice = keys[i];
            return 1;
        }
    return 0;
}

skl_status skl_check_distinct(uint32_t num_positions, const int64_t *offsets, const uint32_t *token_ids, uint64_t *keys,
                              size_t num_keys, skl_fault *fault)
{
    marks table = {.position = 0};
    const skl_status status =
        skl_check_offsets(num_positions, offsets, (uint64_t)offsets[num_positions], fault);
    if (status != SKL_OK)
        return status;
    for (uint32_t t = 0; t < num_positions; t++) {
        uint64_t twice;
        const size_t n = (size_t)(offsets[t + 1] - offsets[t]);
        if (n > num_keys)
            return SKL_ERR_DST_SMALL;
        if (comes_twice(&table, token_ids + offsets[t], n, keys, &twice))
            return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_ID_TWICE, t, twice);
    }
    return SKL_OK;
}

/* Smaller key: larger weight, then lower id. */
static uint64_t weight_key(float weight, uint32_t token_id)
{
    return (uint64_t)(~float_bits(weight)) << 32 | token_id;
}

/* Few weights whose ids rise: sorted keys, each placed where as many weights are larger.  The loops are written for
 * vectors: EIGHT places at a time. */
static void sort_few_weights(const float *weights, const uint32_t *token_ids, size_t n, uint64_t *keys)
{
    enum { EIGHT = 8 };
    float padded[FEW];
    int32_t places[FEW];
    uint8_t equal[FEW];
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
        keys[place + equal[place]++] = weight_key(weights[i], token_ids[i]);
    }
}

static void sort_ids(uint64_t *keys, uint32_t *token_ids, size_t n)
{
    for (size_t i = 0; i < n; i++)
        keys[i] = token_ids[i];
    skl_sort_keys(keys, n);
    for (size_t i = 0; i < n; i++)
        token_ids[i] = (uint32_t)keys[i];
}

static float key_weight(uint64_t key)
{
    return bits_float(~(uint32_t)(key >> 32));
}

static void fill_heights(const uint64_t *restrict keys, size_t n, float *restrict heights)
{
    for (size_t i = 0; i < n; i++)
        heights[i] = height(key_weight(keys[i]));
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
            const uint32_t u = (uint32_t)((double)key_weight(keys[i]) * to_fixed + 0.5);
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
                sort_ids(keys + group, out_token_ids + group, kept - group);
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

skl_status skl_quantise(uint32_t num_positions, const int64_t *offsets, const uint32_t *token_ids,
                        const float *weights, uint32_t scale_log2, uint64_t *keys, size_t num_keys,
                        int64_t *out_offsets, uint32_t *out_token_ids, uint8_t *out_codes, skl_fault *fault)
{
    if (scale_log2 > 30)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 30);
    const skl_status status =
        skl_check_offsets(num_positions, offsets, (uint64_t)offsets[num_positions], fault);
    if (status != SKL_OK)
        return status;
    const float scale = (float)(UINT64_C(1) << scale_log2);
    marks table = {.position = 0};
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
        if (n <= FEW && rise(token_ids + begin, n)) {
            sort_few_weights(weights + begin, token_ids + begin, n, keys);
        } else {
            uint64_t twice;
            if (comes_twice(&table, token_ids + begin, n, keys, &twice)) /* it would be two targets for one token */
                return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_ID_TWICE, t, twice);
            for (size_t i = 0; i < n; i++)
                keys[i] = weight_key(weights[begin + (int64_t)i], token_ids[begin + (int64_t)i]);
            skl_sort_keys(keys, n);
        }
        total += (int64_t)quantise_sorted(keys, n, scale_log2, out_token_ids + total, out_codes + total);
        out_offsets[t + 1] = total;
    }
    return SKL_OK;
}

static int reaches_zero(uint32_t num_positions, const int64_t *offsets, const uint8_t *codes)
{
    int zero = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        uint32_t v = SKL_RATIO_ONE;
        for (int64_t i = offsets[t]; i < offsets[t + 1]; i++)
            v = skl_ratio_step(v, codes[i]);
        zero |= v == 0; /* where it stays */
    }
    return zero;
}

int skl_expand_from(uint32_t num_positions, const int64_t *offsets, const uint8_t *codes, uint32_t scale_log2,
                    float *weights)
{
    if (weights == NULL)
        return reaches_zero(num_positions, offsets, codes);
    const float unit = (float)(UINT64_C(1) << scale_log2) / (float)SKL_RATIO_ONE; /* exact: powers of two */
    int zero = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        const int64_t end = offsets[t + 1]; /* by itself, since what is stored might change it */
        uint32_t v = SKL_RATIO_ONE;
        for (int64_t i = offsets[t]; i < end; i++) {
            v = skl_ratio_step(v, codes[i]);
            weights[i] = (float)v * unit;
        }
        zero |= v == 0;
    }
    return zero;
}

skl_status skl_expand(uint32_t num_positions, const int64_t *offsets, const uint8_t *codes, uint32_t scale_log2,
                      float *weights)
{
    skl_fault fault;
    if (scale_log2 > 30 ||
        skl_check_offsets(num_positions, offsets, (uint64_t)offsets[num_positions], &fault) != SKL_OK)
        return SKL_ERR_ARG;
    skl_expand_from(num_positions, offsets, codes, scale_log2, weights);
    return SKL_OK;
}
