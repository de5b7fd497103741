/* test_codec.c: the codec and the ratio code alone, with buffers of exactly the promised length, under sanitizers. */
#include "check.h"
#include "kernels_choice.h"
#include "skl.h"

#include <fenv.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static void *copy(const void *source, size_t size)
{
    void *memory = room(size);
    if (size != 0)
        memcpy(memory, source, size);
    return memory;
}

/* ---- a sequence ------------------------------------------------------------------------------------------------ */

typedef struct sequence {
    skl_shape shape;
    int64_t *offsets;
    uint32_t *token_ids;
    uint8_t *codes;
    uint32_t *tokens;
    uint8_t *columns;
} sequence;

/* Bytes of the optional columns, as SPEC.md 5.1 says. */
static size_t size_of_columns(const skl_shape *shape)
{
    static const uint32_t per_position[4] = {0, 2, 2, 4};
    const size_t positions = shape->num_positions;
    return positions * per_position[shape->columns & 3] + (shape->columns & 4 ? (positions + 8) / 8 : 0) +
           (shape->columns & 8 ? 2 * (size_t)shape->num_records : 0);
}

static sequence empty_sequence(skl_shape shape)
{
    sequence s = {.shape = shape};
    s.offsets = room((shape.num_positions + 1) * sizeof *s.offsets);
    s.token_ids = room(shape.num_records * sizeof *s.token_ids);
    s.codes = room(shape.num_records * sizeof *s.codes);
    if (shape.token_size != 0)
        s.tokens = room((shape.num_positions + 1) * sizeof *s.tokens);
    if (shape.columns != 0)
        s.columns = room(size_of_columns(&shape));
    return s;
}

static void free_sequence(sequence *s)
{
    free(s->offsets);
    free(s->token_ids);
    free(s->codes);
    free(s->tokens);
    free(s->columns);
}

/* A random valid sequence; kinds and profiles by the caller's shape. */
static sequence random_sequence(skl_shape shape)
{
    const uint32_t most = 5;
    uint32_t numbers[16];
    shape.num_records = 0;
    for (uint32_t t = 0; t < shape.num_positions; t++) {
        numbers[t] = draw(most + 1);
        if (numbers[t] > shape.vocab_size)
            numbers[t] = shape.vocab_size;
        if (shape.kind == SKL_KIND_COUNTS && numbers[t] > shape.rounds)
            numbers[t] = shape.rounds;
        shape.num_records += numbers[t];
    }
    sequence s = empty_sequence(shape);
    int64_t record = 0;
    s.offsets[0] = 0;
    for (uint32_t t = 0; t < shape.num_positions; t++) {
        uint32_t rounds_left = shape.rounds;
        for (uint32_t i = 0; i < numbers[t]; i++) {
            const uint32_t step = shape.vocab_size / (most + 1) + 1;
            const uint32_t id = i == 0 ? draw(step) : s.token_ids[record - 1] + 1 + (step > 2 ? draw(step - 2) : 0);
            s.token_ids[record] = id < shape.vocab_size ? id : i; /* small vocabularies: 0, 1, 2, ... */
            if (shape.vocab_size <= most + 1)
                s.token_ids[record] = i;
            if (shape.kind == SKL_KIND_COUNTS) {
                const uint32_t rest = numbers[t] - i - 1;
                const uint32_t count = rest == 0 ? rounds_left : 1 + draw(rounds_left - rest);
                s.codes[record] = (uint8_t)count;
                rounds_left -= count;
            } else {
                s.codes[record] = (uint8_t)draw(20);
            }
            record++;
        }
        s.offsets[t + 1] = record;
    }
    for (uint32_t i = 0; shape.token_size != 0 && i <= shape.num_positions; i++)
        s.tokens[i] = draw(shape.vocab_size);
    for (size_t i = 0; i < size_of_columns(&shape); i++)
        s.columns[i] = (uint8_t)draw(256);
    return s;
}

/* Encode into a buffer of exactly the payload's size, then lay the padding behind it. */
static uint8_t *encoded(const sequence *s, size_t *size)
{
    uint64_t payload = 0;
    CHECK(skl_payload_size(&s->shape, &payload) == SKL_OK);
    uint8_t *exact = room((size_t)payload);
    size_t written = 0;
    skl_fault fault;
    CHECK(skl_encode(&s->shape, s->offsets, s->token_ids, s->codes, s->tokens, s->columns, exact, (size_t)payload,
                     &written, &fault) == SKL_OK);
    CHECK(written == payload);
    *size = (size_t)payload + PADDING;
    uint8_t *bytes = room(*size);
    if (payload != 0)
        memcpy(bytes, exact, (size_t)payload);
    memset(bytes + payload, 0, PADDING);
    free(exact);
    return bytes;
}

