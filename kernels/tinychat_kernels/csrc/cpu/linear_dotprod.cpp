// The inner loops for Arm's dot products: a register is a quarter of a line, 4 outputs.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "dispatch.h"
#include "linear_kernels.h"

TINYCHAT_TARGET_BEGIN(TINYCHAT_DOTPROD)

#include "linear_neon.h"

namespace tinychat {
namespace {

void unpack4(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    if (block >= w.count()) return clear(panel, count, b);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* line = w.at(block, first + g) + w.header;
        uint8_t* to = panel.part(g, b);
        for (int64_t j = 0; j < w.lines; ++j, line += kLine, to += 2 * kLine) {
            unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE {
                const uint8x16_t pair = vld1q_u8(line + q * kQuarter);
                vst1q_u8(to + q * kQuarter, vandq_u8(pair, vdupq_n_u8(15)));
                vst1q_u8(to + kLine + q * kQuarter, vshrq_n_u8(pair, 4));
            });
        }
        unpack_header<4>(w, w.at(block, first + g), g, b, panel);
    }
}

void unpack8(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    if (block >= w.count()) return clear(panel, count, b);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* from = w.at(block, first + g) + w.header;
        uint8_t* to = panel.part(g, b);
        for (int64_t i = 0; i < w.lines * kLine; i += kQuarter) vst1q_u8(to + i, made_signed(vld1q_u8(from + i)));
        unpack_header<8>(w, w.at(block, first + g), g, b, panel);
    }
}

template <int kRows>
inline TINYCHAT_INLINE void multiply_block(const uint8_t* weights, const int8_t* values, int64_t stride, int64_t quads,
                                           int32x4_t (&dots)[kRows][kQuarters]) {
    for (; quads >= 4; quads -= 4, weights += 4 * kLine, values += 16) {
        int8x16_t x[kRows];
        unrolled<kRows>([&](auto r) TINYCHAT_INLINE { x[r] = vld1q_s8(values + r * stride); });
        unrolled<4>([&](auto lane) TINYCHAT_INLINE {
            unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE {
                const int8x16_t four = vreinterpretq_s8_u8(vld1q_u8(weights + lane * kLine + q * kQuarter));
                unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
                    dots[r][q] = vdotq_laneq_s32(dots[r][q], four, x[r], lane);
                });
            });
        });
    }
    for (; quads > 0; --quads, weights += kLine, values += 4)
        unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
            const int8x16_t x = quad(values + r * stride);
            unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE {
                dots[r][q] = vdotq_s32(dots[r][q], vreinterpretq_s8_u8(vld1q_u8(weights + q * kQuarter)), x);
            });
        });
}

template <int kRows>
void multiply_tile(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, float* sums) {
    const int8_t* values = x.values + row * x.stride + first * panel.quads * 4;
    const int64_t of_group = row * x.groups + first;
    for (int64_t g = 0; g < count; ++g)
        for (int b = 0; b < kPanelBlocks; ++b) {
            int32x4_t dots[kRows][kQuarters];
            begin<kRows>(panel.zeros_of(g, b), x.sums + of_group + g, x.groups, dots);
            multiply_block<kRows>(panel.part(g, b), values + g * panel.quads * 4, x.stride, panel.quads, dots);
            float32x4_t scales[kQuarters];
            unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE { scales[q] = vld1q_f32(panel.scales_of(g, b) + 4 * q); });
            add_group<kRows>(dots, scales, x.scales + of_group + g, x.groups, sums + b * kLanes, kPanelColumns);
        }
}

void multiply(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, int64_t rows,
              float* sums) {
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
        multiply_tile<kTileRows>(panel, first, count, x, row + r, sums + r * kPanelColumns);
    for (; r < rows; ++r) multiply_tile<1>(panel, first, count, x, row + r, sums + r * kPanelColumns);
}

int64_t products(int64_t rounds) {
    constexpr int kSums = 16;
    int32x4_t sums[kSums];
    unrolled<kSums>([&](auto n) TINYCHAT_INLINE { sums[n] = vdupq_n_s32(0); });
    int8x16_t ones = vdupq_n_s8(1);
    for (int64_t i = 0; i < rounds; ++i)
        unrolled<kSums>([&](auto n) TINYCHAT_INLINE {
            asm volatile("" : "+w"(ones));  // so that no product is computed once for all
            sums[n] = vdotq_s32(sums[n], ones, ones);
        });
    unrolled<kSums>([&](auto n) TINYCHAT_INLINE { asm volatile("" ::"w"(sums[n])); });
    return rounds * kSums * kQuarter;
}

}  // namespace

const LinearKernels kLinearDotprod = {quantize, stream<4>, stream<8>, unpack4,  unpack8,
                                      multiply, multiply,  exact<4>,  exact<8>, products};

}  // namespace tinychat

TINYCHAT_TARGET_END

#endif
