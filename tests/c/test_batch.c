/* test_batch.c: decoding at length, one by one and in batches; every table of kernels gives the same bits and names the
 * same fault, under sanitizers and in buffers of exactly the promised length. */
#include "check.h"
#include "kernels.h"
#include "kernels_choice.h"

#include <fenv.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PADDING = 64 };

static uint64_t random_state = 1;

/* A linear congruential generator; the high bits are good enough for tests. */
static uint32_t draw(uint32_t below)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((random_state >> 33) % below);
}

/* Heap memory of exactly this size, so that the sanitizer sees the first byte beyond it. */
static void *room(size_t size)
{
    void *memory = malloc(size == 0 ? 1 : size);
    CHECK(memory != NULL);
    memset(memory, 0xa5, size);
    return memory;
}

/* ---- payloads -------------------------------------------------------------------------------------------------------- */

typedef struct payload {
    skl_shape shape;
    uint8_t *bytes; /* with padding */
    size_t size;
} payload;

/* Bytes of the optional columns, as SPEC.md 5.1 says. */
static size_t size_of_columns(const skl_shape *shape)
{
    static const uint32_t per_position[4] = {0, 2, 2, 4};
    const size_t positions = shape->num_positions;
    return positions * per_position[shape->columns & 3] + (shape->columns & 4 ? (positions + 8) / 8 : 0) +
           (shape->columns & 8 ? 2 * (size_t)shape->num_records : 0);
}

/* A sound payload of num_positions positions with 0..most records each. */
static payload make_payload(skl_shape shape, uint32_t most)
{
    const uint32_t positions = shape.num_positions;
    int64_t *offsets = room((positions + 1) * sizeof *offsets);
    offsets[0] = 0;
    for (uint32_t t = 0; t < positions; t++)
        offsets[t + 1] = offsets[t] + draw(most + 1);
    shape.num_records = (uint64_t)offsets[positions];
    uint32_t *ids = room(shape.num_records * sizeof *ids), *tokens = room((positions + 1) * sizeof *tokens);
    uint8_t *columns = room(size_of_columns(&shape));
    uint8_t *codes = room(shape.num_records);
    const uint32_t stride = shape.vocab_size / (most + 1);
    for (uint32_t t = 0; t < positions; t++) {
        const uint32_t n = (uint32_t)(offsets[t + 1] - offsets[t]);
        for (uint32_t i = 0; i < n; i++) {
            ids[offsets[t] + i] = stride * i + draw(stride);
            codes[offsets[t] + i] = (uint8_t)(shape.kind == SKL_KIND_RATIOS ? draw(12) : i > 0 ? 1 : shape.rounds - n + 1);
        }
    }
    for (uint32_t t = 0; t <= positions; t++)
        tokens[t] = draw(shape.vocab_size);
    memset(columns, 1, size_of_columns(&shape));
    payload made = {shape, NULL, 0};
    uint64_t size = 0;
    size_t written = 0;
    skl_fault fault;
    CHECK(skl_payload_size(&shape, &size) == SKL_OK);
    made.size = (size_t)size + PADDING;
    made.bytes = room(made.size);
    memset(made.bytes + size, 0, PADDING);
    CHECK(skl_encode(&shape, offsets, ids, codes, shape.token_size == 0 ? NULL : tokens,
                     shape.columns == 0 ? NULL : columns, made.bytes, (size_t)size, &written, &fault) == SKL_OK);
    free(offsets);
    free(ids);
    free(codes);
    free(tokens);
    free(columns);
    return made;
}

typedef struct decoded {
    int64_t *offsets;
    uint32_t *token_ids, *tokens;
    uint8_t *codes;
    skl_status status;
    skl_fault fault;
} decoded;

static decoded decode_with(const char *table, const payload *from)
{
    decoded out = {.fault = {0, 0, 0}};
    out.offsets = room((from->shape.num_positions + (size_t)1) * sizeof *out.offsets);
    out.token_ids = room(from->shape.num_records * sizeof *out.token_ids);
    out.codes = room(from->shape.num_records);
    out.tokens = room((from->shape.num_positions + (size_t)1) * sizeof *out.tokens);
    CHECK(skl_use_kernels(table) == SKL_OK);
    out.status = skl_decode(&from->shape, from->bytes, from->size, out.offsets, out.token_ids, out.codes, out.tokens,
                            NULL, &out.fault);
    return out;
}

static void drop(decoded *out)
{
    free(out->offsets);
    free(out->token_ids);
    free(out->tokens);
    free(out->codes);
}

