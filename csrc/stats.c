/* stats.c: what the records of many payloads add up to: one pass over each, just after it was decoded and checked. */
#include "codec.h"
#include "environment.h"
#include "faults.h"
#include "kernels.h"

#include <string.h>

#define NO_ID UINT32_MAX
#define SIZES 256

static inline uint16_t load_half(const uint8_t *from)
{
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return SKL_LITTLE_ENDIAN ? half : __builtin_bswap16(half);
}

/* Sum of n finite float16. */
static double sum_of_halves(const uint8_t *halves, uint64_t n)
{
    double sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint32_t half = load_half(halves + 2 * i), exponent = half >> 10 & 31, fraction = half & 1023;
        /* In units of 2^-24, the smallest subnormal: whole numbers below 2^41. */
        const int64_t units = exponent == 0 ? fraction : (int64_t)(1024 + fraction) << (exponent - 1);
        sum += (double)(half & 0x8000 ? -units : units);
    }
    return sum * 0x1p-24;
}

/* Natural logarithm of a normal number above 0, to 2e-9: of the power of two, and of a fraction near 1 by atanh. */
static inline double log_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const int32_t exponent = (int32_t)(bits - 0x3f3504f3) >> 23; /* the fraction is in [sqrt(1/2), sqrt(2)) */
    bits -= (uint32_t)exponent << 23;
    float fraction;
    memcpy(&fraction, &bits, sizeof fraction);
    const double s = ((double)fraction - 1) / ((double)fraction + 1), q = s * s;
    return exponent * 0x1.62e42fefa39efp-1 + 2 * s * (1 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q / 9))));
}

/* How many doublings a weight lies below 1, 0 for 1 and above, by the exponent of its float. */
static inline uint32_t halvings_of(float weight)
{
    uint32_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return bits >> 23 >= 127 ? 0 : 127 - (bits >> 23);
}

/* What needs no position: how many records there are of each size, and from these, or one by one, mass and entropy. */
static void add_sizes(const skl_shape *shape, const skl_stats *stats, double *row)
{
    uint32_t sizes[4][SIZES] = {{0}}; /* apart, since a count of 1 mostly follows a count of 1 */
    const int counts = shape->kind == SKL_KIND_COUNTS;
    double mass = 0, entropy = 0;
    for (uint64_t i = 0; i < shape->num_records; i++) {
        const float weight = counts ? 0 : stats->weights[i];
        sizes[i & 3][counts ? stats->codes[i] : halvings_of(weight)]++;
        if (!counts) {
            mass += weight;
            entropy -= weight * log_of(weight);
        }
    }
    for (uint32_t size = 0; size < SIZES; size++) {
        const uint64_t n = (uint64_t)sizes[0][size] + sizes[1][size] + sizes[2][size] + sizes[3][size];
        stats->sizes[size] += n;
        if (counts && n > 0) {
            const double weight = (double)size / shape->rounds;
            mass += (double)n * weight;
            entropy -= (double)n * weight * log_of((float)weight);
        }
    }
    row[SKL_STATS_RECORDS] = (double)shape->num_records;
    row[SKL_STATS_MASS] = mass;
    row[SKL_STATS_ENTROPY] = entropy;
}

/* One position: its largest value, that of the label, and whether the label of elsewhere is there; values are counts,
 * or weights. */
typedef struct position {
    float top, at_label;
    uint32_t others;
} position;

SKL_INLINE position look(const skl_stats *stats, int counts, int64_t begin, int64_t end, uint32_t label, uint32_t other)
{
    uint32_t others = 0;
    if (counts) {
        uint32_t top = 0, at_label = 0;
        for (int64_t i = begin; i < end; i++) {
            const uint32_t id = stats->token_ids[i], count = stats->codes[i];
            others |= id == other;
            at_label |= id == label ? count : 0;
            top = count > top ? count : top;
        }
        return (position){(float)top, (float)at_label, others};
    }
    float top = 0, at_label = 0;
    for (int64_t i = begin; i < end; i++) {
        const float weight = stats->weights[i];
        others |= stats->token_ids[i] == other;
        at_label = stats->token_ids[i] == label ? weight : at_label;
        top = weight > top ? weight : top;
    }
    return (position){top, at_label, others};
}

/* How many records of a position are as large as its largest. */
SKL_INLINE uint32_t count_tops(const skl_stats *stats, int counts, int64_t begin, int64_t end, float top)
{
    uint32_t tops = 0;
    for (int64_t i = begin; i < end; i++)
        tops += (counts ? (float)stats->codes[i] : stats->weights[i]) == top;
    return tops;
}

