// Many rows times packed weights on tensor cores: tiles of x and of weights come in stages of asynchronous copies,
// weights become 16-bit numbers between shared memory and mma. Inputs may be split over blocks, whose sums w4_reduce
// adds up.
#include "w4_tiles.cuh"

namespace {

constexpr int kStages = 3;
constexpr int kDepth = 64;  // inputs of a panel: a tile's
constexpr int kColumns = 128, kColumnTiles = kColumns / kTileOutputs;  // outputs of a block
constexpr int kWarpColumns = 32, kTiles = kWarpColumns / kTileOutputs;
constexpr int kRowBytes = 2 * kDepth;

// Blocks that a processor shall hold: two of the largest where shared memory and, without spills, registers allow it.
#if __CUDA_ARCH__ == 870 || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int kBlocksOf128 = 2;
#else
constexpr int kBlocksOf128 = 1;
#endif

// What a block is asked.
template <class Type>
struct Product {
    const typename Type::One* x;  // [rows, inputs], rows x_stride apart
    const uint4* words;
    const uint2* scales;
    int rows, inputs, outputs, x_stride;
    int units, tiles;  // that the inputs and the outputs fill
};

// A block of Rows x 128 outputs: RowWarps x 4 warps of (Rows / RowWarps) x 32, as many times as it has Slices, each of
// which takes a panel of every stage.
template <class Type, int Group, int Rows, int RowWarps, int Slices>
struct Gemm {
    using T = typename Type::One;
    using Two = typename Type::Two;
    static constexpr int kThreads = 128 * RowWarps * Slices;
    static constexpr int kStrips = Rows / RowWarps / 16;  // of 16 rows, of a warp
    static constexpr int kGroups = Group < kDepth ? kDepth / Group : 1, kSteps = kDepth / 16 / kGroups;  // of a panel
    static constexpr int kInputs = Slices * kDepth;                                                      // of a stage
    static constexpr int kStageGroups = Group < kInputs ? kInputs / Group : 1;

    // Rows of x are 128 bytes, whose 16-byte pieces are permuted by the row so that load_matrix meets no bank twice.
    struct Stage {
        uint4 x[Slices][Rows][8];
        uint4 words[Slices][kColumnTiles][32];
        uint2 scales[kColumnTiles][kStageGroups][8];
    };

    // What this thread copies into each stage; the pointers go ahead by a stage at a time.
    struct Copies {
        static constexpr int kX = Slices * Rows * 8 / kThreads, kWords = Slices * kColumnTiles * 32 / kThreads;
        static constexpr int kScales = kColumnTiles * kStageGroups * 4;  // of the whole block
        static_assert(kX == 1 || Rows * 8 % kThreads == 0, "a thread's pieces of x lie whole rows apart");
        static_assert(Slices * Rows * 8 % kThreads == 0 && kScales <= kThreads, "threads share the copies evenly");
        const T* x;
        const uint4* words[kWords];
        const uint2* scales;
        u32 valid;  // bits: x, then words, then scales
        int input;  // the first one's of x

        __device__ __forceinline__ Copies(const Product<Type>& of, int first_row, int first_tile, int step) : valid(0) {
            const int thread = threadIdx.x;
            input = step * kInputs + thread % 8 * 8;
            const int row = first_row + thread / 8 % Rows;
            x = of.x + static_cast<long long>(row) * of.x_stride + input + thread / 8 / Rows * kDepth;
#pragma unroll
            for (int i = 0; i < kX; ++i) valid |= static_cast<u32>(row + i * kThreads / 8 % Rows < of.rows) << i;
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                const int at = thread + i * kThreads, tile = first_tile + at / 32 % kColumnTiles;
                const int panel = step * Slices + at / 32 / kColumnTiles;
                words[i] = of.words + (static_cast<long long>(tile) * of.units * 2 + panel) * 32 + at % 32;
                valid |= static_cast<u32>(tile < of.tiles) << (kX + i);
            }
            const int tile = first_tile + thread / (kStageGroups * 4), groups = of.units * (kUnitInputs / Group);
            scales = of.scales + static_cast<long long>(tile) * groups * 8 + thread % (kStageGroups * 4) * 2;
            valid |= static_cast<u32>(tile < of.tiles) << (kX + kWords);
        }