static void check_same(const skl_shape *shape, const decoded *a, const decoded *b)
{
    CHECK(a->status == b->status);
    if (a->status != SKL_OK) {
        CHECK(a->fault.reason == b->fault.reason && a->fault.position == b->fault.position);
        CHECK(a->fault.value == b->fault.value);
        return;
    }
    CHECK(memcmp(a->offsets, b->offsets, (shape->num_positions + (size_t)1) * sizeof *a->offsets) == 0);
    CHECK(memcmp(a->token_ids, b->token_ids, shape->num_records * sizeof *a->token_ids) == 0);
    CHECK(memcmp(a->codes, b->codes, shape->num_records) == 0);
    CHECK(memcmp(a->tokens, b->tokens, (shape->num_positions + (size_t)1) * sizeof *a->tokens) == 0);
}

/* Decode with every table that this processor has; returns the status they agree on. */
static skl_status check_agreement(const payload *from)
{
    decoded truth = decode_with("portable", from);
    for (size_t i = 1; i < NUM_KERNELS; i++) {
        if (!try_kernels(all_kernels[i]))
            continue;
        decoded other = decode_with(all_kernels[i], from);
        check_same(&from->shape, &truth, &other);
        drop(&other);
    }
    const skl_status status = truth.status;
    CHECK(status == SKL_OK || truth.fault.reason != SKL_REASON_NONE);
    drop(&truth);
    return status;
}

static const skl_shape shapes[] = {
    {SKL_KIND_COUNTS, SKL_PROFILE_R24, 1, 3, 1, 128256, 50, 0, 0},
    {SKL_KIND_COUNTS, SKL_PROFILE_R24, 2, 2, 0, 60000, 127, 0, 0},
    {SKL_KIND_COUNTS, SKL_PROFILE_R24W, 1, 3, 0, 1u << 18, 63, 0, 0},
    {SKL_KIND_COUNTS, SKL_PROFILE_R32, 1, 4, 15, 1u << 24, 100, 0, 0},
    {SKL_KIND_RATIOS, SKL_PROFILE_R24, 1, 3, 0, 1u << 17, 0, 0, 0},
    {SKL_KIND_RATIOS, SKL_PROFILE_R32, 2, 3, 0, 1u << 24, 0, 0, 0},
};
enum { NUM_SHAPES = sizeof shapes / sizeof shapes[0] };

/* Sound payloads of all lengths, then the same with a few bits or bytes changed anywhere. */
static void test_tables_agree(void)
{
    uint32_t refused = 0;
    for (uint32_t round = 0; round < 240; round++) {
        skl_shape shape = shapes[round % NUM_SHAPES];
        shape.num_positions = 1 + draw(round % 24 < NUM_SHAPES ? 2000 : 60);
        payload made = make_payload(shape, 1 + draw(40));
        CHECK(check_agreement(&made) == SKL_OK);
        for (uint32_t damage = 0; damage < 12; damage++) {
            uint8_t *const at = made.bytes + draw((uint32_t)made.size);
            const uint8_t kept = *at;
            *at = damage % 3 == 0 ? (uint8_t)draw(256) : (uint8_t)(kept ^ 1u << draw(8));
            refused += check_agreement(&made) != SKL_OK;
            *at = kept;
        }
        free(made.bytes);
    }
    CHECK(refused > 1000);
}

/* Two counts changed so that their sum stays: where they are of one position nothing is wrong, else both positions are;
 * sums that wrap around a byte are wrong too. */
static void test_moved_counts(void)
{
    skl_shape shape = {SKL_KIND_COUNTS, SKL_PROFILE_R32, 1, 0, 0, 1u << 24, 120, 300, 0};
    for (uint32_t round = 0; round < 400; round++) {
        payload made = make_payload(shape, 30);
        uint8_t *const records = made.bytes + made.shape.num_positions;
        const uint64_t n = made.shape.num_records;
        const uint32_t from = draw((uint32_t)n), to = (from + 1 + draw(round % 2 == 0 ? 3 : (uint32_t)n - 1)) % n;
        const uint8_t amount = (uint8_t)draw(records[4 * from + 3] + 1u);
        if (records[4 * to + 3] + amount < 128) {
            records[4 * from + 3] = (uint8_t)(records[4 * from + 3] - amount);
            records[4 * to + 3] = (uint8_t)(records[4 * to + 3] + amount);
        }
        check_agreement(&made);
        for (uint64_t i = from; i < n && i < from + 5; i++) /* 5 * 127 passes 256 twice */
            records[4 * i + 3] = 127;
        CHECK(check_agreement(&made) == SKL_ERR_CORRUPT);
        free(made.bytes);
    }
}

