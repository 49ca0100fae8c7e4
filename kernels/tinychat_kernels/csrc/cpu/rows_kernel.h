// Norms, rotary positions, SwiGLU and conversions of one row. Included as attention_kernel.h is, after it.
#pragma once

static void scale_row(const float* x, float factor, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += W) vstore(y + i, vmul(vload(x + i), vset(factor)));
}

LANE void turn(float* left, float* right, const float* cos, const float* sin) {
    const vf a = vload(left), b = vload(right), c = vload(cos), s = vload(sin);
    vstore(left, vfma(a, c, vsub(vzero(), vmul(b, s))));
    vstore(right, vfma(b, c, vmul(a, s)));
}

static void rotate_row(float* x, const float* cos, const float* sin, int64_t n) {
    float* right = x + n / 2;
    int64_t i = 0;
    for (; i + W <= n / 2; i += W) turn(x + i, right + i, cos + i, sin + i);
    if (i == n / 2) return;
    float rest[4][W] = {};
    const float* from[] = {x + i, right + i, cos + i, sin + i};
    const size_t bytes = (size_t)(n / 2 - i) * sizeof(float);
    for (int part = 0; part < 4; part++) memcpy(rest[part], from[part], bytes);
    turn(rest[0], rest[1], rest[2], rest[3]);
    memcpy(x + i, rest[0], bytes);
    memcpy(right + i, rest[1], bytes);
}

template <Kind kind>
static void store_row(const float* x, int64_t n, void* to) {
    auto* out = (typename Stored<kind>::Type*)to;
    for (int64_t i = 0; i < n; i += W) Stored<kind>::store(out + i, vload(x + i));
}

template <Kind kind>
static void load_row(const void* x, int64_t n, float* to) {
    auto* in = (const typename Stored<kind>::Type*)x;
    for (int64_t i = 0; i < n; i += W) vstore(to + i, Stored<kind>::load(in + i));
}

// sums of every 16th number, 4 of each that are added up first: the adder's latency is hidden
struct Sums {
    vf of[4 * kSums / W];

    void clear() {
        for (auto& sum : of) sum = vzero();
    }
    float total() const {
        float lanes[kSums];
        constexpr int n = kSums / W;
        for (int i = 0; i < n; i++) {
            vstore(lanes + i * W, vadd(vadd(of[i], of[n + i]), vadd(of[2 * n + i], of[3 * n + i])));
        }
        return sum16(lanes);
    }
};

static void norm_row(float* x, const float* add, const float* weight, float eps, int64_t n, float* y) {
    if (add) {
        for (int64_t i = 0; i < n; i += W) vstore(x + i, vadd(vload(x + i), vload(add + i)));
    }
    Sums sums;
    sums.clear();
    for (int64_t i = 0; i < n; i += kSums) {
        for (int w = 0; w < kSums / W; w++) {
            const vf value = vload(x + i + w * W);
            vf& sum = sums.of[i / kSums % 4 * (kSums / W) + w];
            sum = vfma(value, value, sum);
        }
    }
    const vf factor = vset(1.f / __builtin_sqrtf(sums.total() / (float)n + eps));
    for (int64_t i = 0; i < n; i += W) vstore(y + i, vmul(vload(weight + i), vmul(vload(x + i), factor)));
}

static void swiglu_row(const float* gate, const float* up, int64_t n, float* y) {
    const vf minus_log2e = vset(-1.44269504f), one = vset(1.f);
    for (int64_t i = 0; i < n; i += W) {
        const vf x = vload(gate + i);
        const vf silu = vdiv(x, vadd(one, vexp2(vmul(x, minus_log2e))));
        vstore(y + i, vmul(silu, vload(up + i)));
    }
}

template <Kind kind>
static float dot_row(const float* x, const void* weights, int64_t n) {
    auto* from = (const typename Stored<kind>::Type*)weights;
    Sums sums;
    sums.clear();
    for (int64_t i = 0; i < n; i += kSums) {
        for (int w = 0; w < kSums / W; w++) {
            vf& sum = sums.of[i / kSums % 4 * (kSums / W) + w];
            sum = vfma(vload(x + i + w * W), Stored<kind>::load(from + i + w * W), sum);
        }
    }
    return sums.total();
}

static constexpr FloatOps kFloatOps = {
    {attend_block<Kind::f16>, attend_block<Kind::bf16>, attend_block<Kind::f32>},
    merge_partial,
    finish_partial,
    scale_row,
    rotate_row,
    {store_row<Kind::f16>, store_row<Kind::bf16>, store_row<Kind::f32>},
    {load_row<Kind::f16>, load_row<Kind::bf16>, load_row<Kind::f32>},
    norm_row,
    swiglu_row,
    {dot_row<Kind::f16>, dot_row<Kind::bf16>, dot_row<Kind::f32>},
};
