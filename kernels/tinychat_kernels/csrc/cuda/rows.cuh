// What kernels over rows share: 8 numbers of a row at a time, and sums and maxima over a block.
#pragma once

#include "device.cuh"

constexpr int kVector = 8;
constexpr int kWarpSize = 32, kMostWarps = 32;  // of a block

// 8 numbers of 16 bits, 16 bytes; in arithmetic they are floats.
template <class Type>
struct Eight {
    using One = typename Type::One;
    using Two = typename Type::Two;
    uint4 bits;

    __device__ __forceinline__ void load(const One* from) { bits = *reinterpret_cast<const uint4*>(from); }
    __device__ __forceinline__ void store(One* to) const { *reinterpret_cast<uint4*>(to) = bits; }
    __device__ __forceinline__ void get(float (&out)[kVector]) const {
        const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 two = Type::to_floats(bit_cast<Two>(words[i]));
            out[2 * i] = two.x;
            out[2 * i + 1] = two.y;
        }
    }
    __device__ __forceinline__ void set(const float (&from)[kVector]) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = bit_cast<u32>(Type::from_floats(from[2 * i], from[2 * i + 1]));
        bits = make_uint4(words[0], words[1], words[2], words[3]);
    }
};

struct Sum {
    template <class T>
    __device__ static __forceinline__ T join(T a, T b) { return a + b; }
};
struct Largest {
    template <class T>
    __device__ static __forceinline__ T join(T a, T b) { return a > b ? a : b; }
};

// Joined over `lanes` neighbours, a power of two; all of them get the same bits. The whole warp comes.
template <class How, class T>
__device__ __forceinline__ T join_lanes(T value, int lanes = kWarpSize) {
    for (int other = lanes / 2; other > 0; other /= 2) {
        value = How::join(value, __shfl_xor_sync(0xffffffffu, value, other));
    }
    return value;
}

// Joined over a block of whole warps; `scratch` is shared room for a value a warp that nobody has touched since the
// last barrier. `none`: what changes nothing.
template <class How, class T>
__device__ __forceinline__ T join_block(T value, T none, T* scratch) {
    const int lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
    value = join_lanes<How>(value);
    if (lane == 0) scratch[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    return join_lanes<How>(lane < warps ? scratch[lane] : none);
}

// The bits of |x|: as integers they are in the order of the numbers, and NaN is above all of them.
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// What a step of int8 is worth where the largest magnitude has these bits: int8.py's rule.
__device__ __forceinline__ float step_of(u32 largest) {
    return largest == 0 ? 1.0f : __uint_as_float(largest) / 127.0f;
}

// 8 numbers in such steps, to the nearest; 0 for what is no number. The quotient is rounded as a division's would be.
__device__ __forceinline__ uint2 to_int8(const float (&values)[kVector], float step) {
    const float inverse = 1.0f / step;
    u32 words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        const float near = values[i] * inverse;
        const int q = __float2int_rn(fmaf(fmaf(-near, step, values[i]), inverse, near));
        words[i / 4] |= (static_cast<u32>(min(max(q, -127), 127)) & 0xffu) << (8 * (i % 4));
    }
    return make_uint2(words[0], words[1]);
}
