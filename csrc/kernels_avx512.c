/* kernels_avx512.c: kernels_portable.c compiled for avx512; CMakeLists.txt gives the flags. */
#define SKL_KERNELS skl_kernels_avx512
#define SKL_KERNELS_NAME "avx512"
#include "kernels_portable.c"