/* What a table's pass over one stretch of records sees. */
static skl_scan scan_with(const char *table, const uint8_t *begin_marks, const uint8_t *records, size_t n,
                          uint32_t rounds)
{
    skl_scan scan = {.profile = SKL_PROFILE_R32, .vocab_size = 1u << 24, .counts = rounds != 0};
    uint32_t *ids = room(n * sizeof *ids);
    uint8_t *codes = room(n);
    CHECK(skl_use_kernels(table) == SKL_OK);
    skl_current_kernels()->unpack(&scan, begin_marks, records, n, ids, codes);
    CHECK(scan.last_id == ids[n - 1]);
    free(ids);
    free(codes);
    return scan;
}

/* Sound records are never taken for bad ones, which would be looked at again, one by one; one position whose counts sum
 * to anything else is always bad, whatever byte it is in, also where the sum is right but for a carry. */
static void test_sums(void)
{
    static const int32_t wrong[] = {0, 1, -1, 2, 127, 128, 254, 255, 256, 257, 510, 511, 512};
    for (uint32_t round = 0; round < 6000; round++) {
        const uint32_t rounds = 1 + draw(127), wanted = draw(40), one_in = 1 + draw(4);
        uint8_t begin_marks[700] = {0}, records[4 * 700 + PADDING] = {0};
        const int32_t off_by = wrong[round % (sizeof wrong / sizeof wrong[0])];
        size_t n = 0;
        int sound = 1;
        for (uint32_t t = 0; t < 41 && n < 600; t++) {
            int32_t rounds_left = (int32_t)rounds;
            if (t == wanted && rounds_left + off_by > 0) {
                rounds_left += off_by;
                sound = off_by == 0;
            }
            begin_marks[n] = (uint8_t)rounds;
            for (uint32_t i = 0; rounds_left > 0; i++, n++) {
                const int32_t most = rounds_left < 127 ? rounds_left : 127;
                const int32_t code = draw(one_in) == 0 || i > 60 ? most : 1 + (int32_t)draw((uint32_t)most);
                records[4 * n] = (uint8_t)i;
                records[4 * n + 3] = (uint8_t)code;
                rounds_left -= code;
            }
        }
        for (size_t i = 0; i < NUM_KERNELS; i++) {
            if (!try_kernels(all_kernels[i]))
                continue;
            const skl_scan scan = scan_with(all_kernels[i], begin_marks, records, n, rounds);
            CHECK(!sound || (scan.bad == 0 && scan.rounds_left == 0 && scan.reserved == 0));
            CHECK(sound || scan.bad != 0 || scan.rounds_left != 0);
            CHECK(sound || off_by < 0 || scan.bad != 0);
        }
    }
}

/* One position may have more records than are unpacked at a time. */
static void test_long_position(void)
{
    skl_shape shape = {SKL_KIND_RATIOS, SKL_PROFILE_R32, 2, 0, 0, 1u << 24, 0, 3, 3 * 65535};
    payload made = {shape, NULL, 0};
    uint64_t size = 0;
    CHECK(skl_payload_size(&shape, &size) == SKL_OK);
    made.size = (size_t)size + PADDING;
    made.bytes = room(made.size);
    memset(made.bytes, 0xff, 6); /* 65 535 records each */
    memset(made.bytes + size, 0, PADDING);
    for (uint32_t i = 0; i < 3 * 65535; i++) {
        const uint32_t id = i % 65535;
        memcpy(made.bytes + 6 + (size_t)4 * i, (uint8_t[]){(uint8_t)id, (uint8_t)(id >> 8), (uint8_t)(id >> 16), 0}, 4);
    }
    CHECK(check_agreement(&made) == SKL_OK);
    made.bytes[6 + 4 * 100000] ^= 0x40;
    CHECK(check_agreement(&made) == SKL_ERR_CORRUPT);
    free(made.bytes);
}

/* Results beyond the caches are streamed, from any place of theirs on a cache line, with the same bits; as are faults. */
static void test_streamed(void)
{
    for (uint32_t number = 0; number < 4; number++) {
        skl_shape shape = shapes[number == 3 ? 4 : number];
        shape.num_positions = 200000;
        payload made = make_payload(shape, 32);
        const size_t records = made.shape.num_records, positions = shape.num_positions;
        CHECK(records * 5 + positions * 8 > (size_t)1 << 24);
        CHECK(check_agreement(&made) == SKL_OK);
        decoded truth = decode_with("portable", &made);
        for (size_t i = 1; i < NUM_KERNELS; i++) {
            if (!try_kernels(all_kernels[i]))
                continue;
            const size_t shift = 1 + draw(15);
            uint32_t *ids = room((records + shift) * sizeof *ids);
            uint8_t *codes = room(records + shift);
            int64_t *offsets = room((positions + 1 + shift) * sizeof *offsets);
            skl_fault fault;
            CHECK(skl_decode(&made.shape, made.bytes, made.size, offsets + shift, ids + shift, codes + shift, NULL, NULL,
                             &fault) == SKL_OK);
            CHECK(memcmp(ids + shift, truth.token_ids, records * sizeof *ids) == 0);
            CHECK(memcmp(codes + shift, truth.codes, records) == 0);
            CHECK(memcmp(offsets + shift, truth.offsets, (positions + 1) * sizeof *offsets) == 0);
            free(ids);
            free(codes);
            free(offsets);
        }
        drop(&truth);
        made.bytes[positions * shape.record_count_size + 1000000] ^= 0x55;
        check_agreement(&made);
        free(made.bytes);
    }
}

