// A picture through a vision transformer as one job: what each thread does, stage by stage.
#include "tower.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "attention.h"
#include "blocks.h"
#include "floats.h"
#include "linear.h"
#include "pool.h"
#include "stopwatch.h"

namespace tinychat {
namespace {


constexpr int64_t kPatchRows = 96;  // patches of a task

int64_t tokens_of(const tc_tower& t) { return t.patches + (t.first != nullptr ? 1 : 0); }

int64_t mixed_width(const tc_tower& t) { return t.heads * t.head_dim; }

// Heads as attention takes them: zeros at the end change no sum.
int64_t padded(const tc_tower& t) { return round_up(t.head_dim, kSums); }

// What the threads share.
struct Buffers {
    float* sum;     // [tokens, width]: what attention or MLP adds to the residual
    float* qkv;     // [tokens, 3 * mixed_width]
    float* q;       // [tokens, heads, padded]; NULL where qkv's own need no zeros
    float* keys;    // [heads, tokens, padded]
    float* values;
    float* mixed;   // [tokens, heads, padded]
    float* inner;   // [tokens, inner]
    void* rounded;  // the int8 input of a linear
    void* attention;

    Buffers(const tc_tower& t, int64_t layers, Arena& arena) {
        const int64_t tokens = tokens_of(t), heads = tokens * t.heads * padded(t);
        sum = arena.take<float>(tokens * t.width);
        qkv = arena.take<float>(tokens * 3 * mixed_width(t));
        q = padded(t) == t.head_dim ? nullptr : arena.take<float>(heads);
        keys = arena.take<float>(heads);
        values = arena.take<float>(heads);
        mixed = arena.take<float>(heads);
        inner = arena.take<float>(tokens * t.inner);
        rounded = arena.take<char>(static_cast<int64_t>(most_rounded(t, layers, tokens)));
        attention = arena.take<char>(
            static_cast<int64_t>(attention_memory(1, tokens, t.heads, t.heads, padded(t), tokens)));
    }

    static size_t most_rounded(const tc_tower& t, int64_t layers, int64_t tokens) {
        size_t most = 0;
        for (int64_t i = 0; i < layers; ++i) {
            const tc_tower_layer& layer = t.layers[i];
            for (const tc_weights* w : {&layer.qkv, &layer.out, &layer.up, &layer.down}) {
                most = std::max(most, quantized_size(tokens, w->inputs, w->group));
            }
        }
        return most;
    }
};

class Encode {
  public:
    Encode(Team& team, const tc_tower& t, const tc_picture& picture, const Buffers& buffers)
        : team_(team), t_(t), picture_(picture), b_(buffers), ops_(float_ops()), tokens_(tokens_of(t)),
          residual_(picture.hidden), watch_(team, picture.nanoseconds) {
        const int64_t floats = std::max({t.width, t.inner, mixed_width(t)});
        scratch_ = static_cast<float*>(team.scratch(Scratch::decoder, static_cast<size_t>(floats) * sizeof(float)));
    }

    void run() {
        embed();
        for (int64_t i = 0; i < picture_.layers; ++i) {
            const tc_tower_layer& layer = t_.layers[i];
            normalize(i == 0 ? nullptr : b_.sum, layer.attention_norm, layer.qkv);
            multiply(layer.qkv, layer.qkv_bias, b_.qkv, TC_TOWER_QKV);
            part_heads();
            attend();
            round_mixed(layer.out);
            multiply(layer.out, layer.out_bias, b_.sum, TC_TOWER_OUT);
            normalize(b_.sum, layer.mlp_norm, layer.up);
            multiply(layer.up, layer.up_bias, b_.inner, TC_TOWER_UP);
            activate(layer.down);
            multiply(layer.down, layer.down_bias, b_.sum, TC_TOWER_DOWN);
        }
        if (picture_.layers > 0) add_last();
    }

  private:
    void end_stage(tc_tower_stage stage) {
        team_.barrier();
        watch_.mark(stage);
    }

