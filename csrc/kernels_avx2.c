/* kernels_avx2.c: kernels_portable.c compiled for avx2; CMakeLists.txt gives the flags. */
#define SKL_KERNELS skl_kernels_avx2
#define SKL_KERNELS_NAME "avx2"
#include "kernels_portable.c"
