/* input.h: what every fuzz target needs: numbers from the input, memory of exactly the asked size, and laws that abort. */
#ifndef SKL_FUZZ_INPUT_H
#define SKL_FUZZ_INPUT_H

#include "skl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A law of the library; a crash that a fuzzer sees where it does not hold. */
#define LAW(condition)                                                                                                \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition);                                   \
            abort();                                                                                                  \
        }                                                                                                             \
    } while (0)

typedef struct input {
    const uint8_t *data;
    size_t size;
} input;

/* The next bytes as a little-endian number; zeros where the input ends. */
static inline uint64_t take(input *in, size_t bytes)
{
    uint64_t value = 0;
    for (size_t i = 0; i < bytes && in->size > 0; i++, in->data++, in->size--)
        value |= (uint64_t)*in->data << (8 * i);
    return value;
}

/* Memory that ends where its contents end, so that the sanitizer sees the first byte beyond. */
static inline void *room(uint64_t count, size_t size)
{
    void *memory = malloc(count == 0 ? 1 : (size_t)count * size);
    LAW(memory != NULL);
    memset(memory, 0xa5, count == 0 ? 1 : (size_t)count * size);
    return memory;
}

/* Bytes of the optional columns of a shape that skl_payload_size knows. */
static inline uint64_t columns_size(const skl_shape *shape)
{
    skl_shape without = *shape;
    uint64_t size = 0, rest = 0;
    without.columns = 0;
    return skl_payload_size(shape, &size) == SKL_OK && skl_payload_size(&without, &rest) == SKL_OK ? size - rest : 0;
}

/* The shape as 24 bytes say; one bit of the input makes the field values known ones, and one fits num_records. */
static inline skl_shape take_shape(input *in)
{
    static const uint32_t token_sizes[4] = {0, 2, 3, 4}, id_bits[4] = {17, 17, 18, 24};
    const uint32_t flags = (uint32_t)take(in, 1);
    skl_shape shape;
    shape.kind = (uint32_t)take(in, 1);
    shape.profile = (uint32_t)take(in, 1);
    shape.record_count_size = (uint32_t)take(in, 1);
    shape.token_size = (uint32_t)take(in, 1);
    shape.columns = (uint32_t)take(in, 1);
    shape.rounds = (uint32_t)take(in, 2);
    shape.vocab_size = (uint32_t)take(in, 4);
    shape.num_positions = (uint32_t)take(in, 4);
    shape.num_records = take(in, 8);
    if (flags & 1) {
        shape.kind = 1 + shape.kind % 2;
        shape.profile = shape.kind == SKL_KIND_COUNTS ? 1 + shape.profile % 3 : shape.profile % 2 ? 3 : 1;
        shape.record_count_size = 1 + shape.record_count_size % 2;
        shape.token_size = token_sizes[shape.token_size % 4];
        shape.columns %= 16;
        shape.rounds = 1 + shape.rounds % (shape.profile == SKL_PROFILE_R24W ? 63 : 127);
        shape.vocab_size = 1 + shape.vocab_size % (UINT32_C(1) << id_bits[shape.profile]);
    }
    if (flags & 2) { /* as many records as the rest of the input has room for */
        shape.num_positions %= 1 + (uint32_t)in->size;
        shape.num_records = 0;
        uint64_t fixed;
        if (skl_payload_size(&shape, &fixed) == SKL_OK && fixed < in->size)
            shape.num_records = (in->size - fixed) /
                                ((shape.profile == SKL_PROFILE_R32 ? 4 : 3) + (shape.columns & 8 ? 2 : 0));
    }
    return shape;
}

#endif
