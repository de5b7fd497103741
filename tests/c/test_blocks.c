/* test_blocks.c: checksums, whole blocks and columns, with buffers of exactly the promised length, under sanitizers. */
#include "kernels_choice.h"
#include "skl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);     \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)

/* Heap memory of exactly this size, so that the sanitizer sees the first byte beyond it. */
static uint8_t *room(size_t size)
{
    uint8_t *memory = malloc(size == 0 ? 1 : size);
    CHECK(memory != NULL);
    memset(memory, 0, size);
    return memory;
}

/* ---- checksums -------------------------------------------------------------------------------------------------- */

/* What the xxhash package gives for the bytes 0, 7, 14, ... modulo 251, with seed 0 and with seed 2^64 - 59. */
static const struct {
    size_t len;
    uint64_t plain, seeded;
} known[] = {
    {0, UINT64_C(0x2d06800538d394c2), UINT64_C(0xf74034edbcd35d87)},
    {1, UINT64_C(0xc44bdff4074eecdb), UINT64_C(0x7eeafe8f19261b46)},
    {2, UINT64_C(0x9093381c8763d62e), UINT64_C(0xf6f6bef866d44dd5)},
    {3, UINT64_C(0xc3489259e968ad9e), UINT64_C(0x2cbcbc01ae37bf00)},
    {4, UINT64_C(0xd3d60c1519014e89), UINT64_C(0xdd8c8e2ff3e77271)},
    {5, UINT64_C(0x559935c0f3f7327f), UINT64_C(0x5096cf733df8286b)},
    {7, UINT64_C(0x0ffc4827844c63a6), UINT64_C(0xa6712a56e067b1ad)},
    {8, UINT64_C(0xb88dee77f6bf6980), UINT64_C(0x523e9a9fb71437fe)},
    {9, UINT64_C(0x03688dcad730d826), UINT64_C(0x6b77a10db8bfe5cc)},
    {15, UINT64_C(0x2e52bc81c6a30fa3), UINT64_C(0x0fde6771f80175cc)},
    {16, UINT64_C(0x9da23836adf2be1e), UINT64_C(0xeb6876cbe0221b19)},
    {17, UINT64_C(0xf34c3c9cf5a112d1), UINT64_C(0xc5f209670469827b)},
    {32, UINT64_C(0x99cb9ad0f1a11fbe), UINT64_C(0x9d6b100306bef492)},
    {33, UINT64_C(0xc077b45492d29cde), UINT64_C(0xdf2c80d0c1f841f8)},
    {64, UINT64_C(0xfaecd52effbb854f), UINT64_C(0x5fd32409fadec788)},
    {65, UINT64_C(0xfd2b8a4f15d954d0), UINT64_C(0x437b5eb39c2980a0)},
    {96, UINT64_C(0x8f8a0c940d32e958), UINT64_C(0x38ac103dc7b517b2)},
    {97, UINT64_C(0x92b3a831febf71ac), UINT64_C(0xee4643c50ec25ed8)},
    {128, UINT64_C(0x4c659b745f435148), UINT64_C(0x6a31e9fe64803771)},
    {129, UINT64_C(0xb85222b83902b6e5), UINT64_C(0x34f766706dfd9419)},
    {160, UINT64_C(0x7b45da4714c3419f), UINT64_C(0xc901cececfe974cd)},
    {239, UINT64_C(0x6b9d88f6418559a4), UINT64_C(0xd68a6f49cec56271)},
    {240, UINT64_C(0xd6dfbf67b0675b54), UINT64_C(0xd981a12aa28163ce)},
    {241, UINT64_C(0xc614c8c3575348c1), UINT64_C(0x53a1aeeb598e217c)},
    {256, UINT64_C(0xf4186dc163a3283c), UINT64_C(0xc5c066a1732238d8)},
    {257, UINT64_C(0x412fa6b97a7575ac), UINT64_C(0x2b73149676ff4057)},
    {1023, UINT64_C(0x540c9523214a845b), UINT64_C(0xba76d67d0c1f2b3c)},
    {1024, UINT64_C(0xf22ef3dc84ff47ea), UINT64_C(0x01bf45cfe48694a7)},
    {1025, UINT64_C(0x43f869a83769a435), UINT64_C(0xb4d89bf52315a4ad)},
    {1088, UINT64_C(0x40d71f037cd0c530), UINT64_C(0xb347225d4197d034)},
    {2048, UINT64_C(0x3d2649f662a2e191), UINT64_C(0xc904ecde2a510f8c)},
    {2049, UINT64_C(0x4583128afa3a2985), UINT64_C(0xcf9feab8e5c20545)},
    {5000, UINT64_C(0xce29a19460ee1bfc), UINT64_C(0xa465fb8a53015019)},
};