static skl_status decode_into(const uint8_t *bytes, size_t size, sequence *s, skl_fault *fault)
{
    return skl_decode(&s->shape, bytes, size, s->offsets, s->token_ids, s->codes, s->tokens, s->columns, fault);
}

/* Decode bytes of any content into fresh buffers of exact size. */
static skl_status decode_alone(const skl_shape *shape, const uint8_t *bytes, size_t size, skl_fault *fault)
{
    sequence s = empty_sequence(*shape);
    const skl_status status = decode_into(bytes, size, &s, fault);
    free_sequence(&s);
    return status;
}

static const skl_shape shapes[] = {
    {SKL_KIND_COUNTS, SKL_PROFILE_R24, 1, 0, 0, 1u << 17, 127, 4, 0},
    {SKL_KIND_COUNTS, SKL_PROFILE_R24, 2, 2, 1, 60000, 50, 7, 0},
    {SKL_KIND_COUNTS, SKL_PROFILE_R24W, 1, 3, 15, 1u << 18, 63, 5, 0},
    {SKL_KIND_COUNTS, SKL_PROFILE_R24W, 2, 4, 0, 3, 1, 1, 0},
    {SKL_KIND_COUNTS, SKL_PROFILE_R32, 1, 4, 5, 1u << 24, 127, 15, 0},
    {SKL_KIND_RATIOS, SKL_PROFILE_R24, 1, 2, 8, 40000, 0, 9, 0},
    {SKL_KIND_RATIOS, SKL_PROFILE_R32, 2, 0, 6, 1u << 24, 300, 3, 0},
};
enum { NUM_SHAPES = sizeof shapes / sizeof shapes[0] };

/* ---- round trips ------------------------------------------------------------------------------------------------- */

/* What is encoded comes back, and no byte outside of the buffers is touched. */
static void test_round_trip(void)
{
    for (int i = 0; i < NUM_SHAPES * 200; i++) {
        sequence s = random_sequence(shapes[i % NUM_SHAPES]);
        size_t size = 0;
        uint8_t *bytes = encoded(&s, &size);
        sequence d = empty_sequence(s.shape);
        skl_fault fault;
        CHECK(decode_into(bytes, size, &d, &fault) == SKL_OK);
        CHECK(memcmp(s.offsets, d.offsets, (s.shape.num_positions + 1) * sizeof *s.offsets) == 0);
        CHECK(memcmp(s.token_ids, d.token_ids, s.shape.num_records * sizeof *s.token_ids) == 0);
        CHECK(memcmp(s.codes, d.codes, s.shape.num_records) == 0);
        if (s.tokens != NULL)
            CHECK(memcmp(s.tokens, d.tokens, (s.shape.num_positions + 1) * sizeof *s.tokens) == 0);
        if (s.columns != NULL)
            CHECK(memcmp(s.columns, d.columns, size_of_columns(&s.shape)) == 0);
        /* tokens and columns may be left out by the caller */
        CHECK(skl_decode(&s.shape, bytes, size, d.offsets, d.token_ids, d.codes, NULL, NULL, &fault) == SKL_OK);
        free_sequence(&d);
        free(bytes);
        free_sequence(&s);
    }
}

/* A payload that ends early at any byte is truncated, never read beyond its end. */
static void test_truncation(void)
{
    for (int i = 0; i < NUM_SHAPES; i++) {
        sequence s = random_sequence(shapes[i]);
        size_t size = 0;
        uint8_t *bytes = encoded(&s, &size);
        for (size_t length = 0; length < size; length++) {
            uint8_t *exact = copy(bytes, length);
            skl_fault fault;
            CHECK(decode_alone(&s.shape, exact, length, &fault) == SKL_ERR_TRUNCATED);
            free(exact);
        }
        free(bytes);
        free_sequence(&s);
    }
}

/* Room that is one byte short is refused before anything is written. */
static void test_small_destination(void)
{
    sequence s = random_sequence(shapes[1]);
    uint64_t payload = 0;
    CHECK(skl_payload_size(&s.shape, &payload) == SKL_OK);
    uint8_t *dst = room((size_t)payload - 1);
    size_t written = 7;
    skl_fault fault;
    CHECK(skl_encode(&s.shape, s.offsets, s.token_ids, s.codes, s.tokens, s.columns, dst, (size_t)payload - 1, &written,
                     &fault) == SKL_ERR_DST_SMALL);
    CHECK(written == 7);
    free(dst);
    free_sequence(&s);
}

