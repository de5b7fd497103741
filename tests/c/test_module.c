/* test_module.c: loading the library does not change how its process computes.  test_module MODULE. */
#include "check.h"

#include <dlfcn.h>
#include <fenv.h>
#include <float.h>
#include <stdio.h>
#include <stdlib.h>

/* Subnormal numbers are numbers, and results are rounded to nearest. */
static void check_environment(void)
{
    volatile float least = FLT_MIN, half = 0.5f;
    volatile double least_double = DBL_MIN;
    CHECK(least * half > 0.0f && least_double * half > 0.0);
    CHECK(fegetround() == FE_TONEAREST);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    check_environment();
    void *const module = dlopen(argv[1], RTLD_NOW);
    if (module == NULL)
        fprintf(stderr, "%s\n", dlerror());
    CHECK(module != NULL && dlsym(module, "kernels_of_module") != NULL);
    check_environment();
    dlclose(module);
    puts("module: all tests hold");
    return 0;
}