        __device__ __forceinline__ void run(Stage& to, int step, int inputs, int x_stride) {
            const int thread = threadIdx.x;
#pragma unroll
            for (int i = 0; i < kX; ++i) {
                const int at = thread + i * kThreads, row = at / 8 % Rows, slice = at / 8 / Rows;
                const int rows_on = i * kThreads / 8 % Rows, panels_on = i * kThreads / 8 / Rows;
                const bool wanted = (valid >> i & 1u) && input + slice * kDepth < inputs;
                const T* from = x + static_cast<long long>(x_stride) * rows_on + panels_on * kDepth;
                copy16(&to.x[slice][row][at % 8 ^ row % 8], from, wanted);
            }
            x += kInputs;
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                copy16(&to.words[0][0][0] + thread + i * kThreads, words[i], valid >> (kX + i) & 1u);
                words[i] += Slices * 32;
            }
            if (thread < kScales) {
                const uint2* from = scales + step * kInputs / Group * 8;
                copy16(&to.scales[0][0][0] + 2 * thread, from, valid >> (kX + kWords) & 1u);
            }
            input += kInputs;
        }
    };

    const Product<Type>& of;
    Masks masks;
    int first_row, first_tile;
    int lane, slice, row_warp, column_warp;
    float sums[kStrips][2 * kTiles][4] = {};

    // Weights of 16 inputs and 16 outputs, as b of outputs 0 to 7 and of outputs 8 to 15.
    __device__ __forceinline__ void weights(u32 word, const Zeros& zeros, const Two (&scale)[2], u32 (&b)[2][2]) const {
        u32 pairs[4];
        Nibbles<Type>::decode(word, zeros, masks, pairs);
#pragma unroll
        for (int p = 0; p < 4; ++p) b[p % 2][p / 2] = bits_of(__hmul2(bit_cast<Two>(pairs[p]), scale[p % 2]));
    }

    // `x_at`: of the 16 rows that load_matrix takes for a strip, this lane's, without the step.
    __device__ __forceinline__ void multiply(const Stage& stage, int x_at) {
        const unsigned char* x = reinterpret_cast<const unsigned char*>(&stage);
        uint4 held[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) held[i] = stage.words[slice][column_warp * kTiles + i][lane];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            Zeros zeros[kTiles];
            Two scale[kTiles][2];
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const int of_stage = Group < kInputs ? slice * kDepth / Group + group : 0;
                const uint2 both = stage.scales[column_warp * kTiles + i][of_stage][lane / 4];
                zeros[i] = Nibbles<Type>::zeros(both.x, both.y);
                const float first = scale_of(both.x), second = scale_of(both.y);
                scale[i][0] = Type::from_floats(first, first);
                scale[i][1] = Type::from_floats(second, second);
            }
#pragma unroll
            for (int step = group * kSteps; step < (group + 1) * kSteps; ++step) {
                u32 a[kStrips][4];
#pragma unroll
                for (int i = 0; i < kStrips; ++i) load_matrix(a[i], x + (x_at ^ 32 * step) + 16 * kRowBytes * i);
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
                    u32 b[2][2];
                    weights(word_of(held[j], step), zeros[j], scale[j], b);
#pragma unroll
                    for (int i = 0; i < kStrips; ++i) {
                        mma<Type>(sums[i][2 * j], a[i], b[0], sums[i][2 * j]);
                        mma<Type>(sums[i][2 * j + 1], a[i], b[1], sums[i][2 * j + 1]);
                    }
                }
            }
        }
    }

    // Steps of a stage's inputs, from begin to end. One barrier a step: behind it the step's copies have landed for
    // all, and the stage of the step before, which is filled anew, is read no more.
    __device__ __forceinline__ void run(Stage* stages, int begin, int end) {
        Copies copies(of, first_row, first_tile, begin);
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) {
            if (begin + i < end) copies.run(stages[i], begin + i, of.inputs, of.x_stride);
            copy_commit();
        }
        const int row = row_warp * kStrips * 16 + lane % 16;
        const int x_at = (slice * Rows + row) * kRowBytes + (lane / 16 ^ row % 8) * 16;
        int now = 0;
        for (int step = begin; step < end; ++step) {
            copy_wait<kStages - 2>();
            __syncthreads();
            const int ahead = step + kStages - 1;
            if (ahead < end) copies.run(stages[now == 0 ? kStages - 1 : now - 1], ahead, of.inputs, of.x_stride);
            copy_commit();
            multiply(stages[now], x_at);
            now = now == kStages - 1 ? 0 : now + 1;
        }
    }

    // The sums of all slices end in the first one's.
    __device__ __forceinline__ void join(float* parts) {
        constexpr int kSums = kStrips * 2 * kTiles * 4, kSliceThreads = kThreads / Slices;
        const int thread = threadIdx.x % kSliceThreads;
        float* flat = &sums[0][0][0];
        for (int from = 1; from < Slices; ++from) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                if (slice == from) parts[i * kSliceThreads + thread] = flat[i];
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                if (slice == 0) flat[i] += parts[i * kSliceThreads + thread];
            }
        }
    }

    // Calls store(row, output, sums of output and of the next) for what this thread has.
    template <class Store>
    __device__ __forceinline__ void write(Store store) const {
        if (slice > 0) return;
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
#pragma unroll
            for (int j = 0; j < 2 * kTiles; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = first_row + (row_warp * kStrips + i) * 16 + lane / 4 + 8 * half;
                    const int output = first_tile * kTileOutputs + column_warp * kWarpColumns + 8 * j + lane % 4 * 2;
                    if (row < of.rows) store(row, output, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
                }
            }
        }
    }
};

