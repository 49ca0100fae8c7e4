// Linears in 8 bits: rows rounded to int8 behind an activation, and the product of int8 matrices, whose sums are exact.
#include "rows.cuh"

namespace {

constexpr int kHeld = 2;  // times 8 values of a row that a thread holds
enum Activation { kNone, kGelu, kGeluTanh, kQuickGelu };

__device__ __forceinline__ float gated(float x, float by) { return x / (1.0f + __expf(-by)); }

__device__ __forceinline__ float activated(float x, int activation) {
    constexpr float kRootHalf = 0.70710678118654752f, kTwiceRoot = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    switch (activation) {
        case kGelu: return 0.5f * x * (1.0f + erff(x * kRootHalf));
        case kGeluTanh: return gated(x, kTwiceRoot * fmaf(0.044715f * x * x, x, x));
        case kQuickGelu: return gated(x, 1.702f * x);
        default: return x;
    }
}

// x [rows, width] -> int8 values, and what a step of a row is worth. A block a row. Shared memory: room for joining.
template <class Type>
__device__ __forceinline__ void quantize_rows(const typename Type::One* x, signed char* values, float* steps, int width,
                                              int activation) {
    const long long row = static_cast<long long>(blockIdx.x) * width;
    float held[kHeld][kVector];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = kVector * (threadIdx.x + i * blockDim.x);
        if (at >= width) continue;
        Eight<Type> eight;
        eight.load(x + row + at);
        eight.get(held[i]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            held[i][j] = activated(held[i][j], activation);
            largest = max(largest, magnitude(held[i][j]));
        }
    }
    const float step = step_of(join_block<Largest>(largest, 0u, shared_memory<u32>()));
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = kVector * (threadIdx.x + i * blockDim.x);
        if (at < width) *reinterpret_cast<uint2*>(values + row + at) = to_int8(held[i], step);
    }
    if (threadIdx.x == 0) steps[blockIdx.x] = step;
}

constexpr int kThreads = 128;  // four warps, two by two
constexpr int kStages = 3;
constexpr int kPiece = 16, kPieces = 4;  // bytes that are copied at once; of them a row has so many in a stage
constexpr int kDepth = kPiece * kPieces;
constexpr int kLines = kThreads / kPieces;  // that all threads copy at once

struct Matrices {
    const signed char *x, *weight;
    int rows, inputs, outputs;
};

// A block's part of x [rows, inputs] times weight [outputs, inputs], transposed: Side rows and Side outputs.
template <int Side>
struct Tile {
    static constexpr int kPart = Side / 2;    // of a warp
    static constexpr int kTall = kPart / 16;  // fragments of 16 rows
    static constexpr int kWide = kPart / 8;   // fragments of 8 outputs
    static constexpr int kStage = 2 * Side * kDepth;

    const Matrices& of;
    unsigned char* shared;
    int row, output;  // the block's first
    int lane, warp;
    int sums[kTall][kWide][4] = {};

    // Where a piece of a row lies: eight rows below each other are in all banks. Eight rows on, pieces are as before.
    __device__ static __forceinline__ int place(int row, int piece) {
        return row * kDepth + kPiece * (piece ^ (row / 2 % kPieces));
    }

    __device__ __forceinline__ void copy(int step) const {
        const int line = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, input = step * kDepth + kPiece * piece;
        unsigned char* to = shared + step % kStages * kStage + place(line, piece);
#pragma unroll
        for (int i = 0; i < 2 * Side / kLines; ++i) {
            const bool of_x = i < Side / kLines;
            const int at = (of_x ? row : output - Side) + i * kLines + line;
            const bool valid = at < (of_x ? of.rows : of.outputs) && input < of.inputs;
            const signed char* from = of_x ? of.x : of.weight;
            if (valid) from += static_cast<long long>(at) * of.inputs + input;
            copy16(to + i * kLines * kDepth, from, valid);
        }
    }

