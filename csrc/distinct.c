/* distinct.c: whether an id comes twice in a position. */
#include "distinct.h"

#include "faults.h"
#include "sort.h"

#include <string.h>

/* Whether two ids of a position fall on one place; where none do, none are equal. */
static int places_meet(skl_id_table *table, const uint32_t *token_ids, size_t n)
{
    if (++table->position == 0) {
        memset(table, 0, sizeof *table);
        table->position = 1;
    }
    uint32_t met = 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t *const place = table->last_position + (token_ids[i] * UINT32_C(2654435769) >> (32 - SKL_PLACE_BITS));
        met |= *place == table->position;
        *place = table->position;
    }
    return met != 0;
}

int skl_comes_twice(skl_id_table *table, const uint32_t *token_ids, size_t n, uint64_t *keys, uint64_t *twice)
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

skl_status skl_check_distinct(uint32_t num_positions, uint64_t num_records, const int64_t *offsets,
                              const uint32_t *token_ids, uint64_t *keys, size_t num_keys, skl_fault *fault)
{
    skl_id_table table = {.position = 0};
    SKL_TRY(skl_check_offsets(num_positions, offsets, num_records, fault));
    for (uint32_t t = 0; t < num_positions; t++) {
        uint64_t twice;
        const size_t n = (size_t)(offsets[t + 1] - offsets[t]);
        if (n > num_keys)
            return SKL_ERR_DST_SMALL;
        if (skl_comes_twice(&table, token_ids + offsets[t], n, keys, &twice))
            return skl_fail(SKL_ERR_CORRUPT, fault, SKL_REASON_ID_TWICE, t, twice);
    }
    return SKL_OK;
}
