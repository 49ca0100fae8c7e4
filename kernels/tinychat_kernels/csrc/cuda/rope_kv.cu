// Rotary positions for q and k, and the write of k and v into the cache, in one pass over what a linear gave for all
// three.
#include "rows.cuh"

namespace {

constexpr int kThreads = 128;

struct Sizes {
    int heads, kv_heads, dim, capacity;
};

// The first and the second half of a head, 8 numbers of each: pairs (i, i + dim / 2) turn together.
struct Halves {
    float first[kVector], second[kVector];

    template <class Type>
    __device__ __forceinline__ void load(const typename Type::One* from, int half) {
        Eight<Type> eight;
        eight.load(from);
        eight.get(first);
        eight.load(from + half);
        eight.get(second);
    }
    template <class Type>
    __device__ __forceinline__ void store(typename Type::One* to, int half) const {
        Eight<Type> eight;
        eight.set(first);
        eight.store(to);
        eight.set(second);
        eight.store(to + half);
    }
    __device__ __forceinline__ void add(const Halves& other) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            first[i] += other.first[i];
            second[i] += other.second[i];
        }
    }
    __device__ __forceinline__ void turn(const float4* cos, const float4* sin) {
#pragma unroll
        for (int i = 0; i < kVector / 4; ++i) {
            const float4 c = __ldg(cos + i), s = __ldg(sin + i);
            turn(4 * i, c.x, s.x);
            turn(4 * i + 1, c.y, s.y);
            turn(4 * i + 2, c.z, s.z);
            turn(4 * i + 3, c.w, s.w);
        }
    }
    __device__ __forceinline__ void turn(int i, float cos, float sin) {
        const float left = first[i], right = second[i];
        first[i] = left * cos - right * sin;
        second[i] = right * cos + left * sin;
    }
    __device__ __forceinline__ u32 largest() const {
        u32 out = 0;
#pragma unroll
        for (int i = 0; i < kVector; ++i) out = max(out, max(magnitude(first[i]), magnitude(second[i])));
        return out;
    }
};

// A cache of keys or values [slots, kv_heads, capacity, dim] in the activations' type; `at` counts heads of tokens.
template <class Type>
struct Plain {
    using T = typename Type::One;
    T* to;

    __device__ __forceinline__ void write(const Halves& halves, long long at, int dim, int lane, int,
                                          bool active) const {
        if (active) halves.store<Type>(to + at * dim + kVector * lane, dim / 2);
    }
};

// A cache of int8, with a scale for each of its heads of tokens.
struct Rounded {
    signed char* to;
    float* scales;

    __device__ __forceinline__ void write(const Halves& halves, long long at, int dim, int lane, int lanes,
                                          bool active) const {
        const float step = step_of(join_lanes<Largest>(active ? halves.largest() : 0u, lanes));
        if (!active) return;
        signed char* place = to + at * dim + kVector * lane;
        *reinterpret_cast<uint2*>(place) = to_int8(halves.first, step);
        *reinterpret_cast<uint2*>(place + dim / 2) = to_int8(halves.second, step);
        if (lane == 0) scales[at] = step;
    }
};

// A head by neighbouring lanes, 16 numbers each; y: rows. A row whose position is not in the cache is left alone.
template <class Type, class Cache>
__device__ __forceinline__ void rope_kv(typename Type::One* qkv, const typename Type::One* bias, const float4* cos,
                                        const float4* sin, const int* positions, const int* slots, Cache keys,
                                        Cache values, Sizes sizes) {
    const int working = sizes.dim / (2 * kVector), half = sizes.dim / 2;
    const int lanes = working > 8 ? 16 : working > 4 ? 8 : working > 2 ? 4 : 2;
    const int head = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes, lane = threadIdx.x % lanes;
    const int position = positions[blockIdx.y], slot = slots[blockIdx.y];
    const int all = sizes.heads + 2 * sizes.kv_heads, key = head - sizes.heads, value = key - sizes.kv_heads;
    const bool active = head < all && lane < working && position >= 0 && position < sizes.capacity;
    const int at = head * sizes.dim + kVector * lane;
    typename Type::One* place = qkv + static_cast<long long>(blockIdx.y) * all * sizes.dim + at;
    Halves halves;
    if (active) {
        halves.load<Type>(place, half);
        if (bias != nullptr) {
            Halves more;
            more.load<Type>(bias + at, half);
            halves.add(more);
        }
        const long long angle = (static_cast<long long>(position) * half + kVector * lane) / 4;
        if (value < 0) halves.turn(cos + angle, sin + angle);
        if (key < 0) halves.store<Type>(place, half);
    }
    const int written = value < 0 ? key : value;
    const long long row = (static_cast<long long>(slot) * sizes.kv_heads + written) * sizes.capacity + position;
    const Cache cache = value < 0 ? keys : values;
    cache.write(halves, row, sizes.dim, lane, lanes, active && key >= 0);
}

}  // namespace

#define ENTRIES(name, Type)                                                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads) rope_kv_##name(                                            \
        Type::One* qkv, const Type::One* bias, const float4* cos, const float4* sin, const int* positions,            \
        const int* slots, Type::One* keys, Type::One* values, int heads, int kv_heads, int head_dim, int capacity) {  \
        rope_kv<Type, Plain<Type>>(qkv, bias, cos, sin, positions, slots, {keys}, {values},                           \
                                   {heads, kv_heads, head_dim, capacity});                                            \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads) rope_kv_##name##_kv8(                                      \
        Type::One* qkv, const Type::One* bias, const float4* cos, const float4* sin, const int* positions,            \
        const int* slots, signed char* keys, signed char* values, float* key_scales, float* value_scales, int heads,  \
        int kv_heads, int head_dim, int capacity) {                                                                   \
        rope_kv<Type, Rounded>(qkv, bias, cos, sin, positions, slots, {keys, key_scales}, {values, value_scales},     \
                               {heads, kv_heads, head_dim, capacity});                                                \
    }

ENTRIES(f16, F16)
#ifdef TINYCHAT_BF16
ENTRIES(bf16, BF16)
#endif