// Two neighbours of a row, as far as they are there.
template <class Type>
__device__ __forceinline__ void store_pair(typename Type::One* out, const typename Type::One* bias, int outputs,
                                           int row, int output, float first, float second) {
    if (output >= outputs) return;
    const bool both = output + 1 < outputs;
    if (bias != nullptr) {
        first += Type::to_float(bias[output]);
        if (both) second += Type::to_float(bias[output + 1]);
    }
    typename Type::One* to = out + static_cast<long long>(row) * outputs + output;
    if (both && outputs % 2 == 0) {
        *reinterpret_cast<typename Type::Two*>(to) = Type::from_floats(first, second);
    } else {
        to[0] = Type::from_float(first);
        if (both) to[1] = Type::from_float(second);
    }
}

// x [rows, inputs], rows x_stride apart; bias [outputs] or null; out [rows, outputs]. With several splits (gridDim.z),
// out and bias wait for w4_reduce, and each split leaves its sums in parts [splits, rows, outputs rounded up to 16].
template <class Type, int Group, int Rows, int RowWarps, int Slices>
__device__ __forceinline__ void gemm(const typename Type::One* x, const uint4* words, const uint2* scales,
                                     const typename Type::One* bias, typename Type::One* out, float* parts, int rows,
                                     int inputs, int outputs, int x_stride) {
    using This = Gemm<Type, Group, Rows, RowWarps, Slices>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int units = (inputs + kUnitInputs - 1) / kUnitInputs, tiles = (outputs + kTileOutputs - 1) / kTileOutputs;
    const Product<Type> of{x, words, scales, rows, inputs, outputs, x_stride, units, tiles};
    This self{of, Masks(inputs), static_cast<int>(blockIdx.x) * Rows,
              static_cast<int>(blockIdx.y) * kColumnTiles, lane, warp / (4 * RowWarps), warp / 4 % RowWarps, warp % 4};
    const int steps = 2 * units / Slices, splits = gridDim.z, split = blockIdx.z;
    typename This::Stage* stages = shared_memory<typename This::Stage>();
    self.run(stages, steps * split / splits, steps * (split + 1) / splits);
    self.join(shared_memory<float>());
    if (splits == 1) {
        self.write([&](int row, int output, float first, float second) {
            store_pair<Type>(out, bias, outputs, row, output, first, second);
        });
    } else {
        const int width = tiles * kTileOutputs;
        float* own = parts + static_cast<long long>(split) * rows * width;
        self.write([&](int row, int output, float first, float second) {
            if (output >= width) return;
            *reinterpret_cast<float2*>(own + static_cast<long long>(row) * width + output) = make_float2(first, second);
        });
    }
}

// parts [splits, rows, width], width a multiple of 16 -> out [rows, outputs]: the sums of all splits in order, and
// bias.
template <class Type>
__device__ __forceinline__ void reduce(const float* parts, const typename Type::One* bias, typename Type::One* out,
                                       int rows, int outputs, int splits) {
    const int width = (outputs + kTileOutputs - 1) / kTileOutputs * kTileOutputs;
    const int row = blockIdx.y, output = 4 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (output >= outputs) return;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int i = 0; i < splits; ++i) {
        const float* from = parts + (static_cast<long long>(i) * rows + row) * width + output;
        const float4 part = *reinterpret_cast<const float4*>(from);
        sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    store_pair<Type>(out, bias, outputs, row, output, sum.x, sum.y);
    store_pair<Type>(out, bias, outputs, row, output + 2, sum.z, sum.w);
}