static void test_known_checksums(void)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint8_t *const bytes = room(known[i].len);
        for (size_t j = 0; j < known[i].len; j++)
            bytes[j] = (uint8_t)(7 * j % 251);
        for (size_t k = 0; k < NUM_KERNELS; k++) {
            if (!try_kernels(all_kernels[k]))
                continue;
            CHECK(skl_checksum(bytes, known[i].len, 0) == known[i].plain);
            CHECK(skl_checksum(bytes, known[i].len, UINT64_MAX - 58) == known[i].seeded);
        }
        free(bytes);
    }
}

/* Every byte counts, at every length up to several stripes of stripes. */
static void test_every_byte_counts(void)
{
    for (size_t len = 1; len < 2200; len += len < 260 ? 1 : 97) {
        uint8_t *const bytes = room(len);
        const uint64_t before = skl_checksum(bytes, len, 3);
        for (size_t i = 0; i < len; i++) {
            bytes[i] ^= 0x10;
            CHECK(skl_checksum(bytes, len, 3) != before);
            bytes[i] ^= 0x10;
        }
        CHECK(skl_checksum(bytes, len, 3) == before && skl_checksum(bytes, len, 4) != before);
        free(bytes);
    }
}

/* ---- blocks ----------------------------------------------------------------------------------------------------- */

enum { HEADER = 32, AT = 16, BLOCKS = 3 };

static void store(uint8_t *to, uint64_t value)
{
    for (int i = 0; i < 8; i++)
        to[i] = (uint8_t)(value >> 8 * i);
}

static void test_blocks(void)
{
    const skl_block_layout layout = {.key = 9, .max_size = 400, .header_size = HEADER, .checksum_offset = AT};
    const uint64_t lens[BLOCKS] = {HEADER, HEADER + 100, HEADER + 368};
    uint8_t *blocks[BLOCKS], *const expected = room(BLOCKS * HEADER);
    const uint8_t *views[BLOCKS];
    uint64_t block = 7;
    for (size_t b = 0; b < BLOCKS; b++) {
        views[b] = blocks[b] = room(lens[b]);
        memset(blocks[b], (int)b + 1, lens[b]);
        store(blocks[b] + AT, skl_checksum(blocks[b] + HEADER, lens[b] - HEADER, 9));
        store(blocks[b] + HEADER - 8, skl_checksum(blocks[b], HEADER - 8, 9));
        memcpy(expected + b * HEADER, blocks[b], HEADER);
        memset(expected + b * HEADER + AT, 0xff, 8); /* not looked at */
    }
    CHECK(skl_check_blocks(&layout, BLOCKS, views, lens, expected, &block) == SKL_OK);
    CHECK(skl_check_blocks(&layout, 0, NULL, NULL, NULL, &block) == SKL_OK);
    for (size_t b = 0; b < BLOCKS; b++)
        for (size_t i = 0; i < lens[b]; i++) {
            blocks[b][i] ^= 1;
            CHECK(skl_check_blocks(&layout, BLOCKS, views, lens, expected, &block) == SKL_ERR_CORRUPT && block == b);
            blocks[b][i] ^= 1;
        }
    for (size_t i = 0; i < HEADER; i++) {
        expected[HEADER + i] ^= 1;
        const int looked_at = i < AT || i >= AT + 8;
        CHECK(skl_check_blocks(&layout, BLOCKS, views, lens, expected, &block) ==
              (looked_at ? SKL_ERR_CORRUPT : SKL_OK));
        CHECK(!looked_at || block == 1);
        expected[HEADER + i] ^= 1;
    }
    const uint64_t short_lens[BLOCKS] = {HEADER - 1, 0, 0};
    CHECK(skl_check_blocks(&layout, 1, views, short_lens, expected, &block) == SKL_ERR_CORRUPT && block == 0);
    skl_block_layout other = layout;
    other.max_size = 399;
    CHECK(skl_check_blocks(&other, BLOCKS, views, lens, expected, &block) == SKL_ERR_CORRUPT && block == 2);
    static const uint32_t sizes[][2] = {{15, 0}, {HEADER, HEADER - 15}, {0, 0}, {HEADER, UINT32_MAX}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        other.header_size = sizes[i][0];
        other.checksum_offset = sizes[i][1];
        CHECK(skl_check_blocks(&other, BLOCKS, views, lens, expected, &block) == SKL_ERR_ARG);
    }
    for (size_t b = 0; b < BLOCKS; b++)
        free(blocks[b]);
    free(expected);
}

/* ---- tokens ----------------------------------------------------------------------------------------------------- */

