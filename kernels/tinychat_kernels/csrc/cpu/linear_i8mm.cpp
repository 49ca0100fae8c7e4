// The inner loops for Arm's products of matrices, of 2 rows and 2 outputs by 8 inputs; one row goes by dot products.
#include "dispatch.h"

#if TINYCHAT_HAS_I8MM

#include <arm_neon.h>

#include "linear_kernels.h"

TINYCHAT_TARGET_BEGIN(TINYCHAT_I8MM)

#include "linear_neon.h"

namespace tinychat {
namespace {

constexpr int64_t kPairBytes = 2 * kLine;  // 16 outputs of 8 inputs: eight registers of 2 outputs

// Two quads of inputs, each 4 outputs -> 2 outputs of all 8 inputs, and the 2 others.
inline void put_pair(uint8x16_t near, uint8x16_t far, int q, uint8_t* to) {
    const uint32x4_t first = vreinterpretq_u32_u8(near), second = vreinterpretq_u32_u8(far);
    vst1q_u8(to + 2 * q * kQuarter, vreinterpretq_u8_u32(vzip1q_u32(first, second)));
    vst1q_u8(to + (2 * q + 1) * kQuarter, vreinterpretq_u8_u32(vzip2q_u32(first, second)));
}

void unpack4(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    if (block >= w.count()) return clear(panel, count, b);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* line = w.at(block, first + g) + w.header;
        uint8_t* to = panel.part(g, b);
        for (int64_t j = 0; j < w.lines; ++j, line += kLine, to += kPairBytes)
            for (int q = 0; q < kQuarters; ++q) {
                const uint8x16_t both = vld1q_u8(line + q * kQuarter);
                put_pair(vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8(both, 4), q, to);
            }
        unpack_header<4>(w, w.at(block, first + g), g, b, panel);
    }
}

// A last quad without a partner gets one of zeros.
void unpack8(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    if (block >= w.count()) return clear(panel, count, b);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* line = w.at(block, first + g) + w.header;
        uint8_t* to = panel.part(g, b);
        for (int64_t j = 0; j < w.lines; j += 2, line += 2 * kLine, to += kPairBytes)
            for (int q = 0; q < kQuarters; ++q) {
                const uint8x16_t near = made_signed(vld1q_u8(line + q * kQuarter));
                const bool alone = j + 1 == w.lines;
                put_pair(near, alone ? vdupq_n_u8(0) : made_signed(vld1q_u8(line + kLine + q * kQuarter)), q, to);
            }
        unpack_header<8>(w, w.at(block, first + g), g, b, panel);
    }
}

// Rows by twos; a row without a partner is multiplied twice.
template <int kRows>
inline TINYCHAT_INLINE void multiply_block(const uint8_t* weights, const int8_t* values, int64_t stride, int64_t quads,
                                           int32x4_t (&dots)[kRows][kQuarters]) {
    constexpr int kPairs = (kRows + 1) / 2;
    int32x4_t squares[kPairs][2 * kQuarters];
    unrolled<kPairs>([&](auto p) TINYCHAT_INLINE {
        unrolled<2 * kQuarters>([&](auto i) TINYCHAT_INLINE { squares[p][i] = vdupq_n_s32(0); });
    });
    for (; quads > 0; quads -= 2, weights += kPairBytes, values += 8) {
        int8x16_t x[kPairs];
        unrolled<kPairs>([&](auto p) TINYCHAT_INLINE {
            constexpr int near = 2 * p, far = 2 * p + 1 < kRows ? 2 * p + 1 : 2 * p;
            x[p] = vcombine_s8(vld1_s8(values + near * stride), vld1_s8(values + far * stride));
        });
        unrolled<2 * kQuarters>([&](auto i) TINYCHAT_INLINE {
            const int8x16_t two = vreinterpretq_s8_u8(vld1q_u8(weights + i * kQuarter));
            unrolled<kPairs>([&](auto p) TINYCHAT_INLINE { squares[p][i] = vmmlaq_s32(squares[p][i], x[p], two); });
        });
    }
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
        unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE {
            const int32x4_t first = squares[r / 2][2 * q], second = squares[r / 2][2 * q + 1];
            const int32x4_t row = r % 2 == 0 ? vcombine_s32(vget_low_s32(first), vget_low_s32(second))
                                             : vcombine_s32(vget_high_s32(first), vget_high_s32(second));
            dots[r][q] = vaddq_s32(dots[r][q], row);
        });
    });
}

constexpr int kProducts = 2 * kQuarter;  // of an instruction

inline TINYCHAT_INLINE int32x4_t product(int32x4_t sum, int8x16_t x) { return vmmlaq_s32(sum, x, x); }

}  // namespace
}  // namespace tinychat

#include "linear_neon_tile.h"

namespace tinychat {

const LinearKernels kLinearI8mm = {quantize, stream<4>, stream<8>, unpack4,  unpack8,
                                   multiply, multiply,  exact<4>,  exact<8>, products};

}  // namespace tinychat

TINYCHAT_TARGET_END

#endif