/* ---- faults -------------------------------------------------------------------------------------------------------- */

/* Two positions: ids 1, 5 with counts 2, 3 and id 9 with count 5; tokens 1, 2, 3. */
static sequence small_counts(void)
{
    skl_shape shape = {SKL_KIND_COUNTS, SKL_PROFILE_R24, 1, 2, 0, 10, 5, 2, 3};
    sequence s = empty_sequence(shape);
    memcpy(s.offsets, (int64_t[]){0, 2, 3}, 3 * sizeof *s.offsets);
    memcpy(s.token_ids, (uint32_t[]){1, 5, 9}, 3 * sizeof *s.token_ids);
    memcpy(s.codes, (uint8_t[]){2, 3, 5}, 3);
    memcpy(s.tokens, (uint32_t[]){1, 2, 3}, 3 * sizeof *s.tokens);
    return s;
}

static void expect_encode_fault(const sequence *s, skl_reason reason, uint64_t position, uint64_t value)
{
    uint8_t dst[4096];
    size_t written = 0;
    skl_fault fault = {0};
    CHECK(skl_encode(&s->shape, s->offsets, s->token_ids, s->codes, s->tokens, s->columns, dst, sizeof dst, &written,
                     &fault) == SKL_ERR_ARG);
    CHECK(fault.reason == (uint32_t)reason);
    CHECK(fault.position == position);
    CHECK(fault.value == value);
}

/* Every fault of a record has its reason, its position and its value, in the encoder ... */
static void test_encode_faults(void)
{
    sequence s = small_counts();
    s.token_ids[2] = 10;
    expect_encode_fault(&s, SKL_REASON_ID_RANGE, 1, 10);
    s.token_ids[2] = 9;
    s.token_ids[1] = 1;
    expect_encode_fault(&s, SKL_REASON_ID_ORDER, 0, 1);
    s.token_ids[1] = 0;
    expect_encode_fault(&s, SKL_REASON_ID_ORDER, 0, 0);
    s.token_ids[1] = 5;
    s.codes[1] = 0;
    expect_encode_fault(&s, SKL_REASON_COUNT_RANGE, 0, 0);
    s.codes[1] = 6;
    expect_encode_fault(&s, SKL_REASON_COUNT_RANGE, 0, 6);
    s.codes[1] = 2;
    expect_encode_fault(&s, SKL_REASON_COUNT_SUM, 0, 4);
    s.codes[1] = 3;
    s.tokens[2] = 10;
    expect_encode_fault(&s, SKL_REASON_TOKEN_RANGE, 2, 10);
    s.tokens[2] = 3;
    s.offsets[1] = 4;
    expect_encode_fault(&s, SKL_REASON_SHAPE, 1, 3);
    s.offsets[1] = 2;
    s.offsets[2] = 2;
    expect_encode_fault(&s, SKL_REASON_SHAPE, 2, 3);
    s.offsets[2] = 3;
    s.shape.vocab_size = 65537; /* does not fit two bytes a token */
    expect_encode_fault(&s, SKL_REASON_SHAPE, 0, 0);
    s.shape.vocab_size = 10;
    s.shape.kind = SKL_KIND_RATIOS;
    memcpy(s.codes, (uint8_t[]){127, 127, 128}, 3);
    expect_encode_fault(&s, SKL_REASON_RATIO_ZERO, 0, 127);
    s.codes[1] = 0;
    expect_encode_fault(&s, SKL_REASON_RATIO_ZERO, 1, 128);
    s.codes[2] = 1;
    s.token_ids[1] = 1; /* equal weights: ids rise */
    expect_encode_fault(&s, SKL_REASON_ID_ORDER, 0, 1);
    free_sequence(&s);

    skl_shape shape = {SKL_KIND_RATIOS, SKL_PROFILE_R24, 1, 0, 0, 1000, 0, 1, 256};
    s = empty_sequence(shape);
    s.offsets[0] = 0;
    s.offsets[1] = 256;
    for (uint32_t i = 0; i < 256; i++) {
        s.token_ids[i] = i;
        s.codes[i] = 0;
    }
    expect_encode_fault(&s, SKL_REASON_NUM_RECORDS, 0, 256);
    free_sequence(&s);
}

