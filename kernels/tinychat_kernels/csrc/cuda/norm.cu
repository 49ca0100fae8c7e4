// Between a decoder's linears: the RMS norm of a residual stream that grows by what the last linear gave, and SwiGLU.
#include "rows.cuh"

namespace {

constexpr int kHeld = 2;  // times 8 values of a row that a thread holds

// x += delta (where there is one), rounded as it is stored; out = x / sqrt(mean(x^2) + eps) * weight. A block a row.
template <class Type>
__device__ __forceinline__ void add_rms_norm(typename Type::One* x, const typename Type::One* delta,
                                             const typename Type::One* weight, typename Type::One* out, int width,
                                             float eps) {
    const long long row = static_cast<long long>(blockIdx.x) * width;
    Eight<Type> held[kHeld], weights[kHeld];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = kVector * (threadIdx.x + i * blockDim.x);
        if (at >= width) continue;
        float values[kVector];
        held[i].load(x + row + at);
        weights[i].load(weight + at);
        if (delta != nullptr) {
            float more[kVector];
            Eight<Type> added;
            added.load(delta + row + at);
            added.get(more);
            held[i].get(values);
#pragma unroll
            for (int j = 0; j < kVector; ++j) values[j] += more[j];
            held[i].set(values);
            held[i].store(x + row + at);
        }
        held[i].get(values);
#pragma unroll
        for (int j = 0; j < kVector; ++j) squares = fmaf(values[j], values[j], squares);
    }
    const float factor = rsqrtf(join_block<Sum>(squares, 0.0f, shared_memory<float>()) / width + eps);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = kVector * (threadIdx.x + i * blockDim.x);
        if (at >= width) continue;
        float values[kVector], by[kVector];
        held[i].get(values);
        weights[i].get(by);
#pragma unroll
        for (int j = 0; j < kVector; ++j) values[j] *= factor * by[j];
        held[i].set(values);
        held[i].store(out + row + at);
    }
}

// gate_up [rows, 2 inner] -> out [rows, inner] = gate / (1 + exp(-gate)) * up. Blocks: x over a row, y over rows.
template <class Type>
__device__ __forceinline__ void swiglu(const typename Type::One* gate_up, typename Type::One* out, int inner) {
    const int at = kVector * (blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= inner) return;
    const long long row = blockIdx.y;
    Eight<Type> gate, up;
    gate.load(gate_up + 2 * row * inner + at);
    up.load(gate_up + (2 * row + 1) * inner + at);
    float values[kVector], by[kVector];
    gate.get(values);
    up.get(by);
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] *= by[j] / (1.0f + __expf(-values[j]));
    gate.set(values);
    gate.store(out + row * inner + at);
}

}  // namespace

#define ENTRIES(name, Type)                                                                                      \
    extern "C" __global__ void __launch_bounds__(1024) add_rms_norm_##name(                                      \
        Type::One* x, const Type::One* delta, const Type::One* weight, Type::One* out, int width, float eps) {   \
        add_rms_norm<Type>(x, delta, weight, out, width, eps);                                                   \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) swiglu_##name(const Type::One* gate_up, Type::One* out,    \
                                                                    int inner) {                                 \
        swiglu<Type>(gate_up, out, inner);                                                                       \
    }

ENTRIES(f16, F16)
#ifdef TINYCHAT_BF16
ENTRIES(bf16, BF16)
#endif
