// A whole forward of the decoder as one job: what each thread does, stage by stage.
#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "attention.h"
#include "floats.h"
#include "linear.h"
#include "pool.h"
#include "stopwatch.h"

namespace tinychat {
namespace {

constexpr int64_t kSwigluColumns = 512;  // of a task, at least a group

int64_t qkv_width(const tc_decoder& d) { return (d.heads + 2 * d.kv_heads) * d.head_dim; }

bool head_in_float(const tc_decoder& d) { return d.head_table.values != nullptr; }

// What the threads share during a forward.
struct Buffers {
    float* residual;  // [tokens, width]
    float* last;      // [rows, width]: the residual of each row's last token
    int32_t* starts;  // [rows]: its position
    float* sum;       // [tokens, width]: what attention or MLP adds to it
    float* qkv;       // [tokens, qkv_width]
    float* mixed;     // [tokens, heads * head_dim]
    float* gate_up;   // [tokens, 2 * inner]
    float* floats;    // [tokens, widest input]: of a linear in float
    void* rounded;    // the int8 input of any other
    void* attention;

    Buffers(const tc_decoder& d, int64_t rows, int64_t count, int64_t longest, Arena& arena) {
        const int64_t tokens = rows * count, mixed_width = d.heads * d.head_dim;
        const int64_t widest = std::max({d.width, mixed_width, d.inner});
        residual = arena.take<float>(tokens * d.width);
        last = arena.take<float>(rows * d.width);
        starts = arena.take<int32_t>(rows);
        sum = arena.take<float>(tokens * d.width);
        qkv = arena.take<float>(tokens * qkv_width(d));
        mixed = arena.take<float>(tokens * mixed_width);
        gate_up = arena.take<float>(tokens * 2 * d.inner);
        floats = arena.take<float>(tokens * (d.exact != 0 ? widest : head_in_float(d) ? d.width : 0));
        rounded = arena.take<char>(static_cast<int64_t>(d.exact != 0 ? 0 : most_rounded(d, tokens)));
        attention = arena.take<char>(
            static_cast<int64_t>(std::max(attention_memory(rows, count, d.heads, d.kv_heads, d.head_dim, longest),
                                          attention_memory(rows, 1, d.heads, d.kv_heads, d.head_dim, longest))));
    }

    static size_t most_rounded(const tc_decoder& d, int64_t tokens) {
        size_t most = head_in_float(d) ? 0 : quantized_size(tokens, d.width, d.head.group);
        for (int64_t i = 0; i < d.layer_count; ++i) {
            const tc_layer& layer = d.layers[i];
            for (const tc_weights* w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) {
                most = std::max(most, quantized_size(tokens, w->inputs, w->group));
            }
        }
        return most;
    }
};

// The part of one row's groups that begins at an input, as a row of its own.
Quantized part_of(const Quantized& q, int64_t row, int64_t begin, int64_t inputs, int64_t group, bool last) {
    const int64_t first = row * q.groups + begin / group;
    const int64_t stride = last ? q.stride - begin : inputs;
    return {q.values + row * q.stride + begin, q.scales + first, q.sums + first, stride, q.groups};
}

class Forward {
  public:
    Forward(Team& team, const tc_decoder& d, const tc_cache& cache, const tc_step& step, const Buffers& buffers)
        : team_(team), d_(d), cache_(cache), step_(step), b_(buffers), ops_(float_ops()),
          tokens_(step.rows * step.count), count_(step.count), residual_(buffers.residual),
          watch_(team, step.nanoseconds) {
        const int64_t floats = std::max({d.width, d.inner, kSwigluColumns});
        scratch_ = static_cast<float*>(team.scratch(Scratch::decoder, static_cast<size_t>(floats) * sizeof(float)));
    }

    void run() {
        take_inputs();
        for (int64_t i = 0; i < d_.layer_count; ++i) {
            const tc_layer& layer = d_.layers[i];
            const bool is_last = i + 1 == d_.layer_count;
            normalize(i == 0 ? nullptr : b_.sum, layer.attention_norm, layer.qkv);
            multiply(layer.qkv, layer.qkv_bias, b_.qkv, TC_STAGE_QKV);
            write_cache(i);
            if (is_last && step_.logits == nullptr) return;
            if (is_last && step_.every == 0) attend_with_last(i);
            else attend(i, b_.qkv, qkv_width(d_), step_.starts);
            round_mixed(layer.out);
            multiply(layer.out, layer.out_bias, b_.sum, TC_STAGE_OUT);
            normalize(b_.sum, layer.mlp_norm, layer.gate_up);
            multiply(layer.gate_up, layer.gate_up_bias, b_.gate_up, TC_STAGE_GATE_UP);
            activate(layer.down);
            multiply(layer.down, layer.down_bias, b_.sum, TC_STAGE_DOWN);
        }
        head();
    }

  private:
    void end_stage(tc_stage stage) {
        team_.barrier();
        watch_.mark(stage);
    }

