/* columns.c: whether the columns of payloads hold what SPEC.md section 5.1 allows.
 *
 * Says that they do not, and leaves it to others to say why. */
#include "codec.h"
#include "faults.h"
#include "kernels.h"

#include <string.h>

static inline uint16_t load_half(const uint8_t *from)
{
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return SKL_LITTLE_ENDIAN ? half : __builtin_bswap16(half);
}

/* Whether any of n float16 is neither 0 nor a finite number below it. */
static int logprobs_are_bad(const uint8_t *halves, uint64_t n)
{
    uint16_t bad = 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint16_t half = load_half(halves + 2 * i), below = (uint16_t)(half - 0x8001);
        bad |= (uint16_t)((uint16_t)(half != 0) & (uint16_t)(below >= 0xfc00 - 0x8001));
    }
    return bad != 0;
}

/* Whether any of n float16 is not finite, or -0. */
static int entropies_are_bad(const uint8_t *halves, uint64_t n)
{
    uint16_t bad = 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint16_t half = load_half(halves + 2 * i);
        bad |= (uint16_t)((uint16_t)((half & 0x7c00) == 0x7c00) | (uint16_t)(half == 0x8000));
    }
    return bad != 0;
}

/* Whether any position without records has a value that is not 0; numbers: of records, of size bytes each. */
static int empty_are_bad(const uint8_t *halves, const uint8_t *numbers, uint32_t size, uint64_t n)
{
    uint16_t bad = 0;
    if (size == 1)
        for (uint64_t i = 0; i < n; i++)
            bad |= (uint16_t)((uint16_t)(numbers[i] == 0) & (uint16_t)(load_half(halves + 2 * i) != 0));
    else
        for (uint64_t i = 0; i < n; i++)
            bad |= (uint16_t)((uint16_t)(load_half(numbers + 2 * i) == 0) &
                              (uint16_t)(load_half(halves + 2 * i) != 0));
    return bad != 0;
}

/* Whether a bit of document_start is set that belongs to no token. */
static int starts_are_bad(const uint8_t *starts, uint64_t num_tokens)
{
    return num_tokens % 8 != 0 && starts[num_tokens / 8] >> num_tokens % 8 != 0;
}

static int columns_are_bad(const skl_shape *shape, const uint8_t *src)
{
    const uint64_t positions = shape->num_positions;
    const uint8_t *column = src + skl_columns_offset(shape);
    int bad = 0;
    if (shape->columns & SKL_COLUMN_LABEL_LOGPROB) {
        bad |= logprobs_are_bad(column, positions) | empty_are_bad(column, src, shape->record_count_size, positions);
        column += 2 * positions;
    }
    if (shape->columns & SKL_COLUMN_ENTROPY) {
        bad |= entropies_are_bad(column, positions) | empty_are_bad(column, src, shape->record_count_size, positions);
        column += 2 * positions;
    }
    if (shape->columns & SKL_COLUMN_DOCUMENT_START) {
        bad |= starts_are_bad(column, positions + 1);
        column += (positions + 8) / 8;
    }
    if (shape->columns & SKL_COLUMN_RECORD_LOGPROB)
        bad |= logprobs_are_bad(column, shape->num_records);
    return bad;
}

skl_status skl_check_columns(const skl_shape *shape, uint32_t num_rows, const uint8_t *const *sources,
                             const uint64_t *source_lens, const uint32_t *num_positions, const uint32_t *num_records)
{
    skl_shape row_shape = *shape;
    for (uint32_t b = 0; b < num_rows; b++) {
        uint64_t size = 0;
        row_shape.num_positions = num_positions[b];
        row_shape.num_records = num_records[b];
        SKL_TRY(skl_payload_size(&row_shape, &size));
        if (size > source_lens[b])
            return SKL_ERR_TRUNCATED;
        if (columns_are_bad(&row_shape, sources[b]))
            return SKL_ERR_CORRUPT;
    }
    return SKL_OK;
}
