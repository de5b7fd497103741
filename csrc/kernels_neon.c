/* kernels_neon.c: 16 lanes in four registers, and records 16 at a time; every 64-bit ARM processor has what it takes.
 *
 * Loads and stores that take triples and fours of bytes apart do what shuffles do on x86.  Equal to the portable table
 * bit for bit under qemu-user; how fast it is was not measured on a processor of its own. */
#define SKL_KERNELS_NEON /* what kernels_table.h makes of this file */
#include "kernels.h"

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#if !defined(__aarch64__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "for 64-bit ARM, little-endian"
#endif

/* ---- sampler ----------------------------------------------------------------------------------------------- */

#define QUARTERS 4
#define EACH_QUARTER(i) for (size_t i = 0; i < QUARTERS; i++)

typedef struct lanes {
    float32x4_t quarter[QUARTERS];
} lanes;

SKL_INLINE lanes fill_lanes(float value)
{
    const float32x4_t four = vdupq_n_f32(value);
    return (lanes){{four, four, four, four}};
}

SKL_INLINE float32x4_t load_four(uint32_t dtype, const unsigned char *from)
{
    if (dtype == SKL_DTYPE_FLOAT32)
        return vreinterpretq_f32_u8(vld1q_u8(from));
    const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(from));
    if (dtype == SKL_DTYPE_FLOAT16)
        return vcvt_f32_f16(vreinterpret_f16_u16(halves));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}

SKL_INLINE lanes load_lanes(uint32_t dtype, const unsigned char *from)
{
    lanes a;
    EACH_QUARTER(i)
        a.quarter[i] = load_four(dtype, from + 4 * i * skl_logit_size(dtype));
    return a;
}

SKL_INLINE float load_one(uint32_t dtype, const unsigned char *from)
{
    unsigned char four[16] = {0};
    memcpy(four, from, skl_logit_size(dtype));
    return vgetq_lane_f32(load_four(dtype, four), 0);
}

SKL_INLINE void store_lanes(float *to, lanes a)
{
    EACH_QUARTER(i)
        vst1q_f32(to + 4 * i, a.quarter[i]);
}

/* a where b is NaN. */
SKL_INLINE float32x4_t larger_four(float32x4_t a, float32x4_t b)
{
    return vbslq_f32(vcgtq_f32(b, a), b, a);
}

SKL_INLINE lanes larger_lanes(lanes a, lanes b)
{
    EACH_QUARTER(i)
        a.quarter[i] = larger_four(a.quarter[i], b.quarter[i]);
    return a;
}

SKL_INLINE float largest_lane(lanes a)
{
    const float32x4_t four =
        larger_four(larger_four(a.quarter[0], a.quarter[2]), larger_four(a.quarter[1], a.quarter[3]));
    return vmaxvq_f32(four); /* none is NaN any more */
}

