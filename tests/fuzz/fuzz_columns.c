/* fuzz_columns.c: columns are sound where each value is, looked at by itself, and nowhere else.
 *
 * Input: 24 bytes of shape, then the payload's bytes. */
#include "input.h"

/* One value, as SPEC.md section 5.1 says. */
static int value_is_sound(uint32_t half, int is_entropy, int has_records)
{
    const int finite = (half >> 10 & 31) != 31;
    if (half == 0x8000 || !finite || (!has_records && half != 0))
        return 0;
    return is_entropy || half == 0 || half >> 15 == 1;
}

static int columns_are_sound(const skl_shape *shape, const uint8_t *src, uint64_t size)
{
    const uint64_t positions = shape->num_positions;
    input column = {src + size - columns_size(shape), (size_t)columns_size(shape)};
    int sound = 1;
    for (int c = 0; c < 2; c++)
        for (uint64_t t = 0; shape->columns >> c & 1 && t < positions; t++) {
            const uint8_t *const number = src + t * shape->record_count_size;
            const int has_records = number[0] != 0 || (shape->record_count_size == 2 && number[1] != 0);
            sound &= value_is_sound((uint32_t)take(&column, 2), c == 1, has_records);
        }
    for (uint64_t i = 0; shape->columns & SKL_COLUMN_DOCUMENT_START && i < (positions + 8) / 8; i++) {
        const uint32_t byte = (uint32_t)take(&column, 1);
        for (uint64_t bit = 0; bit < 8; bit++)
            sound &= 8 * i + bit <= positions || (byte >> bit & 1) == 0;
    }
    for (uint64_t i = 0; shape->columns & SKL_COLUMN_RECORD_LOGPROB && i < shape->num_records; i++)
        sound &= value_is_sound((uint32_t)take(&column, 2), 0, 1);
    return sound;
}

static void check_columns(const skl_shape *shape, const uint8_t *bytes, size_t bytes_size)
{
    uint64_t size = 0;
    const skl_status known = skl_payload_size(shape, &size);
    const uint32_t positions[1] = {shape->num_positions}, records[1] = {(uint32_t)shape->num_records};
    uint64_t lens[1] = {size};
    if (known != SKL_OK || size > 4096 || shape->num_records > UINT32_MAX) {
        const uint8_t *const sources[1] = {bytes};
        lens[0] = 0;
        const skl_status status = skl_check_columns(shape, 1, sources, lens, positions, records);
        LAW(status == SKL_ERR_ARG || status == SKL_ERR_TRUNCATED || (status == SKL_OK && records[0] == 0));
        return;
    }
    uint8_t *const src = room(size, 1);
    memset(src, 0, (size_t)size);
    memcpy(src, bytes, bytes_size < size ? bytes_size : (size_t)size);
    const uint8_t *const sources[1] = {src};
    LAW(skl_check_columns(shape, 1, sources, lens, positions, records) ==
        (columns_are_sound(shape, src, size) ? SKL_OK : SKL_ERR_CORRUPT));
    if (size > 0) {
        lens[0] = size - 1;
        LAW(skl_check_columns(shape, 1, sources, lens, positions, records) == SKL_ERR_TRUNCATED);
    }
    free(src);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    const skl_shape shape = take_shape(&in);
    uint8_t *const bytes = room(in.size, 1);
    memcpy(bytes, in.data, in.size);
    check_columns(&shape, bytes, in.size);
    free(bytes);
    return 0;
}
