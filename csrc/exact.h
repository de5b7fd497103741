/* exact.h: what the compiler must promise of floating point, or records would depend on it; private.
 *
 * CMakeLists.txt takes back -ffast-math and its parts; this is for builds that go another way. */
#ifndef SKL_EXACT_H
#define SKL_EXACT_H

#include <float.h>

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) ||                         \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compile without -ffast-math and what belongs to it: records would depend on the compiler"
#endif

/* 16: float16 too is computed as it is. */
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float and double must be computed as such: on x86 with -mfpmath=sse, which 64 bits have unless told otherwise"
#endif

#endif