/* ---- batches ----------------------------------------------------------------------------------------------------------- */

enum { IGNORED = -100 };

/* The arrays of a batch, of exactly their size. */
static skl_batch make_batch(uint32_t num_rows, uint32_t row_positions, uint64_t num_records)
{
    const size_t cells = (size_t)num_rows * row_positions;
    skl_batch batch = {.num_rows = num_rows, .row_positions = row_positions, .num_records = num_records};
    batch.ignored_label = IGNORED;
    batch.tokens = room((cells + num_rows) * sizeof *batch.tokens);
    batch.input_ids = room(cells * sizeof *batch.input_ids);
    batch.labels = room(cells * sizeof *batch.labels);
    batch.offsets = room((cells + 1) * sizeof *batch.offsets);
    batch.token_ids = room(num_records * sizeof *batch.token_ids);
    batch.probs = room(num_records * sizeof *batch.probs);
    return batch;
}

static void drop_batch(skl_batch *batch)
{
    free(batch->tokens);
    free(batch->input_ids);
    free(batch->labels);
    free(batch->offsets);
    free(batch->token_ids);
    free(batch->probs);
}

/* Every quotient of a count and its rounds is the one that a division rounds to: with two records a position, all of
 * them come up. */
static void test_quotients(void)
{
    for (uint32_t rounds = 2; rounds <= 127; rounds++)
        for (size_t table = 0; table < NUM_KERNELS; table++) {
            if (!try_kernels(all_kernels[table]))
                continue;
            uint8_t bytes[126 + 6 * 126 + PADDING];
            const uint32_t positions = rounds - 1;
            memset(bytes, 0, sizeof bytes);
            for (uint32_t t = 0; t < positions; t++) {
                const uint32_t records[2] = {(t + 1) << 17, 1 | (rounds - t - 1) << 17};
                bytes[t] = 2;
                for (uint32_t i = 0; i < 6; i++)
                    bytes[positions + 6 * t + i] = (uint8_t)(records[i / 3] >> 8 * (i % 3));
            }
            const skl_shape shape = {SKL_KIND_COUNTS, SKL_PROFILE_R24, 1, 0, 0, 2, rounds, 0, 0};
            const uint8_t *const sources[1] = {bytes};
            const uint64_t lengths[1] = {positions * UINT64_C(7) + PADDING};
            const uint32_t num_positions[1] = {positions}, num_records[1] = {2 * positions};
            skl_batch batch = make_batch(1, positions, 2 * positions);
            batch.tokens_given = 1;
            memset(batch.tokens, 0, (positions + 1) * sizeof *batch.tokens);
            uint8_t codes[252];
            uint32_t row;
            skl_fault fault;
            CHECK(skl_decode_batch(&shape, 0, sources, lengths, num_positions, num_records, &batch, codes, &row,
                                   &fault) == SKL_OK);
            for (uint32_t i = 0; i < 2 * positions; i++)
                CHECK(batch.probs[i] == (float)codes[i] / (float)rounds);
            drop_batch(&batch);
        }
}

typedef struct rows {
    payload made[3];
    const uint8_t *sources[4];
    uint64_t lengths[4];
    uint32_t num_positions[4], num_records[4];
    uint64_t total;
} rows;

/* Four rows: two sound ones, an empty one, a third. */
static rows make_rows(skl_shape shape)
{
    rows r = {.total = 0};
    for (uint32_t b = 0, next = 0; b < 4; b++) {
        r.sources[b] = NULL;
        r.lengths[b] = r.num_positions[b] = r.num_records[b] = 0;
        if (b == 2)
            continue;
        shape.num_positions = 300 + 70 * b; /* more than is asked for ahead */
        payload *const made = &r.made[next++];
        *made = make_payload(shape, 20);
        r.sources[b] = made->bytes;
        r.lengths[b] = made->size;
        r.num_positions[b] = shape.num_positions;
        r.num_records[b] = (uint32_t)made->shape.num_records;
        r.total += made->shape.num_records;
    }
    return r;
}

