/* dispatch.c: which table of kernels runs.  The one mutable global of the library. */
#include "kernels.h"

#include <stdatomic.h>
#include <string.h>
#ifdef SKL_X86_KERNELS
#include <cpuid.h>
#endif

static _Atomic(const skl_kernels *) chosen;

#ifdef SKL_X86_KERNELS
/* Not every compiler lets __builtin_cpu_supports be asked for it. */
static int has_f16c(void)
{
    unsigned int eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
#endif

/* Tables this processor can run, the widest first. */
static size_t usable(const skl_kernels *tables[3])
{
    size_t n = 0;
#ifdef SKL_X86_KERNELS
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        tables[n++] = &skl_kernels_avx512;
    if (avx2)
        tables[n++] = &skl_kernels_avx2;
#endif
#ifdef SKL_NEON_KERNELS
    tables[n++] = &skl_kernels_neon; /* every processor of this kind has it */
#endif
    tables[n++] = &skl_kernels_portable;
    return n;
}

const skl_kernels *skl_current_kernels(void)
{
    /* Relaxed: the tables are constant, and threads that race choose the same one. */
    const skl_kernels *table = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (table == NULL) {
        const skl_kernels *tables[3];
        (void)usable(tables);
        table = tables[0];
        atomic_store_explicit(&chosen, table, memory_order_relaxed);
    }
    return table;
}

const char *skl_kernels_name(void)
{
    return skl_current_kernels()->name;
}

skl_status skl_use_kernels(const char *name)
{
    const skl_kernels *tables[3];
    const size_t n = usable(tables);
    for (size_t i = 0; i < n; i++)
        if (strcmp(tables[i]->name, name) == 0) {
            atomic_store_explicit(&chosen, tables[i], memory_order_relaxed);
            return SKL_OK;
        }
    return SKL_ERR_UNSUPPORTED;
}