    // No barrier: the thread that reads a token's residual next is the one that writes it here.
    void take_inputs() {
        const Range own = team_.share(tokens_);
        for (int64_t t = own.begin; t < own.end; ++t) {
            float* to = residual_ + t * d_.width;
            if (step_.tokens == nullptr) {
                std::memcpy(to, step_.hidden + t * d_.width, static_cast<size_t>(d_.width) * sizeof(float));
                continue;
            }
            const Kind kind = Kind(d_.embeddings.kind);
            const char* table = static_cast<const char*>(d_.embeddings.values);
            ops_.load[index(kind)](table + step_.tokens[t] * d_.width * kind_size(kind), d_.width, to);
        }
    }

    Quantized rounded(const tc_weights& w) const { return quantized_at(b_.rounded, tokens_, w.inputs, w.group); }

    const tc_weights* unless_exact(const tc_weights& w) const { return d_.exact != 0 ? nullptr : &w; }

    // Residual sum and norm: the input of a linear, rounded for w or (NULL) in float.
    void normalize_for(const tc_weights* w, const float* add, const float* weight) {
        const Range own = team_.share(tokens_);
        for (int64_t t = own.begin; t < own.end; ++t) {
            float* y = w == nullptr ? b_.floats + t * d_.width : scratch_;
            const float* more = add == nullptr ? nullptr : add + t * d_.width;
            ops_.norm(residual_ + t * d_.width, more, weight, d_.eps, d_.width, y);
            if (w != nullptr) quantize_row(y, d_.width, w->group, rounded(*w), t);
        }
        end_stage(TC_STAGE_NORM);
    }

    void normalize(const float* add, const float* weight, const tc_weights& w) {
        normalize_for(unless_exact(w), add, weight);
    }

    void multiply(const tc_weights& w, const float* bias, float* y, tc_stage stage) {
        if (d_.exact != 0) linear_exact(team_, w, b_.floats, w.inputs, tokens_, y, w.outputs, bias);
        else linear(team_, w, rounded(w), tokens_, y, w.outputs, bias);
        end_stage(stage);
    }

    int64_t position(int64_t token) const { return step_.starts[token / count_] + token % count_; }

    void write_cache(int64_t layer) {
        const int64_t heads = d_.heads + 2 * d_.kv_heads;
        const Range own = team_.share(tokens_ * heads);
        for (int64_t i = own.begin; i < own.end; ++i) write_head(layer, i / heads, i % heads);
        end_stage(TC_STAGE_ROTARY);
    }

    // Head 0, 1, ... of a token: its queries, then keys, then values.
    void write_head(int64_t layer, int64_t token, int64_t head) {
        float* x = b_.qkv + token * qkv_width(d_) + head * d_.head_dim;
        const int64_t at = position(token), key_head = (head - d_.heads) % d_.kv_heads;
        const bool is_value = head >= d_.heads + d_.kv_heads;
        if (!is_value) {
            const int64_t angle = step_.angles == nullptr ? at : step_.angles[token];
            ops_.rotate(x, step_.cos + angle * (d_.head_dim / 2), step_.sin + angle * (d_.head_dim / 2), d_.head_dim);
        }
        if (head < d_.heads) return;
        const int64_t slot = step_.slots[token / count_];
        write_row(layer, is_value, (slot * d_.kv_heads + key_head) * cache_.capacity + at, x);
    }

    // The key or value of one token and head, number `row` of the layer's.
    void write_row(int64_t layer, bool is_value, int64_t row, const float* x) {
        const Kind kind = Kind(cache_.kind);
        char* to = static_cast<char*>((is_value ? cache_.values : cache_.keys)[layer]);
        to += row * d_.head_dim * kind_size(kind);
        if (kind != Kind::i8) return ops_.store[index(kind)](x, d_.head_dim, to);
        int32_t sum;
        float* scale = (is_value ? cache_.value_scales : cache_.key_scales)[layer] + row;
        quantize_row(x, d_.head_dim, d_.head_dim, {reinterpret_cast<int8_t*>(to), scale, &sum, d_.head_dim, 1}, 0);
    }

    // In the last layer only the rows' last tokens are needed any more: from here on there are no others.
    void attend_with_last(int64_t layer) {
        const int64_t stride = count_ * qkv_width(d_);
        if (team_.index() == 0) {
            for (int64_t row = 0; row < step_.rows; ++row) {
                const float* from = residual_ + ((row + 1) * count_ - 1) * d_.width;
                std::memcpy(b_.last + row * d_.width, from, static_cast<size_t>(d_.width) * sizeof(float));
                b_.starts[row] = static_cast<int32_t>(step_.starts[row] + count_ - 1);
            }
        }
        team_.barrier();
        residual_ = b_.last;
        tokens_ = step_.rows;
        count_ = 1;
        attend(layer, b_.qkv + stride - qkv_width(d_), stride, b_.starts);
    }

