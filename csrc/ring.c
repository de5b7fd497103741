/* ring.c: single-producer single-consumer ring on memory that two processes share.
 *
 * Words that one side writes and the other reads are C11 atomics.  The pairings:
 *   P1  producer's store of `tail` after the payload  ->  consumer's load of `tail` before reading it
 *   P2  consumer's store of `head` after its reading  ->  producer's load of `head` before overwriting it
 *   P3  each side's store of its `closed`             ->  the other's load of it, before a last look at head or tail
 *   P4  consumer's store of `durable`                 ->  producer's load of it
 * P1 to P4 need release and acquire.  P1, P2 and P3 also take part in Dekker's game with the sleeping flags
 * (publish, then look for a sleeper; announce sleep, then look for what was published), which needs one total order
 * over the four accesses: those stores and the loads in the sleeping path are therefore seq_cst, which includes
 * release and acquire.  Accesses, not fences, because ThreadSanitizer understands them.
 *
 * What is read from shared memory is checked before it is used as a size or place: a word that something overwrote
 * gives SKL_ERR_CORRUPT, never an access outside the memory. */
#include "faults.h"
#include "sleep.h"

#include <assert.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <string.h>

static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a lock would not be shared between processes");
static_assert(ATOMIC_INT_LOCK_FREE == 2, "a lock would not be shared between processes");

#define MAGIC UINT64_C(0x31474e49524c4b53) /* "SKLRING1" in memory */
#define CONTROL_SIZE 4096u
#define ALIGNMENT 64u
#define PADDING_TYPE UINT32_MAX
#define SPINS 200

/* Two lines of 64 bytes apart: neighbouring lines are fetched in pairs. */
typedef struct control {
    uint64_t magic; /* written once, before the memory is shared */
    uint64_t capacity;

    alignas(128) _Atomic uint64_t tail; /* producer: bytes ever published, padding included */
    _Atomic uint64_t pushed;            /* producer: frames ever published */
    _Atomic uint64_t wait_ns;           /* producer: time it waited for room */
    _Atomic uint64_t high_water;        /* producer: most bytes it ever saw in use */
    _Atomic uint32_t producer_closed;
    _Atomic uint32_t consumer_sleeps; /* consumer sets, producer clears; the consumer's futex */

    alignas(128) _Atomic uint64_t head; /* consumer: bytes ever released, padding included */
    _Atomic uint64_t popped;            /* consumer: frames ever released */
    _Atomic uint64_t durable;           /* consumer */
    _Atomic uint32_t consumer_closed;
    _Atomic uint32_t producer_sleeps; /* producer sets, consumer clears; the producer's futex */
} control;

/* The first 64 bytes of a frame; the payload follows. */
typedef struct frame_header {
    uint64_t length; /* bytes of payload */
    uint64_t number; /* frames before this one; padding has none and says 0 */
    uint64_t tag;
    uint32_t type;
    uint32_t reserved;
    uint8_t unused[32];
} frame_header;

static_assert(sizeof(control) <= CONTROL_SIZE, "control words fit their page");
static_assert(sizeof(frame_header) == ALIGNMENT, "a payload starts on a cache line");

/* ---- checked access -------------------------------------------------------------------------------------- */

static uint64_t round_up(uint64_t size) { return (size + (ALIGNMENT - 1)) & ~(uint64_t)(ALIGNMENT - 1); }

/* One side's view; the capacity is the caller's, not what the shared memory says now. */
typedef struct view {
    control *words;
    uint8_t *data;
    uint64_t capacity; /* a power of two */
} view;

static uint64_t index_of(const view *ring, uint64_t place) { return place & (ring->capacity - 1); }

static uint64_t bytes_to_end(const view *ring, uint64_t place) { return ring->capacity - index_of(ring, place); }

static skl_status open_memory(void *memory, size_t memory_len, view *ring)
{
    if (!SKL_CAN_SLEEP)
        return SKL_ERR_UNSUPPORTED;
    if (memory == NULL || memory_len < 2 * (size_t)CONTROL_SIZE || (uintptr_t)memory % alignof(control) != 0)
        return SKL_ERR_ARG;
    ring->words = memory;
    ring->data = (uint8_t *)memory + CONTROL_SIZE;
    ring->capacity = memory_len - CONTROL_SIZE;
    return (ring->capacity & (ring->capacity - 1)) == 0 ? SKL_OK : SKL_ERR_ARG;
}

