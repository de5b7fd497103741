/* The sampler under sanitizers: every row lies in memory of exactly its length, so that a read beside it is caught. */
#include <fenv.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "kernels.h"
#include "kernels_choice.h"
#include "skl.h"

typedef struct result {
    int64_t *offsets;
    uint32_t *token_ids;
    uint8_t *counts;
    float *weights;
    uint64_t num_records;
    skl_fault fault;
} result;

static void *exactly(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    CHECK(memory != NULL);
    return memory;
}

static skl_sampling multinomial(uint32_t vocab_size, uint32_t num_positions)
{
    const skl_sampling sampling = {.sampler = SKL_SAMPLER_MULTINOMIAL,
                                   .dtype = SKL_DTYPE_FLOAT32,
                                   .vocab_size = vocab_size,
                                   .num_positions = num_positions,
                                   .row_stride = vocab_size,
                                   .rounds = 50,
                                   .proposal_temperature = 1.0,
                                   .self_normalise = 1,
                                   .seed = 7,
                                   .sequence = 3};
    return sampling;
}

/* Every output and the scratch get exactly the room that the call asks for. */
static skl_status draw(const skl_sampling *sampling, const void *logits, uint64_t num_logits, int weighted, result *r)
{
    uint64_t num_scratch, most;
    CHECK(skl_draw_sizes(sampling, &num_scratch, &most) == SKL_OK);
    const uint64_t room = most * sampling->num_positions;
    uint64_t *scratch = exactly(num_scratch * sizeof *scratch);
    memset(r, 0, sizeof *r);
    r->offsets = exactly((sampling->num_positions + 1) * sizeof *r->offsets);
    r->token_ids = exactly(room * sizeof *r->token_ids);
    if (weighted)
        r->weights = exactly(room * sizeof *r->weights);
    else
        r->counts = exactly(room);
    const skl_status status = skl_draw(sampling, logits, num_logits, scratch, num_scratch, r->offsets, r->token_ids,
                                       r->counts, r->weights, room, &r->fault);
    if (status == SKL_OK)
        r->num_records = (uint64_t)r->offsets[sampling->num_positions];
    free(scratch);
    return status;
}

static void drop(result *r)
{
    free(r->offsets);
    free(r->token_ids);
    free(r->counts);
    free(r->weights);
}

/* Logits -8..8 in steps of 1/8: exact in all three types. */
static float logit_value(size_t i)
{
    return (float)((int)(i * 2654435761u % 129u) - 64) / 8.0f;
}

static uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* For values that float16 holds as normal numbers or 0. */
static uint16_t to_float16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    return (uint16_t)(value == 0.0f ? sign : sign | (((bits & 0x7fffffffu) >> 13) - (112u << 10)));
}

/* Any value, rounded down to what float16 has: below 2^-14 to 0, above its range to infinity. */
static uint16_t cut_to_float16(float value)
{
    const float size = fabsf(value);
    if (size >= 65536.0f || isnan(value))
        return (uint16_t)((signbit(value) ? 0x8000u : 0u) | (isnan(value) ? 0x7e00u : 0x7c00u));
    return size < 0x1p-14f ? (uint16_t)(signbit(value) ? 0x8000u : 0u) : to_float16(value);
}

/* Exact rows of `type`; the last ends with the memory. */
static void *make_rows(uint32_t dtype, size_t n)
{
    const size_t size = dtype == SKL_DTYPE_FLOAT32 ? 4 : 2;
    unsigned char *rows = exactly(n * size);
    for (size_t i = 0; i < n; i++) {
        const float value = logit_value(i);
        const uint16_t half = dtype == SKL_DTYPE_FLOAT16 ? to_float16(value) : to_bfloat16(value);
        if (size == 4)
            memcpy(rows + 4 * i, &value, 4);
        else
            memcpy(rows + 2 * i, &half, 2);
    }
    return rows;
}

static void check_position(const result *r, size_t t, uint32_t vocab_size, uint32_t rounds)
{
    uint32_t sum = 0;
    for (int64_t i = r->offsets[t]; i < r->offsets[t + 1]; i++) {
        CHECK(r->token_ids[i] < vocab_size);
        CHECK(i == r->offsets[t] || r->token_ids[i - 1] < r->token_ids[i]);
        if (r->counts != NULL) {
            CHECK(r->counts[i] > 0);
            sum += r->counts[i];
        } else {
            CHECK(r->weights[i] > 0.0f && isfinite(r->weights[i]));
        }
    }
    CHECK(r->counts == NULL || sum == rounds);
    CHECK(r->offsets[t + 1] > r->offsets[t]);
}

