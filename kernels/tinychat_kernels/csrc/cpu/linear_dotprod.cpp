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

constexpr int kProducts = kQuarter;  // of an instruction

inline TINYCHAT_INLINE int32x4_t product(int32x4_t sum, int8x16_t x) { return vdotq_s32(sum, x, x); }

}  // namespace
}  // namespace tinychat

#include "linear_neon_tile.h"

namespace tinychat {

const LinearKernels kLinearDotprod = {quantize, stream<4>, stream<8>, unpack4,  unpack8,
                                      multiply, multiply,  exact<4>,  exact<8>, products};

}  // namespace tinychat

TINYCHAT_TARGET_END

#endif
