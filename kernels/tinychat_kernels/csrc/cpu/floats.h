// The arithmetic in float32 around the linears, for one thread: attention, norms, rotary positions, SwiGLU. A table
// for each instruction set; a result's bits depend neither on the set (but for x86 without FMA) nor on what else is
// computed with it.
#pragma once

#include <cstdint>

#include "tinychat.h"
#include "tower.h"

namespace tinychat {

// How numbers are stored; the last one, int8 with a scale for each token and head, keys and values alone.
enum class Kind : int32_t { f16 = TC_F16, bf16 = TC_BF16, f32 = TC_F32, i8 = TC_I8 };
constexpr int kKinds = 3;  // of floats
constexpr int kCacheKinds = 4;

constexpr int index(Kind kind) { return static_cast<int>(kind); }
constexpr int64_t kind_size(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::i8 ? 1 : 2; }

// Keys are attended to in blocks that start at multiples of kBlock; a block's sums are made from parts of kPart keys.
constexpr int64_t kBlock = 256;
constexpr int64_t kPart = 64;
constexpr int kSums = 16;  // a sum is 16 sums, of every 16th number, added up at the end
constexpr int64_t kPanelRows = 6;
constexpr int64_t kMaxHeadDim = 256;  // head_dim is a multiple of 16

// Some queries of one sequence and one key head. Query i sees the keys first[i] <= key < end[i]; both never fall.
struct Queries {
    const float* q;  // [count, head_dim], times the softmax scale and log2(e)
    const int64_t* first;
    const int64_t* end;
    int64_t count;
    int64_t head_dim;
    const void* keys;  // [capacity, head_dim]
    const void* values;
    float* part;    // memory: [head_dim, kPart]
    float* scores;  // memory: [count, kBlock]
    // Of 8-bit keys and values alone:
    const float* key_scales;  // [capacity]
    const float* value_scales;
    const int16_t* rounded;  // [count, head_dim]: what round_query made of q
    const float* steps;      // [count]
    int16_t* weights;        // memory: [count, kBlock]
};

// What attention over some of the keys gives for each query: sum of 2^(score - top) * value, and of 2^(score - top).
struct Partial {
    float* out;  // [count, head_dim]
    float* sum;  // [count, kSums]
    float* top;  // [count], -inf where no key is seen
};

struct FloatOps {
    // Attention over the keys start <= key < start + kBlock.
    void (*attend_block[kCacheKinds])(const Queries& queries, int64_t start, const Partial& result);
    // A query as attention to 8-bit keys wants it; returns what a step of it is worth.
    float (*round_query)(const float* x, int64_t n, int16_t* to);
    // into = attention over what was seen in both. `into` of nothing has out = 0, sum = 0, top = -inf.
    void (*merge)(const Partial& into, const Partial& more, int64_t count, int64_t head_dim);
    // y [count, head_dim], heads ldy apart = out / sum
    void (*finish)(const Partial& partial, int64_t count, int64_t head_dim, float* y, int64_t ldy);
    void (*scale)(const float* x, float factor, int64_t n, float* y);
    // x [n] turned by an angle for each pair (i, i + n/2), in place
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t n);
    void (*store[kKinds])(const float* x, int64_t n, void* to);
    void (*load[kKinds])(const void* x, int64_t n, float* to);
    // x += add (unless NULL), then y = x / rms(x) * weight
    void (*norm)(float* x, const float* add, const float* weight, float eps, int64_t n, float* y);
    // y = gate / (1 + exp(-gate)) * up
    void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
    // The dot product of float32 and weights of a kind.
    float (*dot[kKinds])(const float* x, const void* weights, int64_t n);
    // y [rows, kPart], kBlock apart = x [rows, inputs] times panel [inputs, kPart]; rows are at most kPanelRows
    void (*panel)(const float* x, int64_t rows, int64_t inputs, const float* panel, float* y);
    // x += more
    void (*add)(float* x, const float* more, int64_t n);
    // x += add (unless NULL), then y = (x - mean) / deviation * weight + bias
    void (*layer_norm)(float* x, const float* add, const float* weight, const float* bias, float eps, int64_t n,
                       float* y);
    void (*gelu[TC_GELUS])(const float* x, int64_t n, float* y);
};

const FloatOps& float_ops();  // for isa()

}  // namespace tinychat