/* Rows of 1, 0 and 3 positions; what lies behind the tokens of a row does not count. */
static void test_tokens(void)
{
    enum { ROWS = 3, WIDTH = 4 };
    const uint32_t positions[ROWS] = {1, 0, 3};
    uint32_t *const tokens = (uint32_t *)(void *)room(ROWS * WIDTH * sizeof *tokens), row = 9;
    uint64_t alignment[ROWS] = {0}, computed = 0;
    for (uint32_t i = 0; i < ROWS * WIDTH; i++)
        tokens[i] = 1000 * i;
    for (size_t b = 0; b < ROWS; b++)
        alignment[b] = skl_checksum((const uint8_t *)(tokens + b * WIDTH), (positions[b] + 1) * sizeof *tokens, 0);
    alignment[1] = 5;
    CHECK(skl_check_tokens(ROWS, WIDTH - 1, tokens, positions, alignment, &row, &computed) == SKL_OK);
    CHECK(skl_check_tokens(0, 0, NULL, NULL, NULL, &row, &computed) == SKL_OK);
    for (uint32_t i = 0; i < ROWS * WIDTH; i++) {
        const uint32_t b = i / WIDTH;
        const int counts = positions[b] > 0 && i % WIDTH <= positions[b];
        tokens[i] ^= 1;
        CHECK(skl_check_tokens(ROWS, WIDTH - 1, tokens, positions, alignment, &row, &computed) ==
              (counts ? SKL_ERR_CORRUPT : SKL_OK));
        CHECK(!counts || (row == b && computed != alignment[b]));
        tokens[i] ^= 1;
    }
    CHECK(skl_check_tokens(ROWS, WIDTH - 2, tokens, positions, alignment, &row, &computed) != SKL_OK);
    CHECK(skl_check_tokens(1, 0, tokens, positions, alignment, &row, &computed) == SKL_ERR_ARG && row == 0);
    free(tokens);
}

/* ---- columns ---------------------------------------------------------------------------------------------------- */

static void test_columns(void)
{
    /* 9 positions, of which the first has 2 records and the third 1; 10 tokens; then all columns. */
    enum { POSITIONS = 9, RECORDS = 3, LOGPROB = 9 + 3 * RECORDS, ENTROPY = LOGPROB + 18, STARTS = ENTROPY + 18 };
    enum { RECORD = STARTS + 2, SIZE = RECORD + 2 * RECORDS };
    const skl_shape shape = {.kind = SKL_KIND_COUNTS, .profile = SKL_PROFILE_R24, .record_count_size = 1,
                             .columns = 15, .vocab_size = 10, .rounds = 5};
    const uint32_t positions[2] = {POSITIONS, POSITIONS}, records[2] = {RECORDS, RECORDS};
    uint8_t *const sound = room(SIZE), *const row = room(SIZE);
    const uint8_t *sources[2] = {sound, row};
    uint64_t lens[2] = {SIZE, SIZE};
    row[0] = sound[0] = 2;
    row[2] = sound[2] = 1;
    static const struct {
        size_t at;
        uint16_t half;
        int sound;
    } cases[] = {
        {LOGPROB, 0, 1},      {LOGPROB, 0x8001, 1}, {LOGPROB, 0xfbff, 1},     {LOGPROB, 0xfc00, 0},
        {LOGPROB, 0x8000, 0}, {LOGPROB, 1, 0},      {LOGPROB + 2, 0x8001, 0}, {LOGPROB + 4, 0xc000, 1},
        {ENTROPY, 0x7bff, 1}, {ENTROPY, 0x7c00, 0}, {ENTROPY, 0xfc01, 0},     {ENTROPY, 0x8000, 0},
        {ENTROPY, 0x8001, 1}, {ENTROPY + 2, 1, 0},  {ENTROPY + 4, 1, 1},      {ENTROPY + 16, 1, 0},
        {STARTS, 0x03ff, 1},  {STARTS, 0x0400, 0},  {STARTS, 0x8000, 0},      {RECORD, 0x8001, 1},
        {RECORD + 4, 1, 0},   {RECORD + 4, 0x8000, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        row[cases[i].at] = (uint8_t)cases[i].half;
        row[cases[i].at + 1] = (uint8_t)(cases[i].half >> 8);
        CHECK(skl_check_columns(&shape, 2, sources, lens, positions, records) ==
              (cases[i].sound ? SKL_OK : SKL_ERR_CORRUPT));
        row[cases[i].at] = row[cases[i].at + 1] = 0;
    }
    lens[1] = SIZE - 1;
    CHECK(skl_check_columns(&shape, 2, sources, lens, positions, records) == SKL_ERR_TRUNCATED);
    CHECK(skl_check_columns(&shape, 1, sources, lens, positions, records) == SKL_OK);
    CHECK(skl_check_columns(&shape, 0, NULL, NULL, NULL, NULL) == SKL_OK);
    skl_shape unknown = shape;
    unknown.columns = 16;
    CHECK(skl_check_columns(&unknown, 1, sources, lens, positions, records) == SKL_ERR_ARG);
    free(sound);
    free(row);
}

int main(void)
{
    choose_kernels();
    test_known_checksums();
    choose_kernels();
    test_every_byte_counts();
    test_blocks();
    test_tokens();
    test_columns();
    puts("blocks: all tests hold");
    say_kernels();
    return 0;
}
