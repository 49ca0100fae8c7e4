// Up to 8 rows times packed weights: a block computes 16 outputs, its warps share the inputs, every weight is read
// once.
//
// Weights are a, rows of x are the columns of b: a column depends on no other, so what a row gives depends on it alone.
#include "w4_tiles.cuh"

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostRows = 8;
constexpr int kRowGap = 8;  // between rows of x in shared memory, so that their banks differ

template <class Type, int Bits, int Group, bool OneRow>
struct Gemv {
    using T = typename Type::One;
    static constexpr int kGroups = kUnitInputs / Group, kSteps = Group / 16;  // of a unit; of a group
    static constexpr int kAhead = 32 / (8 * Bits / 4 + 2 * kGroups);          // units under way: about 32 words

    // A unit and the scales of its groups, for outputs g and g + 8.
    struct Fetched {
        Unit<Bits> unit;
        uint2 scales[kGroups];
    };

    const T* x;
    int inputs, x_stride, rows;
    T* staged;
    int staged_stride, lane, warp;
    Masks masks;
    const uint4* words = nullptr;   // of this lane, in the unit that is fetched next
    const uint2* scales = nullptr;  // likewise
    float sums[4] = {0, 0, 0, 0};  // as mma's d: outputs g and g + 8, rows 2t and 2t + 1

    // This warp's next unit, where it has one.
    __device__ __forceinline__ void fetch(Fetched& to, bool wanted) {
        to.unit.load(words, wanted);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) to.scales[i] = load_once_8(scales + 8 * i, wanted);
        words += kWarps * Unit<Bits>::kStride;
        scales += kWarps * kGroups * 8;
    }

    // Inputs from `first` on to shared memory, with zeros behind the last.
    __device__ __forceinline__ void stage(int first, int count) {
        for (int row = 0; row < (OneRow ? 1 : rows); ++row) {
            const T* from = x + static_cast<long long>(row) * x_stride;
            for (int i = 8 * static_cast<int>(threadIdx.x); i < count; i += 8 * kThreads) {
                const bool valid = first + i < inputs;
                copy16(staged + row * staged_stride + i, valid ? from + first + i : from, valid);
            }
        }
        copy_commit();
        copy_wait<0>();
    }

    __device__ __forceinline__ void multiply(const Fetched& from, const T* row) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const uint2 scale = from.scales[i];
            const Zeros zeros = Nibbles<Type>::zeros(scale.x, scale.y);
            float d[4] = {0, 0, 0, 0};
#pragma unroll
            for (int pair = 0; pair < kSteps / 2; ++pair) {
                const int step = i * kSteps + 2 * pair;
                u32 matrices[4];
                load_matrix(matrices, row + 16 * step);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    u32 a[4];
                    decode<Type, Bits>(from.unit, step + half, zeros, masks, a);
                    const u32 b[2] = {matrices[2 * half], matrices[2 * half + 1]};
                    mma<Type>(d, a, b, d);
                }
            }
            const float first = scale_of(scale.x), second = scale_of(scale.y);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (OneRow && j % 2 == 1) continue;
                sums[j] = fmaf(j < 2 ? first : second, d[j], sums[j]);
            }
        }
    }

    // A share of the units; `chunk` of them are staged at a time. Weights are asked for before anybody waits for x.
    __device__ __forceinline__ void run(const uint4* all_words, const uint2* all_scales, int units, int chunk) {
        // Of the 32 rows that load_matrix takes: inputs 8 (lane / 8) on of row lane % 8, or of the last there is.
        const T* row = staged + (OneRow ? 0 : min(lane % 8, rows - 1) * staged_stride) + lane / 8 * 8;
        Fetched ring[kAhead];
        for (int begin = 0; begin < units; begin += chunk) {
            const int count = min(chunk, units - begin);
            int left = (count - warp + kWarps - 1) / kWarps;  // units of this warp
            const long long first = static_cast<long long>(blockIdx.x) * units + begin + warp;
            words = all_words + first * Unit<Bits>::kStride + lane;
            scales = all_scales + first * kGroups * 8 + lane / 4;
#pragma unroll
            for (int i = 0; i < kAhead; ++i) fetch(ring[i], i < left);
            if (begin > 0) __syncthreads();  // what was staged before is still read
            stage(begin * kUnitInputs, count * kUnitInputs);
            __syncthreads();
            for (const T* at = row + warp * kUnitInputs; left > 0; left -= kAhead) {
#pragma unroll
                for (int i = 0; i < kAhead; ++i, at += kWarps * kUnitInputs) {
                    if (i < left) multiply(ring[i], at);
                    fetch(ring[i], i + kAhead < left);
                }
            }
        }
    }

    // The warps' sums, added up in their order.
    __device__ __forceinline__ void write(float* parts, const T* bias, void* out, int outputs, bool wide) const {
        constexpr int kRows = OneRow ? 1 : kMostRows;
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = 2 * t + j % 2, output = g + 8 * (j / 2);
            if (row < kRows) parts[(warp * kRows + row) * kTileOutputs + output] = sums[j];
        }
        __syncthreads();
        const int row = threadIdx.x / kTileOutputs, output = blockIdx.x * kTileOutputs + threadIdx.x % kTileOutputs;
        if (row >= rows || output >= outputs) return;
        float sum = 0;
        for (int i = 0; i < kWarps; ++i) sum += parts[i * kRows * kTileOutputs + threadIdx.x];
        if (bias != nullptr) sum += Type::to_float(bias[output]);
        const long long at = static_cast<long long>(row) * outputs + output;
        if (wide) {
            static_cast<float*>(out)[at] = sum;
        } else {
            static_cast<T*>(out)[at] = Type::from_float(sum);
        }
    }
};

// x [rows, inputs], rows x_stride apart; weights and scales as packed; bias [outputs] or null; out [rows, outputs], of
// floats where wide. Shared memory: `chunk` units of x, and the warps' sums.
template <class Type, int Bits, int Group, bool OneRow>
__device__ __forceinline__ void gemv(const typename Type::One* x, const uint4* words, const uint2* scales,
                                     const typename Type::One* bias, void* out, int rows, int inputs, int outputs,
                                     int x_stride, int chunk, int wide) {
    using This = Gemv<Type, Bits, Group, OneRow>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* parts = shared_memory<float>();
    This self{x, inputs, x_stride, OneRow ? 1 : rows,
              reinterpret_cast<typename Type::One*>(parts + kWarps * kTileOutputs * (OneRow ? 1 : kMostRows)),
              chunk * kUnitInputs + kRowGap, lane, warp, Masks(inputs)};
    self.run(words, scales, (inputs + kUnitInputs - 1) / kUnitInputs, chunk);
    self.write(parts, bias, out, outputs, wide);
}

}  // namespace

#define ENTRY(bits, name, Type, group, rows)                                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads) w##bits##_gemv_##name##_g##group##_m##rows(              \
        const Type::One* x, const uint4* words, const uint2* scales, const Type::One* bias, void* out,              \
        int row_count, int inputs, int outputs, int x_stride, int chunk, int wide) {                                \
        gemv<Type, bits, group, rows == 1>(x, words, scales, bias, out, row_count, inputs, outputs, x_stride,       \
                                           chunk, wide);                                                            \
    }
#define ENTRIES(name, Type, group) \
    ENTRY(4, name, Type, group, 1) \
    ENTRY(4, name, Type, group, 8) \
    ENTRY(8, name, Type, group, 1) \
    ENTRY(8, name, Type, group, 8)
FOR_ALL(ENTRIES)
