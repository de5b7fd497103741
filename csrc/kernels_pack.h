/* kernels_pack.h: ids and codes to records, and the checks that look at every record.
 *
 * The counterpart of kernels_records.h, included where that is; steps and plain loops as there.  Ids and codes may be
 * anything here: what a caller hands over was not checked before. */
#ifndef SKL_KERNELS_PACK_H
#define SKL_KERNELS_PACK_H

#include "kernels.h"

#include <string.h>

SKL_INLINE void pack_as(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                        const uint8_t *codes, size_t n, uint8_t *dst, skl_pack_seen *seen)
{
    size_t i = pack_steps(size, id_bits, vocab_size, token_ids, codes, n, dst, seen);
    for (; i < n; i++) {
        const uint32_t record = token_ids[i] | (uint32_t)codes[i] << id_bits;
        seen->large_id |= token_ids[i] >= vocab_size;
        seen->zero_code |= codes[i] == 0;
        seen->ids_not_rising += i > 0 && token_ids[i] <= token_ids[i - 1];
        for (uint32_t byte = 0; byte < size; byte++)
            dst[size * i + byte] = (uint8_t)(record >> (8 * byte));
    }
}

static void pack(uint32_t profile, uint32_t vocab_size, const uint32_t *token_ids, const uint8_t *codes, size_t n,
                 uint8_t *dst, skl_pack_seen *seen)
{
    memset(seen, 0, sizeof *seen);
    /* One copy of the loop for each profile. */
    if (profile == SKL_PROFILE_R24)
        pack_as(3, 17, vocab_size, token_ids, codes, n, dst, seen);
    else if (profile == SKL_PROFILE_R24W)
        pack_as(3, 18, vocab_size, token_ids, codes, n, dst, seen);
    else
        pack_as(4, 24, vocab_size, token_ids, codes, n, dst, seen);
}

/* Sum of n bytes, n * 255 < 2^32. */
SKL_INLINE uint32_t sum_bytes(const uint8_t *bytes, size_t n)
{
    uint32_t sum = 0;
    const size_t done = sum_steps(bytes, n, &sum);
    bytes += done;
    n -= done;
    for (; n >= 8; n -= 8, bytes += 8) {
        uint64_t eight;
        memcpy(&eight, bytes, sizeof eight);
        const uint64_t pairs = (eight & UINT64_C(0x00ff00ff00ff00ff)) + (eight >> 8 & UINT64_C(0x00ff00ff00ff00ff));
        sum += (uint32_t)(pairs * UINT64_C(0x0001000100010001) >> 48);
    }
    for (size_t i = 0; i < n; i++)
        sum += bytes[i];
    return sum;
}

static int sums_differ(const int64_t *offsets, uint32_t num_positions, const uint8_t *codes, uint32_t rounds)
{
    uint32_t bad = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        const size_t n = (size_t)(offsets[t + 1] - offsets[t]);
        bad |= (uint32_t)(n > 0) & (uint32_t)(sum_bytes(codes + offsets[t], n) != rounds);
    }
    return bad != 0;
}

#endif
