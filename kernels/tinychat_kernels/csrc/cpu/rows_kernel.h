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

static void multiply_panel(const float* x, int64_t rows, int64_t inputs, const float* panel, float* y) {
    static_assert(kPanelRows == kRows, "the tiles of attention's scores do it");
    kScorePart[rows - 1](x, panel, inputs, y);
}

static void add_row(float* x, const float* more, int64_t n) {
    for (int64_t i = 0; i < n; i += W) vstore(x + i, vadd(vload(x + i), vload(more + i)));
}

static void layer_norm_row(float* x, const float* add, const float* weight, const float* bias, float eps, int64_t n,
                           float* y) {
    if (add) add_row(x, add, n);
    Sums sums;
    sums.clear();
    for (int64_t i = 0; i < n; i += kSums) {
        for (int w = 0; w < kSums / W; w++) {
            vf& sum = sums.of[i / kSums % 4 * (kSums / W) + w];
            sum = vadd(vload(x + i + w * W), sum);
        }
    }
    const vf mean = vset(sums.total() / (float)n);
    sums.clear();
    for (int64_t i = 0; i < n; i += kSums) {
        for (int w = 0; w < kSums / W; w++) {
            const vf value = vsub(vload(x + i + w * W), mean);
            vf& sum = sums.of[i / kSums % 4 * (kSums / W) + w];
            sum = vfma(value, value, sum);
        }
    }
    const vf factor = vset(1.f / __builtin_sqrtf(sums.total() / (float)n + eps));
    for (int64_t i = 0; i < n; i += W) {
        const vf value = vmul(vsub(vload(x + i), mean), factor);
        vstore(y + i, vfma(value, vload(weight + i), vload(bias + i)));
    }
}

// x / (1 + 2^power)
LANE vf gated(vf x, vf power) { return vdiv(x, vadd(vset(1.f), vexp2(power))); }

static void gelu_quick_row(const float* x, int64_t n, float* y) {
    const vf factor = vset(-1.702f * 1.44269504f);
    for (int64_t i = 0; i < n; i += W) vstore(y + i, gated(vload(x + i), vmul(vload(x + i), factor)));
}

// x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
static void gelu_tanh_row(const float* x, int64_t n, float* y) {
    const vf linear = vset(-2.30220818f), cubic = vset(-2.30220818f * 0.044715f);
    for (int64_t i = 0; i < n; i += W) {
        const vf value = vload(x + i);
        vstore(y + i, gated(value, vmul(value, vfma(vmul(value, value), cubic, linear))));
    }
}

// max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2, by formula 7.1.26 of Abramowitz and Stegun: within 2e-7 * |x|.
static void gelu_erf_row(const float* x, int64_t n, float* y) {
    const vf zero = vzero(), one = vset(1.f);
    for (int64_t i = 0; i < n; i += W) {
        const vf value = vload(x + i), size = vmax(vsub(zero, value), value);
        const vf t = vdiv(one, vfma(size, vset(0.3275911f * 0.707106781f), one));
        vf p = vset(0.5f * 1.061405429f);
        p = vfma(p, t, vset(0.5f * -1.453152027f));
        p = vfma(p, t, vset(0.5f * 1.421413741f));
        p = vfma(p, t, vset(0.5f * -0.284496736f));
        p = vfma(p, t, vset(0.5f * 0.254829592f));
        const vf tail = vmul(vmul(p, t), vexp2(vmul(vmul(value, value), vset(-0.5f * 1.44269504f))));
        vstore(y + i, vsub(vmax(zero, value), vmul(size, tail)));
    }
}

static constexpr FloatOps kFloatOps = {
    {attend_block<Floats<Kind::f16>>, attend_block<Floats<Kind::bf16>>, attend_block<Floats<Kind::f32>>,
     attend_block<Bytes>},
    round_query,
    merge_partial,
    finish_partial,
    scale_row,
    rotate_row,
    {store_row<Kind::f16>, store_row<Kind::bf16>, store_row<Kind::f32>},
    {load_row<Kind::f16>, load_row<Kind::bf16>, load_row<Kind::f32>},
    norm_row,
    swiglu_row,
    {dot_row<Kind::f16>, dot_row<Kind::bf16>, dot_row<Kind::f32>},
    multiply_panel,
    add_row,
    layer_norm_row,
    {gelu_erf_row, gelu_tanh_row, gelu_quick_row},
};