SKL_INLINE float sum_lanes(lanes a)
{
    const float32x4_t low = vaddq_f32(a.quarter[0], a.quarter[2]), high = vaddq_f32(a.quarter[1], a.quarter[3]);
    const float32x4_t four = vaddq_f32(low, high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

/* As sum_lanes, in float64. */
SKL_INLINE double sum_doubled(lanes a)
{
    float64x2_t even[2], odd[2]; /* the first two of four lanes, and the other two */
    for (size_t i = 0; i < 2; i++) {
        even[i] = vaddq_f64(vcvt_f64_f32(vget_low_f32(a.quarter[i])), vcvt_f64_f32(vget_low_f32(a.quarter[i + 2])));
        odd[i] = vaddq_f64(vcvt_high_f64_f32(a.quarter[i]), vcvt_high_f64_f32(a.quarter[i + 2]));
    }
    const float64x2_t two = vaddq_f64(vaddq_f64(even[0], even[1]), vaddq_f64(odd[0], odd[1]));
    return vgetq_lane_f64(two, 0) + vgetq_lane_f64(two, 1);
}

SKL_INLINE float32x4_t exponential_four(float32x4_t x, float32x4_t scale, float32x4_t offset)
{
    const float32x4_t least = vdupq_n_f32(-126.0f), most = vdupq_n_f32(129.0f), magic = vdupq_n_f32(12583038.0f);
    const float32x4_t raw = vfmaq_f32(vnegq_f32(offset), x, scale);
    const float32x4_t above = vbslq_f32(vcltq_f32(raw, least), least, raw);
    const float32x4_t d = vbslq_f32(vcgtq_f32(above, most), most, above);
    const float32x4_t z = vaddq_f32(d, magic);
    const float32x4_t f = vsubq_f32(d, vsubq_f32(z, magic));
    float32x4_t p = vfmaq_f32(vdupq_n_f32(0x1.3d0c52p-6f), vdupq_n_f32(0x1.5c08e6p-9f), f);
    p = vfmaq_f32(vdupq_n_f32(0x1.c6b6e4p-4f), p, f);
    p = vfmaq_f32(vdupq_n_f32(0x1.ebf918p-2f), p, f);
    p = vfmaq_f32(vdupq_n_f32(0x1.62e428p+0f), p, f);
    p = vfmaq_f32(vdupq_n_f32(2.0f), p, f);
    return vmulq_f32(p, vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(z), 23)));
}

SKL_INLINE lanes exponential_lanes(lanes x, lanes scale, lanes offset)
{
    EACH_QUARTER(i)
        x.quarter[i] = exponential_four(x.quarter[i], scale.quarter[i], offset.quarter[i]);
    return x;
}

typedef struct sum_terms {
    float32x4_t scale, offset;
} sum_terms;

SKL_INLINE sum_terms make_sum_terms(uint32_t dtype, float scale, float offset)
{
    (void)dtype;
    return (sum_terms){vdupq_n_f32(scale), vdupq_n_f32(offset)};
}

/* Sum of the exponentials of a block; its largest logit too where that is wanted. */
SKL_INLINE float block_sum(uint32_t dtype, const unsigned char *row, const sum_terms *terms, float *maximum)
{
    lanes sums = fill_lanes(0.0f), most = fill_lanes(-INFINITY);
    for (size_t j = 0; j < SKL_GROUPS; j++) {
        const lanes x = load_lanes(dtype, row + j * SKL_LANES * skl_logit_size(dtype));
        if (maximum != NULL)
            most = larger_lanes(most, x);
        EACH_QUARTER(i)
            sums.quarter[i] =
                vaddq_f32(sums.quarter[i], exponential_four(x.quarter[i], terms->scale, terms->offset));
    }
    if (maximum != NULL)
        *maximum = largest_lane(most);
    return sum_lanes(sums);
}

#include "kernels_lanes.h"

/* ---- records ----------------------------------------------------------------------------------------------- */

#define STEP 16u
/* Far enough that records arrive from memory before their turn. */
#define RECORDS_AHEAD 8192

/* The low bytes of 16 integers. */
SKL_INLINE uint8x16_t low_bytes(const uint32x4_t *fours)
{
    const uint16x8_t low = vcombine_u16(vmovn_u32(fours[0]), vmovn_u32(fours[1]));
    const uint16x8_t high = vcombine_u16(vmovn_u32(fours[2]), vmovn_u32(fours[3]));
    return vcombine_u8(vmovn_u16(low), vmovn_u16(high));
}

/* 16 integers of three bytes each. */
SKL_INLINE void join_bytes(uint8x16_t first, uint8x16_t second, uint8x16_t third, uint32x4_t *fours)
{
    const uint8x16x2_t lower = vzipq_u8(first, second), upper = vzipq_u8(third, vdupq_n_u8(0));
    for (size_t i = 0; i < 2; i++) {
        const uint16x8x2_t both = vzipq_u16(vreinterpretq_u16_u8(lower.val[i]), vreinterpretq_u16_u8(upper.val[i]));
        fours[2 * i] = vreinterpretq_u32_u16(both.val[0]);
        fours[2 * i + 1] = vreinterpretq_u32_u16(both.val[1]);
    }
}

