/* test_stats.c: what payloads add up to, with buffers of exactly the promised length, under sanitizers. */
#include "check.h"
#include "skl.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 8, UNIQUES = 3, BUCKETS = 2, IDS = 2 };

/* Heap memory of exactly this size, so that the sanitizer sees the first byte beyond it. */
static void *room(size_t size)
{
    void *const memory = calloc(1, size == 0 ? 1 : size);
    CHECK(memory != NULL);
    return memory;
}

static skl_stats stats_of(uint32_t rows, uint32_t positions, const uint32_t *ids)
{
    return (skl_stats){.most_positions = positions, .most_records = MOST, .num_uniques = UNIQUES,
                       .num_buckets = BUCKETS, .bucket_positions = 2, .num_ids = ids == NULL ? 0 : IDS, .ids = ids,
                       .offsets = room((positions + 1) * sizeof(int64_t)),
                       .tokens = room((positions + 1) * sizeof(uint32_t)),
                       .token_ids = room(MOST * sizeof(uint32_t)), .codes = room(MOST),
                       .weights = room(MOST * sizeof(float)),
                       .rows = room(rows * SKL_STATS_SUMS * sizeof(double)),
                       .uniques = room(UNIQUES * sizeof(uint64_t)), .sizes = room(256 * sizeof(uint64_t)),
                       .id_counts = room(IDS * sizeof(uint64_t)),
                       .bins = room(3 * SKL_STATS_BINS * sizeof(double)),
                       .buckets = room(5 * BUCKETS * sizeof(double))};
}

static void release(const skl_stats *stats)
{
    free(stats->offsets), free(stats->tokens), free(stats->token_ids), free(stats->codes), free(stats->weights);
    free(stats->rows), free(stats->uniques), free(stats->sizes), free(stats->id_counts);
    free(stats->bins), free(stats->buckets);
}

static int near(double a, double b)
{
    return fabs(a - b) < 1e-6;
}

/* 5 positions of 4 rounds, with (3: 2, 4: 2), (1: 4), none, (1: 1, 2: 3), (0: 1, 5: 1, 6: 2); tokens 0 4 1 2 2 6. */
static void test_counts(void)
{
    static const int64_t offsets[6] = {0, 2, 3, 3, 5, 8};
    static const uint32_t token_ids[8] = {3, 4, 1, 1, 2, 0, 5, 6}, tokens[6] = {0, 4, 1, 2, 2, 6}, ids[IDS] = {2, 7};
    static const uint8_t codes[8] = {2, 2, 4, 1, 3, 1, 1, 2};
    /* label_logprob, entropy, document_start */
    static const uint8_t columns[21] = {0, 0xbc, 0, 0x80 | 0x38, 0, 0, 1, 0x80, 0, 0xc0,
                                        0, 0x3c, 0, 0x34, 0, 0, 1, 0, 0, 0x40, 0x21};
    skl_shape shape = {.kind = SKL_KIND_COUNTS, .profile = SKL_PROFILE_R24, .record_count_size = 1, .token_size = 2,
                       .columns = 7, .vocab_size = 8, .rounds = 4, .num_positions = 5, .num_records = 8};
    uint64_t size = 0;
    size_t written = 0;
    skl_fault fault = {0};
    uint32_t row = 9;
    CHECK(skl_payload_size(&shape, &size) == SKL_OK);
    uint8_t *const payload = room((size_t)size + 64);
    CHECK(skl_encode(&shape, offsets, token_ids, codes, tokens, columns, payload, size, &written, &fault) == SKL_OK);
    const uint8_t *const sources[2] = {payload, payload};
    const uint64_t lens[2] = {size + 64, size + 64};
    const uint32_t positions[2] = {5, 5}, records[2] = {8, 8};
    skl_stats stats = stats_of(2, 5, ids);
    CHECK(skl_gather_stats(&shape, 0, 2, sources, lens, positions, records, &stats, &row, &fault) == SKL_OK);
    for (const double *sums = stats.rows; sums < stats.rows + 2 * SKL_STATS_SUMS; sums += SKL_STATS_SUMS) {
        const double ln2 = log(2), entropy = ln2 + 0 + (ln2 / 2 - 0.75 * log(0.75)) + 1.5 * ln2;
        CHECK(sums[SKL_STATS_POSITIONS] == 4 && sums[SKL_STATS_RECORDS] == 8 && near(sums[SKL_STATS_MASS], 4));
        CHECK(near(sums[SKL_STATS_ENTROPY], entropy) && sums[SKL_STATS_TOP] == 0.5 + 1 + 0.75 + 0.5);
        /* labels 4 (of two as large), 1, 2, 6; across half a sequence 2, 2 of {1}, 4 of {1, 2}, 1 of {0, 5, 6} */
        CHECK(sums[SKL_STATS_RIGHT] == 0.5 + 1 + 1 + 1 && sums[SKL_STATS_LABEL] == 0.5 + 1 + 0.75 + 0.5);
        CHECK(sums[SKL_STATS_HITS] == 4 && sums[SKL_STATS_OTHER_HITS] == 0 && sums[SKL_STATS_UNSEEN] == 0.75);
        CHECK(near(sums[SKL_STATS_LABEL_LOGPROB], -1 - 0.5 - 0x1p-24 - 2));
        CHECK(near(sums[SKL_STATS_EXACT_ENTROPY], 1 + 0.25 + 0x1p-24 + 2) && sums[SKL_STATS_DOCUMENTS] == 2);
    }
    CHECK(stats.uniques[0] == 2 && stats.uniques[1] == 2 && stats.uniques[2] == 6);
    CHECK(stats.sizes[0] == 0 && stats.sizes[1] == 6 && stats.sizes[2] == 6 && stats.sizes[3] == 2 &&
          stats.sizes[4] == 2);
    CHECK(stats.id_counts[0] == 4 && stats.id_counts[1] == 0);
    CHECK(stats.buckets[0] == 4 && stats.buckets[1] == 4 && stats.buckets[5] == 4 && stats.buckets[5 + 3] == 1.5);
    CHECK(stats.bins[3 * 10] == 4 && stats.bins[3 * 15 + 1] == 1.5 && stats.bins[3 * 19 + 2] == 2);

    stats.most_records = 7;
    CHECK(skl_gather_stats(&shape, 0, 2, sources, lens, positions, records, &stats, &row, &fault) == SKL_ERR_ARG);
    stats.most_records = MOST;
    stats.most_positions = 4;
    CHECK(skl_gather_stats(&shape, 0, 2, sources, lens, positions, records, &stats, &row, &fault) == SKL_ERR_ARG);
    stats.most_positions = 5;
    CHECK(skl_gather_stats(&shape, 31, 2, sources, lens, positions, records, &stats, &row, &fault) == SKL_ERR_ARG);
    const uint64_t cut[2] = {size + 64, size};
    CHECK(skl_gather_stats(&shape, 0, 2, sources, cut, positions, records, &stats, &row, &fault) == SKL_ERR_TRUNCATED);
    CHECK(row == 1);
    payload[5 + 3 * 8 + 2] = 8; /* a token that is not below vocab_size */
    CHECK(skl_gather_stats(&shape, 0, 1, sources, lens, positions, records, &stats, &row, &fault) == SKL_ERR_CORRUPT);
    CHECK(fault.reason == SKL_REASON_TOKEN_RANGE && fault.position == 1 && fault.value == 8);
    payload[5 + 3 * 8 + 2] = 4;
    payload[size - 21] = 1; /* a log-probability that would be above 0 */
    payload[size - 20] = 0x3c;
    CHECK(skl_gather_stats(&shape, 0, 1, sources, lens, positions, records, &stats, &row, &fault) == SKL_ERR_CORRUPT);
    CHECK(skl_gather_stats(&shape, 0, 0, NULL, NULL, NULL, NULL, &stats, &row, &fault) == SKL_OK);
    stats.num_buckets = 0;
    CHECK(skl_gather_stats(&shape, 0, 0, NULL, NULL, NULL, NULL, &stats, &row, &fault) == SKL_ERR_ARG);
    release(&stats);
    free(payload);
}

