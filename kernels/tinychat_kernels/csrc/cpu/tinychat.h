// The plain C interface of the library: what Python calls through ctypes. Every call is one job of the pool.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TINYCHAT_EXPORT __declspec(dllexport)
#else
#define TINYCHAT_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised when a signature or a layout below changes: Python refuses a library of another number.
#define TC_ABI 4

enum tc_scale { TC_F16 = 0, TC_BF16 = 1, TC_F32 = 2, TC_I8 = 3 };  // TC_I8: keys and values alone

// The weights of a linear, packed: `bits` is 4 (with zero points) or 8 (symmetric), `group` inputs share a scale.
// 4 bits: group is a multiple of 32 that divides inputs. 8 bits: any group that divides inputs, one row's included.
typedef struct tc_weights {
    const void* blocks;  // tc_packed_size() bytes, aligned to 64
    int64_t inputs;
    int64_t outputs;
    int64_t group;
    int32_t bits;
    int32_t scale;  // enum tc_scale: how the blocks hold their scales
} tc_weights;

TINYCHAT_EXPORT int tc_abi(void);

// Instructions: "avx512", "avx2", ... Setting returns 0, 1 for an unknown name, 2 for one this CPU does not have.
TINYCHAT_EXPORT const char* tc_isa(void);
TINYCHAT_EXPORT int tc_set_isa(const char* name);  // NULL: the best one
TINYCHAT_EXPORT int tc_isa_supported(const char* name);

// Threads; 0 sets the default, which is the physical cores this process may use.
TINYCHAT_EXPORT int tc_threads(void);
TINYCHAT_EXPORT void tc_set_threads(int count);
TINYCHAT_EXPORT int tc_usable_cores(void);

// Calls with fewer int8 products than this run on the caller's thread alone; 0: none do.
TINYCHAT_EXPORT void tc_set_least_work(int64_t work);

TINYCHAT_EXPORT size_t tc_packed_size(const tc_weights* weights);

// AWQ's GEMM layout -> blocks of 4 bits. qweight int32 [inputs, outputs/8], qzeros int32 [groups, outputs/8]; scales
// [groups, outputs] as w->scale says. source_group: inputs a group of the source, a multiple of w->group.
TINYCHAT_EXPORT void tc_pack_w4(const tc_weights* w, const int32_t* qweight, const int32_t* qzeros, const void* scales,
                                int64_t source_group, void* blocks);

// int8 values [outputs, inputs] and scales [outputs, groups], as w->scale says -> blocks of 8 bits.
TINYCHAT_EXPORT void tc_pack_w8(const tc_weights* w, const int8_t* values, const void* scales, void* blocks);

// y [rows, outputs] = x [rows, inputs] times the weights, + bias [outputs] unless NULL. exact: x stays float32; else
// it is rounded to int8 by row and group. y's rows are ldy apart, x's ldx. Returns 0, or 1 without memory for that.
TINYCHAT_EXPORT int tc_linear(const tc_weights* w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy,
                              const float* bias, int exact);

// What tc_linear rounds x to: values int8 [rows, inputs], scales [rows, groups]. Returns as tc_linear does.
TINYCHAT_EXPORT int tc_quantize(const float* x, int64_t rows, int64_t inputs, int64_t group, int8_t* values,
                                float* scales);

// To compare kernels with: the sum of `size` bytes by words of 8, read by all threads; and as many int8 products as the
// registers take, `rounds` times: their number.
TINYCHAT_EXPORT uint64_t tc_read(const void* memory, int64_t size);
TINYCHAT_EXPORT int64_t tc_products(int64_t rounds);

#ifdef __cplusplus
}
#endif
