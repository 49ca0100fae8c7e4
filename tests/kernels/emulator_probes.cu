// Kernels that try the emulator out: each does one thing, right or wrong. See test_cuda_emulator.py.
#include "device.cuh"

constexpr unsigned kAll = 0xffffffffu;

extern "C" __global__ void shuffles(const int* x, int* out) {
    const int lane = threadIdx.x % 32, value = x[threadIdx.x];
    int* mine = out + threadIdx.x * 8;
    mine[0] = __shfl_sync(kAll, value, 3);
    mine[1] = __shfl_xor_sync(kAll, value, 5);
    mine[2] = __shfl_down_sync(kAll, value, 7);
    mine[3] = __shfl_up_sync(kAll, value, 9);
    mine[4] = __shfl_down_sync(kAll, value, 1, 8);
    mine[5] = static_cast<int>(__ballot_sync(kAll, value & 1));
    mine[6] = __any_sync(kAll, value == 77) * 2 + __all_sync(kAll, value < 1000);
    mine[7] = -1;
    if (lane < 16) {
        mine[7] = __shfl_xor_sync(0x0000ffffu, value, 1);
    } else {
        mine[7] = __shfl_xor_sync(0xffff0000u, value, 2);
    }
}

extern "C" __global__ void barriers(const int* x, int* out, int threads_that_leave) {
    int* shared = shared_memory<int>();
    const int i = threadIdx.x, n = blockDim.x;
    if (i < threads_that_leave) return;
    shared[i] = x[i];
    out[i * 3] = __syncthreads_count(x[i] & 1);
    out[i * 3 + 1] = __syncthreads_or(x[i] == 77) * 2 + __syncthreads_and(x[i] < 1000);
    out[i * 3 + 2] = shared[n - 1 - (i - threads_that_leave)];
}

extern "C" __global__ void arguments(int a, long long b, float c, const int* d, int e, float f, int g, int h, int i,
                                     float j, float k, float l, float m, float n, float o, float p, float q, float r,
                                     int s, float* out) {
    const float all[] = {static_cast<float>(a), static_cast<float>(b), c, static_cast<float>(*d),
                         static_cast<float>(e), f, static_cast<float>(g), static_cast<float>(h),
                         static_cast<float>(i), j, k, l, m, n, o, p, q, r, static_cast<float>(s)};
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    if (thread < 19) out[block * 19 + thread] = all[thread];
}

// a [16, 16] b [16, 8] + c, from and to plain rows.
template <class Type>
__device__ void product(const u32* a, const typename Type::One* b, const float* c, float* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const u32 rows[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    u32 columns[2];
    for (int i = 0; i < 2; ++i) {
        const typename Type::One two[2] = {b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]};
        columns[i] = *reinterpret_cast<const u32*>(two);
    }
    float sums[4], start[4];
    for (int i = 0; i < 4; ++i) start[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma<Type>(sums, rows, columns, start);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
extern "C" __global__ void product_f16(const u32* a, const __half* b, const float* c, float* d) {
    product<F16>(a, b, c, d);
}
#ifdef TINYCHAT_BF16
extern "C" __global__ void product_bf16(const u32* a, const __nv_bfloat16* b, const float* c, float* d) {
    product<BF16>(a, b, c, d);
}
#endif

extern "C" __global__ void product_int8(const u32* a, const signed char* b, const int* c, int* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const u32 rows[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    u32 columns[2] = {};
    for (int i = 0; i < 8; ++i) {
        columns[i / 4] |= (b[(4 * t + 16 * (i / 4) + i % 4) * 8 + g] & 0xffu) << (i % 4 * 8);
    }
    int sums[4], start[4];
    for (int i = 0; i < 4; ++i) start[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_int8(sums, rows, columns, start);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// Shared memory to fragments: x [32, 8] as four matrices.
extern "C" __global__ void matrices(const uint4* x, u32* out) {
    uint4* shared = shared_memory<uint4>();
    shared[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    u32 words[4];
    load_matrix(words, shared + threadIdx.x);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = words[i];
}

// What lies in shared memory when a copy is under way, when another one may be, and when none is.
extern "C" __global__ void copies(const uint4* x, u32* out) {
    uint4* shared = shared_memory<uint4>();
    for (int i = 0; i < 3; ++i) shared[i] = make_uint4(7, 7, 7, 7);
    copy16(shared, x, true);
    copy_commit();
    copy16(shared + 1, x + 1, true);
    copy16(shared + 2, x + 2, false);
    copy_commit();
    for (int i = 0; i < 3; ++i) out[i] = shared[i].y;
    copy_wait<1>();
    for (int i = 0; i < 3; ++i) out[3 + i] = shared[i].y;
    copy_wait<0>();
    for (int i = 0; i < 3; ++i) out[6 + i] = shared[i].y;
}

// Each round, a thread writes what its neighbour reads. Without the second barrier a fast warp overwrites it too soon.
template <bool second_barrier>
__device__ void rounds(const int* x, int* out) {
    int* shared = shared_memory<int>();
    const int i = threadIdx.x, n = blockDim.x;
    int sum = 0;
    for (int round = 0; round < 4; ++round) {
        shared[i] = x[i] + round;
        __syncthreads();
        sum += shared[(i + 32) % n];
        if (second_barrier) __syncthreads();
    }
    out[i] = sum;
}
extern "C" __global__ void safe_rounds(const int* x, int* out) { rounds<true>(x, out); }
extern "C" __global__ void racing_rounds(const int* x, int* out) { rounds<false>(x, out); }

// What must end a launch.
extern "C" __global__ void fault(int what, int* x, int size) {
    int* shared = shared_memory<int>();
    const int i = threadIdx.x;
    int local[4] = {i, i, i, i};
    switch (what) {
        case 0: x[size + i] = 1; break;                                            // behind a tensor
        case 1: shared[size + i] = 1; break;                                       // behind shared memory
        case 2: shared[-1 - i] = 1; break;                                         // before it
        case 3: if (i < 16) __syncwarp(); break;                                   // lanes that part, and end
        case 4: if (i == 0) { __syncthreads(); } else { __syncwarp(0xfffffffeu); __syncwarp(); } break;  // a deadlock
        case 5: if (i < 16) { __ballot_sync(kAll, 1); } else { __shfl_sync(kAll, i, 0); } break;
        case 6: x[i] = static_cast<int>(reinterpret_cast<uint4*>(x + 1)->x); break;  // not aligned
        case 7: copy16(shared + 4 * i, x, true); copy_commit(); break;             // never waited for
        case 8: copy16(shared + 1, x, true); break;                                // not aligned
        case 9: copy16(x, shared, true); break;                                    // into global memory
        case 10: x[0] = local[size + i]; break;                                    // behind an array
        case 11: if (i < 16) x[i] = __shfl_sync(0x0000ffffu, i, 16 + i); break;    // from lanes that take no part
        case 12: if (i > 0) __syncwarp(1); break;                                  // not in its own mask
        default: break;
    }
}
