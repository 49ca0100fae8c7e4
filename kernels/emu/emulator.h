// CUDA's words for a C++ compiler. Included before a .cu, which is compiled unchanged; runtime.cpp does the work.
#pragma once

#include <cstdint>
#include <cstring>
#include <math.h>

#define TINYCHAT_EMU 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static_assert(false, "the emulator knows no static shared memory: see shared_memory<T>()")

#define EMU_VECTOR2(name, type) \
    struct alignas(2 * sizeof(type)) name { type x, y; }; \
    inline name make_##name(type x, type y) { return {x, y}; }
#define EMU_VECTOR4(name, type) \
    struct alignas(4 * sizeof(type)) name { type x, y, z, w; }; \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTOR2(float2, float)
EMU_VECTOR4(float4, float)
EMU_VECTOR2(int2, int)
EMU_VECTOR4(int4, int)
EMU_VECTOR2(uint2, unsigned)
EMU_VECTOR4(uint4, unsigned)
EMU_VECTOR2(short2, short)
EMU_VECTOR2(ushort2, unsigned short)
EMU_VECTOR4(char4, signed char)
EMU_VECTOR4(uchar4, unsigned char)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emu {

// What a CUDA thread may know of itself. It lies at the top of the thread's own stack, so that no register and no
// thread-local variable has to hold it.
struct Thread {
    dim3 thread, block, block_size, grid;
    unsigned char* shared;
    unsigned linear;  // in its block
};

constexpr uintptr_t kStackSize = 64 << 10;  // and their alignment
constexpr uintptr_t kFiberRoom = 8 << 10;   // at a stack's top; a ucontext_t of aarch64 is large

inline Thread& here() {
    const uintptr_t frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return *reinterpret_cast<Thread*>((frame & ~(kStackSize - 1)) + kStackSize - kFiberRoom);
}

// Ends the launch with a message that names this block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits until all threads of the block that still run have come, and adds up their values.
int barrier(int value);

// The lanes of `mask` come together with an argument each; then `act` runs once. Lanes that are not in the mask, or
// have ended, have no argument (nullptr).
using Act = void (*)(void* const* arguments);
void meet(unsigned mask, Act act, void* argument);
constexpr unsigned kWarp = 0xffffffffu;

// Lanes exchange values of up to 8 bytes: each gets that of its source.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source);
unsigned ballot(unsigned mask, bool predicate);

// The PTX that device.cuh wraps.
void copy_async(void* shared, const void* global, int bytes, bool valid);
void copy_commit();
void copy_wait(int groups);
void load_matrix(unsigned* fragments, const void* row);
void mma_f16(float* d, const unsigned* a, const unsigned* b, const float* c, int depth);   // m16n8, depth 8 or 16
void mma_bf16(float* d, const unsigned* a, const unsigned* b, const float* c, int depth);  // m16n8, depth 8 or 16
void mma_int8(int* d, const unsigned* a, const unsigned* b, const int* c);                 // m16n8k32
void mma_int8_turing(int* d, unsigned a, unsigned b, const int* c);                        // m8n8k16

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "lanes exchange at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned lane() { return here().linear % 32; }

template <class T>
T shuffle(unsigned mask, T value, int source, bool inside) {
    return from_bits<T>(exchange(mask, to_bits(value), inside ? static_cast<unsigned>(source) : lane()));
}

}  // namespace emu

#define threadIdx (emu::here().thread)
#define blockIdx (emu::here().block)
#define blockDim (emu::here().block_size)
#define gridDim (emu::here().grid)
#define warpSize 32

#include "intrinsics.h"
