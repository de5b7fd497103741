/* Sorted draws become (token id, count) pairs; anything else is refused. */
#include "check.h"
#include "kernels_choice.h"
#include "skl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Equal neighbours are counted, rows stay apart. */
static void merges_each_row(void)
{
    const uint32_t draws[8] = {3, 3, 7, 9, 9, 9, 9, 9};
    int64_t offsets[3];
    uint32_t ids[8];
    uint8_t counts[8];
    skl_fault fault = {0};
    CHECK(skl_merge_draws(2, 4, draws, offsets, ids, counts, &fault) == SKL_OK);
    CHECK(offsets[0] == 0 && offsets[1] == 3 && offsets[2] == 4);
    CHECK(ids[0] == 3 && ids[1] == 7 && ids[2] == 9 && ids[3] == 9);
    CHECK(counts[0] == 2 && counts[1] == 1 && counts[2] == 1 && counts[3] == 4);
}

/* A count fits its byte: all rounds may draw one token. */
static void counts_up_to_127(void)
{
    static uint32_t draws[128];
    static uint32_t ids[128];
    static uint8_t counts[128];
    int64_t offsets[2];
    skl_fault fault = {0};
    CHECK(skl_merge_draws(1, 127, draws, offsets, ids, counts, &fault) == SKL_OK);
    CHECK(offsets[1] == 1 && counts[0] == 127);
    CHECK(skl_merge_draws(1, 128, draws, offsets, ids, counts, &fault) == SKL_ERR_ARG);
    CHECK(fault.reason == SKL_REASON_SHAPE && fault.value == 128);
    CHECK(skl_merge_draws(1, 0, draws, offsets, ids, counts, &fault) == SKL_ERR_ARG);
}

/* A row that falls is refused by position and id. */
static void refuses_unsorted(void)
{
    const uint32_t draws[6] = {1, 2, 3, 5, 4, 6};
    int64_t offsets[3];
    uint32_t ids[6];
    uint8_t counts[6];
    skl_fault fault = {0};
    CHECK(skl_merge_draws(2, 3, draws, offsets, ids, counts, &fault) == SKL_ERR_ARG);
    CHECK(fault.reason == SKL_REASON_ID_ORDER && fault.position == 1 && fault.value == 4);
}

int main(void)
{
    choose_kernels();
    merges_each_row();
    counts_up_to_127();
    refuses_unsorted();
    say_kernels();
    return 0;
}
