// CUDA's built-in functions, as far as our kernels use them. Included by emulator.h.
#pragma once

inline void __syncthreads() { emu::barrier(0); }
inline int __syncthreads_count(int predicate) { return emu::barrier(predicate != 0); }
inline int __syncthreads_or(int predicate) { return emu::barrier(predicate != 0) > 0; }
inline int __syncthreads_and(int predicate) { return emu::barrier(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = emu::kWarp) { emu::ballot(mask, false); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int first = static_cast<int>(emu::lane()) & ~(width - 1);
    return emu::shuffle(mask, value, first + (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
    const int lane = static_cast<int>(emu::lane()), source = lane ^ other;
    return emu::shuffle(mask, value, source, source < (lane & ~(width - 1)) + width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = static_cast<int>(emu::lane()), source = lane + static_cast<int>(delta);
    return emu::shuffle(mask, value, source, source < (lane & ~(width - 1)) + width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = static_cast<int>(emu::lane()), source = lane - static_cast<int>(delta);
    return emu::shuffle(mask, value, source, source >= (lane & ~(width - 1)));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emu::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emu::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emu::ballot(mask, predicate == 0) == 0; }

template <class T>
T __ldg(const T* from) { return *from; }
template <class T>
T __ldcs(const T* from) { return *from; }
template <class T>
T __ldcg(const T* from) { return *from; }
template <class T>
void __stcs(T* to, T value) { *to = value; }
template <class T>
void __stcg(T* to, T value) { *to = value; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline unsigned __float_as_uint(float value) { return emu::from_bits<unsigned>(emu::to_bits(value)); }
inline int __float_as_int(float value) { return emu::from_bits<int>(emu::to_bits(value)); }
inline float __uint_as_float(unsigned bits) { return emu::from_bits<float>(bits); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float2int_rn(float value) { return static_cast<int>(lrintf(value)); }
inline int __float2int_rz(float value) { return static_cast<int>(value); }
inline int __float2int_rd(float value) { return static_cast<int>(floorf(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return x >= 0.0f ? fminf(x, 1.0f) : 0.0f; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned __brev(unsigned x) {
    unsigned out = 0;
    for (int i = 0; i < 32; ++i) out |= (x >> i & 1u) << (31 - i);
    return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// Byte i of the result is byte (selector >> 4i & 7) of b:a; with bit 3 its sign, repeated.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned chosen = selector >> (4 * i), byte = static_cast<unsigned>(both >> (8 * (chosen & 7))) & 0xffu;
        out |= ((chosen & 8) ? (byte & 0x80u ? 0xffu : 0u) : byte) << (8 * i);
    }
    return out;
}

inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
    return sum;
}

template <class T>
T atomicAdd(T* at, T value) {
    static_assert(static_cast<T>(0.5) == T(0), "sums of floats in no fixed order are not deterministic");
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicExch(T* at, T value) { return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST); }
template <class T>
T atomicCAS(T* at, T expected, T value) {
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
template <class T>
T atomicMax(T* at, T value) {
    T seen = *at;
    while (seen < value && !__atomic_compare_exchange_n(at, &seen, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return seen;
}
