/* The ring: order, content, waiting, closing, and memory that something overwrote.  Built with ASan and UBSan, and with
 * TSan for the threads. */
#include "check.h"
#include "kernels_choice.h"
#include "skl.h"

#if __has_include(<linux/seccomp.h>)
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#define CAN_FORBID 1
#else
#define CAN_FORBID 0
#endif
#include <pthread.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CAPACITY 16384u
#define RING_LEN (4096u + CAPACITY)
#define SECOND UINT64_C(1000000000)
#define CONSUMER_SLEEPS 164u /* offset of the flag in the control words */
#ifndef NUM_MESSAGES
#define NUM_MESSAGES 60000u
#endif

#ifdef __SANITIZE_THREAD__
#define CORRUPTIONS 500u /* one thread: the other sanitizers' matter */
#else
#define CORRUPTIONS 20000u
#endif

static alignas(4096) uint8_t memory[RING_LEN];

static uint64_t next_random(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return *state >> 33;
}

static void fresh(void)
{
    memset(memory, 0, sizeof memory);
    CHECK(skl_ring_init(memory, RING_LEN) == SKL_OK);
}

static skl_status push(const void *bytes, size_t length, uint64_t tag, uint64_t timeout_ns)
{
    const void *parts[1] = {bytes};
    return skl_ring_push(memory, RING_LEN, 7, tag, parts, &length, 1, timeout_ns);
}

/* Frames come out as they went in: parts joined, type and tag kept, numbered from 0. */
static void keeps_order_and_content(void)
{
    fresh();
    skl_frame frame;
    CHECK(skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_ERR_TIMEOUT);
    const void *parts[3] = {"ab", NULL, "cde"};
    const size_t lengths[3] = {2, 0, 3};
    CHECK(skl_ring_push(memory, RING_LEN, 1, 42, parts, lengths, 3, 0) == SKL_OK);
    CHECK(push("", 0, 43, 0) == SKL_OK);
    CHECK(skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_OK);
    CHECK(frame.type == 1 && frame.tag == 42 && frame.number == 0 && frame.length == 5);
    CHECK(frame.offset % 64 == 0 && memcmp(memory + frame.offset, "abcde", 5) == 0);
    CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
    CHECK(skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_OK);
    CHECK(frame.type == 7 && frame.tag == 43 && frame.number == 1 && frame.length == 0);
    CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
    CHECK(skl_ring_release(memory, RING_LEN) == SKL_ERR_ARG);
}

/* A frame lies in one piece wherever it starts, up to the largest one; a larger one is refused. */
static void wraps_in_one_piece(void)
{
    fresh();
    static uint8_t bytes[CAPACITY];
    uint64_t random = 1;
    for (uint32_t i = 0; i < 2000; i++) {
        const size_t length = next_random(&random) % (CAPACITY - 64 + 1);
        memset(bytes, (int)(i & 255), length);
        skl_frame frame;
        /* Padding may need the room first; the ring is empty, so that the second push succeeds. */
        CHECK(push(bytes, length, i, 0) == SKL_OK || skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_ERR_TIMEOUT);
        if (skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_ERR_TIMEOUT)
            CHECK(push(bytes, length, i, 0) == SKL_OK);
        CHECK(skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_OK);
        CHECK(frame.number == i && frame.tag == i && frame.length == length);
        CHECK(frame.offset + frame.length <= RING_LEN);
        CHECK(memcmp(memory + frame.offset, bytes, length) == 0);
        CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
    }
    CHECK(push(bytes, CAPACITY - 64, 0, 0) != SKL_ERR_ARG);
    CHECK(push(bytes, CAPACITY - 63, 0, 0) == SKL_ERR_ARG);
}