static int same(const result *a, const result *b)
{
    return a->num_records == b->num_records &&
           memcmp(a->token_ids, b->token_ids, a->num_records * sizeof *a->token_ids) == 0 &&
           (a->counts == NULL || memcmp(a->counts, b->counts, a->num_records) == 0) &&
           (a->weights == NULL || memcmp(a->weights, b->weights, a->num_records * sizeof *a->weights) == 0);
}

/* Fold the bits of a result into what was drawn before: FNV-1a. */
static void add_bytes(uint64_t *digest, const void *from, size_t n)
{
    const unsigned char *const bytes = from;
    for (size_t i = 0; i < n; i++)
        *digest = (*digest ^ bytes[i]) * UINT64_C(1099511628211);
}

static uint64_t records_digest = UINT64_C(14695981039346656037);

/* One set of arguments: every type and every kernel gives the records of float32 on the portable one. */
static void check_everywhere(skl_sampling sampling, int weighted)
{
    result first = {0};
    for (size_t i = 0; i < NUM_KERNELS; i++) {
        if (!try_kernels(all_kernels[i]))
            continue;
        CHECK(strcmp(skl_kernels_name(), all_kernels[i]) == 0);
        for (uint32_t dtype = SKL_DTYPE_FLOAT32; dtype <= SKL_DTYPE_BFLOAT16; dtype++) {
            const size_t n = (size_t)(sampling.num_positions - 1) * sampling.row_stride + sampling.vocab_size;
            void *rows = make_rows(dtype, n);
            result r;
            sampling.dtype = dtype;
            CHECK(draw(&sampling, rows, n, weighted, &r) == SKL_OK);
            for (size_t t = 0; t < sampling.num_positions; t++)
                check_position(&r, t, sampling.vocab_size, sampling.rounds);
            if (first.offsets == NULL) {
                first = r;
            } else {
                CHECK(same(&first, &r));
                drop(&r);
            }
            free(rows);
        }
    }
    add_bytes(&records_digest, first.token_ids, first.num_records * sizeof *first.token_ids);
    if (weighted)
        add_bytes(&records_digest, first.weights, first.num_records * sizeof *first.weights);
    else
        add_bytes(&records_digest, first.counts, first.num_records);
    drop(&first);
}

/* Every sampler at every kind of row length stays inside its memory and gives one result on all kernels and types. */
static void test_bounds(void)
{
    static const uint32_t sizes[] = {1, 2, 15, 16, 17, 255, 256, 257, 511, 1000, 4097};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        skl_sampling s = multinomial(sizes[i], 3);
        check_everywhere(s, 0);
        s.row_stride = 2 * (uint64_t)sizes[i] + 1;
        check_everywhere(s, 1);
        s.sampler = SKL_SAMPLER_SYSTEMATIC;
        check_everywhere(s, 0);
        s.proposal_temperature = 0.8;
        check_everywhere(s, 1);
        s.self_normalise = 0;
        s.rounds = 1000;
        check_everywhere(s, 1);
        s = multinomial(sizes[i], 3);
        s.sampler = SKL_SAMPLER_TOPK;
        for (s.k = 1; s.k < 2000; s.k = s.k * 7 + 1)
            check_everywhere(s, 1);
        s.sampler = SKL_SAMPLER_TOPP;
        s.p = 0.6;
        check_everywhere(s, 1);
        s.p = 1.0;
        check_everywhere(s, 1);
    }
    CHECK(skl_use_kernels("none") == SKL_ERR_UNSUPPORTED);
    /* Whatever compiler, flags and processor made them: a change here is a change of every cache made from now on. */
    CHECK(records_digest == UINT64_C(0x5d2af0c5f95e54ba));
}

/* The known answers of the generator's authors: counter and key of zeros, of ones, and of the digits of pi. */
static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* A logit whose d lies in -99..99, or now and then at `bound` or beside it; for scale 1 without bits below. */
static float some_logit(uint32_t *state, float scale, float offset, float bound)
{
    const uint32_t choice = next_random(state) % 32;
    const float d = choice < 3 ? bound : (float)(next_random(state) % 199u) - 99.0f;
    const float value = (d + offset) / scale;
    return scale == 1.0f || choice % 3 == 0 ? value : nextafterf(value, choice % 3 == 1 ? INFINITY : -INFINITY);
}

