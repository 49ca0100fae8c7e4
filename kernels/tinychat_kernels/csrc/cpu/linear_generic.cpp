// The inner loops in plain C++: what every instruction set must equal, bit for bit.
#include "linear_kernels.h"

#include <algorithm>
#include <cmath>

namespace tinychat {
namespace {

void quantize(const float* x, int64_t inputs, int64_t group, const Quantized& out, int64_t row) {
    int8_t* values = out.values + row * out.stride;
    for (int64_t g = 0; g < inputs / group; ++g) {
        const float* from = x + g * group;
        uint32_t largest = 0;
        for (int64_t i = 0; i < group; ++i) largest = std::max(largest, to_bits(from[i]) & kMagnitude);
        const Rounding rounding = rounding_of(largest);
        int32_t sum = 0;
        for (int64_t i = 0; i < group; ++i) {
            const bool finite = largest < kInfinite;
            const auto value = static_cast<int8_t>(finite ? std::lrint(from[i] * rounding.inverse) : 0);
            values[g * group + i] = value;
            sum += value;
        }
        out.scales[row * out.groups + g] = rounding.scale;
        out.sums[row * out.groups + g] = sum;
    }
    std::fill(values + inputs, values + out.stride, static_cast<int8_t>(0));
}

// Weight i (0 to 3) of a lane in a quad of a block: 4-bit lines hold two quads.
template <int kBits>
int weight(const uint8_t* lines, int64_t quad, int lane, int i) {
    if (kBits == 8) return lines[quad * kLine + 4 * lane + i];
    const uint8_t pair = lines[quad / 2 * kLine + 4 * lane + i];
    return quad % 2 == 0 ? pair & 15 : pair >> 4;
}

template <int kBits>
int64_t quads_of(const Blocks& w) {
    return kBits == 8 ? w.lines : 2 * w.lines;
}

template <int kBits>
int zero_of(const uint8_t* block, int lane) {
    return kBits == 8 ? kMiddle : block[lane];
}

template <int kBits>
void stream(const Blocks& w, int64_t block, const Quantized& x, int64_t row, int rows, float* out) {
    std::fill(out, out + rows * kLanes, 0.0f);
    for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* at = w.at(block, g);
        for (int r = 0; r < rows; ++r) {
            const int8_t* values = x.values + (row + r) * x.stride + g * w.group;
            const float scale = x.scales[(row + r) * x.groups + g];
            const int32_t sum = x.sums[(row + r) * x.groups + g];
            for (int lane = 0; lane < kLanes; ++lane) {
                int32_t dot = -zero_of<kBits>(at, lane) * sum;
                for (int64_t quad = 0; quad < quads_of<kBits>(w); ++quad)
                    for (int i = 0; i < 4; ++i)
                        dot += weight<kBits>(at + w.header, quad, lane, i) * values[4 * quad + i];
                float& to = out[r * kLanes + lane];
                to = std::fma(scale_of(at, w.scale, lane) * scale, static_cast<float>(dot), to);
            }
        }
    }
}

// Input by input, 16 outputs side by side: the compiler takes them together with whatever registers there are.
template <int kBits>
void unpack(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    for (int64_t g = 0; g < count; ++g) {
        uint8_t* to = panel.part(g, b);
        if (block >= w.count()) {
            std::memset(to, 0, static_cast<size_t>(panel.quads * kLine));
            std::fill(panel.scales_of(g, b), panel.scales_of(g, b) + kLanes, 0.0f);
            std::fill(panel.zeros_of(g, b), panel.zeros_of(g, b) + kLanes, 0);
            continue;
        }
        const uint8_t* at = w.at(block, first + g);
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int64_t quad = 0; quad < panel.quads; ++quad)
                for (int i = 0; i < 4; ++i)
                    to[(4 * quad + i) * kLanes + lane] =
                        static_cast<uint8_t>(weight<kBits>(at + w.header, quad, lane, i));
            panel.scales_of(g, b)[lane] = scale_of(at, w.scale, lane);
            panel.zeros_of(g, b)[lane] = -zero_of<kBits>(at, lane);
        }
    }
}

