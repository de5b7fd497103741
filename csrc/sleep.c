/* sleep.c: futex(2) and the monotonic clock.  The only file that asks the system for anything. */
#include "sleep.h"

#if SKL_CAN_SLEEP
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Of linux/futex.h, which a C library without the kernel's headers has not got. */
#define FUTEX_WAIT 0
#define FUTEX_WAKE 1

#define SLICE_NS UINT64_C(100000000) /* longest single sleep: bounds the cost of any lost wake-up */

/* No system call where the kernel maps the clock. */
uint64_t skl_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* Not FUTEX_PRIVATE: the two sides are processes. */
void skl_sleep_on(_Atomic uint32_t *word, uint64_t limit_ns)
{
    const uint64_t ns = limit_ns < SLICE_NS ? limit_ns : SLICE_NS;
    const struct timespec timeout = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAIT, 1u, &timeout, NULL, 0);
}

void skl_wake(_Atomic uint32_t *word)
{
    /* Dekker, second half: what was published is before this load in the total order of seq_cst. */
    if (atomic_load_explicit(word, memory_order_seq_cst) == 0)
        return;
    /* A sleeper that is only on its way into the kernel finds the word changed and does not sleep. */
    atomic_store_explicit(word, 0, memory_order_seq_cst);
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

void skl_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#else

uint64_t skl_now_ns(void) { return 0; }
void skl_sleep_on(_Atomic uint32_t *word, uint64_t limit_ns) { (void)word, (void)limit_ns; }
void skl_wake(_Atomic uint32_t *word) { (void)word; }
void skl_relax(void) {}

#endif
