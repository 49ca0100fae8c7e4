// Attention over one block of keys. Included inside a namespace and a target region, after lanes.h.
#pragma once

template <Kind kind>
struct Stored;

template <>
struct Stored<Kind::f32> {
    using Type = float;
    LANE vf load(const float* p) { return vload(p); }
    LANE void store(float* p, vf x) { vstore(p, x); }
};

template <>
struct Stored<Kind::f16> {
    using Type = uint16_t;
    LANE vf load(const uint16_t* p) { return vload_f16(p); }
    LANE void store(uint16_t* p, vf x) { vstore_f16(p, x); }
};

template <>
struct Stored<Kind::bf16> {
    using Type = uint16_t;
    LANE vf load(const uint16_t* p) { return vload_bf16(p); }
    LANE void store(uint16_t* p, vf x) { vstore_bf16(p, x); }
};

constexpr int kRows = 6;                        // queries that share what is loaded of keys or values
constexpr int kWide = LANES == 256 ? 2 : 4;     // vectors of keys, or of a value, beside each other
constexpr int64_t kAhead = 32;                  // values asked for before their turn
constexpr float kNothing = -__builtin_inff();

// keys [n, D] -> part [D, kPart]; columns beyond n are 0.
template <Kind kind>
static void transpose_keys(const typename Stored<kind>::Type* keys, int64_t head_dim, int64_t n, float* part) {
    for (int64_t k = 0; k < kPart; k += W) {
        for (int64_t d = 0; d < head_dim; d += W) {
            const auto* key = keys + k * head_dim + d;
            vf rows[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++, key += head_dim) {
                rows[i] = k + i < n ? Stored<kind>::load(key) : vzero();
                // The next part's keys are asked for now: rows at this stride are more than the hardware foresees.
                __builtin_prefetch(key + kPart * head_dim);
            }
            vtranspose(rows, part + d * kPart + k, kPart);
        }
    }
}

