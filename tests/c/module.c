/* module.c: a shared module with the library in it, which test_module loads as Python loads its own. */
#include "skl.h"

#if defined(__GNUC__)
__attribute__((visibility("default")))
#endif
const char *kernels_of_module(void);

const char *kernels_of_module(void)
{
    return skl_kernels_name();
}
