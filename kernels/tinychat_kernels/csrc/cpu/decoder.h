// The C interface of a whole decoder: one call is one forward, and one job of the pool. Also its parts, for tests.
#pragma once

#include "tinychat.h"

#ifdef __cplusplus
extern "C" {
#endif

// Weights in float: of the head and of the embeddings. `kind` is enum tc_scale.
typedef struct tc_table {
    const void* values;  // [rows, width], rows as many as the vocabulary
    int32_t kind;
} tc_table;

typedef struct tc_layer {
    tc_weights qkv;      // the outputs of q, then k, then v
    tc_weights out;
    tc_weights gate_up;  // the outputs of gate, then up
    tc_weights down;
    const float* qkv_bias;  // NULL: none, as below
    const float* out_bias;
    const float* gate_up_bias;
    const float* down_bias;
    const float* attention_norm;
    const float* mlp_norm;
    int64_t window;  // keys that a token sees at most, its own included; 0: all
} tc_layer;

// width, inner and the groups of weights are multiples of 32, head_dim is one of 16 and at most 256.
typedef struct tc_decoder {
    const tc_layer* layers;
    int64_t layer_count;
    int64_t width;
    int64_t inner;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t vocabulary;
    const float* norm;
    tc_weights head;      // used where head_table.values is NULL
    tc_table head_table;
    tc_table embeddings;  // only read where a step gives tokens
    float eps;
    int32_t exact;  // float32 activations in every linear
} tc_decoder;

// Where keys and values are: for each layer [slots, kv_heads, capacity, head_dim], and of TC_I8 a scale for each token
// and head [slots, kv_heads, capacity].
typedef struct tc_cache {
    void* const* keys;
    void* const* values;
    float* const* key_scales;  // NULL but for TC_I8
    float* const* value_scales;
    int64_t capacity;
    int32_t kind;  // enum tc_scale
} tc_cache;

// What a forward spends its time in.
enum tc_stage {
    TC_STAGE_NORM,       // residual sum, norm, rounding to int8
    TC_STAGE_QKV,
    TC_STAGE_ROTARY,     // rotary positions, writing keys and values
    TC_STAGE_ATTENTION,
    TC_STAGE_OUT,        // rounding to int8, linear
    TC_STAGE_GATE_UP,
    TC_STAGE_SWIGLU,     // and rounding to int8
    TC_STAGE_DOWN,
    TC_STAGE_HEAD,
    TC_STAGES
};

// Token t of row r is number r * count + t, and is written at position starts[r] + t of its slot.
typedef struct tc_step {
    const float* hidden;     // [rows * count, width], or NULL where tokens are given
    const int64_t* tokens;   // [rows * count] or NULL
    const int32_t* slots;    // [rows]
    const int32_t* starts;   // [rows]
    const float* cos;        // [angles, head_dim / 2]
    const float* sin;
    const int32_t* angles;   // [rows * count]: a token's row of cos and sin; NULL: its position
    int64_t rows;
    int64_t count;
    int32_t every;           // logits of every token instead of each row's last
    float* logits;           // [rows or rows * count, vocabulary]; NULL: only keys and values are wanted
    void* memory;            // tc_step_memory() bytes, aligned to 64
    int64_t* nanoseconds;    // [TC_STAGES], added to by thread 0; NULL: not measured
} tc_step;

// Bytes that a step of this shape needs, where the longest row has `longest` tokens after it.
TINYCHAT_EXPORT size_t tc_step_memory(const tc_decoder* decoder, int64_t rows, int64_t count, int64_t longest);

// Returns as tc_linear does.
TINYCHAT_EXPORT int tc_forward(const tc_decoder* decoder, const tc_cache* cache, const tc_step* step);

// Attention alone. q and y [rows, count, heads, head_dim]; keys and values as in tc_cache. Returns as tc_linear does.
typedef struct tc_attention_shape {
    const int32_t* slots;
    const int32_t* starts;
    int64_t rows;
    int64_t count;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t capacity;
    int64_t window;
    float scale;
    int32_t kind;
} tc_attention_shape;

TINYCHAT_EXPORT int tc_attention(const tc_attention_shape* shape, const float* q, const void* keys,
                                 const void* values, const float* key_scales, const float* value_scales, float* y);

// For each of `rows` rows of n numbers, on the calling thread. norm: x += add unless NULL, y = x / rms(x) * weight;
// swiglu: x [rows, 2n] is gate and up; rotate: x is turned in place by cos and sin [rows, n/2].
TINYCHAT_EXPORT void tc_norm(float* x, const float* add, const float* weight, float eps, int64_t rows, int64_t n,
                             float* y);
TINYCHAT_EXPORT void tc_swiglu(const float* x, int64_t rows, int64_t n, float* y);
TINYCHAT_EXPORT void tc_rotate(float* x, const float* cos, const float* sin, int64_t rows, int64_t n);

#ifdef __cplusplus
}
#endif