// As the compiler has them on every machine, in one register or several.
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// dots [kRows, 16] = kRows rows of int8 times [inputs, 16] weights. 16 bits hold the sum of 16 products of 4-bit
// weights, and one of 8-bit ones.
template <int kBits, int kRows>
void dots_of(const uint8_t* weights, int64_t inputs, const int8_t* x, int64_t stride, int32_t (*dots)[kLanes]) {
    constexpr int64_t kRun = kBits == 4 ? 16 : 1;
    Ints sums[kRows] = {};
    for (int64_t first = 0; first < inputs; first += kRun) {
        Shorts part[kRows] = {};
        for (int64_t k = first; k < first + kRun; ++k) {
            Bytes bytes;
            std::memcpy(&bytes, weights + k * kLanes, sizeof bytes);
            const Shorts wide = __builtin_convertvector(bytes, Shorts);
            for (int r = 0; r < kRows; ++r) part[r] += wide * static_cast<int16_t>(x[r * stride + k]);
        }
        for (int r = 0; r < kRows; ++r) sums[r] += __builtin_convertvector(part[r], Ints);
    }
    std::memcpy(dots, sums, sizeof sums);
}

template <int kBits, int kRows>
void multiply_rows(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, float* sums) {
    const int64_t inputs = panel.quads * 4;
    int32_t dots[kRows][kLanes];
    for (int64_t g = 0; g < count; ++g) {
        for (int b = 0; b < kPanelBlocks; ++b) {
            dots_of<kBits, kRows>(panel.part(g, b), inputs, x.values + row * x.stride + (first + g) * inputs, x.stride,
                                  dots);
            for (int r = 0; r < kRows; ++r) {
                const float scale = x.scales[(row + r) * x.groups + first + g];
                const int32_t sum = x.sums[(row + r) * x.groups + first + g];
                float* to = sums + r * kPanelColumns + b * kLanes;
                for (int lane = 0; lane < kLanes; ++lane) {
                    const int32_t dot = dots[r][lane] + panel.zeros_of(g, b)[lane] * sum;
                    to[lane] = std::fma(panel.scales_of(g, b)[lane] * scale, static_cast<float>(dot), to[lane]);
                }
            }
        }
    }
}

template <int kBits>
void multiply(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, int64_t rows,
              float* sums) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) multiply_rows<kBits, 4>(panel, first, count, x, row + r, sums + r * kPanelColumns);
    for (; r < rows; ++r) multiply_rows<kBits, 1>(panel, first, count, x, row + r, sums + r * kPanelColumns);
}

// The order of the sum is that of the vector paths: input i of a group into partial sum i % 4.
template <int kBits>
void exact(const Blocks& w, int64_t block, const float* x, int64_t ldx, int rows, float* out) {
    std::fill(out, out + rows * kLanes, 0.0f);
    for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* at = w.at(block, g);
        for (int r = 0; r < rows; ++r) {
            const float* from = x + r * ldx + g * w.group;
            for (int lane = 0; lane < kLanes; ++lane) {
                float part[4] = {0, 0, 0, 0};
                const int zero = zero_of<kBits>(at, lane);
                for (int64_t i = 0; i < w.group; ++i) {
                    const int value = weight<kBits>(at + w.header, i / 4, lane, static_cast<int>(i % 4)) - zero;
                    part[i % 4] = std::fma(static_cast<float>(value), from[i], part[i % 4]);
                }
                const float dot = (part[0] + part[1]) + (part[2] + part[3]);
                float& to = out[r * kLanes + lane];
                to = std::fma(scale_of(at, w.scale, lane), dot, to);
            }
        }
    }
}

int64_t products(int64_t rounds) {
    int32_t sums[kLanes] = {};
    volatile int8_t factors[2] = {3, 5};
    const int weight = factors[0], value = factors[1];
    for (int64_t i = 0; i < rounds; ++i)
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += (weight + lane) * (value ^ sums[lane]);
    volatile int32_t kept = sums[0];
    static_cast<void>(kept);
    return rounds * kLanes;
}

}  // namespace

const LinearKernels kLinearGeneric = {quantize, stream<4>, stream<8>, unpack<4>, unpack<8>,
                                      multiply<4>, multiply<8>, exact<4>, exact<8>, products};

}  // namespace tinychat