SKL_INLINE size_t pack_steps(uint32_t size, uint32_t id_bits, uint32_t vocab_size, const uint32_t *token_ids,
                             const uint8_t *codes, size_t n, uint8_t *dst, skl_pack_seen *seen)
{
    const uint32x4_t vocab = vdupq_n_u32(vocab_size);
    uint32x4_t ids_before = vdupq_n_u32(0), large_ids = ids_before;
    uint8x16_t zero_codes = vdupq_n_u8(0);
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        const uint8x16_t step_codes = vld1q_u8(codes + i);
        uint32x4_t records[4], not_rising = vdupq_n_u32(0);
        join_bytes(step_codes, vdupq_n_u8(0), vdupq_n_u8(0), records);
        for (size_t j = 0; j < 4; j++) {
            const uint32x4_t ids = vld1q_u32(token_ids + i + 4 * j);
            not_rising = vsubq_u32(not_rising, vcleq_u32(ids, vextq_u32(ids_before, ids, 3)));
            large_ids = vorrq_u32(large_ids, vcgeq_u32(ids, vocab));
            ids_before = ids;
            records[j] = vorrq_u32(ids, vshlq_u32(records[j], vdupq_n_s32((int32_t)id_bits)));
        }
        seen->ids_not_rising += vaddvq_u32(not_rising);
        zero_codes = vorrq_u8(zero_codes, vceqzq_u8(step_codes));
        if (size == 4) {
            for (size_t j = 0; j < 4; j++)
                vst1q_u8(dst + 4 * i + 16 * j, vreinterpretq_u8_u32(records[j]));
        } else {
            uint32x4_t above[4], top[4];
            for (size_t j = 0; j < 4; j++) {
                above[j] = vshrq_n_u32(records[j], 8);
                top[j] = vshrq_n_u32(records[j], 16);
            }
            vst3q_u8(dst + 3 * i, (uint8x16x3_t){{low_bytes(records), low_bytes(above), low_bytes(top)}});
        }
    }
    seen->ids_not_rising -= i > 0 && token_ids[0] == 0; /* the first has none before it */
    seen->large_id |= vmaxvq_u32(large_ids) != 0;
    seen->zero_code |= vmaxvq_u8(zero_codes) != 0;
    return i;
}

/* Positions are too short for it. */
SKL_INLINE size_t sum_steps(const uint8_t *bytes, size_t n, uint32_t *sum)
{
    (void)bytes, (void)n, (void)sum;
    return 0;
}

/* How counts are checked: a position that starts has `rounds` left, each count takes its part away, and nothing is left
 * where the next one starts.  With byte i holding mark - code, what is left after record i is the running sum.  The
 * first sum that does not lie in 0..127 has its upper bit set, from one that does being at most 127 away. */
typedef struct count_sums {
    uint8x16_t rounds_left, negative, open;
} count_sums;

SKL_INLINE void check_counts(count_sums *sums, uint8x16_t begin_marks, uint8x16_t codes)
{
    const uint8x16_t none = vdupq_n_u8(0);
    uint8x16_t upto = vsubq_u8(begin_marks, codes);
    upto = vaddq_u8(upto, vextq_u8(none, upto, 15));
    upto = vaddq_u8(upto, vextq_u8(none, upto, 14));
    upto = vaddq_u8(upto, vextq_u8(none, upto, 12));
    upto = vaddq_u8(upto, vextq_u8(none, upto, 8));
    const uint8x16_t left_after = vaddq_u8(upto, sums->rounds_left);
    const uint8x16_t complete = vceqq_u8(vaddq_u8(left_after, codes), begin_marks);
    sums->open = vorrq_u8(sums->open, vbicq_u8(vtstq_u8(begin_marks, begin_marks), complete));
    sums->negative = vorrq_u8(sums->negative, left_after);
    sums->rounds_left = vdupq_laneq_u8(left_after, 15);
}