/* The sums and maxima of blocks are the same bits on every table, but for sums that are lost: infinite or NaN. */
static void test_block_sums(void)
{
    enum { N = 5 * SKL_BLOCK + 77, BLOCKS = 6, ROWS = 3 * 4 * 7 * 18 };
    static const float scales[] = {1.44269502f, 0.00144269504f, 144.269504f, 1.0f};
    static const float offsets[] = {0.0f, 9.0f, -60.0f, 124.0f, 130.0f, -127.0f, -4000.0f};
    static const float bounds[] = {0.0f,   -125.0f, -125.5f, -126.0f, -126.5f, -127.0f, -130.0f, -1e9f, -INFINITY,
                                   127.0f, 127.5f,  128.0f,  128.5f,  129.0f,  129.5f,  131.0f,  1e9f,  NAN};
    float values[N], maxima[2][BLOCKS];
    double cdf[2][BLOCKS + 1];
    uint32_t state = 1;
    for (uint32_t i = 0; i < (uint32_t)ROWS; i++) {
        const float scale = scales[i % 4], offset = offsets[i / 4 % 7], bound = bounds[i / 28 % 18];
        const uint32_t dtype = SKL_DTYPE_FLOAT32 + i % 3;
        unsigned char *const row = exactly(N * skl_logit_size(dtype));
        for (size_t j = 0; j < N; j++) {
            values[j] = some_logit(&state, scale, offset, bound);
            const uint16_t half = dtype == SKL_DTYPE_FLOAT16 ? cut_to_float16(values[j]) : to_bfloat16(values[j]);
            memcpy(row + j * skl_logit_size(dtype), dtype == SKL_DTYPE_FLOAT32 ? (void *)(values + j) : (void *)&half,
                   skl_logit_size(dtype));
        }
        CHECK(skl_use_kernels("portable") == SKL_OK);
        skl_current_kernels()->block_cdf(dtype, row, N, scale, offset, cdf[0], maxima[0]);
        for (size_t k = 0; k < NUM_KERNELS; k++)
            for (int with_maxima = 0; try_kernels(all_kernels[k]) && with_maxima < 2; with_maxima++) {
                skl_current_kernels()->block_cdf(dtype, row, N, scale, offset, cdf[1], with_maxima ? maxima[1] : NULL);
                for (size_t b = 0; b <= BLOCKS; b++)
                    CHECK(cdf[0][b] <= 0x1p1000 ? memcmp(&cdf[0][b], &cdf[1][b], 8) == 0 : !(cdf[1][b] <= 0x1p1000));
                for (size_t b = 0; with_maxima && b < BLOCKS; b++)
                    CHECK(maxima[0][b] == maxima[1][b]);
            }
        free(row);
    }
}

static void test_philox(void)
{
    static const uint32_t cases[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
         0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1}};
    for (size_t i = 0; i < 3; i++) {
        uint32_t out[4];
        skl_philox(cases[i], cases[i] + 4, out);
        CHECK(memcmp(out, cases[i] + 6, sizeof out) == 0);
    }
}

/* Rows without a distribution are refused, with their position and the first bad id. */
static void test_not_finite(void)
{
    static const float bad[] = {NAN, INFINITY, 0x1p21f};
    enum { V = 700, T = 3 };
    for (size_t i = 0; i < 3; i++)
        for (size_t at = 0; at < V; at += 233) {
            float *rows = make_rows(SKL_DTYPE_FLOAT32, (size_t)V * T);
            skl_sampling s = multinomial(V, T);
            result r;
            s.first_position = 100;
            rows[V + at] = bad[i];
            CHECK(draw(&s, rows, (uint64_t)V * T, 0, &r) == SKL_ERR_ARG);
            CHECK(r.fault.reason == SKL_REASON_NOT_FINITE && r.fault.position == 101 && r.fault.value == at);
            drop(&r);
            free(rows);
        }
    float *masked = exactly(V * sizeof *masked);
    for (size_t i = 0; i < V; i++)
        masked[i] = -INFINITY;
    skl_sampling s = multinomial(V, 1);
    result r;
    CHECK(draw(&s, masked, V, 0, &r) == SKL_ERR_ARG && r.fault.reason == SKL_REASON_NOT_FINITE);
    drop(&r);
    masked[V - 1] = -9.0f; /* one id is left: it takes every draw */
    CHECK(draw(&s, masked, V, 0, &r) == SKL_OK);
    CHECK(r.num_records == 1 && r.token_ids[0] == V - 1 && r.counts[0] == 50);
    drop(&r);
    free(masked);
}

/* A logit that is too large is refused wherever it stands and however near to others, by every sampler; the largest that
 * is not too large is drawn from. */
