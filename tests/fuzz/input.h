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

#endif