static skl_status attach(void *memory, size_t memory_len, view *ring)
{
    SKL_TRY(open_memory(memory, memory_len, ring));
    if (ring->words->magic != MAGIC)
        return SKL_ERR_UNSUPPORTED;
    return ring->words->capacity == ring->capacity ? SKL_OK : SKL_ERR_CORRUPT;
}

/* A word that only the asking side writes: relaxed. */
static uint64_t own_word(_Atomic uint64_t *word) { return atomic_load_explicit(word, memory_order_relaxed); }

static void set_own_word(_Atomic uint64_t *word, uint64_t value)
{
    atomic_store_explicit(word, value, memory_order_relaxed);
}

/* Store how far this side is, for the other side to see, and wake that: P1 or P2, Dekker. */
static void publish(_Atomic uint64_t *word, uint64_t place, _Atomic uint32_t *other_sleeps)
{
    atomic_store_explicit(word, place, memory_order_seq_cst);
    skl_wake(other_sleeps);
}

/* Bytes between head and tail; neither side can leave this range or alignment, an overwritten word would. */
static skl_status bytes_used(const view *ring, uint64_t head, uint64_t tail, uint64_t *used)
{
    *used = tail - head;
    return *used <= ring->capacity && (head | tail) % ALIGNMENT == 0 ? SKL_OK : SKL_ERR_CORRUPT;
}

/* ---- waiting --------------------------------------------------------------------------------------------- */

/* One look at the other side's words, for `size` bytes after or before the own `place`: SKL_OK: they are there;
 * SKL_ERR_TIMEOUT: not yet; anything else ends the waiting.  *used: bytes published and not released. */
typedef skl_status look(const view *ring, uint64_t place, uint64_t size, uint64_t *used);

/* Look until there is something, spinning first, then asleep; *waited_ns: how long it took, 0 for one look. */
static skl_status wait_for(look *look_once, const view *ring, uint64_t place, uint64_t size, uint64_t timeout_ns,
                           _Atomic uint32_t *sleeps, uint64_t *used, uint64_t *waited_ns)
{
    *waited_ns = 0;
    skl_status status = look_once(ring, place, size, used);
    if (status != SKL_ERR_TIMEOUT || timeout_ns == 0)
        return status;
    const uint64_t started = skl_now_ns();
    for (uint32_t spin = 0; status == SKL_ERR_TIMEOUT; spin++) {
        if (spin < SPINS) {
            skl_relax();
        } else {
            *waited_ns = skl_now_ns() - started;
            if (*waited_ns >= timeout_ns)
                break;
            if (atomic_load_explicit(sleeps, memory_order_relaxed)) {
                skl_sleep_on(sleeps, timeout_ns - *waited_ns);
                atomic_store_explicit(sleeps, 0, memory_order_relaxed);
            } else { /* announce, then look once more before sleeping */
                atomic_store_explicit(sleeps, 1, memory_order_seq_cst);
            }
        }
        status = look_once(ring, place, size, used);
    }
    atomic_store_explicit(sleeps, 0, memory_order_relaxed);
    *waited_ns = skl_now_ns() - started;
    return status;
}

/* ---- producer -------------------------------------------------------------------------------------------- */

/* Room for `size` bytes from tail on. */
static skl_status look_for_room(const view *ring, uint64_t tail, uint64_t size, uint64_t *used)
{
    if (atomic_load_explicit(&ring->words->consumer_closed, memory_order_seq_cst)) /* P3, Dekker */
        return SKL_ERR_CLOSED;
    const uint64_t head = atomic_load_explicit(&ring->words->head, memory_order_seq_cst); /* P2, Dekker */
    SKL_TRY(bytes_used(ring, head, tail, used));
    if (*used > own_word(&ring->words->high_water))
        set_own_word(&ring->words->high_water, *used);
    return ring->capacity - *used >= size ? SKL_OK : SKL_ERR_TIMEOUT;
}