/* A single fault at any of many records, whatever step of whichever kernels it falls into. */
static void test_encode_faults_in_steps(void)
{
    enum { RECORDS = 75 };
    for (size_t k = 0; k < NUM_KERNELS; k++) {
        if (!try_kernels(all_kernels[k]))
            continue;
        for (uint32_t profile = SKL_PROFILE_R24; profile <= SKL_PROFILE_R32; profile++) {
            if (profile == SKL_PROFILE_R24W)
                continue; /* its 63 rounds are too few; packed as R24 */
            const skl_shape shape = {SKL_KIND_COUNTS, profile, 1, 0, 0, 1000, RECORDS, 1, RECORDS};
            sequence s = empty_sequence(shape);
            s.offsets[0] = 0;
            s.offsets[1] = RECORDS;
            for (uint32_t i = 0; i < RECORDS; i++) {
                s.token_ids[i] = 900 + i;
                s.codes[i] = 1;
            }
            for (uint32_t i = 0; i < RECORDS; i++) {
                const uint32_t id = s.token_ids[i];
                if (i > 0) {
                    s.token_ids[i] = id - 1;
                    expect_encode_fault(&s, SKL_REASON_ID_ORDER, 0, id - 1);
                    s.token_ids[i] = 0;
                    expect_encode_fault(&s, SKL_REASON_ID_ORDER, 0, 0);
                }
                s.token_ids[i] = 1000;
                expect_encode_fault(&s, SKL_REASON_ID_RANGE, 0, 1000);
                s.token_ids[i] = UINT32_MAX;
                expect_encode_fault(&s, SKL_REASON_ID_RANGE, 0, UINT32_MAX);
                s.token_ids[i] = id;
                s.codes[i] = 0;
                expect_encode_fault(&s, SKL_REASON_COUNT_RANGE, 0, 0);
                s.codes[i] = 1;
            }
            s.token_ids[0] = 0; /* the least id there is */
            size_t size;
            free(encoded(&s, &size));
            free_sequence(&s);
        }
    }
    choose_kernels();
}

static void expect_decode_fault(const sequence *s, const uint8_t *bytes, size_t size, skl_reason reason,
                                uint64_t position, uint64_t value)
{
    skl_fault fault = {0};
    CHECK(decode_alone(&s->shape, bytes, size, &fault) == SKL_ERR_CORRUPT);
    CHECK(fault.reason == (uint32_t)reason);
    CHECK(fault.position == position);
    CHECK(fault.value == value);
}

static void set_record(uint8_t *bytes, size_t number, uint32_t id, uint32_t code)
{
    const uint32_t record = id | code << 17;
    for (uint32_t i = 0; i < 3; i++)
        bytes[2 + 3 * number + i] = (uint8_t)(record >> (8 * i));
}

/* ... and in the decoder.  Payload: numbers of records at 0, records at 2, tokens at 11, padding from 17. */
static void test_decode_faults(void)
{
    sequence s = small_counts();
    size_t size = 0;
    uint8_t *bytes = encoded(&s, &size);
    CHECK(size == 17 + PADDING);
    bytes[0] = 3;
    expect_decode_fault(&s, bytes, size, SKL_REASON_SHAPE, 2, 4);
    bytes[0] = 2;
    set_record(bytes, 2, 10, 5);
    expect_decode_fault(&s, bytes, size, SKL_REASON_ID_RANGE, 1, 10);
    set_record(bytes, 2, 9, 5);
    set_record(bytes, 1, 1, 3);
    expect_decode_fault(&s, bytes, size, SKL_REASON_ID_ORDER, 0, 1);
    set_record(bytes, 1, 5, 0);
    expect_decode_fault(&s, bytes, size, SKL_REASON_COUNT_RANGE, 0, 0);
    set_record(bytes, 1, 5, 127);
    expect_decode_fault(&s, bytes, size, SKL_REASON_COUNT_RANGE, 0, 127);
    set_record(bytes, 1, 5, 4);
    expect_decode_fault(&s, bytes, size, SKL_REASON_COUNT_SUM, 0, 6);
    set_record(bytes, 1, 5, 3);
    bytes[16] = 1;
    expect_decode_fault(&s, bytes, size, SKL_REASON_TOKEN_RANGE, 2, 259);
    bytes[16] = 0;
    bytes[17] = 1;
    expect_decode_fault(&s, bytes, size, SKL_REASON_PADDING, 2, 17);
    bytes[17] = 0;
    bytes[size - 1] = 1;
    expect_decode_fault(&s, bytes, size, SKL_REASON_PADDING, 2, size - 1);
    free(bytes);
    free_sequence(&s);

    skl_shape shape = {SKL_KIND_RATIOS, SKL_PROFILE_R32, 1, 0, 0, 10, 0, 1, 2};
    s = empty_sequence(shape);
    memcpy(s.offsets, (int64_t[]){0, 2}, 2 * sizeof *s.offsets);
    memcpy(s.token_ids, (uint32_t[]){3, 4}, 2 * sizeof *s.token_ids);
    memcpy(s.codes, (uint8_t[]){127, 3}, 2);
    bytes = encoded(&s, &size);
    bytes[8] |= 0x80;
    expect_decode_fault(&s, bytes, size, SKL_REASON_RESERVED, 0, 1);
    bytes[8] = 127;
    expect_decode_fault(&s, bytes, size, SKL_REASON_RATIO_ZERO, 0, 127);
    bytes[8] = 0;
    bytes[5] = 3;
    expect_decode_fault(&s, bytes, size, SKL_REASON_ID_ORDER, 0, 3);
    free(bytes);
    free_sequence(&s);
}

