// The parts of the decoder behind the C interface, each alone.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "attention.h"
#include "decoder.h"
#include "floats.h"
#include "pool.h"

using namespace tinychat;

namespace {

struct Freed {
    void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

extern "C" {

int tc_attention(const tc_attention_shape* s, const float* q, const void* keys, const void* values,
                 const float* key_scales, const float* value_scales, float* y) {
    const int64_t longest = *std::max_element(s->starts, s->starts + s->rows) + s->count;
    const size_t bytes = attention_memory(s->rows, s->count, s->heads, s->kv_heads, s->head_dim, longest);
    const std::unique_ptr<void, Freed> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
    if (memory == nullptr) return 1;
    Attention a;
    a.q = q;
    a.y = y;
    a.keys = keys;
    a.values = values;
    a.key_scales = key_scales;
    a.value_scales = value_scales;
    a.slots = s->slots;
    a.starts = s->starts;
    a.ldq = a.ldy = s->heads * s->head_dim;
    a.rows = s->rows;
    a.count = s->count;
    a.heads = s->heads;
    a.kv_heads = s->kv_heads;
    a.head_dim = s->head_dim;
    a.capacity = s->capacity;
    a.window = s->window;
    a.scale = s->scale;
    a.kind = Kind(s->kind);
    a.memory = memory.get();
    return run([&](Team& team) { attention(team, a); }) ? 0 : 1;
}

void tc_norm(float* x, const float* add, const float* weight, float eps, int64_t rows, int64_t n, float* y) {
    for (int64_t i = 0; i < rows * n; i += n) {
        float_ops().norm(x + i, add == nullptr ? nullptr : add + i, weight, eps, n, y + i);
    }
}

void tc_swiglu(const float* x, int64_t rows, int64_t n, float* y) {
    for (int64_t i = 0; i < rows; ++i) float_ops().swiglu(x + i * 2 * n, x + i * 2 * n + n, n, y + i * n);
}

void tc_rotate(float* x, const float* cos, const float* sin, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows; ++i) float_ops().rotate(x + i * n, cos + i * n / 2, sin + i * n / 2, n);
}

}  // extern "C"
