// The linears: which inner loop runs over which part of the weights, on which thread.
#include "linear.h"

#include <algorithm>

#include "dispatch.h"
#include "linear_kernels.h"

namespace tinychat {
namespace {

constexpr int64_t kChunkInputs = 512;     // a panel's inputs: 64 columns of them fit into the first cache
constexpr int64_t kShortChunk = 256;      // for few rows: what comes next is then already read ahead
constexpr int64_t kFewRows = 32;
constexpr int64_t kMostStreamed = 8;      // rows up to which weights are read in place
constexpr int64_t kTasksAThread = 4;      // for an even end
constexpr int64_t kFewestPanelRows = 48;  // that are worth unpacking a panel anew

// Sums of `columns` outputs -> y, with the bias.
void finish(const float* sums, int64_t ld, int64_t rows, int64_t column, int64_t columns, float* y, int64_t ldy,
            const float* bias) {
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = sums + r * ld;
        float* to = y + r * ldy + column;
        for (int64_t i = 0; i < columns; ++i) to[i] = bias == nullptr ? from[i] : from[i] + bias[column + i];
    }
}

int64_t columns_from(const Blocks& w, int64_t column, int64_t most) { return std::min(most, w.outputs - column); }

void stream(Team& team, const Blocks& w, const Quantized& x, int64_t rows, float* y, int64_t ldy, const float* bias) {
    alignas(64) float sums[kStreamRows * kLanes];
    const auto inner = w.bits == 4 ? linear_kernels().stream4 : linear_kernels().stream8;
    const Range blocks = team.share(w.count());
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        for (int64_t row = 0; row < rows; row += kStreamRows) {
            const int some = static_cast<int>(std::min<int64_t>(kStreamRows, rows - row));
            inner(w, block, x, row, some, sums);
            const int64_t column = block * kLanes;
            finish(sums, kLanes, some, column, columns_from(w, column, kLanes), y + row * ldy, ldy, bias);
        }
    }
}

// Panels of 64 outputs times parts of the rows, handed out one by one.
struct PanelWork {
    PanelWork(const Team& team, const Blocks& w, int64_t rows)
        : panels((w.count() + kPanelBlocks - 1) / kPanelBlocks),
          parts(std::clamp<int64_t>((kTasksAThread * team.count() + panels - 1) / panels, 1,
                                    std::max<int64_t>(1, rows / kFewestPanelRows))),
          chunk(std::clamp<int64_t>((rows > kFewRows ? kChunkInputs : kShortChunk) / w.group, 1, w.groups)) {}

    int64_t panels;
    int64_t parts;  // of the rows
    int64_t chunk;  // groups of a panel
};

struct PanelMemory {
    PanelMemory(Team& team, const Blocks& w, int64_t chunk, int64_t rows) {
        const int64_t quads = (w.group + 3) / 4;
        const int64_t values = chunk * kPanelBlocks * Panel::part_size(quads);
        const int64_t numbers = chunk * kPanelColumns;
        const int64_t bytes = values + 4 * (2 * numbers + rows * kPanelColumns);
        auto* memory = static_cast<uint8_t*>(team.scratch(Scratch::linear, static_cast<size_t>(bytes)));
        auto* scales = reinterpret_cast<float*>(memory + values);
        panel = {memory, scales, reinterpret_cast<int32_t*>(scales + numbers), quads};
        sums = scales + 2 * numbers;
    }

    Panel panel;
    float* sums;  // [rows, kPanelColumns]
};

void multiply_panel(const Blocks& w, int64_t column, int64_t chunk, const PanelMemory& memory, const Quantized& x,
                    Range rows) {
    const auto unpack = w.bits == 4 ? linear_kernels().unpack4 : linear_kernels().unpack8;
    const auto inner = w.bits == 4 ? linear_kernels().multiply4 : linear_kernels().multiply8;
    std::fill(memory.sums, memory.sums + (rows.end - rows.begin) * kPanelColumns, 0.0f);
    for (int64_t first = 0; first < w.groups; first += chunk) {
        const int64_t count = std::min(chunk, w.groups - first);
        for (int b = 0; b < kPanelBlocks; ++b) unpack(w, column / kLanes + b, first, count, b, memory.panel);
        inner(memory.panel, first, count, x, rows.begin, rows.end - rows.begin, memory.sums);
    }
}