static void drop_rows(rows *r)
{
    for (size_t i = 0; i < 3; i++)
        free(r->made[i].bytes);
}

/* In a thread that rounds upward, which changes nothing. */
static skl_status decode_rows(const rows *r, const skl_shape *shape, const skl_batch *batch, uint32_t *row,
                              skl_fault *fault)
{
    uint8_t *codes = room(r->total + 1);
    CHECK(fesetround(FE_UPWARD) == 0);
    const skl_status status = skl_decode_batch(shape, 3, r->sources, r->lengths, r->num_positions, r->num_records, batch,
                                               codes, row, fault);
    CHECK(fegetround() == FE_UPWARD && fesetround(FE_TONEAREST) == 0);
    free(codes);
    return status;
}

/* Rows are their sequences one by one, padded on the right; every table gives the same bits. */
static void test_rows(void)
{
    for (uint32_t number = 0; number < NUM_SHAPES; number++) {
        rows r = make_rows(shapes[number]);
        const uint32_t width = r.num_positions[3] + 2;
        for (size_t table = 0; table < NUM_KERNELS; table++) {
            if (!try_kernels(all_kernels[table]))
                continue;
            skl_batch batch = make_batch(4, width, r.total);
            uint32_t row;
            skl_fault fault;
            CHECK(decode_rows(&r, &shapes[number], &batch, &row, &fault) == SKL_OK);
            CHECK(batch.offsets[4 * width] == (int64_t)r.total);
            for (uint32_t b = 0, next = 0; b < 4; b++) {
                const size_t first = (size_t)b * width;
                for (size_t t = r.num_positions[b]; t < width; t++) {
                    CHECK(batch.input_ids[first + t] == 0 && batch.labels[first + t] == IGNORED);
                    CHECK(batch.offsets[first + t + 1] == batch.offsets[first + t]);
                }
                if (r.num_positions[b] == 0)
                    continue;
                decoded alone = decode_with(all_kernels[table], &r.made[next++]);
                float *weights = room(r.num_records[b] * sizeof *weights);
                CHECK(alone.status == SKL_OK);
                const int64_t base = batch.offsets[first];
                for (size_t t = 0; t < r.num_positions[b]; t++) {
                    CHECK(batch.offsets[first + t + 1] == base + alone.offsets[t + 1]);
                    CHECK(batch.input_ids[first + t] == alone.tokens[t]);
                    const int empty = alone.offsets[t + 1] == alone.offsets[t];
                    CHECK(batch.labels[first + t] == (empty ? IGNORED : (int64_t)alone.tokens[t + 1]));
                    CHECK(batch.tokens[first + b + t] == alone.tokens[t]);
                }
                CHECK(batch.tokens[first + b + r.num_positions[b]] == alone.tokens[r.num_positions[b]]);
                CHECK(memcmp(batch.token_ids + base, alone.token_ids, r.num_records[b] * sizeof *alone.token_ids) == 0);
                if (shapes[number].kind == SKL_KIND_RATIOS) {
                    CHECK(skl_expand(r.num_positions[b], r.num_records[b], alone.offsets, alone.codes, 3, weights) ==
                          SKL_OK);
                    CHECK(memcmp(batch.probs + base, weights, r.num_records[b] * sizeof *weights) == 0);
                } else {
                    for (size_t i = 0; i < r.num_records[b]; i++)
                        CHECK(batch.probs[(size_t)base + i] == (float)alone.codes[i] / (float)shapes[number].rounds);
                }
                free(weights);
                drop(&alone);
            }
            drop_batch(&batch);
        }
        drop_rows(&r);
    }
}

/* Tokens of the caller stand in for the stored ones; probabilities are left out where nobody wants them. */
static void test_given_tokens(void)
{
    rows r = make_rows(shapes[0]);
    const uint32_t width = r.num_positions[3];
    skl_batch batch = make_batch(4, width, r.total), stored = make_batch(4, width, r.total);
    float *const probs = batch.probs;
    uint32_t row;
    skl_fault fault;
    batch.tokens_given = 1;
    batch.probs = NULL;
    for (size_t i = 0; i < 4 * (size_t)(width + 1); i++)
        batch.tokens[i] = (uint32_t)i;
    CHECK(decode_rows(&r, &shapes[0], &batch, &row, &fault) == SKL_OK);
    CHECK(decode_rows(&r, &shapes[0], &stored, &row, &fault) == SKL_OK);
    for (uint32_t b = 0; b < 4; b++)
        for (size_t t = 0; t < r.num_positions[b]; t++) {
            const size_t at = (size_t)b * width + t;
            CHECK(batch.input_ids[at] == (int64_t)((size_t)b * (width + 1) + t));
            CHECK(batch.labels[at] == (stored.labels[at] == IGNORED ? IGNORED : batch.input_ids[at] + 1));
        }
    drop_batch(&stored);
    batch.tokens[width + 1 + 5] = shapes[0].vocab_size;
    CHECK(decode_rows(&r, &shapes[0], &batch, &row, &fault) == SKL_ERR_ARG);
    CHECK(row == 1 && fault.reason == SKL_REASON_TOKEN_RANGE && fault.position == 5);
    CHECK(fault.value == shapes[0].vocab_size);
    batch.probs = probs;
    drop_batch(&batch);
    drop_rows(&r);
}