// scores [R, kWide * W] of R queries
template <int R>
LANE void score_tile(const float* q, const float* part, int64_t head_dim, float* scores) {
    vf sum[R][kWide];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < kWide; w++) sum[r][w] = vzero();
    for (int64_t d = 0; d < head_dim; d++) {
        vf key[kWide];
        for (int w = 0; w < kWide; w++) key[w] = vload(part + d * kPart + w * W);
        for (int r = 0; r < R; r++) {
            const vf x = vset(q[r * head_dim + d]);
            for (int w = 0; w < kWide; w++) sum[r][w] = vfma(x, key[w], sum[r][w]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < kWide; w++) vstore(scores + r * kBlock + w * W, sum[r][w]);
}

template <int R>
static void score_part(const float* q, const float* part, int64_t head_dim, float* scores) {
    for (int64_t k = 0; k < kPart; k += kWide * W) score_tile<R>(q, part + k, head_dim, scores + k);
}

// out [R, WIDE * W] = sum over n keys of weight * value
template <Kind kind, int R, int WIDE>
static void mix_tile(const float* weights, const typename Stored<kind>::Type* values, int64_t head_dim, int64_t n,
                     float* out) {
    vf sum[R][WIDE];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < WIDE; w++) sum[r][w] = vzero();
    for (int64_t k = 0; k < n; k++) {
        vf value[WIDE];
        for (int w = 0; w < WIDE; w++) {
            value[w] = Stored<kind>::load(values + k * head_dim + w * W);
            if (R <= 4) __builtin_prefetch(values + (k + kAhead) * head_dim + w * W);
        }
        for (int r = 0; r < R; r++) {
            const vf x = vset(weights[r * kBlock + k]);
            for (int w = 0; w < WIDE; w++) sum[r][w] = vfma(x, value[w], sum[r][w]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < WIDE; w++) vstore(out + r * head_dim + w * W, sum[r][w]);
}

template <Kind kind, int R>
static void mix(const float* weights, const typename Stored<kind>::Type* values, int64_t head_dim, int64_t n,
                float* out) {
    int64_t d = 0;
    for (; d + kWide * W <= head_dim; d += kWide * W) {
        mix_tile<kind, R, kWide>(weights, values + d, head_dim, n, out + d);
    }
    for (; d < head_dim; d += W) mix_tile<kind, R, 1>(weights, values + d, head_dim, n, out + d);
}

// scores [kBlock] -> weights 2^(score - top) where begin <= key < end, 0 elsewhere in low..high (multiples of 16)
static void soften(float* scores, int64_t low, int64_t begin, int64_t end, int64_t high, float* sum, float* top) {
    for (int64_t k = low; k < begin; k++) scores[k] = kNothing;
    for (int64_t k = end; k < high; k++) scores[k] = kNothing;
    vf highest = vset(kNothing);
    for (int64_t k = low; k < high; k += W) highest = vmax(vload(scores + k), highest);
    float lanes[W];
    vstore(lanes, highest);
    *top = lanes[0];
    for (int i = 1; i < W; i++) *top = lanes[i] > *top ? lanes[i] : *top;
    const vf shift = vset(*top == kNothing ? 0.f : *top);
    vf sums[kSums / W];
    for (int i = 0; i < kSums / W; i++) sums[i] = vzero();
    for (int64_t k = low; k < high; k += kSums) {
        for (int i = 0; i < kSums / W; i++) {
            const vf weight = vexp2(vsub(vload(scores + k + i * W), shift));
            sums[i] = vadd(sums[i], weight);
            vstore(scores + k + i * W, weight);
        }
    }
    for (int i = 0; i < kSums / W; i++) vstore(sum + i * W, sums[i]);
}

using ScorePart = void (*)(const float*, const float*, int64_t, float*);
constexpr ScorePart kScorePart[] = {score_part<1>, score_part<2>, score_part<3>,
                                    score_part<4>, score_part<5>, score_part<6>};

template <Kind kind>
using Mix = void (*)(const float*, const typename Stored<kind>::Type*, int64_t, int64_t, float*);
template <Kind kind>
constexpr Mix<kind> kMix[] = {mix<kind, 1>, mix<kind, 2>, mix<kind, 3>, mix<kind, 4>, mix<kind, 5>, mix<kind, 6>};

struct Seen {
    int64_t begin;  // keys of the block
    int64_t end;
};

LANE Seen seen(const Queries& q, int64_t first, int64_t last, int64_t start) {
    const int64_t begin = q.first[first] - start, end = q.end[last] - start;
    return {begin > 0 ? begin : 0, end < kBlock ? end : kBlock};
}

// Keys and values of a block in floats of a kind.
template <Kind kind>
class Floats {
  public:
    Floats(const Queries& q, int64_t start, int64_t)
        : q_(q), keys_((const Type*)q.keys + start * q.head_dim), values_((const Type*)q.values + start * q.head_dim) {}

    void take_keys(int64_t k, int64_t n) const {
        transpose_keys<kind>(keys_ + k * q_.head_dim, q_.head_dim, n, q_.part);
    }

    void score(int64_t i, int64_t rows, int64_t k) const {
        kScorePart[rows - 1](q_.q + i * q_.head_dim, q_.part, q_.head_dim, q_.scores + i * kBlock + k);
    }

    void mix(int64_t i, int64_t rows, Seen any, float* out) const {
        kMix<kind>[rows - 1](q_.scores + i * kBlock + any.begin, values_ + any.begin * q_.head_dim, q_.head_dim,
                             any.end - any.begin, out);
    }

  private:
    using Type = typename Stored<kind>::Type;
    const Queries& q_;
    const Type* keys_;
    const Type* values_;
};

// A Form reads keys and values: take_keys() puts n of them, from key k of the block on, into q.part; score() writes
// the scores of queries i.. with them; mix() sums up the values of the keys that any of these queries sees.
template <class Form>
static void attend_block(const Queries& q, int64_t start, const Partial& result) {
    const int64_t dim = q.head_dim;
    const Seen all = seen(q, 0, q.count - 1, start);
    const Form form(q, start, all.end);
    const int64_t tiles = (q.count + kRows - 1) / kRows, most = (q.count + tiles - 1) / tiles;  // 8 are 4 and 4
    for (int64_t k = all.begin / kPart * kPart; k < all.end; k += kPart) {
        form.take_keys(k, all.end - k < kPart ? all.end - k : kPart);
        for (int64_t i = 0; i < q.count; i += most) {
            const int64_t rows = q.count - i < most ? q.count - i : most;
            const Seen any = seen(q, i, i + rows - 1, start);
            if (any.end <= k || any.begin >= k + kPart) continue;
            form.score(i, rows, k);
        }
    }
    for (int64_t i = 0; i < q.count; i += most) {
        const int64_t rows = q.count - i < most ? q.count - i : most;
        Seen any = seen(q, i, i + rows - 1, start);
        if (any.begin >= any.end) any = {0, 0};
        const int64_t low = any.begin / kSums * kSums, high = (any.end + kSums - 1) / kSums * kSums;
        for (int64_t j = i; j < i + rows; j++) {
            Seen own = seen(q, j, j, start);
            if (own.begin >= own.end) own = {low, low};
            soften(q.scores + j * kBlock, low, own.begin, own.end, high, result.sum + j * kSums, result.top + j);
        }
        form.mix(i, rows, any, result.out + i * dim);
    }
}

static void merge_partial(const Partial& into, const Partial& more, int64_t count, int64_t head_dim) {
    for (int64_t i = 0; i < count; i++) {
        const float old = into.top[i], top = more.top[i] > old ? more.top[i] : old;
        if (top == kNothing) continue;
        float factors[2 * W];
        vstore(factors, vexp2(vset(old - top)));
        vstore(factors + W, vexp2(vset(more.top[i] - top)));
        const vf keep = vset(factors[0]), take = vset(factors[W]);
        for (int64_t d = 0; d < head_dim; d += W) {
            float* out = into.out + i * head_dim + d;
            vstore(out, vfma(vload(out), keep, vmul(vload(more.out + i * head_dim + d), take)));
        }
        for (int64_t d = 0; d < kSums; d += W) {
            float* sum = into.sum + i * kSums + d;
            vstore(sum, vfma(vload(sum), keep, vmul(vload(more.sum + i * kSums + d), take)));
        }
        into.top[i] = top;
    }
}

static void finish_partial(const Partial& partial, int64_t count, int64_t head_dim, float* y, int64_t ldy) {
    for (int64_t i = 0; i < count; i++) {
        const vf factor = vset(1.f / sum16(partial.sum + i * kSums));
        for (int64_t d = 0; d < head_dim; d += W) {
            vstore(y + i * ldy + d, vmul(vload(partial.out + i * head_dim + d), factor));
        }
    }
}
