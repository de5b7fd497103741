/* environment.h: floating point as every C program begins with it, whatever the calling thread has set; private.
 *
 * A thread may round another way than to nearest, or flush subnormal numbers to 0; records must not depend on it. */
#ifndef SKL_ENVIRONMENT_H
#define SKL_ENVIRONMENT_H

#include <fenv.h>

static inline fenv_t skl_enter_default_environment(void)
{
    fenv_t callers;
    fegetenv(&callers);
    fesetenv(FE_DFL_ENV);
    return callers;
}

static inline void skl_leave_default_environment(const fenv_t *callers)
{
    fesetenv(callers);
}

/* From here to the end of the block; the caller's environment is as before afterwards, however the block is left. */
#define SKL_DEFAULT_ENVIRONMENT                                                                                       \
    const fenv_t callers_environment __attribute__((cleanup(skl_leave_default_environment), unused)) =                \
        skl_enter_default_environment()

#endif
