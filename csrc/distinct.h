/* distinct.h: whether an id comes twice in a position; private. */
#ifndef SKL_DISTINCT_H
#define SKL_DISTINCT_H

#include <stddef.h>
#include <stdint.h>

#define SKL_PLACE_BITS 13 /* 12 ids meet in 1 position of 124, and then are sorted */

/* Where the ids of positions fell, so that the places are cleared once in many positions.  Zero at first. */
typedef struct skl_id_table {
    uint8_t last_position[1 << SKL_PLACE_BITS]; /* by place: the position whose id fell there last, or 0 */
    uint8_t position;                           /* counts the positions, 1..255 and again */
} skl_id_table;

/* Whether an id comes twice among the n of the next position; *twice: one that does, written only then.
 * table: the caller's, the same for all positions; keys: scratch [n]. */
int skl_comes_twice(skl_id_table *table, const uint32_t *token_ids, size_t n, uint64_t *keys, uint64_t *twice);

#endif