void multiply(Team& team, const Blocks& w, const Quantized& x, int64_t rows, float* y, int64_t ldy,
              const float* bias) {
    const PanelWork work(team, w, rows);
    const int64_t most_rows = (rows + work.parts - 1) / work.parts;
    const PanelMemory memory(team, w, work.chunk, most_rows);
    for (int64_t task = team.next(); task < work.panels * work.parts; task = team.next()) {
        const int64_t column = task / work.parts * kPanelColumns, part = task % work.parts;
        const Range mine = {std::min(rows, part * most_rows), std::min(rows, (part + 1) * most_rows)};
        multiply_panel(w, column, work.chunk, memory, x, mine);
        finish(memory.sums, kPanelColumns, mine.end - mine.begin, column, columns_from(w, column, kPanelColumns),
               y + mine.begin * ldy, ldy, bias);
    }
}

}  // namespace

const LinearKernels& linear_kernels() {
    switch (isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return kLinearAvx512;
#if TINYCHAT_HAS_AVXVNNI
        case Isa::avxvnni: return kLinearAvxVnni;
#endif
        case Isa::avx2: return kLinearAvx2;
#elif defined(__aarch64__)
#if TINYCHAT_HAS_I8MM
        case Isa::i8mm: return kLinearI8mm;
#endif
        case Isa::dotprod: return kLinearDotprod;
#endif
        default: return kLinearGeneric;
    }
}

size_t quantized_size(int64_t rows, int64_t inputs, int64_t group) {
    return static_cast<size_t>(rows * (round_up(inputs, kLine) + round_up(inputs / group * 4, kLine) * 2));
}

Quantized quantized_at(void* memory, int64_t rows, int64_t inputs, int64_t group) {
    const int64_t stride = round_up(inputs, kLine), groups = inputs / group;
    auto* values = static_cast<int8_t*>(memory);
    auto* scales = reinterpret_cast<float*>(values + rows * stride);
    return {values, scales, reinterpret_cast<int32_t*>(scales + rows * groups), stride, groups};
}

void quantize_row(const float* x, int64_t inputs, int64_t group, const Quantized& out, int64_t row) {
    linear_kernels().quantize(x, inputs, group, out, row);
}

void quantize(Team& team, const float* x, int64_t ldx, int64_t rows, int64_t inputs, int64_t group,
              const Quantized& out) {
    const Range mine = team.share(rows);
    for (int64_t row = mine.begin; row < mine.end; ++row) quantize_row(x + row * ldx, inputs, group, out, row);
}

void linear(Team& team, const tc_weights& w, const Quantized& x, int64_t rows, float* y, int64_t ldy,
            const float* bias) {
    const Blocks blocks(w);
    if (rows <= kMostStreamed) stream(team, blocks, x, rows, y, ldy, bias);
    else multiply(team, blocks, x, rows, y, ldy, bias);
}

void linear_exact(Team& team, const tc_weights& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy,
                  const float* bias) {
    alignas(64) float sums[kStreamRows * kLanes];
    const Blocks blocks(w);
    const auto inner = w.bits == 4 ? linear_kernels().exact4 : linear_kernels().exact8;
    const Range mine = team.share(blocks.count());
    for (int64_t block = mine.begin; block < mine.end; ++block) {
        for (int64_t row = 0; row < rows; row += kStreamRows) {
            const int some = static_cast<int>(std::min<int64_t>(kStreamRows, rows - row));
            inner(blocks, block, x + row * ldx, ldx, some, sums);
            const int64_t column = block * kLanes;
            finish(sums, kLanes, some, column, columns_from(blocks, column, kLanes), y + row * ldy, ldy, bias);
        }
    }
}

}  // namespace tinychat
