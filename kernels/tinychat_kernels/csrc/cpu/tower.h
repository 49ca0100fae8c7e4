// The C interface of a vision transformer: one call is one picture through the layers asked for, and one job of the
// pool. CLIP's and SigLIP's; linears are 8-bit ones.
#pragma once

#include "tinychat.h"

#ifdef __cplusplus
extern "C" {
#endif

enum tc_gelu { TC_GELU_ERF, TC_GELU_TANH, TC_GELU_QUICK, TC_GELUS };

// A norm over the width: y = (x - mean) / deviation * weight + bias. weight NULL: none.
typedef struct tc_layer_norm {
    const float* weight;
    const float* bias;
} tc_layer_norm;

typedef struct tc_tower_layer {
    tc_weights qkv;  // the outputs of q, then k, then v
    tc_weights out;
    tc_weights up;
    tc_weights down;
    const float* qkv_bias;  // NULL: none, as below
    const float* out_bias;
    const float* up_bias;
    const float* down_bias;
    tc_layer_norm attention_norm;
    tc_layer_norm mlp_norm;
} tc_tower_layer;

// width and inner are multiples of 16, head_dim is at most 256.
typedef struct tc_tower {
    const tc_tower_layer* layers;
    int64_t width;
    int64_t inner;     // outputs of up
    int64_t heads;
    int64_t head_dim;
    int64_t patch;     // numbers of a patch
    int64_t patches;   // of a picture
    const float* embedding;   // of patches: [width / 64, patch, 64], zeros in columns beyond the width
    const float* patch_bias;  // [width] or NULL
    const float* first;       // [width]: the token before the patches; NULL: none
    const float* positions;   // [tokens, width]
    tc_layer_norm norm;       // before the first layer
    float eps;
    int32_t gelu;             // enum tc_gelu
} tc_tower;

// What a picture spends its time in.
enum tc_tower_stage {
    TC_TOWER_PATCHES,    // their embedding
    TC_TOWER_NORM,       // residual sum, norm, rounding to int8
    TC_TOWER_QKV,
    TC_TOWER_HEADS,      // keys and values head by head
    TC_TOWER_ATTENTION,
    TC_TOWER_OUT,        // rounding to int8, linear
    TC_TOWER_UP,
    TC_TOWER_GELU,       // and rounding to int8
    TC_TOWER_DOWN,
    TC_TOWER_STAGES
};

typedef struct tc_picture {
    const float* patches;  // [patches, patch]
    int64_t layers;        // so many are run
    float* hidden;         // out: [tokens, width]
    void* memory;          // tc_picture_memory() bytes, aligned to 64
    int64_t* nanoseconds;  // [TC_TOWER_STAGES], added to by thread 0; NULL: not measured
} tc_picture;

TINYCHAT_EXPORT size_t tc_picture_memory(const tc_tower* tower, int64_t layers);

// Returns as tc_linear does.
TINYCHAT_EXPORT int tc_encode(const tc_tower* tower, const tc_picture* picture);

// For each of `rows` rows of n numbers, on the calling thread; layer_norm: x += add unless NULL, y = the norm of x.
TINYCHAT_EXPORT void tc_layer_norm_rows(float* x, const float* add, const tc_layer_norm* norm, float eps, int64_t rows,
                                        int64_t n, float* y);
TINYCHAT_EXPORT void tc_gelu_rows(const float* x, int32_t kind, int64_t rows, int64_t n, float* y);

#ifdef __cplusplus
}
#endif
