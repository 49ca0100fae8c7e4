// The inner loops of the linears, a table of them for each instruction set.
#pragma once

#include "blocks.h"
#include "linear.h"

namespace tinychat {

constexpr int kStreamRows = 8;   // rows at most that share one reading of the weights
constexpr int kPanelBlocks = 4;  // blocks that a panel holds side by side
constexpr int kPanelColumns = kPanelBlocks * kLanes;

// Some groups of kPanelBlocks blocks, a byte a weight, for many rows. Part (g, b) is group g of block b.
struct Panel {
    uint8_t* values;  // [groups, kPanelBlocks, quads of inputs (an even number), 64]
    float* scales;    // [groups, kPanelBlocks, 16]
    int32_t* zeros;   // [groups, kPanelBlocks, 16]: less the zero points; of 4 bits only
    int64_t quads;    // of a group

    static int64_t part_size(int64_t quads) { return round_up(quads, 2) * kLine; }

    uint8_t* part(int64_t g, int b) const { return values + (g * kPanelBlocks + b) * part_size(quads); }
    float* scales_of(int64_t g, int b) const { return scales + (g * kPanelBlocks + b) * kLanes; }
    int32_t* zeros_of(int64_t g, int b) const { return zeros + (g * kPanelBlocks + b) * kLanes; }
};

struct LinearKernels {
    // One row to int8: see Quantized.
    void (*quantize)(const float* x, int64_t inputs, int64_t group, const Quantized& out, int64_t row);

    // out [rows, 16] = rows from `row` on (1 to kStreamRows of them) times one block of 16 outputs.
    using Stream = void (*)(const Blocks& w, int64_t block, const Quantized& x, int64_t row, int rows, float* out);
    Stream stream4;
    Stream stream8;

    // Groups first..first+count of block `block` -> column b of the panel. A block that is none: nothing is read.
    using Unpack = void (*)(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel);
    Unpack unpack4;
    Unpack unpack8;

    // sums [rows, kPanelColumns] += rows from `row` on times the panel, whose first group is `first`.
    using Multiply = void (*)(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row,
                              int64_t rows, float* sums);
    Multiply multiply4;
    Multiply multiply8;

    // out [rows, 16] = float32 rows (1 to kStreamRows of them, ldx apart) times one block of 16 outputs.
    using Exact = void (*)(const Blocks& w, int64_t block, const float* x, int64_t ldx, int rows, float* out);
    Exact exact4;
    Exact exact8;

    // As many products of int8 as the registers take, so many times; returns how many. For measuring.
    int64_t (*products)(int64_t rounds);
};

// Those of isa().
const LinearKernels& linear_kernels();

extern const LinearKernels kLinearGeneric;
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvxVnni;
extern const LinearKernels kLinearAvx512;
extern const LinearKernels kLinearDotprod;
extern const LinearKernels kLinearI8mm;

// How a group is rounded to int8: value = rint(x * inverse), x = value * scale. The largest magnitude comes as the
// bits of a float, whose order is that of whole numbers, NaN and Inf at the top. Such a group's scale is NaN and its
// values are 0; below kSmallest everything is 0, since the inverse would overflow.
struct Rounding {
    float scale;
    float inverse;
};

constexpr float kSmallest = 1e-30f;
constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kInfinite = 0x7f800000;

inline Rounding rounding_of(uint32_t largest) {
    if (largest >= kInfinite) return {from_bits(0x7fc00000), 0.0f};
    const float top = from_bits(largest);
    if (top < kSmallest) return {0.0f, 0.0f};
    return {top / 127.0f, 127.0f / top};
}

}  // namespace tinychat