    void attend(int64_t layer, const float* q, int64_t ldq, const int32_t* starts) {
        Attention a;
        a.q = q;
        a.y = d_.exact != 0 ? b_.floats : b_.mixed;
        a.keys = cache_.keys[layer];
        a.values = cache_.values[layer];
        a.key_scales = cache_.key_scales == nullptr ? nullptr : cache_.key_scales[layer];
        a.value_scales = cache_.value_scales == nullptr ? nullptr : cache_.value_scales[layer];
        a.slots = step_.slots;
        a.starts = starts;
        a.ldq = ldq;
        a.ldy = d_.heads * d_.head_dim;
        a.rows = step_.rows;
        a.count = count_;
        a.heads = d_.heads;
        a.kv_heads = d_.kv_heads;
        a.head_dim = d_.head_dim;
        a.capacity = cache_.capacity;
        a.window = d_.layers[layer].window;
        a.scale = 1.0f / __builtin_sqrtf(static_cast<float>(d_.head_dim));
        a.kind = Kind(cache_.kind);
        a.memory = b_.attention;
        attention(team_, a);
        end_stage(TC_STAGE_ATTENTION);
    }

    void round_mixed(const tc_weights& w) {
        if (d_.exact != 0) return;
        quantize(team_, b_.mixed, w.inputs, tokens_, w.inputs, w.group, rounded(w));
        team_.barrier();
    }

    // SwiGLU and rounding in tasks of some columns of a token, so that all threads work on a single token too.
    void activate(const tc_weights& w) {
        const int64_t group = w.group, columns = std::max(group, kSwigluColumns / group * group);
        const int64_t tasks = (d_.inner + columns - 1) / columns;
        const Range own = team_.share(tokens_ * tasks);
        const Quantized all = d_.exact != 0 ? Quantized{} : rounded(w);
        for (int64_t i = own.begin; i < own.end; ++i) {
            const int64_t token = i / tasks, begin = i % tasks * columns, n = std::min(columns, d_.inner - begin);
            const float* gate = b_.gate_up + token * 2 * d_.inner + begin;
            float* y = d_.exact != 0 ? b_.floats + token * d_.inner + begin : scratch_;
            ops_.swiglu(gate, gate + d_.inner, n, y);
            if (d_.exact != 0) continue;
            quantize_row(y, n, group, part_of(all, token, begin, n, group, begin + n == d_.inner), 0);
        }
        end_stage(TC_STAGE_SWIGLU);
    }

    // The last norm and the head.
    void head() {
        normalize_for(head_in_float(d_) ? nullptr : unless_exact(d_.head), b_.sum, d_.norm);
        if (!head_in_float(d_)) return multiply(d_.head, nullptr, step_.logits, TC_STAGE_HEAD);
        const Kind kind = Kind(d_.head_table.kind);
        const char* weights = static_cast<const char*>(d_.head_table.values);
        const Range own = team_.share(d_.vocabulary, 16);
        for (int64_t v = own.begin; v < own.end; ++v) {
            const char* weight = weights + v * d_.width * kind_size(kind);
            for (int64_t row = 0; row < tokens_; ++row) {
                const float* x = b_.floats + row * d_.width;
                step_.logits[row * d_.vocabulary + v] = ops_.dot[index(kind)](x, weight, d_.width);
            }
        }
        end_stage(TC_STAGE_HEAD);
    }

    Team& team_;
    const tc_decoder& d_;
    const tc_cache& cache_;
    const tc_step& step_;
    const Buffers& b_;
    const FloatOps& ops_;
    int64_t tokens_;   // rows * count_
    int64_t count_;    // tokens of a row
    float* residual_;  // [tokens_, width]
    float* scratch_;   // of this thread
    Stopwatch watch_;
};

// Products of a layer: what threads share between two barriers is a part of them.
int64_t layer_work(const tc_decoder& d, int64_t tokens) {
    return tokens * d.width * (qkv_width(d) + d.heads * d.head_dim + 3 * d.inner);
}

int64_t longest_row(const tc_step& step) {
    return *std::max_element(step.starts, step.starts + step.rows) + step.count;
}

}  // namespace
}  // namespace tinychat

using namespace tinychat;

extern "C" {

size_t tc_step_memory(const tc_decoder* decoder, int64_t rows, int64_t count, int64_t longest) {
    Arena arena(nullptr);
    Buffers(*decoder, rows, count, longest, arena);
    return arena.used();
}

int tc_forward(const tc_decoder* decoder, const tc_cache* cache, const tc_step* step) {
    Arena arena(step->memory);
    const Buffers buffers(*decoder, step->rows, step->count, longest_row(*step), arena);
    const bool done = run([&](Team& team) { Forward(team, *decoder, *cache, *step, buffers).run(); },
                          layer_work(*decoder, step->rows * step->count));
    return done ? 0 : 1;
}

}  // extern "C"