/* A reserved bit that is gone when its place is looked for, since the ids are written where the records lie: the last
 * record is named, and nothing beyond it is read. */
static void test_changed_underneath(void)
{
    enum { T = 4, RECORDS = 40 };
    const skl_shape shape = {SKL_KIND_COUNTS, SKL_PROFILE_R32, 1, 0, 0, 1u << 24, 10, T, RECORDS};
    sequence s = empty_sequence(shape);
    for (uint32_t i = 0; i < RECORDS; i++) {
        s.token_ids[i] = i;
        s.codes[i] = 1;
    }
    for (uint32_t t = 0; t <= T; t++)
        s.offsets[t] = 10 * t;
    size_t size = 0;
    uint8_t *bytes = encoded(&s, &size);
    bytes[T + 4 * 20 + 3] |= 0x80;
    skl_fault fault = {0};
    CHECK(skl_decode(&shape, bytes, size, s.offsets, (uint32_t *)(void *)(bytes + T), s.codes, NULL, NULL, &fault) ==
          SKL_ERR_CORRUPT);
    CHECK(fault.reason == SKL_REASON_RESERVED && fault.position == T - 1 && fault.value == RECORDS - 1);
    free(bytes);
    free_sequence(&s);
}

/* Shapes that mean nothing are refused by all three functions. */
static void test_unknown_shapes(void)
{
    const skl_shape bad[] = {
        {3, 1, 1, 0, 0, 10, 5, 1, 1},
        {1, 0, 1, 0, 0, 10, 5, 1, 1},
        {1, 4, 1, 0, 0, 10, 5, 1, 1},
        {2, SKL_PROFILE_R24W, 1, 0, 0, 10, 5, 1, 1},
        {1, 1, 0, 0, 0, 10, 5, 1, 1},
        {1, 1, 3, 0, 0, 10, 5, 1, 1},
        {1, 1, 1, 1, 0, 10, 5, 1, 1},
        {1, 1, 1, 5, 0, 10, 5, 1, 1},
        {1, 1, 1, 0, 16, 10, 5, 1, 1},
        {1, 1, 1, 0, 0, 0, 5, 1, 1},
        {1, 1, 1, 0, 0, (1u << 17) + 1, 5, 1, 1},
        {1, 1, 1, 0, 0, 10, 0, 1, 1},
        {1, 1, 1, 0, 0, 10, 128, 1, 1},
        {1, SKL_PROFILE_R24W, 1, 0, 0, 10, 64, 1, 1},
        {1, 1, 1, 0, 0, 10, 5, 1, 65536},
        {1, 1, 1, 0, 0, 10, 5, UINT32_MAX, UINT64_MAX},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        uint64_t size = 0;
        size_t written = 0;
        uint8_t bytes[256] = {0};
        int64_t offsets[2] = {0, 1};
        uint32_t ids[1] = {0};
        uint8_t codes[1] = {5};
        skl_fault fault;
        CHECK(skl_payload_size(&bad[i], &size) == SKL_ERR_ARG);
        CHECK(skl_encode(&bad[i], offsets, ids, codes, NULL, NULL, bytes, sizeof bytes, &written, &fault) ==
              SKL_ERR_ARG);
        CHECK(skl_decode(&bad[i], bytes, sizeof bytes, offsets, ids, codes, NULL, NULL, &fault) == SKL_ERR_ARG);
    }
    /* tokens and columns are given exactly where the shape has them */
    sequence s = small_counts();
    uint8_t dst[256];
    size_t written = 0;
    skl_fault fault;
    CHECK(skl_encode(&s.shape, s.offsets, s.token_ids, s.codes, NULL, NULL, dst, sizeof dst, &written, &fault) ==
          SKL_ERR_ARG);
    free_sequence(&s);
}

/* ---- garbage --------------------------------------------------------------------------------------------------------- */