static void test_too_large(void)
{
    static const double temperatures[] = {1.0, 0.001, 0.25, 100.0};
    static const float excesses[] = {0.0f, 0.125f, 60.0f, 200.0f, 0x1p30f};
    enum { V = 700 };
    float *row = exactly(V * sizeof *row);
    for (uint32_t sampler = SKL_SAMPLER_MULTINOMIAL; sampler <= SKL_SAMPLER_TOPP; sampler++)
        for (size_t i = 0; i < 4 * 5 * 3; i++) {
            const float excess = excesses[i % 5];
            const size_t at = (size_t[]){0, 300, V - 1}[i / 5 % 3];
            const int is_top = sampler >= SKL_SAMPLER_TOPK;
            skl_sampling s = multinomial(V, 1);
            s.sampler = sampler;
            s.proposal_temperature = is_top ? 1.0 : temperatures[i / 15];
            s.k = 10;
            s.p = 0.5;
            for (size_t id = 0; id < V; id++)
                row[id] = id == 1 ? 0x1p20f : 3.0f;
            row[at] = 0x1p20f + excess;
            result r;
            const skl_status status = draw(&s, row, V, 1, &r);
            if (excess > 0.0f)
                CHECK(status == SKL_ERR_ARG && r.fault.reason == SKL_REASON_NOT_FINITE && r.fault.value == at);
            else
                CHECK(status == SKL_OK && r.num_records > 0);
            drop(&r);
        }
    free(row);
}

/* A thread that rounds another way draws the same, and goes on rounding its way. */
static void test_rounding_modes(void)
{
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    enum { V = 3000, T = 5 };
    float *rows = exactly(V * T * sizeof *rows);
    for (size_t i = 0; i < V * T; i++)
        rows[i] = logit_value(i) * 0.7f;
    for (uint32_t i = 0; i < 5; i++) {
        skl_sampling s = multinomial(V, T);
        s.sampler = i < 4 ? SKL_SAMPLER_MULTINOMIAL + i : SKL_SAMPLER_MULTINOMIAL;
        s.rounds = 1000;
        s.k = 300;
        s.p = 0.9;
        s.proposal_temperature = i < 4 ? 1.0 : 0.7;
        result first = {0};
        for (size_t mode = 0; mode < sizeof modes / sizeof *modes; mode++) {
            result r;
            CHECK(fesetround(modes[mode]) == 0);
            const skl_status status = draw(&s, rows, V * T, 1, &r);
            CHECK(status == SKL_OK && fegetround() == modes[mode]);
            fesetround(FE_TONEAREST);
            if (mode == 0) {
                first = r;
            } else {
                CHECK(same(&first, &r));
                drop(&r);
            }
        }
        drop(&first);
    }
    free(rows);
}

/* Arguments that contradict each other are refused before anything is read. */
static void test_arguments(void)
{
    skl_sampling s = multinomial(10, 2);
    float *rows = make_rows(SKL_DTYPE_FLOAT32, 20);
    result r;
    CHECK(draw(&s, rows, 20, 0, &r) == SKL_OK);
    drop(&r);
    CHECK(draw(&s, rows, 19, 0, &r) == SKL_ERR_ARG);
    drop(&r);
    s.row_stride = UINT64_MAX;
    CHECK(draw(&s, rows, 20, 0, &r) == SKL_ERR_ARG);
    drop(&r);
    s.row_stride = 0; /* one row twice */
    CHECK(draw(&s, rows, 10, 0, &r) == SKL_OK);
    drop(&r);
    s.rounds = 128;
    CHECK(draw(&s, rows, 20, 0, &r) == SKL_ERR_ARG);
    drop(&r);
    uint64_t scratch, most;
    s.rounds = 0;
    CHECK(skl_draw_sizes(&s, &scratch, &most) == SKL_ERR_ARG);
    s = multinomial(0, 1);
    CHECK(skl_draw_sizes(&s, &scratch, &most) == SKL_ERR_ARG);
    s = multinomial(10, 2);
    s.first_position = UINT32_MAX;
    CHECK(skl_draw_sizes(&s, &scratch, &most) == SKL_ERR_ARG);
    s = multinomial(10, 2);
    s.proposal_temperature = NAN;
    CHECK(skl_draw_sizes(&s, &scratch, &most) == SKL_ERR_ARG);
    s.proposal_temperature = 1.0;
    int64_t offsets[3];
    uint32_t ids[9];
    uint8_t counts[9];
    uint64_t words[4096];
    CHECK(skl_draw(&s, rows, 20, words, 4096, offsets, ids, counts, NULL, 9, &r.fault) == SKL_ERR_DST_SMALL);
    CHECK(skl_draw(&s, rows, 20, words, 1, offsets, ids, counts, NULL, 9, &r.fault) == SKL_ERR_DST_SMALL);
    free(rows);
}

int main(void)
{
    choose_kernels();
    test_philox();
    test_bounds();
    test_block_sums();
    choose_kernels(); /* what compared them left any */
    test_not_finite();
    test_too_large();
    test_rounding_modes();
    test_arguments();
    say_kernels();
    puts("sampler: all tests hold");
    return 0;
}
