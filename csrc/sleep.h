/* sleep.h: sleeping until another process wakes this one, over a word that both map; private. */
#ifndef SKL_SLEEP_H
#define SKL_SLEEP_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* Whether the system can do it; elsewhere the functions do nothing, and nobody may call them. */
#if defined(__linux__) && UINTPTR_MAX > UINT32_MAX
#define SKL_CAN_SLEEP 1
#else
#define SKL_CAN_SLEEP 0
#endif

/* Nanoseconds of a clock that only goes forward. */
uint64_t skl_now_ns(void);

/* Sleep while *word is 1, for limit_ns at most.  Any reason to return will do: the caller looks again. */
void skl_sleep_on(_Atomic uint32_t *word, uint64_t limit_ns);

/* If *word is not 0, make it 0 and wake who sleeps on it. */
void skl_wake(_Atomic uint32_t *word);

/* Let some time pass between two looks, awake. */
void skl_relax(void);

#endif