static void expect_batch_fault(const rows *r, const skl_shape *shape, const skl_batch *batch, skl_status status,
                               uint32_t expected_row, skl_reason reason, uint64_t position)
{
    uint32_t row = 99;
    skl_fault fault = {0, 0, 0};
    CHECK(decode_rows(r, shape, batch, &row, &fault) == status);
    CHECK(row == expected_row && fault.reason == (uint32_t)reason && fault.position == position);
}

/* Records that somebody else decodes: their bytes one row after the other, and all else as when they are decoded; what is
 * wrong with their numbers and with the padding is found. */
static void test_packed_records(void)
{
    for (uint32_t number = 0; number < NUM_SHAPES; number++) {
        const uint32_t size = shapes[number].profile == SKL_PROFILE_R32 ? 4 : 3;
        rows r = make_rows(shapes[number]);
        const uint32_t width = r.num_positions[3] + 2;
        const size_t cells = 4 * (size_t)width;
        skl_batch batch = make_batch(4, width, r.total), ours = make_batch(4, width, r.total);
        uint32_t row;
        skl_fault fault;
        ours.records = room(r.total * size);
        CHECK(decode_rows(&r, &shapes[number], &batch, &row, &fault) == SKL_OK);
        CHECK(decode_rows(&r, &shapes[number], &ours, &row, &fault) == SKL_OK);
        CHECK(memcmp(ours.offsets, batch.offsets, (cells + 1) * sizeof *ours.offsets) == 0);
        CHECK(memcmp(ours.input_ids, batch.input_ids, cells * sizeof *ours.input_ids) == 0);
        CHECK(memcmp(ours.labels, batch.labels, cells * sizeof *ours.labels) == 0);
        const uint8_t *next = ours.records;
        for (size_t i = 0; i < 3; i++) {
            const payload *const made = &r.made[i];
            const size_t n = (size_t)made->shape.num_records * size;
            CHECK(memcmp(next, made->bytes + made->shape.num_positions * made->shape.record_count_size, n) == 0);
            next += n;
        }
        payload *const second = &r.made[1];
        second->bytes[second->size - 1] = 1;
        expect_batch_fault(&r, &shapes[number], &ours, SKL_ERR_CORRUPT, 1, SKL_REASON_PADDING, r.num_positions[1]);
        second->bytes[second->size - 1] = 0;
        second->bytes[0] += 1;
        expect_batch_fault(&r, &shapes[number], &ours, SKL_ERR_CORRUPT, 1, SKL_REASON_SHAPE, r.num_positions[1]);
        r.lengths[1] -= 1;
        expect_batch_fault(&r, &shapes[number], &ours, SKL_ERR_TRUNCATED, 1, SKL_REASON_NONE, 0);
        skl_shape unknown = shapes[number];
        unknown.vocab_size = 0;
        expect_batch_fault(&r, &unknown, &ours, SKL_ERR_ARG, 0, SKL_REASON_SHAPE, 0);
        free(ours.records);
        drop_batch(&ours);
        drop_batch(&batch);
        drop_rows(&r);
    }
}