/* Wait until `size` bytes from tail on are free, and count the time.  size <= capacity. */
static skl_status wait_for_room(const view *ring, uint64_t tail, uint64_t size, uint64_t timeout_ns)
{
    uint64_t used, waited_ns;
    const skl_status status = wait_for(look_for_room, ring, tail, size, timeout_ns, &ring->words->producer_sleeps,
                                       &used, &waited_ns);
    if (waited_ns > 0)
        set_own_word(&ring->words->wait_ns, own_word(&ring->words->wait_ns) + waited_ns);
    return status;
}

/* Write a frame at tail, its payload from the parts; the room is known to be free. */
static void write_frame(const view *ring, uint64_t tail, const frame_header *header, const void *const *parts,
                        const size_t *lengths, size_t num_parts)
{
    uint8_t *to = ring->data + index_of(ring, tail);
    memcpy(to, header, sizeof *header);
    to += sizeof *header;
    for (size_t i = 0; i < num_parts; i++) {
        if (lengths[i] > 0)
            memcpy(to, parts[i], lengths[i]);
        to += lengths[i];
    }
}

skl_status skl_ring_push(void *memory, size_t memory_len, uint32_t type, uint64_t tag, const void *const *parts,
                         const size_t *lengths, size_t num_parts, uint64_t timeout_ns)
{
    view ring;
    SKL_TRY(attach(memory, memory_len, &ring));
    const uint64_t room = ring.capacity - sizeof(frame_header);
    uint64_t length = 0;
    for (size_t i = 0; i < num_parts; i++) {
        if (lengths[i] > room - length)
            return SKL_ERR_ARG;
        length += lengths[i];
    }
    if (type == PADDING_TYPE)
        return SKL_ERR_ARG;

    control *const words = ring.words;
    uint64_t tail = own_word(&words->tail);
    const uint64_t size = sizeof(frame_header) + round_up(length);
    const uint64_t to_end = bytes_to_end(&ring, tail);
    if (tail % ALIGNMENT != 0)
        return SKL_ERR_CORRUPT;
    if (size > to_end) {
        /* Published by itself, so that a frame may be as large as the ring; a push repeated after a time-out
         * starts behind it. */
        SKL_TRY(wait_for_room(&ring, tail, to_end, timeout_ns));
        const frame_header padding = {.length = to_end - sizeof padding, .type = PADDING_TYPE};
        write_frame(&ring, tail, &padding, NULL, NULL, 0);
        tail += to_end;
        publish(&words->tail, tail, &words->consumer_sleeps);
    }
    SKL_TRY(wait_for_room(&ring, tail, size, timeout_ns));
    const uint64_t number = own_word(&words->pushed);
    const frame_header header = {.length = length, .number = number, .tag = tag, .type = type};
    write_frame(&ring, tail, &header, parts, lengths, num_parts);
    set_own_word(&words->pushed, number + 1);
    publish(&words->tail, tail + size, &words->consumer_sleeps);
    return SKL_OK;
}

/* ---- consumer -------------------------------------------------------------------------------------------- */

/* Anything that is published from head on. */
static skl_status look_for_frame(const view *ring, uint64_t head, uint64_t size, uint64_t *used)
{
    /* P3: closed is read before tail, so that all that was pushed before closing is seen. */
    const uint32_t closed = atomic_load_explicit(&ring->words->producer_closed, memory_order_seq_cst);
    const uint64_t tail = atomic_load_explicit(&ring->words->tail, memory_order_seq_cst); /* P1, Dekker */
    const skl_status status = bytes_used(ring, head, tail, used);
    if (status != SKL_OK || *used >= size)
        return status;
    return closed ? SKL_ERR_CLOSED : SKL_ERR_TIMEOUT;
}

/* The header at head, checked against what is published and against the end of the memory. */
static skl_status read_header(const view *ring, uint64_t head, uint64_t used, frame_header *header)
{
    memcpy(header, ring->data + index_of(ring, head), sizeof *header);
    const uint64_t to_end = bytes_to_end(ring, head);
    const uint64_t limit = used < to_end ? used : to_end;
    if (header->length > limit - sizeof *header || header->reserved != 0)
        return SKL_ERR_CORRUPT;
    if (header->type == PADDING_TYPE)
        return header->length == to_end - sizeof *header ? SKL_OK : SKL_ERR_CORRUPT;
    return header->number == own_word(&ring->words->popped) ? SKL_OK : SKL_ERR_CORRUPT;
}

