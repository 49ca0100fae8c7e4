// CUDA's built-in functions, as far as our kernels use them. Included by emulator.h.
#pragma once

inline void __syncthreads() { emu::barrier(0); }
inline int __syncthreads_count(int predicate) { return emu::barrier(predicate != 0); }
inline int __syncthreads_or(int predicate) { return emu::barrier(predicate != 0) > 0; }
inline int __syncthreads_and(int predicate) { return emu::barrier(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = emu::kWarp) { emu::ballot(mask, false); }

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
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }

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

template <class T>
T atomicAdd(T* at, T value) {
    static_assert(static_cast<T>(0.5) == T(0), "sums of floats in no fixed order are not deterministic");
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
