// What the inner loops of linear_dotprod.cpp and linear_i8mm.cpp share. Included inside their target.

#include "unrolled.h"

namespace tinychat {
namespace {

constexpr int kQuarters = 4;      // of a line, 4 outputs each
constexpr int64_t kQuarter = 16;  // bytes
constexpr int kTileRows = 4;      // 16 sums, and room for weights and rows
constexpr int64_t kAhead = 1024;  // bytes that streaming reads ahead

inline int8x16_t quad(const int8_t* values) {
    int32_t four;
    __builtin_memcpy(&four, values, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

inline uint8x16_t made_signed(uint8x16_t weights) { return veorq_u8(weights, vdupq_n_u8(kMiddle)); }

inline float32x4_t scales_of(const uint8_t* block, int scale, int q) {
    const uint8_t* at = block + scales_at(scale) + q * 4 * scale_size(scale);
    if (scale == TC_F32) return vreinterpretq_f32_u8(vld1q_u8(at));
    const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(at));
    if (scale == TC_F16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 15) << 1);
}

template <int kBits>
inline int32x4_t zeros_of(const uint8_t* block, int q) {
    if (kBits == 8) return vdupq_n_s32(0);  // weights are made signed
    uint32_t four;
    __builtin_memcpy(&four, block + 4 * q, sizeof four);
    const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}

uint32_t largest_of(const float* x, int64_t count) {
    uint32x4_t largest = vdupq_n_u32(0);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(kMagnitude)));
    uint32_t most = vmaxvq_u32(largest);
    for (; i < count; ++i) {
        const uint32_t bits = to_bits(x[i]) & kMagnitude;
        most = bits > most ? bits : most;
    }
    return most;
}

int32_t round_values(const float* x, int64_t count, float inverse, int8_t* to) {
    int32x4_t sums = vdupq_n_s32(0);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
        const int32x4_t second = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
        sums = vaddq_s32(sums, vaddq_s32(first, second));
        vst1_s8(to + i, vmovn_s16(vcombine_s16(vmovn_s32(first), vmovn_s32(second))));
    }
    int32_t sum = vaddvq_s32(sums);
    for (; i < count; ++i) {
        to[i] = static_cast<int8_t>(vcvtns_s32_f32(x[i] * inverse));
        sum += to[i];
    }
    return sum;
}

}  // namespace
}  // namespace tinychat

#include "linear_round.h"

namespace tinychat {
namespace {

// Adds a group's dot products, times both scales, to the sums [kRows, 16] of a tile.
template <int kRows>
inline TINYCHAT_INLINE void add_group(const int32x4_t (&dots)[kRows][kQuarters], const float32x4_t (&scales)[kQuarters],
                                      const float* row_scales, int64_t groups, float* sums, int64_t ld) {
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
        const float row_scale = row_scales[r * groups];
        unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE {
            float* to = sums + r * ld + 4 * q;
            vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vmulq_n_f32(scales[q], row_scale), vcvtq_f32_s32(dots[r][q])));
        });
    });
}

// What a tile's sums begin with; `zeros` are less the zero points.
template <int kRows>
inline TINYCHAT_INLINE void begin(const int32_t* zeros, const int32_t* row_sums, int64_t groups,
                                  int32x4_t (&dots)[kRows][kQuarters]) {
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
        const int32_t sum = row_sums[r * groups];
        unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE { dots[r][q] = vmulq_n_s32(vld1q_s32(zeros + 4 * q), sum); });
    });
}

template <int kBits, int kRows>
inline TINYCHAT_INLINE void stream_group(const Blocks& w, const uint8_t* at, const int8_t* values, int64_t stride,
                                         const float* row_scales, const int32_t* row_sums, int64_t groups, float* out) {
    int32x4_t dots[kRows][kQuarters];
    float32x4_t scales[kQuarters];
    unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE {
        scales[q] = scales_of(at, w.scale, q);
        const int32x4_t zeros = zeros_of<kBits>(at, q);
        unrolled<kRows>([&](auto r) TINYCHAT_INLINE { dots[r][q] = vmulq_n_s32(zeros, -row_sums[r * groups]); });
    });
    const uint8_t* line = at + w.header;
    for (int64_t j = 0; j < w.lines; ++j, line += kLine, values += 32 / kBits) {
        __builtin_prefetch(line + kAhead);
        unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE {
            const uint8x16_t bytes = vld1q_u8(line + q * kQuarter);
            unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
                const int8_t* x = values + r * stride;
                if constexpr (kBits == 8) {
                    dots[r][q] = vdotq_s32(dots[r][q], vreinterpretq_s8_u8(made_signed(bytes)), quad(x));
                } else {
                    const uint8x16_t below = vandq_u8(bytes, vdupq_n_u8(15)), above = vshrq_n_u8(bytes, 4);
                    dots[r][q] = vdotq_s32(dots[r][q], vreinterpretq_s8_u8(below), quad(x));
                    dots[r][q] = vdotq_s32(dots[r][q], vreinterpretq_s8_u8(above), quad(x + 4));
                }
            });
        });
    }
    add_group<kRows>(dots, scales, row_scales, groups, out, kLanes);
}

