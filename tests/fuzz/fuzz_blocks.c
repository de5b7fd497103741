/* fuzz_blocks.c: any bytes have one checksum, whichever kernels make it, and so do tokens; a block is sound where its
 * header is the one expected and both checksums are right, and nowhere else; columns are sound where each value is,
 * looked at by itself.
 *
 * Input: 24 bytes of shape, 4 of block (header's size, place of the checksum, key, what is changed), then the bytes. */
#include "input.h"

static uint64_t word_at(const uint8_t *from)
{
    input in = {from, 8};
    return take(&in, 8);
}

static void store(uint8_t *to, uint64_t word)
{
    for (size_t i = 0; i < 8; i++)
        to[i] = (uint8_t)(word >> 8 * i);
}

/* ---- checksums and blocks --------------------------------------------------------------------------------------- */

static void check_checksums(const uint8_t *bytes, size_t size, uint64_t seed)
{
    static const char *const tables[] = {"portable", "avx2", "avx512"};
    LAW(skl_use_kernels(tables[0]) == SKL_OK);
    const uint64_t expected = skl_checksum(bytes, size, seed);
    for (size_t i = 1; i < sizeof tables / sizeof *tables; i++)
        if (skl_use_kernels(tables[i]) == SKL_OK)
            LAW(skl_checksum(bytes, size, seed) == expected);
    const uint32_t width = (uint32_t)(size / 8); /* two rows, of which the second is a token shorter */
    if (width < 2)
        return;
    uint32_t *const tokens = room(2 * width, sizeof *tokens), positions[2] = {width - 1, width - 2}, row = 9;
    memcpy(tokens, bytes, 2 * width * sizeof *tokens);
    const uint64_t second = skl_checksum((const uint8_t *)(tokens + width), (width - 1) * sizeof *tokens, 0);
    const uint64_t alignment[2] = {skl_checksum((const uint8_t *)tokens, width * sizeof *tokens, 0), second};
    uint64_t computed = 0;
    LAW(skl_check_tokens(2, width - 1, tokens, positions, alignment, &row, &computed) == SKL_OK);
    tokens[width] ^= 1;
    const int looked_at = positions[1] > 0;
    LAW(skl_check_tokens(2, width - 1, tokens, positions, alignment, &row, &computed) ==
        (looked_at ? SKL_ERR_CORRUPT : SKL_OK));
    LAW(!looked_at || (row == 1 && computed != second));
    LAW(skl_check_tokens(1, width - 2, tokens, positions, alignment, &row, &computed) == SKL_ERR_ARG && row == 0);
    free(tokens);
}

/* The bytes as a block of which only what `change` says is wrong; then as they are. */
static void check_block(const uint8_t *bytes, size_t size, uint32_t header_size, uint32_t at, uint64_t key,
                        size_t change)
{
    const skl_block_layout layout = {
        .key = key, .max_size = 4096, .header_size = header_size, .checksum_offset = at};
    uint8_t *const block = room(size, 1), *const expected = room(header_size, 1);
    const uint8_t *const blocks[1] = {block};
    const uint64_t lens[1] = {size};
    uint64_t first = 9;
    memcpy(block, bytes, size);
    memset(expected, 0, header_size);
    memcpy(expected, block, size < header_size ? size : header_size);
    skl_status status = skl_check_blocks(&layout, 1, blocks, lens, expected, &first);
    if (header_size < 16 || at > header_size - 16) {
        LAW(status == SKL_ERR_ARG);
    } else if (size < header_size || size > 4096) {
        LAW(status == SKL_ERR_CORRUPT && first == 0);
    } else {
        const int right = word_at(block + at) == skl_checksum(block + header_size, size - header_size, key) &&
                          word_at(block + header_size - 8) == skl_checksum(block, header_size - 8, key);
        LAW(status == (right ? SKL_OK : SKL_ERR_CORRUPT));
        store(block + at, skl_checksum(block + header_size, size - header_size, key));
        store(block + header_size - 8, skl_checksum(block, header_size - 8, key));
        memcpy(expected, block, header_size);
        memset(expected + at, 0x5a, 8);
        LAW(skl_check_blocks(&layout, 1, blocks, lens, expected, &first) == SKL_OK);
        block[change % size] ^= 1;
        LAW(skl_check_blocks(&layout, 1, blocks, lens, expected, &first) == SKL_ERR_CORRUPT && first == 0);
    }
    free(block);
    free(expected);
}

/* ---- columns ---------------------------------------------------------------------------------------------------- */

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
    const uint32_t header_size = (uint32_t)take(&in, 1) % 100, at = (uint32_t)take(&in, 1);
    const uint64_t key = take(&in, 1) * UINT64_C(0x9e3779b97f4a7c15);
    const size_t change = (size_t)take(&in, 1) * 31;
    uint8_t *const bytes = room(in.size, 1);
    memcpy(bytes, in.data, in.size);
    check_checksums(bytes, in.size, key);
    check_block(bytes, in.size, header_size, at, key, change);
    check_columns(&shape, bytes, in.size);
    free(bytes);
    return 0;
}
