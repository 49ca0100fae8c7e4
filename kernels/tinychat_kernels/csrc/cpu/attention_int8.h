// Attention over one block of keys and values of 8 bits. Included after attention_kernel.h.
//
// Queries, and the weights of a block's values, are rounded to 16 bits; sums of products are exact in 32 bits, since
// 32767 * 127 * 256 channels, or keys of a block, stay below 2^31. So they have the same bits on every machine.
#pragma once

constexpr int kPairWide = LANES == 512 ? 4 : 2;  // vectors of keys, or of a value, beside each other
constexpr int64_t kKeysAhead = 2 * kPart;  // asked for before their turn
constexpr int64_t kValuesAhead = 64;
constexpr float kTop16 = 32767.f;
constexpr float kLeast = 1e-30f;  // below it everything is 0: its inverse would overflow
constexpr int32_t kNotFinite = 0x7f800000;

// The largest magnitude as the bits of a float, whose order is that of whole numbers, NaN and Inf at the top.
LANE int32_t largest_of(vi most) {
    int32_t lanes[W];
    vstore_int(lanes, most);
    int32_t largest = lanes[0];
    for (int i = 1; i < W; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

// What a step is worth where `largest` becomes 32767, and its inverse. NaN and 0 where there is a NaN or Inf.
struct Step {
    float worth;
    float inverse;
};

LANE Step step_of(int32_t largest) {
    float top;
    memcpy(&top, &largest, sizeof top);
    if (largest >= kNotFinite) return {__builtin_nanf(""), 0.f};
    if (top < kLeast) return {0.f, 0.f};
    return {top / kTop16, kTop16 / top};
}

// x [n] -> whole numbers and what their step is worth. The middle two of each four change places: so they lie as
// veven_bytes and vodd_bytes give a key's channels.
static float round_query(const float* x, int64_t n, int16_t* to) {
    vi most = vmagnitude(vzero());
    for (int64_t i = 0; i < n; i += W) most = vlarger(most, vmagnitude(vload(x + i)));
    const Step step = step_of(largest_of(most));
    for (int64_t i = 0; i < n; i += W) vround_i16(to + i, vmul(vload(x + i), vset(step.inverse)));
    for (int64_t i = 0; i < n; i += 4) {
        uint64_t four;
        memcpy(&four, to + i, sizeof four);
        four = (four & 0xffff00000000ffff) | (four & 0xffff0000) << 16 | (four >> 16 & 0xffff0000);
        memcpy(to + i, &four, sizeof four);
    }
    return step.worth;
}

// W words, of which `count` are read; the others are 0.
LANE vf vload_some(const void* p, int64_t count) {
    float lanes[W] = {};
    if (count >= W) count = W;
    memcpy(lanes, p, (size_t)count * 4);
    return vload(lanes);
}

// keys [n, D] -> part [D / 4, kPart]: 4 channels of a key in a word; columns beyond n are 0.
static void transpose_bytes(const int8_t* keys, int64_t head_dim, int64_t n, float* part) {
    const int64_t words = head_dim / 4;
    for (int64_t k = 0; k < kPart; k += W) {
        for (int64_t d = 0; d < words; d += W) {
            const int8_t* key = keys + k * head_dim + 4 * d;
            const bool whole = k + W <= n && d + W <= words;
            vf rows[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++, key += head_dim) {
                rows[i] = whole ? vload((const float*)key) : vload_some(key, k + i < n ? words - d : 0);
                __builtin_prefetch(key + kKeysAhead * head_dim);
            }
            vtranspose(rows, part + d * kPart + k, kPart);
        }
    }
}

// scores [R, kPairWide * W] of R queries, each with its step; `scales` are the keys'.
template <int R>
LANE void score_bytes(const int16_t* q, const float* steps, const float* part, const float* scales, int64_t head_dim,
                      float* scores) {
    vsum sum[R][kPairWide];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < kPairWide; w++) sum[r][w] = vzero_sum();
    for (int64_t d = 0; d < head_dim; d += 4, part += kPart) {
        vi key[kPairWide];
        for (int w = 0; w < kPairWide; w++) key[w] = veven_bytes(vload_pairs(part + w * W));
        for (int r = 0; r < R; r++) {
            const vi x = vset_pair(q + r * head_dim + d);
            for (int w = 0; w < kPairWide; w++) sum[r][w] = vadd_pairs(sum[r][w], key[w], x);
        }
        for (int w = 0; w < kPairWide; w++) key[w] = vodd_bytes(vload_pairs(part + w * W));
        for (int r = 0; r < R; r++) {
            const vi x = vset_pair(q + r * head_dim + d + 2);
            for (int w = 0; w < kPairWide; w++) sum[r][w] = vadd_pairs(sum[r][w], key[w], x);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int w = 0; w < kPairWide; w++) {
            const vf worth = vmul(vload(scales + w * W), vset(steps[r]));
            vstore(scores + r * kBlock + w * W, vmul(vtotal(sum[r][w]), worth));
        }
    }
}

template <int R>
static void score_bytes_part(const int16_t* q, const float* steps, const float* part, const float* scales,
                             int64_t head_dim, float* scores) {
    for (int64_t k = 0; k < kPart; k += kPairWide * W) {
        score_bytes<R>(q, steps, part + k, scales + k, head_dim, scores + k);
    }
}

// weights [low..high) times the values' scales -> whole numbers and what their step is worth.
static float round_weights(const float* weights, const float* scales, int64_t low, int64_t high, int16_t* to) {
    vi most = vmagnitude(vzero());
    for (int64_t k = low; k < high; k += W) {
        most = vlarger(most, vmagnitude(vmul(vload(weights + k), vload(scales + k))));
    }
    const Step step = step_of(largest_of(most));
    const vf inverse = vset(step.inverse);
    for (int64_t k = low; k < high; k += W) {
        vround_i16(to + k, vmul(vmul(vload(weights + k), vload(scales + k)), inverse));
    }
    return step.worth;
}

// out [R, WIDE * W] = sum over n keys of weight * value. The weight behind the last one is 0 where n is odd.
template <int R, int WIDE>
static void mix_bytes_tile(const int16_t* weights, const float* steps, const int8_t* values, int64_t head_dim, int64_t n,
                           float* out) {
    vsum sum[R][WIDE];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < WIDE; w++) sum[r][w] = vzero_sum();
    for (int64_t k = 0; k < n; k += 2) {
        const int8_t* value = values + k * head_dim;
        const int8_t* next = k + 1 < n ? value + head_dim : value;
        vi pair[WIDE];
        for (int w = 0; w < WIDE; w++) pair[w] = vpair_bytes(value + w * W, next + w * W);
        if (R <= 4) __builtin_prefetch(value + kValuesAhead * head_dim);
        if (R <= 4) __builtin_prefetch(next + kValuesAhead * head_dim);
        for (int r = 0; r < R; r++) {
            const vi x = vset_pair(weights + r * kBlock + k);
            for (int w = 0; w < WIDE; w++) sum[r][w] = vadd_pairs(sum[r][w], pair[w], x);
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < WIDE; w++) vstore(out + r * head_dim + w * W, vmul(vtotal(sum[r][w]), vset(steps[r])));
}

template <int R>
static void mix_bytes(const int16_t* weights, const float* steps, const int8_t* values, int64_t head_dim, int64_t n,
                      float* out) {
    int64_t d = 0;
    for (; d + kPairWide * W <= head_dim; d += kPairWide * W) {
        mix_bytes_tile<R, kPairWide>(weights, steps, values + d, head_dim, n, out + d);
    }
    for (; d < head_dim; d += W) mix_bytes_tile<R, 1>(weights, steps, values + d, head_dim, n, out + d);
}

using ScoreBytes = void (*)(const int16_t*, const float*, const float*, const float*, int64_t, float*);
constexpr ScoreBytes kScoreBytes[] = {score_bytes_part<1>, score_bytes_part<2>, score_bytes_part<3>,
                                      score_bytes_part<4>, score_bytes_part<5>, score_bytes_part<6>};
using MixBytes = void (*)(const int16_t*, const float*, const int8_t*, int64_t, int64_t, float*);
constexpr MixBytes kMixBytes[] = {mix_bytes<1>, mix_bytes<2>, mix_bytes<3>, mix_bytes<4>, mix_bytes<5>, mix_bytes<6>};

// Keys and values of a block, as attend_block wants them.
class Bytes {
  public:
    // Keys from `end` of the block on are not read.
    Bytes(const Queries& q, int64_t start, int64_t end)
        : q_(q), keys_((const int8_t*)q.keys + start * q.head_dim), values_((const int8_t*)q.values + start * q.head_dim) {
        memcpy(key_scales_, q.key_scales + start, (size_t)end * sizeof(float));
        memcpy(value_scales_, q.value_scales + start, (size_t)end * sizeof(float));
        for (int64_t k = kBlock; k < 2 * kBlock; k += 16) {  // the next block's
            __builtin_prefetch(q.key_scales + start + k);
            __builtin_prefetch(q.value_scales + start + k);
        }
        memset(key_scales_ + end, 0, (size_t)(kBlock - end) * sizeof(float));
        memset(value_scales_ + end, 0, (size_t)(kBlock - end) * sizeof(float));
    }

    void take_keys(int64_t k, int64_t n) const { transpose_bytes(keys_ + k * q_.head_dim, q_.head_dim, n, q_.part); }

    void score(int64_t i, int64_t rows, int64_t k) const {
        kScoreBytes[rows - 1](q_.rounded + i * q_.head_dim, q_.steps + i, q_.part, key_scales_ + k, q_.head_dim,
                              q_.scores + i * kBlock + k);
    }

    // From an even key on: the weight before the first is 0.
    void mix(int64_t i, int64_t rows, Seen any, float* out) const {
        float steps[kRows];
        const int64_t low = any.begin / kSums * kSums, high = (any.end + kSums - 1) / kSums * kSums;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = (i + r) * kBlock;
            steps[r] = round_weights(q_.scores + at, value_scales_, low, high, q_.weights + at);
        }
        const int64_t first = any.begin / 2 * 2;
        kMixBytes[rows - 1](q_.weights + i * kBlock + first, steps, values_ + first * q_.head_dim, q_.head_dim,
                            any.end - first, out);
    }

  private:
    const Queries& q_;
    const int8_t* keys_;
    const int8_t* values_;
    alignas(64) float key_scales_[kBlock];
    alignas(64) float value_scales_[kBlock];
};