    // Patches, the first token, positions and the norm before the layers -> residual.
    void embed() {
        const int64_t panels = (t_.width + kPart - 1) / kPart, parts = (t_.patches + kPatchRows - 1) / kPatchRows;
        for (int64_t i = team_.next(); i < panels * parts; i = team_.next()) embed_part(i % panels, i / panels);
        team_.barrier();
        const Range own = team_.share(tokens_);
        for (int64_t t = own.begin; t < own.end; ++t) finish_embedding(t);
        end_stage(TC_TOWER_PATCHES);
    }

    void embed_part(int64_t panel, int64_t part) {
        alignas(64) float found[kPanelRows * kBlock];
        const float* weights = t_.embedding + panel * t_.patch * kPart;
        const int64_t column = panel * kPart, columns = std::min(kPart, t_.width - column);
        const int64_t end = std::min((part + 1) * kPatchRows, t_.patches);
        for (int64_t p = part * kPatchRows; p < end; p += kPanelRows) {
            const int64_t rows = std::min(kPanelRows, end - p);
            ops_.panel(picture_.patches + p * t_.patch, rows, t_.patch, weights, found);
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t c = 0; c < columns; ++c) {
                    const float bias = t_.patch_bias == nullptr ? 0.0f : t_.patch_bias[column + c];
                    patch_row(p + r)[column + c] = found[r * kBlock + c] + bias;
                }
            }
        }
    }

    float* patch_row(int64_t patch) const { return residual_ + (tokens_ - t_.patches + patch) * t_.width; }

    void finish_embedding(int64_t token) {
        float* x = residual_ + token * t_.width;
        if (token < tokens_ - t_.patches) std::memcpy(x, t_.first, static_cast<size_t>(t_.width) * sizeof(float));
        const float* position = t_.positions + token * t_.width;
        if (t_.norm.weight == nullptr) {
            ops_.add(x, position, t_.width);
        } else {
            ops_.layer_norm(x, position, t_.norm.weight, t_.norm.bias, t_.eps, t_.width, scratch_);
            std::memcpy(x, scratch_, static_cast<size_t>(t_.width) * sizeof(float));
        }
    }

    Quantized rounded(const tc_weights& w) const { return quantized_at(b_.rounded, tokens_, w.inputs, w.group); }

    // Residual sum and norm: the input of a linear.
    void normalize(const float* add, const tc_layer_norm& norm, const tc_weights& w) {
        const Range own = team_.share(tokens_);
        for (int64_t t = own.begin; t < own.end; ++t) {
            const float* more = add == nullptr ? nullptr : add + t * t_.width;
            ops_.layer_norm(residual_ + t * t_.width, more, norm.weight, norm.bias, t_.eps, t_.width, scratch_);
            quantize_row(scratch_, t_.width, w.group, rounded(w), t);
        }
        end_stage(TC_TOWER_NORM);
    }

    void multiply(const tc_weights& w, const float* bias, float* y, tc_tower_stage stage) {
        linear(team_, w, rounded(w), tokens_, y, w.outputs, bias);
        end_stage(stage);
    }

    // Keys and values of a head behind each other, and zeros at the end of heads that need some.
    void part_heads() {
        const int64_t dim = t_.head_dim, wide = padded(t_), row = wide * t_.heads;
        const Range own = team_.share(tokens_);
        for (int64_t t = own.begin; t < own.end; ++t) {
            const float* from = b_.qkv + t * 3 * mixed_width(t_);
            for (int64_t h = 0; h < t_.heads; ++h) {
                const int64_t at = (h * tokens_ + t) * wide;
                if (b_.q != nullptr) copy_head(from + h * dim, b_.q + t * row + h * wide);
                copy_head(from + mixed_width(t_) + h * dim, b_.keys + at);
                copy_head(from + 2 * mixed_width(t_) + h * dim, b_.values + at);
            }
        }
        end_stage(TC_TOWER_HEADS);
    }

    void copy_head(const float* from, float* to) const {
        std::memcpy(to, from, static_cast<size_t>(t_.head_dim) * sizeof(float));
        std::fill(to + t_.head_dim, to + padded(t_), 0.0f);
    }