/* A full ring refuses in time, counts the wait, loses nothing. */
static void full_ring_waits(void)
{
    fresh();
    static const uint8_t bytes[4032];
    for (uint64_t i = 0; i < 4; i++)
        CHECK(push(bytes, sizeof bytes, i, 0) == SKL_OK);
    CHECK(push(bytes, 1, 4, 20000000) == SKL_ERR_TIMEOUT);
    skl_ring_words words;
    CHECK(skl_ring_state(memory, RING_LEN, &words) == SKL_OK);
    CHECK(words.wait_ns >= 20000000 && words.pushed == 4 && words.popped == 0);
    CHECK(words.capacity == CAPACITY && words.high_water == CAPACITY);
    skl_frame frame;
    CHECK(skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_OK && frame.tag == 0);
    CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
    CHECK(push(bytes, 1, 4, 0) == SKL_OK);
}

/* After the producer closed, what it pushed still comes out; after the consumer closed, a push fails. */
static void closing(void)
{
    fresh();
    skl_frame frame;
    CHECK(push("x", 1, 0, 0) == SKL_OK);
    CHECK(skl_ring_close(memory, RING_LEN, SKL_SIDE_PRODUCER) == SKL_OK);
    CHECK(skl_ring_peek(memory, RING_LEN, SECOND, &frame) == SKL_OK);
    CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
    CHECK(skl_ring_peek(memory, RING_LEN, SECOND, &frame) == SKL_ERR_CLOSED);
    CHECK(skl_ring_close(memory, RING_LEN, SKL_SIDE_CONSUMER) == SKL_OK);
    CHECK(push("x", 1, 0, SECOND) == SKL_ERR_CLOSED);
    CHECK(skl_ring_close(memory, RING_LEN, 2) == SKL_ERR_ARG);
    CHECK(skl_ring_set_durable(memory, RING_LEN, 9) == SKL_OK);
    skl_ring_words words;
    CHECK(skl_ring_state(memory, RING_LEN, &words) == SKL_OK);
    CHECK(words.producer_closed && words.consumer_closed && words.durable == 9);
}

/* Memory of a wrong size, place or content is refused. */
static void refuses_other_memory(void)
{
    memset(memory, 0, sizeof memory);
    skl_ring_words words;
    CHECK(skl_ring_state(memory, RING_LEN, &words) == SKL_ERR_UNSUPPORTED);
    CHECK(skl_ring_init(NULL, RING_LEN) == SKL_ERR_ARG);
    CHECK(skl_ring_init(memory, RING_LEN - 1) == SKL_ERR_ARG);
    CHECK(skl_ring_init(memory, 4096) == SKL_ERR_ARG);
    CHECK(skl_ring_init(memory + 64, RING_LEN - CAPACITY / 2) == SKL_ERR_ARG);
    fresh();
    CHECK(skl_ring_state(memory, RING_LEN - CAPACITY / 2, &words) == SKL_ERR_CORRUPT);
}

/* A frame that is not the next one (lost, doubled, out of order) is seen by its number. */
static void numbers_are_checked(void)
{
    fresh();
    CHECK(push("x", 1, 0, 0) == SKL_OK);
    skl_frame frame;
    CHECK(skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_OK);
    const uint64_t number = 1;
    memcpy(memory + frame.offset - 64 + 8, &number, sizeof number);
    CHECK(skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_ERR_CORRUPT);
    CHECK(skl_ring_release(memory, RING_LEN) == SKL_ERR_CORRUPT);
}