/* Positions first to end of a row, which are of one bucket. */
SKL_INLINE void add_stretch(const skl_stats *stats, int counts, uint32_t rounds, const uint32_t *labels, uint32_t n,
                            uint32_t first, uint32_t end, double *row, double *bucket)
{
    const double unit = counts ? 1.0 / rounds : 1;
    double positions = 0, tops = 0, at_labels = 0, rights = 0;
    uint64_t hits = 0, others = 0, singles = 0;
    for (uint32_t t = first; t < end; t++) {
        const int64_t begin = stats->offsets[t], stop = stats->offsets[t + 1];
        const uint64_t number = (uint64_t)(stop - begin);
        stats->uniques[number < stats->num_uniques ? number : stats->num_uniques - 1]++;
        if (number == 0)
            continue;
        const uint32_t across = t < n - n / 2 ? t + n / 2 : t - (n - n / 2);
        const position seen = look(stats, counts, begin, stop, labels == NULL ? NO_ID : labels[t],
                                   labels == NULL ? NO_ID : labels[across]);
        const double top = seen.top * unit;
        double right = 0;
        if (seen.at_label == seen.top)
            right = 1.0 / count_tops(stats, counts, begin, stop, seen.top);
        const int place = (int)(top * SKL_STATS_BINS);
        double *const bin = stats->bins + 3 * (place < SKL_STATS_BINS ? place : SKL_STATS_BINS - 1);
        bin[0] += 1;
        bin[1] += top;
        bin[2] += right;
        positions += 1;
        tops += top;
        rights += right;
        at_labels += seen.at_label * unit;
        hits += seen.at_label > 0;
        others += seen.others;
    }
    if (counts)
        for (int64_t i = stats->offsets[first]; i < stats->offsets[end]; i++)
            singles += stats->codes[i] == 1;
    row[SKL_STATS_POSITIONS] += positions;
    row[SKL_STATS_TOP] += tops;
    row[SKL_STATS_RIGHT] += rights;
    row[SKL_STATS_LABEL] += at_labels;
    row[SKL_STATS_HITS] += (double)hits;
    row[SKL_STATS_OTHER_HITS] += (double)others;
    row[SKL_STATS_UNSEEN] += (double)singles * unit;
    bucket[0] += positions;
    bucket[1] += (double)hits;
    bucket[2] += (double)others;
    bucket[3] += (double)singles * unit;
    bucket[4] += at_labels;
}

static void add_positions(const skl_shape *shape, const skl_stats *stats, double *row)
{
    const uint32_t n = shape->num_positions;
    const uint32_t *const labels = shape->token_size == 0 ? NULL : stats->tokens + 1;
    uint32_t bucket = 0;
    for (uint32_t first = 0, end; first < n; first = end) {
        const int last = bucket + 1 >= stats->num_buckets;
        double *const sums = stats->buckets + 5 * (size_t)bucket++;
        end = last || n - first < stats->bucket_positions ? n : first + stats->bucket_positions;
        if (shape->kind == SKL_KIND_COUNTS)
            add_stretch(stats, 1, shape->rounds, labels, n, first, end, row, sums);
        else
            add_stretch(stats, 0, 0, labels, n, first, end, row, sums);
    }
}

static void add_tokens(const skl_shape *shape, const skl_stats *stats)
{
    for (uint32_t k = 0; k < stats->num_ids; k++) {
        uint64_t found = 0;
        for (uint64_t t = 0; t <= shape->num_positions; t++)
            found += stats->tokens[t] == stats->ids[k];
        stats->id_counts[k] += found;
    }
}

static void add_columns(const skl_shape *shape, const uint8_t *src, double *row)
{
    const uint64_t n = shape->num_positions;
    const uint8_t *column = src + skl_columns_offset(shape);
    if (shape->columns & SKL_COLUMN_LABEL_LOGPROB) {
        row[SKL_STATS_LABEL_LOGPROB] = sum_of_halves(column, n);
        column += 2 * n;
    }
    if (shape->columns & SKL_COLUMN_ENTROPY) {
        row[SKL_STATS_EXACT_ENTROPY] = sum_of_halves(column, n);
        column += 2 * n;
    }
    if (shape->columns & SKL_COLUMN_DOCUMENT_START)
        for (uint64_t i = 0; i < (n + 8) / 8; i++)
            row[SKL_STATS_DOCUMENTS] += __builtin_popcount(column[i]);
}

skl_status skl_gather_stats(const skl_shape *shape, uint32_t scale_log2, uint32_t num_rows,
                            const uint8_t *const *sources, const uint64_t *source_lens, const uint32_t *num_positions,
                            const uint32_t *num_records, const skl_stats *stats, uint32_t *row, skl_fault *fault)
{
    SKL_DEFAULT_ENVIRONMENT;
    skl_shape row_shape = *shape;
    *row = 0;
    if (scale_log2 > 30 || stats->num_uniques == 0 || stats->num_buckets == 0 || stats->bucket_positions == 0)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, 0);
    for (uint32_t b = 0; b < num_rows; b++) {
        double *const sums = stats->rows + (size_t)b * SKL_STATS_SUMS;
        *row = b;
        row_shape.num_positions = num_positions[b];
        row_shape.num_records = num_records[b];
        if (num_positions[b] > stats->most_positions || num_records[b] > stats->most_records)
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, 0, stats->most_positions);
        const skl_record_arrays arrays = {.offsets = stats->offsets,
                                          .token_ids = stats->token_ids,
                                          .codes = stats->codes,
                                          .probs = shape->kind == SKL_KIND_COUNTS ? NULL : stats->weights};
        SKL_TRY(skl_decode_records(&row_shape, scale_log2, sources[b], (size_t)source_lens[b], &arrays, fault));
        memset(sums, 0, SKL_STATS_SUMS * sizeof *sums);
        add_sizes(&row_shape, stats, sums);
        if (shape->token_size != 0) {
            const size_t n = (size_t)num_positions[b] + 1;
            skl_current_kernels()->widen_tokens(shape->token_size, sources[b] + skl_tokens_offset(&row_shape), n,
                                                stats->tokens);
            for (size_t t = 0; t < n; t++)
                if (stats->tokens[t] >= shape->vocab_size)
                    return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_TOKEN_RANGE, t, stats->tokens[t]);
            add_tokens(&row_shape, stats);
        }
        if (shape->columns != 0) {
            if (skl_check_columns(&row_shape, 1, sources + b, source_lens + b, num_positions + b, num_records + b))
                return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_NONE, 0, 0);
            add_columns(&row_shape, sources[b], sums);
        }
        add_positions(&row_shape, stats, sums);
    }
    return SKL_OK;
}
