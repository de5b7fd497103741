/* check.h: what a C test asserts with; it ends the program at the first that does not hold. */
#ifndef SKL_TESTS_CHECK_H
#define SKL_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);     \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)

#endif