/* Whatever the shared words and frame headers say, every access stays inside the memory and every call returns. */
static void survives_overwritten_words(void)
{
    static uint8_t bytes[CAPACITY];
    uint64_t random = 7, corrupt = 0;
    for (uint32_t round = 0; round < CORRUPTIONS; round++) {
        fresh();
        for (uint32_t i = 0, n = (uint32_t)(next_random(&random) % 6); i < n; i++) {
            (void)push(bytes, next_random(&random) % 6000, i, 0);
            skl_frame frame;
            if (next_random(&random) % 2 && skl_ring_peek(memory, RING_LEN, 0, &frame) == SKL_OK)
                CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
        }
        for (uint32_t i = 0, n = 1 + (uint32_t)(next_random(&random) % 3); i < n; i++) {
            /* a word of the control lines or of the start of the data: anything, or a near miss */
            const size_t words = next_random(&random) % 2 ? 512 : 4096;
            const size_t place = 8 * (next_random(&random) % (words / 8)) + (words == 4096 ? 4096 : 0);
            uint64_t value = next_random(&random) << (next_random(&random) % 40);
            if (next_random(&random) % 2)
                value = 64 * (value % 600);
            memcpy(memory + place, &value, sizeof value);
        }
        for (uint32_t i = 0; i < 6; i++) {
            skl_frame frame;
            const skl_status status = skl_ring_peek(memory, RING_LEN, 0, &frame);
            corrupt += status == SKL_ERR_CORRUPT;
            if (status == SKL_OK) {
                CHECK(frame.offset >= 4096 && frame.offset + frame.length <= RING_LEN);
                (void)skl_ring_release(memory, RING_LEN);
            }
            corrupt += push(bytes, next_random(&random) % CAPACITY, i, 0) == SKL_ERR_CORRUPT;
        }
    }
    CHECK(corrupt > CORRUPTIONS / 20); /* the damage was seen, not missed */
}

/* ---- two threads ----------------------------------------------------------------------------------------- */

static size_t length_of(uint64_t number)
{
    uint64_t state = number;
    const uint64_t kind = next_random(&state) % 16;
    return kind == 0 ? next_random(&state) % (CAPACITY - 63) : next_random(&state) % (kind < 8 ? 64 : 2048);
}

static void *produce(void *argument)
{
    static uint8_t bytes[CAPACITY];
    (void)argument;
    for (uint64_t number = 0; number < NUM_MESSAGES; number++) {
        const size_t length = length_of(number);
        memset(bytes, (int)(number * 31 & 255), length);
        skl_status status;
        while ((status = push(bytes, length, number, SECOND / 10)) == SKL_ERR_TIMEOUT)
            continue;
        CHECK(status == SKL_OK);
    }
    CHECK(skl_ring_close(memory, RING_LEN, SKL_SIDE_PRODUCER) == SKL_OK);
    return NULL;
}

/* Every message arrives once, whole and in order, with sleeping and waking on both sides. */
static void soak(void)
{
    fresh();
    pthread_t producer;
    CHECK(pthread_create(&producer, NULL, produce, NULL) == 0);
    for (uint64_t number = 0;; number++) {
        skl_frame frame;
        skl_status status;
        while ((status = skl_ring_peek(memory, RING_LEN, SECOND / 10, &frame)) == SKL_ERR_TIMEOUT)
            continue;
        if (status == SKL_ERR_CLOSED) {
            CHECK(number == NUM_MESSAGES);
            break;
        }
        CHECK(status == SKL_OK && frame.tag == number && frame.number == number);
        CHECK(frame.length == length_of(number));
        for (uint64_t i = 0; i < frame.length; i++)
            CHECK(memory[frame.offset + i] == (uint8_t)(number * 31 & 255));
        CHECK(skl_ring_set_durable(memory, RING_LEN, number + 1) == SKL_OK);
        CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
        if (number % 997 == 0) { /* let the producer fall asleep on a full ring */
            const struct timespec nap = {.tv_nsec = 1000000};
            nanosleep(&nap, NULL);
        }
    }
    CHECK(pthread_join(producer, NULL) == 0);
    skl_ring_words words;
    CHECK(skl_ring_state(memory, RING_LEN, &words) == SKL_OK);
    CHECK(words.durable == NUM_MESSAGES && words.pushed == NUM_MESSAGES && words.popped == NUM_MESSAGES);
    CHECK(words.wait_ns > 0 && words.high_water <= CAPACITY);
}

static void *close_later(void *side)
{
    const struct timespec nap = {.tv_nsec = 20000000};
    nanosleep(&nap, NULL);
    CHECK(skl_ring_close(memory, RING_LEN, *(const uint32_t *)side) == SKL_OK);
    return NULL;
}