skl_status skl_ring_peek(void *memory, size_t memory_len, uint64_t timeout_ns, skl_frame *frame)
{
    view ring;
    SKL_TRY(attach(memory, memory_len, &ring));
    for (;;) { /* at most twice: after padding comes a frame */
        const uint64_t head = own_word(&ring.words->head);
        uint64_t used, waited_ns;
        frame_header header;
        SKL_TRY(wait_for(look_for_frame, &ring, head, sizeof header, timeout_ns, &ring.words->consumer_sleeps, &used,
                         &waited_ns));
        SKL_TRY(read_header(&ring, head, used, &header));
        if (header.type == PADDING_TYPE) {
            publish(&ring.words->head, head + sizeof header + header.length, &ring.words->producer_sleeps);
            continue;
        }
        frame->offset = CONTROL_SIZE + index_of(&ring, head) + sizeof header;
        frame->length = header.length;
        frame->number = header.number;
        frame->tag = header.tag;
        frame->type = header.type;
        return SKL_OK;
    }
}

skl_status skl_ring_release(void *memory, size_t memory_len)
{
    view ring;
    SKL_TRY(attach(memory, memory_len, &ring));
    const uint64_t head = own_word(&ring.words->head);
    const uint64_t tail = atomic_load_explicit(&ring.words->tail, memory_order_acquire); /* P1 */
    uint64_t used;
    frame_header header;
    SKL_TRY(bytes_used(&ring, head, tail, &used));
    if (used == 0)
        return SKL_ERR_ARG;
    SKL_TRY(read_header(&ring, head, used, &header));
    if (header.type == PADDING_TYPE)
        return SKL_ERR_ARG;
    set_own_word(&ring.words->popped, header.number + 1);
    publish(&ring.words->head, head + sizeof header + round_up(header.length), &ring.words->producer_sleeps);
    return SKL_OK;
}

skl_status skl_ring_set_durable(void *memory, size_t memory_len, uint64_t durable)
{
    view ring;
    SKL_TRY(attach(memory, memory_len, &ring));
    atomic_store_explicit(&ring.words->durable, durable, memory_order_release); /* P4 */
    return SKL_OK;
}

/* ---- both sides ------------------------------------------------------------------------------------------ */

skl_status skl_ring_init(void *memory, size_t memory_len)
{
    view ring;
    SKL_TRY(open_memory(memory, memory_len, &ring));
    memset(memory, 0, CONTROL_SIZE); /* zero is the first state of every atomic word; nobody else sees it yet */
    ring.words->capacity = ring.capacity;
    ring.words->magic = MAGIC;
    return SKL_OK;
}

skl_status skl_ring_close(void *memory, size_t memory_len, uint32_t side)
{
    view ring;
    SKL_TRY(attach(memory, memory_len, &ring));
    control *const words = ring.words;
    if (side != SKL_SIDE_PRODUCER && side != SKL_SIDE_CONSUMER)
        return SKL_ERR_ARG;
    const int producer = side == SKL_SIDE_PRODUCER;
    atomic_store_explicit(producer ? &words->producer_closed : &words->consumer_closed, 1,
                          memory_order_seq_cst); /* P3, Dekker */
    skl_wake(producer ? &words->consumer_sleeps : &words->producer_sleeps);
    return SKL_OK;
}

skl_status skl_ring_state(void *memory, size_t memory_len, skl_ring_words *state)
{
    view ring;
    SKL_TRY(attach(memory, memory_len, &ring));
    state->capacity = ring.capacity;
    state->durable = atomic_load_explicit(&ring.words->durable, memory_order_acquire); /* P4 */
    state->pushed = atomic_load_explicit(&ring.words->pushed, memory_order_relaxed);
    state->popped = atomic_load_explicit(&ring.words->popped, memory_order_relaxed);
    state->wait_ns = atomic_load_explicit(&ring.words->wait_ns, memory_order_relaxed);
    state->high_water = atomic_load_explicit(&ring.words->high_water, memory_order_relaxed);
    state->producer_closed = atomic_load_explicit(&ring.words->producer_closed, memory_order_acquire);
    state->consumer_closed = atomic_load_explicit(&ring.words->consumer_closed, memory_order_acquire);
    return SKL_OK;
}
