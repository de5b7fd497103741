/* Many messages of mixed sizes from one process to another: each arrives once, whole and in order.
 *
 * soak_ring MESSAGES [CAPACITY]: exits 0 and says what was moved, or says what went wrong. */
#include "check.h"
#include "skl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SECOND UINT64_C(1000000000)
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 31) * UINT64_C(0x7fb5d329728ea185);
    x = (x ^ x >> 27) * UINT64_C(0x81dadef4bc2dd44d);
    return x ^ x >> 33;
}

/* Mostly short, often a page or less, now and then as long as the ring takes. */
static size_t length_of(uint64_t number, size_t longest)
{
    const uint64_t random = mix(number);
    const size_t limit = random % 1024 == 0 ? longest + 1 : random % 16 == 0 ? 4097 : random % 2 == 0 ? 512 : 64;
    return (size_t)((random >> 20) % limit);
}

/* The word that follows another in a message; the first is of the message's number. */
static uint64_t next_word(uint64_t word)
{
    return word * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
}

static void fill(uint8_t *bytes, size_t length, uint64_t number)
{
    uint64_t word = mix(~number);
    for (size_t i = 0; i < length; i += 8, word = next_word(word))
        memcpy(bytes + i, &word, length - i < 8 ? length - i : 8);
}

static void produce(uint8_t *memory, size_t memory_len, uint64_t messages)
{
    const size_t longest = memory_len - 4096 - 64;
    uint8_t *bytes = malloc(longest);
    for (uint64_t number = 0; number < messages; number++) {
        const size_t length = length_of(number, longest), lengths[2] = {length / 3, length - length / 3};
        fill(bytes, length, number);
        const void *parts[2] = {bytes, bytes + lengths[0]};
        skl_status status;
        while ((status = skl_ring_push(memory, memory_len, (uint32_t)(number % 7), number, parts, lengths, 2,
                                       SECOND)) == SKL_ERR_TIMEOUT)
            continue;
        CHECK(status == SKL_OK);
    }
    free(bytes);
    const uint64_t number = messages;
    CHECK(skl_ring_close(memory, memory_len, SKL_SIDE_PRODUCER) == SKL_OK);
}

/* Returns the bytes that came. */
static uint64_t consume(uint8_t *memory, size_t memory_len, uint64_t messages)
{
    const size_t longest = memory_len - 4096 - 64;
    uint8_t *expected = malloc(longest);
    uint64_t number = 0, bytes = 0;
    for (;; number++) {
        skl_frame frame;
        skl_status status;
        while ((status = skl_ring_peek(memory, memory_len, SECOND, &frame)) == SKL_ERR_TIMEOUT)
            continue;
        if (status == SKL_ERR_CLOSED)
            break;
        CHECK(status == SKL_OK && frame.number == number && frame.tag == number && frame.type == number % 7);
        CHECK(frame.length == length_of(number, longest));
        fill(expected, frame.length, number);
        CHECK(memcmp(memory + frame.offset, expected, frame.length) == 0);
        bytes += frame.length;
        if (number % 4096 == 0)
            CHECK(skl_ring_set_durable(memory, memory_len, number) == SKL_OK);
        CHECK(skl_ring_release(memory, memory_len) == SKL_OK);
    }
    CHECK(number == messages);
    free(expected);
    return bytes;
}

int main(int argc, char **argv)
{
    const uint64_t number = 0, messages = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000;
    const size_t memory_len = 4096 + (argc > 2 ? (size_t)strtoull(argv[2], NULL, 10) : 1u << 16);
    uint8_t *memory = mmap(NULL, memory_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    CHECK(skl_ring_init(memory, memory_len) == SKL_OK);
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        produce(memory, memory_len, messages);
        _exit(0);
    }
    const uint64_t bytes = consume(memory, memory_len, messages);
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    clock_gettime(CLOCK_MONOTONIC, &end);
    skl_ring_words words;
    CHECK(skl_ring_state(memory, memory_len, &words) == SKL_OK);
    CHECK(words.pushed == messages && words.popped == messages);
    const double seconds = (double)(end.tv_sec - begin.tv_sec) + (double)(end.tv_nsec - begin.tv_nsec) * 1e-9;
    printf("%llu messages, %.1f GB, %.1f s\n", (unsigned long long)messages, (double)bytes * 1e-9, seconds);
    return 0;
}