/* Weights without stored tokens: no label, no rounds. */
static void test_ratios(void)
{
    static const int64_t offsets[3] = {0, 2, 3};
    static const uint32_t token_ids[3] = {3, 1, 2};
    static const float weights[3] = {0.5F, 0.25F, 1.0F};
    skl_shape shape = {.kind = SKL_KIND_RATIOS, .profile = SKL_PROFILE_R24, .record_count_size = 1, .vocab_size = 8,
                       .num_positions = 2, .num_records = 3};
    uint64_t size = 0, keys[2];
    int64_t out_offsets[3];
    uint32_t out_ids[3], row = 0;
    uint8_t codes[3];
    float expanded[3];
    size_t written = 0;
    skl_fault fault = {0};
    CHECK(skl_quantise(2, 3, offsets, token_ids, weights, 0, keys, 2, out_offsets, out_ids, codes, &fault) == SKL_OK);
    CHECK(skl_expand(2, 3, out_offsets, codes, 0, expanded) == SKL_OK);
    CHECK(skl_payload_size(&shape, &size) == SKL_OK);
    uint8_t *const payload = room((size_t)size + 64);
    CHECK(skl_encode(&shape, out_offsets, out_ids, codes, NULL, NULL, payload, size, &written, &fault) == SKL_OK);
    const uint8_t *const sources[1] = {payload};
    const uint64_t lens[1] = {size + 64};
    const uint32_t positions[1] = {2}, records[1] = {3};
    skl_stats stats = stats_of(1, 2, NULL);
    CHECK(skl_gather_stats(&shape, 0, 1, sources, lens, positions, records, &stats, &row, &fault) == SKL_OK);
    double mass = 0, entropy = 0;
    for (int i = 0; i < 3; i++) {
        mass += expanded[i];
        entropy -= expanded[i] * log(expanded[i]);
    }
    CHECK(near(stats.rows[SKL_STATS_MASS], mass) && near(stats.rows[SKL_STATS_ENTROPY], entropy));
    CHECK(stats.rows[SKL_STATS_POSITIONS] == 2 && stats.rows[SKL_STATS_HITS] == 0);
    CHECK(stats.rows[SKL_STATS_UNSEEN] == 0 && stats.rows[SKL_STATS_RIGHT] == 0);
    CHECK(stats.sizes[0] + stats.sizes[1] + stats.sizes[2] + stats.sizes[3] == 3);
    release(&stats);
    free(payload);
}

int main(void)
{
    test_counts();
    test_ratios();
    puts("stats: all tests hold");
    return 0;
}