/* Closing wakes a side that sleeps, long before its time limit. */
static void closing_wakes(void)
{
    static const uint8_t bytes[CAPACITY - 64];
    for (uint32_t side = 0; side < 2; side++) {
        fresh();
        if (side == SKL_SIDE_CONSUMER)
            CHECK(push(bytes, sizeof bytes, 0, 0) == SKL_OK);
        pthread_t other;
        CHECK(pthread_create(&other, NULL, close_later, &side) == 0);
        skl_frame frame;
        CHECK((side == SKL_SIDE_CONSUMER ? push("x", 1, 1, 60 * SECOND)
                                         : skl_ring_peek(memory, RING_LEN, 60 * SECOND, &frame)) == SKL_ERR_CLOSED);
        CHECK(pthread_join(other, NULL) == 0);
    }
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

static void *act_late(void *filling)
{
    const struct timespec nap = {.tv_nsec = 5000000};
    for (uint32_t i = 0; i < 20; i++) {
        nanosleep(&nap, NULL);
        skl_frame frame;
        if (filling != NULL) { /* the other side waits for room */
            CHECK(skl_ring_peek(memory, RING_LEN, SECOND, &frame) == SKL_OK);
            CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
        } else {
            CHECK(push("x", 1, i, 0) == SKL_OK);
        }
    }
    return NULL;
}

/* A side that sleeps is woken by what it waits for: 20 times lie far below 20 of the time limits that would hide it. */
static void sleepers_are_woken(void)
{
    static const uint8_t bytes[CAPACITY - 64];
    for (uint32_t filling = 0; filling < 2; filling++) {
        fresh();
        if (filling)
            CHECK(push(bytes, sizeof bytes, 0, 0) == SKL_OK);
        const uint64_t started = now_ns();
        pthread_t other;
        CHECK(pthread_create(&other, NULL, act_late, filling ? &filling : NULL) == 0);
        for (uint32_t i = 0; i < 20; i++) {
            skl_frame frame;
            if (filling) {
                CHECK(push(bytes, sizeof bytes, i, SECOND) == SKL_OK);
            } else {
                CHECK(skl_ring_peek(memory, RING_LEN, SECOND, &frame) == SKL_OK);
                CHECK(skl_ring_release(memory, RING_LEN) == SKL_OK);
            }
        }
        CHECK(pthread_join(other, NULL) == 0);
        CHECK(now_ns() - started < SECOND);
    }
}

#if CAN_FORBID
/* Exit status of a process for which futex is no system call any more, and which passes 1000 frames to itself;
 * somebody_sleeps: the control words say that the consumer is asleep. */
static int pass_frames_without_futex(int somebody_sleeps)
{
    fresh();
    if (somebody_sleeps)
        memory[CONSUMER_SLEEPS] = 1;
    fflush(NULL);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        struct sock_filter filter[] = {
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), /* the number of the system call */
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex, 0, 1),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        const struct sock_fprog program = {.len = 4, .filter = filter};
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
            _exit(77); /* a system that has no filters */
        skl_frame frame;
        for (uint32_t i = 0; i < 1000; i++)
            if (push("abc", 3, i, SECOND) != SKL_OK || skl_ring_peek(memory, RING_LEN, SECOND, &frame) != SKL_OK ||
                skl_ring_release(memory, RING_LEN) != SKL_OK)
                _exit(1);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

/* Where nobody sleeps, nobody is woken: frames pass without a system call; a sleeper costs one. */
static void wakes_only_sleepers(void)
{
    const int status = pass_frames_without_futex(0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        return;
    CHECK(status == 0);
    CHECK(WIFSIGNALED(pass_frames_without_futex(1)));
}
#else
static void wakes_only_sleepers(void)
{
    puts("wakes_only_sleepers: no headers of the kernel here, left out");
}
#endif

int main(void)
{
    choose_kernels();
    wakes_only_sleepers(); /* while there is one thread */
    keeps_order_and_content();
    wraps_in_one_piece();
    full_ring_waits();
    closing();
    refuses_other_memory();
    numbers_are_checked();
    survives_overwritten_words();
    soak();
    closing_wakes();
    sleepers_are_woken();
    say_kernels();
    return 0;
}