/* Random bytes under random shapes end in a status: nothing is read or written outside of the buffers. */
static void test_garbage(void)
{
    uint32_t accepted = 0;
    for (int i = 0; i < 20000; i++) {
        skl_shape shape = shapes[draw(NUM_SHAPES)];
        shape.num_positions = 1 + draw(8);
        shape.num_records = draw(12);
        if (draw(2) == 0)
            shape.rounds = 1 + draw(3);
        uint64_t payload = 0;
        CHECK(skl_payload_size(&shape, &payload) == SKL_OK);
        const size_t size = (size_t)payload + PADDING - (draw(8) == 0 ? draw(PADDING) : 0);
        uint8_t *bytes = room(size);
        memset(bytes, 0, size);
        for (size_t at = 0; at < payload && at < size; at++)
            bytes[at] = (uint8_t)(draw(4) == 0 ? draw(256) : draw(3));
        skl_fault fault = {0};
        const skl_status status = decode_alone(&shape, bytes, size, &fault);
        CHECK(status == SKL_OK || status == SKL_ERR_TRUNCATED || (status == SKL_ERR_CORRUPT && fault.reason != 0));
        accepted += status == SKL_OK;
        free(bytes);
    }
    CHECK(accepted > 0);
}

/* A valid payload with some bytes changed is refused, or decodes to something that encodes to the same bytes. */
static void test_changed_bytes(void)
{
    for (int i = 0; i < 5000; i++) {
        sequence s = random_sequence(shapes[i % NUM_SHAPES]);
        size_t size = 0;
        uint8_t *bytes = encoded(&s, &size);
        for (uint32_t changes = 1 + draw(3); changes > 0; changes--)
            bytes[draw((uint32_t)size)] ^= (uint8_t)(1u << draw(8));
        skl_fault fault = {0};
        const skl_status status = decode_into(bytes, size, &s, &fault);
        CHECK(status == SKL_OK || (status == SKL_ERR_CORRUPT && fault.reason != 0));
        if (status == SKL_OK) {
            size_t size_again = 0;
            uint8_t *again = encoded(&s, &size_again);
            CHECK(size == size_again && memcmp(bytes, again, size) == 0);
            free(again);
        }
        free(bytes);
        free_sequence(&s);
    }
}

/* ---- ratios ------------------------------------------------------------------------------------------------------------ */

/* Weights to codes to weights to codes: the second time changes nothing, and weights never rise. */
static void test_quantise(void)
{
    for (int i = 0; i < 3000; i++) {
        const uint32_t scale_log2 = (uint32_t[]){0, 1, 30}[i % 3];
        const uint32_t positions = 1 + draw(3);
        int64_t *offsets = room((positions + 1) * sizeof *offsets);
        offsets[0] = 0;
        for (uint32_t t = 0; t < positions; t++)
            offsets[t + 1] = offsets[t] + draw(9);
        const size_t n = (size_t)offsets[positions];
        uint32_t *ids = room(n * sizeof *ids);
        float *weights = room(n * sizeof *weights);
        for (size_t k = 0; k < n; k++) {
            ids[k] = (uint32_t)(n - k) * 3;
            weights[k] = (float)(1u << scale_log2) / (float)(1 + draw(1u << draw(31)));
        }
        uint64_t *keys = room(8 * sizeof *keys);
        int64_t *kept = room((positions + 1) * sizeof *kept);
        uint32_t *out_ids = room(n * sizeof *out_ids);
        uint8_t *codes = room(n);
        skl_fault fault;
        CHECK(skl_quantise(positions, n, offsets, ids, weights, scale_log2, keys, 8, kept, out_ids, codes, &fault) ==
              SKL_OK);
        CHECK(kept[positions] <= offsets[positions]);
        const size_t m = (size_t)kept[positions];
        float *decoded = room(m * sizeof *decoded);
        CHECK(skl_expand(positions, m, kept, codes, scale_log2, decoded) == SKL_OK);
        for (uint32_t t = 0; t < positions; t++)
            for (int64_t k = kept[t]; k < kept[t + 1]; k++)
                CHECK(decoded[k] > 0.0f && (k == kept[t] || decoded[k] <= decoded[k - 1]));
        int64_t *kept_again = room((positions + 1) * sizeof *kept_again);
        uint32_t *ids_again = room(m * sizeof *ids_again);
        uint8_t *codes_again = room(m);
        CHECK(skl_quantise(positions, m, kept, out_ids, decoded, scale_log2, keys, 8, kept_again, ids_again,
                           codes_again, &fault) == SKL_OK);
        CHECK(memcmp(kept, kept_again, (positions + 1) * sizeof *kept) == 0);
        CHECK(memcmp(out_ids, ids_again, m * sizeof *ids_again) == 0 && memcmp(codes, codes_again, m) == 0);
        free(codes_again);
        free(ids_again);
        free(kept_again);
        free(decoded);
        free(codes);
        free(out_ids);
        free(kept);
        free(keys);
        free(weights);
        free(ids);
        free(offsets);
    }
}