    __device__ __forceinline__ void multiply(int step) {
        const unsigned char* stage = shared + step % kStages * kStage;
        const unsigned char* rows = stage + warp / 2 * kPart * kDepth;
        const unsigned char* outputs = stage + (Side + warp % 2 * kPart) * kDepth;
        const int row_at = place(lane % 16, lane / 16), output_at = place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 a[kTall][4];
#pragma unroll
            for (int i = 0; i < kTall; ++i) load_matrix(a[i], rows + 16 * i * kDepth + (row_at ^ 2 * kPiece * half));
#pragma unroll
            for (int j = 0; j < kWide; j += 2) {
                u32 words[4];
                load_matrix(words, outputs + 8 * j * kDepth + (output_at ^ 2 * kPiece * half));
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const u32 b[2] = {words[2 * k], words[2 * k + 1]};
#pragma unroll
                    for (int i = 0; i < kTall; ++i) mma_int8(sums[i][j + k], a[i], b, sums[i][j + k]);
                }
            }
        }
    }

    __device__ __forceinline__ void run() {
        const int steps = (of.inputs + kDepth - 1) / kDepth;
#pragma unroll
        for (int step = 0; step < kStages - 1; ++step) {
            if (step < steps) copy(step);
            copy_commit();
        }
        for (int step = 0; step < steps; ++step) {
            copy_wait<kStages - 2>();
            __syncthreads();
            if (step + kStages - 1 < steps) copy(step + kStages - 1);
            copy_commit();
            multiply(step);
        }
    }

    template <class Type>
    __device__ __forceinline__ void write(const float* steps, const float* scales, const typename Type::One* bias,
                                          typename Type::One* out) const {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 2 * kTall; ++i) {
            const int at = row + warp / 2 * kPart + 8 * i + g;
            if (at >= of.rows) continue;
            const float step = steps[at];
#pragma unroll
            for (int j = 0; j < kWide; ++j) {
                const int first = output + warp % 2 * kPart + 8 * j + 2 * t;
                write_two<Type>(&sums[i / 2][j][i % 2 * 2], step, scales, bias, out, at, first);
            }
        }
    }
    template <class Type>
    __device__ __forceinline__ void write_two(const int* two, float step, const float* scales,
                                              const typename Type::One* bias, typename Type::One* out, int at,
                                              int first) const {
        float values[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (first + k >= of.outputs) continue;
            values[k] = static_cast<float>(two[k]) * step * scales[first + k];
            if (bias != nullptr) values[k] += Type::to_float(bias[first + k]);
        }
        typename Type::One* to = out + static_cast<long long>(at) * of.outputs + first;
        if (of.outputs % 2 == 0 && first < of.outputs) {
            *reinterpret_cast<typename Type::Two*>(to) = Type::from_floats(values[0], values[1]);
        } else {
            if (first < of.outputs) to[0] = Type::from_float(values[0]);
            if (first + 1 < of.outputs) to[1] = Type::from_float(values[1]);
        }
    }
};

// Grid: outputs, rows. x has a step a row, weight a scale an output; bias [outputs] or null. Shared memory: the stages.
template <class Type, int Side>
__device__ __forceinline__ void int8_gemm(const Matrices& of, const float* steps, const float* scales,
                                          const typename Type::One* bias, typename Type::One* out) {
    Tile<Side> tile = {of, shared_memory<unsigned char>(), static_cast<int>(blockIdx.y) * Side,
                       static_cast<int>(blockIdx.x) * Side, static_cast<int>(threadIdx.x) % kWarpSize,
                       static_cast<int>(threadIdx.x) / kWarpSize};
    tile.run();
    tile.template write<Type>(steps, scales, bias, out);
}

}  // namespace

#define GEMM(name, Type, side)                                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads) int8_gemm_##name##_##side(                                  \
        const signed char* x, const float* steps, const signed char* weight, const float* scales,                      \
        const Type::One* bias, Type::One* out, int rows, int inputs, int outputs) {                                    \
        int8_gemm<Type, side>({x, weight, rows, inputs, outputs}, steps, scales, bias, out);                           \
    }
#define ENTRIES(name, Type)                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024) quantize_rows_##name(const Type::One* x, signed char* values,   \
                                                                            float* steps, int width, int activation) { \
        quantize_rows<Type>(x, values, steps, width, activation);                                                      \
    }                                                                                                                  \
    GEMM(name, Type, 64)                                                                                               \
    GEMM(name, Type, 128)

ENTRIES(f16, F16)
#ifdef TINYCHAT_BF16
ENTRIES(bf16, BF16)
#endif