template <int kBits, int kRows>
void stream_rows(const Blocks& w, int64_t block, const Quantized& x, int64_t row, float* out) {
    __builtin_memset(out, 0, kRows * kLanes * sizeof(float));
    for (int64_t g = 0; g < w.groups; ++g)
        stream_group<kBits, kRows>(w, w.at(block, g), x.values + row * x.stride + g * w.group, x.stride,
                                   x.scales + row * x.groups + g, x.sums + row * x.groups + g, x.groups, out);
}

// Rows beyond the first tile find the block in the cache.
template <int kBits>
void stream(const Blocks& w, int64_t block, const Quantized& x, int64_t row, int rows, float* out) {
    int r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) stream_rows<kBits, kTileRows>(w, block, x, row + r, out + r * kLanes);
    for (; r < rows; ++r) stream_rows<kBits, 1>(w, block, x, row + r, out + r * kLanes);
}

void clear(const Panel& panel, int64_t count, int b) {
    for (int64_t g = 0; g < count; ++g) {
        __builtin_memset(panel.part(g, b), 0, static_cast<size_t>(panel.quads * kLine));
        __builtin_memset(panel.scales_of(g, b), 0, kLanes * sizeof(float));
        __builtin_memset(panel.zeros_of(g, b), 0, kLanes * sizeof(int32_t));
    }
}

template <int kBits>
void unpack_header(const Blocks& w, const uint8_t* block, int64_t g, int b, const Panel& panel) {
    unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE {
        vst1q_f32(panel.scales_of(g, b) + 4 * q, scales_of(block, w.scale, q));
        vst1q_s32(panel.zeros_of(g, b) + 4 * q, vnegq_s32(zeros_of<kBits>(block, q)));
    });
}

// Input i (0 to 3) of a quad, of each lane, less the zero points.
inline float32x4_t weight(uint32x4_t four, int shift, int mask, int32x4_t zeros) {
    const uint32x4_t value = vandq_u32(vshlq_u32(four, vdupq_n_s32(-shift)), vdupq_n_u32(static_cast<uint32_t>(mask)));
    return vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(value), zeros));
}

template <int kBits>
void exact_quarter(const Blocks& w, int64_t block, int q, const float* x, float* out) {
    constexpr int kQuadsALine = 8 / kBits, kMask = (1 << kBits) - 1;
    float32x4_t sum = vdupq_n_f32(0);
    for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* at = w.at(block, g);
        const int32x4_t zeros = kBits == 8 ? vdupq_n_s32(kMiddle) : zeros_of<4>(at, q);
        float32x4_t parts[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
        for (int64_t k = 0; k < w.group; k += 4) {
            const uint8_t* line = at + w.header + k / 4 / kQuadsALine * kLine;
            const uint32x4_t four = vreinterpretq_u32_u8(vld1q_u8(line + q * kQuarter));
            const int above = k / 4 % kQuadsALine != 0 ? kBits : 0;
            const int some = w.group - k < 4 ? static_cast<int>(w.group - k) : 4;
            for (int i = 0; i < some; ++i)
                parts[i] = vfmaq_f32(parts[i], weight(four, 8 * i + above, kMask, zeros),
                                     vdupq_n_f32(x[g * w.group + k + i]));
        }
        const float32x4_t dot = vaddq_f32(vaddq_f32(parts[0], parts[1]), vaddq_f32(parts[2], parts[3]));
        sum = vfmaq_f32(sum, scales_of(at, w.scale, q), dot);
    }
    vst1q_f32(out + 4 * q, sum);
}

template <int kBits>
void exact(const Blocks& w, int64_t block, const float* x, int64_t ldx, int rows, float* out) {
    for (int r = 0; r < rows; ++r)
        for (int q = 0; q < kQuarters; ++q) exact_quarter<kBits>(w, block, q, x + r * ldx, out + r * kLanes);
}

}  // namespace
}  // namespace tinychat