    void attend() {
        static constexpr int32_t kZero = 0;
        Attention a;
        a.q = b_.q == nullptr ? b_.qkv : b_.q;
        a.y = b_.mixed;
        a.keys = b_.keys;
        a.values = b_.values;
        a.slots = a.starts = &kZero;
        a.ldq = b_.q == nullptr ? 3 * mixed_width(t_) : t_.heads * padded(t_);
        a.ldy = t_.heads * padded(t_);
        a.rows = 1;
        a.count = a.capacity = tokens_;
        a.heads = a.kv_heads = t_.heads;
        a.head_dim = padded(t_);
        a.window = 0;
        a.causal = false;
        a.scale = 1.0f / __builtin_sqrtf(static_cast<float>(t_.head_dim));
        a.kind = Kind::f32;
        a.memory = b_.attention;
        attention(team_, a);
        end_stage(TC_TOWER_ATTENTION);
    }

    // What attention gives, rounded; without the zeros.
    void round_mixed(const tc_weights& w) {
        const int64_t dim = t_.head_dim, wide = padded(t_);
        const Range own = team_.share(tokens_);
        for (int64_t t = own.begin; t < own.end; ++t) {
            const float* row = b_.mixed + t * t_.heads * wide;
            if (dim != wide) {
                for (int64_t h = 0; h < t_.heads; ++h)
                    std::memcpy(scratch_ + h * dim, row + h * wide, static_cast<size_t>(dim) * sizeof(float));
                row = scratch_;
            }
            quantize_row(row, w.inputs, w.group, rounded(w), t);
        }
        team_.barrier();
    }

    void activate(const tc_weights& w) {
        const Range own = team_.share(tokens_);
        for (int64_t t = own.begin; t < own.end; ++t) {
            ops_.gelu[t_.gelu](b_.inner + t * t_.inner, t_.inner, scratch_);
            quantize_row(scratch_, t_.inner, w.group, rounded(w), t);
        }
        end_stage(TC_TOWER_GELU);
    }

    // The thread that reads a token's residual is the one that wrote it.
    void add_last() {
        const Range own = team_.share(tokens_);
        for (int64_t t = own.begin; t < own.end; ++t)
            ops_.add(residual_ + t * t_.width, b_.sum + t * t_.width, t_.width);
        end_stage(TC_TOWER_NORM);
    }

    Team& team_;
    const tc_tower& t_;
    const tc_picture& picture_;
    const Buffers& b_;
    const FloatOps& ops_;
    int64_t tokens_;
    float* residual_;  // [tokens, width]
    float* scratch_;   // of this thread
    Stopwatch watch_;
};

// Products of a layer: what threads share between two barriers is a part of them.
int64_t layer_work(const tc_tower& t) {
    return tokens_of(t) * t.width * (4 * mixed_width(t) + 2 * t.inner);
}

}  // namespace
}  // namespace tinychat

using namespace tinychat;

extern "C" {

size_t tc_picture_memory(const tc_tower* tower, int64_t layers) {
    Arena arena(nullptr);
    Buffers(*tower, layers, arena);
    return arena.used();
}

int tc_encode(const tc_tower* tower, const tc_picture* picture) {
    Arena arena(picture->memory);
    const Buffers buffers(*tower, picture->layers, arena);
    return run([&](Team& team) { Encode(team, *tower, *picture, buffers).run(); }, layer_work(*tower)) ? 0 : 1;
}

void tc_layer_norm_rows(float* x, const float* add, const tc_layer_norm* norm, float eps, int64_t rows, int64_t n,
                        float* y) {
    for (int64_t i = 0; i < rows * n; i += n) {
        float_ops().layer_norm(x + i, add == nullptr ? nullptr : add + i, norm->weight, norm->bias, eps, n, y + i);
    }
}

void tc_gelu_rows(const float* x, int32_t kind, int64_t rows, int64_t n, float* y) {
    for (int64_t i = 0; i < rows * n; i += n) float_ops().gelu[kind](x + i, n, y + i);
}

}  // extern "C"
