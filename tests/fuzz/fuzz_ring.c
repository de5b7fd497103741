/* fuzz_ring.c: whatever overwrites a ring's memory, each call gives a status and touches nothing outside of it, and a
 * frame lies inside.
 *
 * Input: a byte of flags, then operations: a byte that names one, and its arguments.  Nothing waits. */
#include "input.h"

enum { CONTROL = 4096, DATA = 4096, LARGEST = 2 * DATA };

static void check_status(skl_status status)
{
    LAW(status == SKL_OK || status == SKL_ERR_ARG || status == SKL_ERR_CORRUPT || status == SKL_ERR_CLOSED ||
        status == SKL_ERR_TIMEOUT || status == SKL_ERR_UNSUPPORTED);
}

static uint8_t payload[LARGEST];

static void operate(input *in, uint8_t *memory, size_t size)
{
    skl_frame frame;
    skl_ring_words words;
    const void *parts[2] = {payload, payload + LARGEST / 2};
    size_t lengths[2], place;
    uint64_t value;
    skl_status status;
    switch (take(in, 1) % 12) {
    case 0:
    case 1:
    case 2:
        lengths[0] = (size_t)take(in, 2) % (LARGEST / 2);
        lengths[1] = (size_t)take(in, 1);
        value = take(in, 1);
        check_status(skl_ring_push(memory, size, value == 255 ? UINT32_MAX : (uint32_t)value, 7, parts, lengths,
                                   take(in, 1) % 3, 0));
        break;
    case 3:
    case 4:
    case 5:
        status = skl_ring_peek(memory, size, 0, &frame);
        check_status(status);
        if (status == SKL_OK) {
            LAW(frame.offset >= CONTROL && frame.length <= size && frame.offset <= size - frame.length);
            uint8_t sum = 0;
            for (uint64_t i = 0; i < frame.length; i++)
                sum = (uint8_t)(sum + memory[frame.offset + i]);
            payload[0] = sum;
        }
        break;
    case 6:
    case 7: check_status(skl_ring_release(memory, size)); break;
    case 8: check_status(skl_ring_state(memory, size, &words)); break;
    case 9: check_status(skl_ring_close(memory, size, (uint32_t)take(in, 1) % 3)); break;
    case 10: check_status(skl_ring_set_durable(memory, size, take(in, 8))); break;
    default: /* overwrite a word: of the control lines, or of a frame's header */
        place = take(in, 1) % 64 * 8;
        if (take(in, 1) % 2)
            place += CONTROL;
        value = take(in, 1) % 2 ? take(in, 8) : take(in, 2) * 64;
        memcpy(memory + place, &value, sizeof value);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    const uint32_t flags = (uint32_t)take(&in, 1);
    uint8_t *memory = aligned_alloc(CONTROL, CONTROL + DATA);
    LAW(memory != NULL);
    memset(memory, 0, CONTROL + DATA);
    const size_t used = flags % 16 == 1 ? CONTROL + DATA - 64 : flags % 16 == 2 ? CONTROL : CONTROL + DATA;
    if (flags % 16 != 3)
        check_status(skl_ring_init(memory, used));
    while (in.size > 0)
        operate(&in, memory, used);
    LAW(skl_ring_peek(NULL, used, 0, &(skl_frame){0}) == SKL_ERR_ARG);
    free(memory);
    return 0;
}