SKL_INLINE size_t unpack_steps(skl_record_format format, skl_scan *scan, const uint8_t *begin_marks,
                               const uint8_t *src, size_t n, uint32_t *token_ids, uint8_t *codes)
{
    const int8_t above_ids = (int8_t)(format.id_bits - 16); /* bits of an id in the third byte */
    const uint8x16_t id_mask = vdupq_n_u8(format.size == 3 ? (uint8_t)((1u << above_ids) - 1) : 0xff);
    uint32x4_t ids_before = vdupq_n_u32(scan->last_id), largest = vdupq_n_u32(0);
    uint8x16_t reserved = vdupq_n_u8(0), unordered = reserved, smallest = vdupq_n_u8(0xff);
    count_sums sums = {vdupq_n_u8((uint8_t)scan->rounds_left), vdupq_n_u8(0), vdupq_n_u8(0)};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        const uint8_t *const from = src + format.size * i;
        uint32x4_t ids[4], not_rising[4];
        uint8x16_t step_codes;
        __builtin_prefetch(from + RECORDS_AHEAD);
        if (format.size == 3) {
            const uint8x16x3_t bytes = vld3q_u8(from);
            join_bytes(bytes.val[0], bytes.val[1], vandq_u8(bytes.val[2], id_mask), ids);
            step_codes = vshlq_u8(bytes.val[2], vdupq_n_s8((int8_t)-above_ids));
        } else {
            const uint8x16x4_t bytes = vld4q_u8(from);
            join_bytes(bytes.val[0], bytes.val[1], bytes.val[2], ids);
            step_codes = vandq_u8(bytes.val[3], vdupq_n_u8(127));
            reserved = vorrq_u8(reserved, bytes.val[3]);
        }
        for (size_t j = 0; j < 4; j++) {
            not_rising[j] = vcleq_u32(ids[j], vextq_u32(ids_before, ids[j], 3));
            ids_before = ids[j];
            largest = vmaxq_u32(largest, ids[j]);
            vst1q_u32(token_ids + i + 4 * j, ids[j]);
        }
        vst1q_u8(codes + i, step_codes);
        const uint8x16_t step_marks = vld1q_u8(begin_marks + i);
        uint8x16_t inside = vceqzq_u8(step_marks);
        if (format.counts) {
            check_counts(&sums, step_marks, step_codes);
            smallest = vminq_u8(smallest, step_codes);
        } else {
            inside = vandq_u8(inside, vceqzq_u8(step_codes));
        }
        unordered = vorrq_u8(unordered, vandq_u8(low_bytes(not_rising), inside));
    }
    scan->rounds_left = vgetq_lane_u8(sums.rounds_left, 0);
    scan->last_id = vgetq_lane_u32(ids_before, 3);
    scan->reserved |= vmaxvq_u8(reserved) >> 7;
    scan->bad |= vmaxvq_u8(vorrq_u8(unordered, sums.open)) != 0 || vminvq_u8(smallest) == 0 ||
                 vmaxvq_u8(sums.negative) > 127 || (i > 0 && vmaxvq_u32(largest) >= scan->vocab_size);
    return i;
}

SKL_INLINE size_t widen_steps(const uint8_t *src, size_t n, uint32_t *tokens)
{
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        const uint8x16x3_t bytes = vld3q_u8(src + 3 * i);
        uint32x4_t fours[4];
        join_bytes(bytes.val[0], bytes.val[1], bytes.val[2], fours);
        for (size_t j = 0; j < 4; j++)
            vst1q_u32(tokens + i + 4 * j, fours[j]);
    }
    return i;
}

SKL_INLINE void stream_offset(int64_t *to, int64_t offset)
{
    *to = offset;
}

static void settle(void)
{
}

static void divide(const uint8_t *restrict codes, size_t n, uint32_t rounds, float *restrict quotients)
{
    const float by = (float)rounds;
    for (size_t i = 0; i < n; i++)
        quotients[i] = (float)codes[i] / by;
}

#include "kernels_table.h"
