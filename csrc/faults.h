/* faults.h: how a function of this library says what is wrong with what it was given; private. */
#ifndef SKL_FAULTS_H
#define SKL_FAULTS_H

#include "skl.h"

/* Return what `call` returns, unless that is SKL_OK. */
#define SKL_TRY(call)                                                                                                 \
    do {                                                                                                              \
        const skl_status status_ = (call);                                                                            \
        if (status_ != SKL_OK)                                                                                        \
            return status_;                                                                                           \
    } while (0)

/* Say in *fault what is wrong, and return the status. */
static inline skl_status skl_fail(skl_status status, skl_fault *fault, skl_reason reason, uint64_t position,
                                  uint64_t value)
{
    fault->reason = reason;
    fault->position = position;
    fault->value = value;
    return status;
}

/* offsets [num_positions + 1] must rise from 0 to num_records.  SKL_OK, or SKL_ERR_ARG with *fault. */
static inline skl_status skl_check_offsets(uint32_t num_positions, const int64_t *offsets, uint64_t num_records,
                                           skl_fault *fault)
{
    if (offsets[0] != 0 || (uint64_t)offsets[num_positions] != num_records)
        return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, num_positions, num_records);
    for (uint32_t t = 0; t < num_positions; t++)
        if (offsets[t + 1] < offsets[t])
            return skl_fail(SKL_ERR_ARG, fault, SKL_REASON_SHAPE, t, num_records);
    return SKL_OK;
}

#endif