/* A thread that rounds another way gets the same codes and weights, and goes on rounding its way. */
static void test_rounding_modes(void)
{
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    enum { N = 400 };
    const int64_t offsets[2] = {0, N};
    static uint32_t ids[N], out_ids[4][N];
    static float weights[N], decoded[4][N];
    static uint8_t codes[4][N];
    static uint64_t keys[N];
    int64_t kept[4][2];
    skl_fault fault;
    for (uint32_t i = 0; i < N; i++) {
        ids[i] = i;
        weights[i] = 1.0f / (float)(1 + draw(1u << draw(31)));
    }
    for (size_t mode = 0; mode < 4; mode++) {
        memset(decoded[mode], 0, sizeof decoded[mode]);
        CHECK(fesetround(modes[mode]) == 0);
        CHECK(skl_quantise(1, N, offsets, ids, weights, 0, keys, N, kept[mode], out_ids[mode], codes[mode], &fault) ==
              SKL_OK);
        CHECK(skl_expand(1, (uint64_t)kept[mode][1], kept[mode], codes[mode], 0, decoded[mode]) == SKL_OK);
        CHECK(fegetround() == modes[mode]);
        fesetround(FE_TONEAREST);
        CHECK(kept[mode][1] == kept[0][1] && memcmp(codes[mode], codes[0], (size_t)kept[0][1]) == 0);
        CHECK(memcmp(out_ids[mode], out_ids[0], (size_t)kept[0][1] * sizeof *ids) == 0);
        CHECK(memcmp(decoded[mode], decoded[0], sizeof decoded[0]) == 0);
    }
}

/* A weight below half of the smallest step is left out, with all that follow; one at half of it is kept. */
static void test_left_out(void)
{
    const int64_t offsets[2] = {0, 3};
    const uint32_t ids[3] = {1, 2, 3};
    for (uint32_t u = 19470; u <= 19471; u++) { /* the smallest step from 2^31 is 38942 */
        const float weights[3] = {1.0f, (float)u / 2147483648.0f, 1e-9f};
        uint64_t keys[3];
        int64_t kept[2];
        uint32_t out_ids[3];
        uint8_t codes[3];
        skl_fault fault;
        CHECK(skl_quantise(1, 3, offsets, ids, weights, 0, keys, 3, kept, out_ids, codes, &fault) == SKL_OK);
        CHECK(kept[1] == (u == 19470 ? 1 : 3));
        CHECK(u == 19470 || codes[1] == 127);
    }
}

static void expect_quantise(float weight, uint32_t second_id, uint32_t scale_log2, skl_status status, skl_reason reason)
{
    const int64_t offsets[2] = {0, 2};
    const uint32_t ids[2] = {1, second_id};
    const float weights[2] = {0.5f, weight};
    uint64_t keys[2];
    int64_t kept[2];
    uint32_t out_ids[2];
    uint8_t codes[2];
    skl_fault fault = {0};
    CHECK(skl_quantise(1, 2, offsets, ids, weights, scale_log2, keys, 2, kept, out_ids, codes, &fault) == status);
    CHECK(fault.reason == (uint32_t)reason);
}

