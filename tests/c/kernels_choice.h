/* kernels_choice.h: the kernels that a test program runs; it says which at its end.
 *
 * SKL_KERNELS=portable, neon, avx2 or avx512 in the environment: these alone, and a failure where they cannot run.  Else the
 * widest that can, or each in turn where a test compares them. */
#ifndef KERNELS_CHOICE_H
#define KERNELS_CHOICE_H

#include "skl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const all_kernels[] = {"portable", "neon", "avx2", "avx512"};
enum { NUM_KERNELS = sizeof all_kernels / sizeof all_kernels[0] };
static int kernels_ran[NUM_KERNELS];

static inline const char *forced_kernels(void)
{
    const char *const name = getenv("SKL_KERNELS");
    return name == NULL || name[0] == 0 ? NULL : name;
}

/* Use these, unless others are forced or the processor has not got them; returns whether they are in use. */
static inline int try_kernels(const char *name)
{
    const char *const forced = forced_kernels();
    if ((forced != NULL && strcmp(name, forced) != 0) || skl_use_kernels(name) != SKL_OK)
        return 0;
    for (size_t i = 0; i < NUM_KERNELS; i++)
        kernels_ran[i] |= strcmp(name, all_kernels[i]) == 0;
    return 1;
}

/* Use the forced ones, or the widest; ends the program where the forced ones cannot run. */
static inline void choose_kernels(void)
{
    for (size_t i = NUM_KERNELS; i > 0; i--)
        if (try_kernels(all_kernels[i - 1]))
            return;
    fprintf(stderr, "SKL_KERNELS=%s: this processor, or this build, has no such kernels\n", forced_kernels());
    exit(1);
}

static inline void say_kernels(void)
{
    printf("kernels:");
    for (size_t i = 0; i < NUM_KERNELS; i++)
        if (kernels_ran[i])
            printf(" %s", all_kernels[i]);
    printf("\n");
}

#endif