constexpr int kDequantizeWarps = 4;

// Packed weights -> [outputs, inputs] for another's product. A warp has a unit; its rows become whole in shared memory.
template <class Type, int Bits, int Group>
__device__ __forceinline__ void dequantize(const uint4* words, const uint2* scales, typename Type::One* out, int inputs,
                                           int outputs) {
    using Two = typename Type::Two;
    constexpr int kStride = kUnitInputs + 8, kGroups = kUnitInputs / Group, kSteps = Group / 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int units = (inputs + kUnitInputs - 1) / kUnitInputs;
    const int index = blockIdx.x * kDequantizeWarps + warp;
    if (index >= units) return;
    const long long unit_at = static_cast<long long>(blockIdx.y) * units + index;
    typename Type::One* own = shared_memory<typename Type::One>() + warp * kTileOutputs * kStride;
    Unit<Bits> unit;
    unit.load(words + unit_at * Unit<Bits>::kStride + lane, true);
    const Masks masks(inputs);
#pragma unroll
    for (int step = 0; step < kUnitInputs / 16; ++step) {
        const uint2 both = scales[(unit_at * kGroups + step / kSteps) * 8 + g];
        const float scale[2] = {scale_of(both.x), scale_of(both.y)};
        u32 pairs[4];
        decode<Type, Bits>(unit, step, Nibbles<Type>::zeros(both.x, both.y), masks, pairs);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const Two weight = __hmul2(bit_cast<Two>(pairs[p]), Type::from_floats(scale[p % 2], scale[p % 2]));
            *reinterpret_cast<Two*>(own + (g + 8 * (p % 2)) * kStride + 16 * step + 8 * (p / 2) + 2 * t) = weight;
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTileOutputs / 2; ++i) {
        const int row = 2 * i + lane / 16, input = lane % 16 * 8;
        const int output = static_cast<int>(blockIdx.y) * kTileOutputs + row, at = index * kUnitInputs + input;
        if (output >= outputs || at >= inputs) continue;
        *reinterpret_cast<uint4*>(out + static_cast<long long>(output) * inputs + at) =
            *reinterpret_cast<const uint4*>(own + row * kStride + input);
    }
}

}  // namespace

#define GEMM(name, Type, group, rows, row_warps, slices)                                                            \
    extern "C" __global__ void __launch_bounds__(128 * row_warps * slices, rows == 128 ? kBlocksOf128 : 2)          \
        w4_gemm_##name##_g##group##_r##rows(const Type::One* x, const uint4* words, const uint2* scales,            \
                                            const Type::One* bias, Type::One* out, float* parts, int row_count,     \
                                            int inputs, int outputs, int x_stride) {                                \
        gemm<Type, group, rows, row_warps, slices>(x, words, scales, bias, out, parts, row_count, inputs, outputs,  \
                                                   x_stride);                                                       \
    }
#define DEQUANTIZE(bits, name, Type, group)                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * kDequantizeWarps) w##bits##_dequantize_##name##_g##group(     \
        const uint4* words, const uint2* scales, Type::One* out, int inputs, int outputs) {                         \
        dequantize<Type, bits, group>(words, scales, out, inputs, outputs);                                         \
    }
#define ENTRIES(name, Type, group)                                                                                  \
    GEMM(name, Type, group, 16, 1, 2)                                                                               \
    GEMM(name, Type, group, 32, 1, 2)                                                                               \
    GEMM(name, Type, group, 64, 2, 1)                                                                               \
    GEMM(name, Type, group, 128, 2, 1)                                                                              \
    DEQUANTIZE(4, name, Type, group)                                                                                \
    DEQUANTIZE(8, name, Type, group)                                                                                \
    extern "C" __global__ void __launch_bounds__(128) w4_reduce_##name##_g##group(                                  \
        const float* parts, const Type::One* bias, Type::One* out, int rows, int outputs, int splits) {             \
        reduce<Type>(parts, bias, out, rows, outputs, splits);                                                      \
    }
FOR_ALL(ENTRIES)