static void test_quantise_faults(void)
{
    float nan_value = 0.0f;
    memcpy(&nan_value, &(uint32_t){0x7fc00000}, sizeof nan_value);
    float infinite = 0.0f;
    memcpy(&infinite, &(uint32_t){0x7f800000}, sizeof infinite);
    expect_quantise(1.0f, 2, 0, SKL_OK, SKL_REASON_NONE);
    expect_quantise(1e-45f, 2, 0, SKL_OK, SKL_REASON_NONE);
    expect_quantise(0.0f, 2, 0, SKL_ERR_ARG, SKL_REASON_WEIGHT_RANGE);
    expect_quantise(-0.0f, 2, 0, SKL_ERR_ARG, SKL_REASON_WEIGHT_RANGE);
    expect_quantise(-0.5f, 2, 0, SKL_ERR_ARG, SKL_REASON_WEIGHT_RANGE);
    expect_quantise(1.0000001f, 2, 0, SKL_ERR_ARG, SKL_REASON_WEIGHT_RANGE);
    expect_quantise(nan_value, 2, 0, SKL_ERR_ARG, SKL_REASON_WEIGHT_RANGE);
    expect_quantise(infinite, 2, 30, SKL_ERR_ARG, SKL_REASON_WEIGHT_RANGE);
    expect_quantise(0.1f, 1, 0, SKL_ERR_ARG, SKL_REASON_ID_TWICE);
    expect_quantise(0.1f, 2, 31, SKL_ERR_ARG, SKL_REASON_SHAPE);

    const int64_t offsets[2] = {0, 2}, falling[3] = {0, 2, 1}, late[2] = {1, 2};
    const uint32_t ids[2] = {1, 2};
    const float weights[2] = {0.5f, 0.5f};
    float out[2];
    uint64_t keys[2];
    int64_t kept[3];
    uint32_t out_ids[2];
    uint8_t codes[2] = {0, 0};
    skl_fault fault = {0};
    CHECK(skl_quantise(1, 2, offsets, ids, weights, 0, keys, 1, kept, out_ids, codes, &fault) == SKL_ERR_DST_SMALL);
    CHECK(skl_quantise(2, 1, falling, ids, weights, 0, keys, 2, kept, out_ids, codes, &fault) == SKL_ERR_ARG);
    CHECK(skl_expand(2, 1, falling, codes, 0, out) == SKL_ERR_ARG);
    CHECK(skl_expand(1, 2, late, codes, 0, out) == SKL_ERR_ARG);
    CHECK(skl_expand(1, 2, offsets, codes, 31, out) == SKL_ERR_ARG);
    CHECK(skl_expand(1, 2, offsets, codes, 0, out) == SKL_OK && out[0] == 1.0f && out[1] == 1.0f);
    for (uint64_t n = 0; n <= 3; n++) { /* offsets that say more, or less, than there is */
        const skl_status expected = n == 2 ? SKL_OK : SKL_ERR_ARG;
        CHECK(skl_quantise(1, n, offsets, ids, weights, 0, keys, 2, kept, out_ids, codes, &fault) == expected);
        CHECK(skl_check_distinct(1, n, offsets, ids, keys, 2, &fault) == expected);
        CHECK(skl_expand(1, n, offsets, codes, 0, out) == expected);
    }
}

/* Positions of 0 to 12 different ids; one of them, in turn, has its first id again at its end. */
static void test_distinct(void)
{
    enum { POSITIONS = 600, LONGEST = 12 };
    static int64_t offsets[POSITIONS + 1];
    static uint32_t ids[POSITIONS * LONGEST];
    uint64_t keys[LONGEST];
    skl_fault fault = {0};
    for (uint32_t t = 0; t < POSITIONS; t++) {
        const uint32_t n = t * 7 % (LONGEST + 1);
        offsets[t + 1] = offsets[t] + n;
        for (uint32_t i = 0; i < n; i++)
            ids[offsets[t] + i] = (t * 31 + i * 20011) & 0xffffff;
    }
    const uint64_t n_ids = (uint64_t)offsets[POSITIONS];
    CHECK(skl_check_distinct(POSITIONS, n_ids, offsets, ids, keys, LONGEST, &fault) == SKL_OK);
    CHECK(skl_check_distinct(POSITIONS, n_ids, offsets, ids, keys, LONGEST - 1, &fault) == SKL_ERR_DST_SMALL);
    CHECK(skl_check_distinct(0, 0, offsets, ids, keys, 0, &fault) == SKL_OK);
    for (uint32_t t = 0; t < POSITIONS; t++) {
        if (offsets[t + 1] - offsets[t] < 2)
            continue;
        uint32_t *const last = ids + offsets[t + 1] - 1;
        const uint32_t id = *last;
        *last = ids[offsets[t]];
        CHECK(skl_check_distinct(POSITIONS, n_ids, offsets, ids, keys, LONGEST, &fault) == SKL_ERR_CORRUPT);
        CHECK(fault.reason == SKL_REASON_ID_TWICE && fault.position == t && fault.value == *last);
        *last = id;
    }
    const int64_t falling[3] = {0, 2, 1}, late[2] = {1, 2};
    CHECK(skl_check_distinct(2, 1, falling, ids, keys, LONGEST, &fault) == SKL_ERR_ARG);
    CHECK(skl_check_distinct(1, 2, late, ids, keys, LONGEST, &fault) == SKL_ERR_ARG);
}

int main(void)
{
    choose_kernels();
    test_round_trip();
    test_truncation();
    test_small_destination();
    test_encode_faults();
    test_encode_faults_in_steps();
    test_decode_faults();
    test_changed_underneath();
    test_unknown_shapes();
    test_garbage();
    test_changed_bytes();
    test_quantise();
    test_rounding_modes();
    test_left_out();
    test_quantise_faults();
    test_distinct();
    puts("codec: all tests hold");
    say_kernels();
    return 0;
}