/* Starts and positions of every document, in rows of any length; without the column they are refused. */
static void test_starts(void)
{
    for (uint32_t number = 0; number < 2; number++) {
        skl_shape shape = shapes[3];
        shape.columns = number == 0 ? SKL_COLUMN_DOCUMENT_START : shape.columns; /* or columns on both sides of it */
        rows r = make_rows(shape);
        const uint32_t width = r.num_positions[3] + 11;
        skl_batch batch = make_batch(4, width, r.total);
        batch.starts = room(4 * (size_t)width);
        batch.positions = room(4 * (size_t)width * sizeof *batch.positions);
        uint32_t row;
        skl_fault fault;
        CHECK(decode_rows(&r, &shape, &batch, &row, &fault) == SKL_OK);
        for (uint32_t b = 0; b < 4; b++)
            for (uint32_t t = 0, place = 0; t < width; t++) {
                const int start = t < r.num_positions[b] && t % 8 == 0; /* make_payload sets one bit of each byte */
                place = start ? 0 : place;
                CHECK(batch.starts[(size_t)b * width + t] == start);
                CHECK(batch.positions[(size_t)b * width + t] == (int64_t)place++);
            }
        const payload *const second = &r.made[1];
        const size_t behind = PADDING + (number == 0 ? 0 : 2 * (size_t)second->shape.num_records);
        CHECK((r.num_positions[1] + 1) % 8 != 0);
        second->bytes[second->size - behind - 1] |= 128; /* a bit behind the last token */
        expect_batch_fault(&r, &shape, &batch, SKL_ERR_CORRUPT, 1, SKL_REASON_PADDING, r.num_positions[1]);
        shape.columns &= ~(uint32_t)SKL_COLUMN_DOCUMENT_START;
        expect_batch_fault(&r, &shape, &batch, SKL_ERR_ARG, 0, SKL_REASON_SHAPE, 0);
        free(batch.starts);
        free(batch.positions);
        drop_batch(&batch);
        drop_rows(&r);
    }
}

/* Every way in which a batch can fail, with its row, reason and position. */
static void test_batch_faults(void)
{
    const skl_shape shape = shapes[3], ratios = shapes[4];
    rows r = make_rows(shape);
    const uint32_t width = r.num_positions[3];
    skl_batch batch = make_batch(4, width, r.total + 1);
    skl_shape other = shape;

    other.token_size = 0;
    expect_batch_fault(&r, &other, &batch, SKL_ERR_ARG, 0, SKL_REASON_SHAPE, 0);
    expect_batch_fault(&r, &shape, &batch, SKL_ERR_ARG, 3, SKL_REASON_SHAPE, 0); /* a record too many */
    batch.num_records = r.total - 1;
    expect_batch_fault(&r, &shape, &batch, SKL_ERR_ARG, 3, SKL_REASON_SHAPE, 0);
    batch.num_records = r.total;
    batch.row_positions = width - 1;
    expect_batch_fault(&r, &shape, &batch, SKL_ERR_ARG, 3, SKL_REASON_SHAPE, 0);
    batch.row_positions = width;
    other = shape;
    other.vocab_size = 0;
    expect_batch_fault(&r, &other, &batch, SKL_ERR_ARG, 0, SKL_REASON_SHAPE, 0);
    CHECK(r.num_positions[2] == 0);
    r.num_records[2] = 5; /* records that no position has */
    batch.num_records += 5;
    expect_batch_fault(&r, &shape, &batch, SKL_ERR_ARG, 2, SKL_REASON_SHAPE, 0);
    r.num_records[2] = 0;
    batch.num_records -= 5;
    r.lengths[1] -= 1;
    expect_batch_fault(&r, &shape, &batch, SKL_ERR_TRUNCATED, 1, SKL_REASON_NONE, 0);
    r.lengths[1] += 1;

    uint8_t *const bytes = r.made[1].bytes;
    const size_t tokens = r.num_positions[1] + 4 * (size_t)r.num_records[1];
    bytes[tokens + 4 * 7 + 3] = 1; /* the eighth token passes 2^24 */
    expect_batch_fault(&r, &shape, &batch, SKL_ERR_CORRUPT, 1, SKL_REASON_TOKEN_RANGE, 7);
    bytes[tokens + 4 * 7 + 3] = 0;
    bytes[r.lengths[1] - 1] = 1;
    expect_batch_fault(&r, &shape, &batch, SKL_ERR_CORRUPT, 1, SKL_REASON_PADDING, r.num_positions[1]);
    bytes[r.lengths[1] - 1] = 0;
    bytes[r.num_positions[1] + 4 * (r.num_records[1] - 1) + 3] |= 128;
    uint64_t last = r.num_positions[1] - 1;
    while (bytes[last] == 0)
        last--;
    expect_batch_fault(&r, &shape, &batch, SKL_ERR_CORRUPT, 1, SKL_REASON_RESERVED, last);
    drop_batch(&batch);
    drop_rows(&r);

    r = make_rows(ratios);
    batch = make_batch(4, r.num_positions[3], r.total);
    uint32_t row;
    skl_fault fault;
    uint8_t *codes = room(r.total);
    CHECK(skl_decode_batch(&ratios, 31, r.sources, r.lengths, r.num_positions, r.num_records, &batch, codes, &row,
                           &fault) == SKL_ERR_ARG);
    free(codes);
    drop_batch(&batch);
    drop_rows(&r);
}

