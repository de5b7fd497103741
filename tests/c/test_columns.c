/* test_columns.c: columns of payloads, with buffers of exactly the promised length, under sanitizers. */
#include "check.h"
#include "skl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Heap memory of exactly this size, so that the sanitizer sees the first byte beyond it. */
static uint8_t *room(size_t size)
{
    uint8_t *memory = malloc(size == 0 ? 1 : size);
    CHECK(memory != NULL);
    memset(memory, 0, size);
    return memory;
}

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
    test_columns();
    puts("columns: all tests hold");
    return 0;
}
