// What every kernel is built from: number types, and PTX in small wrappers. TINYCHAT_EMU: their twins on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using u32 = unsigned int;

// Numbers of 16 bits, one and two at a time.
struct F16 {
    using One = __half;
    using Two = __half2;
    __device__ static __forceinline__ float to_float(One x) { return __half2float(x); }
    __device__ static __forceinline__ float2 to_floats(Two x) { return __half22float2(x); }
    __device__ static __forceinline__ One from_float(float x) { return __float2half(x); }
    __device__ static __forceinline__ Two from_floats(float x, float y) { return __floats2half2_rn(x, y); }
};

#if __CUDA_ARCH__ >= 800
#define TINYCHAT_BF16 1  // there are no products of bfloat16 before
struct BF16 {
    using One = __nv_bfloat16;
    using Two = __nv_bfloat162;
    __device__ static __forceinline__ float to_float(One x) { return __bfloat162float(x); }
    __device__ static __forceinline__ float2 to_floats(Two x) { return __bfloat1622float2(x); }
    __device__ static __forceinline__ One from_float(float x) { return __float2bfloat16(x); }
    __device__ static __forceinline__ Two from_floats(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
#endif

template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
    return *reinterpret_cast<const To*>(&from);
}

// The block's shared memory, as many bytes as the launch says. All of it is dynamic.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef TINYCHAT_EMU
    return reinterpret_cast<T*>(emu::here().shared);
#else
    extern __shared__ __align__(128) unsigned char tinychat_shared[];
    return reinterpret_cast<T*>(tinychat_shared);
#endif
}

#ifndef TINYCHAT_EMU
__device__ __forceinline__ u32 shared_address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }
#endif

// 16 bytes that are read once: they stay out of the first cache. What is not wanted is left undefined.
__device__ __forceinline__ uint4 load_once(const void* from, bool wanted = true) {
#ifdef TINYCHAT_EMU
    return wanted ? *static_cast<const uint4*>(from) : make_uint4(~0u, ~0u, ~0u, ~0u);
#else
    uint4 out;
    asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;\n"
                 "  @wanted ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(from), "r"(static_cast<u32>(wanted)));
    return out;
#endif
}
__device__ __forceinline__ uint2 load_once_8(const void* from, bool wanted = true) {
#ifdef TINYCHAT_EMU
    return wanted ? *static_cast<const uint2*>(from) : make_uint2(~0u, ~0u);
#else
    uint2 out;
    asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %3, 0;\n"
                 "  @wanted ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2]; }"
                 : "=r"(out.x), "=r"(out.y)
                 : "l"(from), "r"(static_cast<u32>(wanted)));
    return out;
#endif
}

// 16 bytes to shared memory while the thread goes on; zeros where not valid. Before sm_80: at once.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ < 800
    *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#elif defined(TINYCHAT_EMU)
    emu::copy_async(shared, global, 16, valid);
#else
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

// Copies since the last commit become a group; copy_wait<n> waits for all of this thread's groups but the last n.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800 && defined(TINYCHAT_EMU)
    emu::copy_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int groups>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800 && defined(TINYCHAT_EMU)
    emu::copy_wait(groups);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

// Four matrices of 8x8 numbers of 16 bits: lanes 8i to 8i+7 give the rows of matrix i, 16 bytes each.
__device__ __forceinline__ void load_matrix(u32 (&out)[4], const void* row) {
#ifdef TINYCHAT_EMU
    emu::load_matrix(out, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// A matrix of 8x8 numbers of 16 bits that a warp holds, row g's columns 2t and 2t + 1 in lane 4g + t, with rows for
// columns.
__device__ __forceinline__ u32 transpose_matrix(u32 word) {
#ifdef TINYCHAT_EMU
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 even = __shfl_sync(0xffffffffu, word, 8 * t + g / 2);
    const u32 odd = __shfl_sync(0xffffffffu, word, 8 * t + 4 + g / 2);
    return __byte_perm(even, odd, g % 2 ? 0x7632 : 0x5410);
#else
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
    return out;
#endif
}

// d [16, 8] = a [16, 16] b [16, 8] + c. With g = lane / 4 and t = lane % 4: a has rows g, g+8 (words 0, 1) at columns
// 2t, 2t+1, and the same at columns + 8 (words 2, 3); b has column g at rows 2t, 2t+1, and + 8; c and d have row g at
// columns 2t, 2t+1, and row g + 8.
template <class Type>
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]);

#define TINYCHAT_MMA16(types)                                                                             \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
                 "{%8, %9}, {%10, %11, %12, %13};"                                                        \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), \
                   "f"(c[2]), "f"(c[3]))

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma<F16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
#ifdef TINYCHAT_EMU
    emu::mma_f16(d, a, b, c, 16);
#else
    TINYCHAT_MMA16("f16.f16");
#endif
}
template <>
__device__ __forceinline__ void mma<BF16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
#ifdef TINYCHAT_EMU
    emu::mma_bf16(d, a, b, c, 16);
#else
    TINYCHAT_MMA16("bf16.bf16");
#endif
}
#else
__device__ __forceinline__ void mma_half_depth(float (&d)[4], const u32* a, u32 b, const float (&c)[4]) {
#ifdef TINYCHAT_EMU
    emu::mma_f16(d, a, &b, c, 8);
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}
template <>
__device__ __forceinline__ void mma<F16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
    float middle[4];
    mma_half_depth(middle, a, b[0], c);
    mma_half_depth(d, a + 2, b[1], middle);
}
#endif

// d [16, 8] = a [16, 32] b [32, 8] + c in integers: rows, columns and words as above, four int8 a word: a at columns
// 4t to 4t+3 and + 16, b at rows 4t to 4t+3 and + 16.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void mma_int8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
#ifdef TINYCHAT_EMU
    emu::mma_int8(d, a, b, c);
#else
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
                   "r"(c[3]));
#endif
}
#else
__device__ __forceinline__ void mma_int8_quarter(int* d, u32 a, u32 b, const int* c) {
#ifdef TINYCHAT_EMU
    emu::mma_int8_turing(d, a, b, c);
#else
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(a), "r"(b), "r"(c[0]), "r"(c[1]));
#endif
}
__device__ __forceinline__ void mma_int8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
    int middle[4];
    mma_int8_quarter(middle, a[0], b[0], c);
    mma_int8_quarter(middle + 2, a[1], b[0], c + 2);
    mma_int8_quarter(d, a[2], b[1], middle);
    mma_int8_quarter(d + 2, a[3], b[1], middle + 2);
}
#endif