/* Two pages and one that cannot be read.  The first read of the second page, by whoever reads both of them in order,
 * makes what is wrong in the first page good, as a file that is mapped can be written at any moment. */
typedef struct changing_memory {
    uint8_t *begin, *end; /* of the two pages */
    size_t page;
    volatile uint8_t *wrong; /* in the first */
} changing_memory;

static changing_memory trap;

static void on_trap(int number, siginfo_t *info, void *context)
{
    static const char message[] = "test_changing_memory: read beyond the end\n";
    (void)number, (void)context;
    const uintptr_t at = (uintptr_t)info->si_addr, middle = (uintptr_t)trap.begin + trap.page;
    if (trap.wrong == NULL || at < middle || at >= (uintptr_t)trap.end) {
        (void)!write(2, message, sizeof message - 1);
        _exit(1);
    }
    mprotect(trap.begin + trap.page, trap.page, PROT_READ | PROT_WRITE);
    *trap.wrong = 0;
    trap.wrong = NULL;
}

static void arm(uint8_t *wrong)
{
    *wrong = 1;
    trap.wrong = wrong;
    CHECK(wrong < trap.begin + trap.page && mprotect(trap.begin + trap.page, trap.page, PROT_NONE) == 0);
}

/* Padding and given tokens that are no longer wrong when their place is looked for: the last place is named. */
static void test_changing_memory(void)
{
    trap.page = (size_t)sysconf(_SC_PAGESIZE);
    trap.begin = mmap(NULL, 3 * trap.page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(trap.begin != MAP_FAILED && mprotect(trap.begin + 2 * trap.page, trap.page, PROT_NONE) == 0);
    trap.end = trap.begin + 2 * trap.page;
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO}, before[2];
    CHECK(sigaction(SIGSEGV, &action, &before[0]) == 0 && sigaction(SIGBUS, &action, &before[1]) == 0);

    const uint32_t positions = (uint32_t)(trap.page / 4 + 300); /* tokens on both pages */
    skl_shape shape = {SKL_KIND_COUNTS, SKL_PROFILE_R24, 1, 0, 0, 1000, 5, 3, 0};
    payload row = make_payload(shape, 5);
    skl_batch batch = make_batch(1, 3, row.shape.num_records);
    uint32_t number, num_records = (uint32_t)row.shape.num_records;
    uint64_t size = 2 * trap.page;
    const uint8_t *source = trap.begin;
    uint8_t *codes = room(num_records);
    skl_fault fault;
    memset(batch.tokens, 0, 4 * sizeof *batch.tokens);
    batch.tokens_given = 1;
    memcpy(trap.begin, row.bytes, row.size);
    arm(trap.begin + row.size);
    CHECK(skl_decode_batch(&shape, 0, &source, &size, &row.shape.num_positions, &num_records, &batch, codes, &number,
                           &fault) == SKL_ERR_CORRUPT);
    CHECK(trap.wrong == NULL && fault.reason == SKL_REASON_PADDING && fault.value == size - 1);
    free(codes);
    free(row.bytes);
    drop_batch(&batch);

    memset(trap.begin, 0, 2 * trap.page);
    shape.num_positions = positions;
    row = make_payload(shape, 5);
    batch = make_batch(1, positions, row.shape.num_records);
    num_records = (uint32_t)row.shape.num_records;
    codes = room(num_records);
    source = row.bytes;
    size = row.size;
    uint32_t *const own_tokens = batch.tokens;
    batch.tokens = (uint32_t *)(void *)(trap.end - 4 * (positions + 1));
    batch.tokens_given = 1;
    arm((uint8_t *)(batch.tokens + 2) + 3);
    CHECK(skl_decode_batch(&shape, 0, &source, &size, &row.shape.num_positions, &num_records, &batch, codes, &number,
                           &fault) == SKL_ERR_ARG);
    CHECK(trap.wrong == NULL && fault.reason == SKL_REASON_TOKEN_RANGE && fault.position == positions);
    batch.tokens = own_tokens;
    free(codes);
    free(row.bytes);
    drop_batch(&batch);
    CHECK(sigaction(SIGSEGV, &before[0], NULL) == 0 && sigaction(SIGBUS, &before[1], NULL) == 0);
    munmap(trap.begin, 3 * trap.page);
}

int main(void)
{
    choose_kernels();
    test_tables_agree();
    test_moved_counts();
    test_sums();
    test_long_position();
    test_streamed();
    test_quotients();
    test_rows();
    choose_kernels(); /* what compared them left any */
    test_given_tokens();
    test_packed_records();
    test_starts();
    test_batch_faults();
    test_changing_memory();
    say_kernels();
    puts("batch: all tests hold");
    return 0;
}
