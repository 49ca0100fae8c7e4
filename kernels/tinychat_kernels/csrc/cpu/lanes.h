// Floats side by side: the same names for AVX-512, AVX2, NEON and plain C++. Included inside a target region, after
// the macro LANES (512, 256 or 128) and after the system's headers. W lanes of `vf`; each lane rounds on its own, so
// results do not depend on the width, but for x86 without FMA, where vfma rounds twice.
#pragma once

#define LANE static inline __attribute__((always_inline))

LANE int32_t word_at(const void* p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

#if LANES == 512

constexpr int W = 16;
typedef __m512 vf;
LANE vf vzero() { return _mm512_setzero_ps(); }
LANE vf vset(float x) { return _mm512_set1_ps(x); }
LANE vf vload(const float* p) { return _mm512_loadu_ps(p); }
LANE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
LANE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
LANE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
LANE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
LANE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
LANE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LANE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where one is NaN, in vmin too
LANE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
LANE vf vround(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for integral n in [-126, 127]
LANE vf vscale2(vf x, vf n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}
// 0 where x < limit, else a
LANE vf vclear_lt(vf a, vf x, vf limit) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), a); }
LANE vf vload_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
LANE void vstore_f16(uint16_t* p, vf x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LANE vf vload_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
LANE void vstore_bf16(uint16_t* p, vf x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
// Whole numbers of 32 bits, or pairs of 16.
typedef __m512i vi;
typedef vi vsum;  // sums of products of pairs
LANE vi vload_pairs(const void* p) { return _mm512_loadu_si512(p); }
LANE vi vset_pair(const int16_t* p) { return _mm512_set1_epi32(word_at(p)); }
LANE vi veven_bytes(vi x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }  // bytes 0 and 2 of each lane
LANE vi vodd_bytes(vi x) { return _mm512_srai_epi16(x, 8); }
LANE vi vpair_bytes(const int8_t* p, const int8_t* q) {  // a lane: p[i], q[i]
    const vi low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
    const vi high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
}
LANE vsum vzero_sum() { return _mm512_setzero_si512(); }
LANE vsum vadd_pairs(vsum sum, vi a, vi b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // some compilers copy each sum around the intrinsic
    return sum;
}
LANE vf vtotal(vsum sum) { return _mm512_cvtepi32_ps(sum); }
LANE vi vmagnitude(vf x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
LANE vi vlarger(vi a, vi b) { return _mm512_max_epi32(a, b); }
LANE void vstore_int(int32_t* p, vi x) { _mm512_storeu_si512(p, x); }
LANE void vround_i16(int16_t* p, vf x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x))); }
// W rows of W floats -> out[column * stride + row]
LANE void vtranspose(vf* r, float* out, int stride) {
    vf t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {  // r[4q + c]: columns 4L + c of rows 4q..4q+3 in 128-bit lane L
        vf ab_even = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), ab_odd = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
        vf cd_even = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
        vf cd_odd = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
        vstore(out + c * stride, _mm512_shuffle_f32x4(ab_even, cd_even, 0x88));
        vstore(out + (8 + c) * stride, _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd));
        vstore(out + (4 + c) * stride, _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88));
        vstore(out + (12 + c) * stride, _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd));
    }
}

#elif LANES == 256

constexpr int W = 8;
typedef __m256 vf;
LANE vf vzero() { return _mm256_setzero_ps(); }
LANE vf vset(float x) { return _mm256_set1_ps(x); }
LANE vf vload(const float* p) { return _mm256_loadu_ps(p); }
LANE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
LANE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
LANE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
LANE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
LANE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
LANE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
LANE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
LANE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
LANE vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LANE vf vscale2(vf x, vf n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
LANE vf vclear_lt(vf a, vf x, vf limit) { return _mm256_and_ps(a, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ)); }
LANE vf vload_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
LANE void vstore_f16(uint16_t* p, vf x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LANE vf vload_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
LANE void vstore_bf16(uint16_t* p, vf x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1)));
}
typedef __m256i vi;
typedef vi vsum;
LANE vi vload_pairs(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
LANE vi vset_pair(const int16_t* p) { return _mm256_set1_epi32(word_at(p)); }
LANE vi veven_bytes(vi x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
LANE vi vodd_bytes(vi x) { return _mm256_srai_epi16(x, 8); }
LANE vi vpair_bytes(const int8_t* p, const int8_t* q) {
    const vi low = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
    const vi high = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)q));
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}
LANE vsum vzero_sum() { return _mm256_setzero_si256(); }
LANE vsum vadd_pairs(vsum sum, vi a, vi b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
LANE vf vtotal(vsum sum) { return _mm256_cvtepi32_ps(sum); }
LANE vi vmagnitude(vf x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }
LANE vi vlarger(vi a, vi b) { return _mm256_max_epi32(a, b); }
LANE void vstore_int(int32_t* p, vi x) { _mm256_storeu_si256((__m256i*)p, x); }
LANE void vround_i16(int16_t* p, vf x) {
    const vi whole = _mm256_cvtps_epi32(x);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
LANE void vtranspose(vf* r, float* out, int stride) {
    vf t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        vf even_low = _mm256_shuffle_ps(t[j], t[2 + j], 0x44), even_high = _mm256_shuffle_ps(t[4 + j], t[6 + j], 0x44);
        vf odd_low = _mm256_shuffle_ps(t[j], t[2 + j], 0xee), odd_high = _mm256_shuffle_ps(t[4 + j], t[6 + j], 0xee);
        vstore(out + (2 * j) * stride, _mm256_permute2f128_ps(even_low, even_high, 0x20));
        vstore(out + (2 * j + 1) * stride, _mm256_permute2f128_ps(odd_low, odd_high, 0x20));
        vstore(out + (4 + 2 * j) * stride, _mm256_permute2f128_ps(even_low, even_high, 0x31));
        vstore(out + (5 + 2 * j) * stride, _mm256_permute2f128_ps(odd_low, odd_high, 0x31));
    }
}

#else  // NEON, and what any compiler of GCC's family makes of four floats

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
LANE vf vzero() { return vf{0, 0, 0, 0}; }
LANE vf vset(float x) { return vf{x, x, x, x}; }
LANE vf vadd(vf a, vf b) { return a + b; }
LANE vf vsub(vf a, vf b) { return a - b; }
LANE vf vmul(vf a, vf b) { return a * b; }
LANE vf vdiv(vf a, vf b) { return a / b; }
LANE vf vmax(vf a, vf b) { return a > b ? a : b; }
LANE vf vmin(vf a, vf b) { return a < b ? a : b; }
LANE vf vclear_lt(vf a, vf x, vf limit) { return (vf)((vi)a & ~(x < limit)); }
LANE vi vmagnitude(vf x) { return (vi)x & 0x7fffffff; }
LANE vi vlarger(vi a, vi b) { return a > b ? a : b; }

#if defined(__aarch64__)
LANE vf vload(const float* p) { return (vf)vld1q_f32(p); }
LANE void vstore(float* p, vf x) { vst1q_f32(p, (float32x4_t)x); }
LANE void vtranspose(vf* r, float* out, int stride) {
    const float32x4_t a = (float32x4_t)r[0], b = (float32x4_t)r[1], c = (float32x4_t)r[2], d = (float32x4_t)r[3];
    const float64x2_t ab_low = (float64x2_t)vzip1q_f32(a, b), ab_high = (float64x2_t)vzip2q_f32(a, b);
    const float64x2_t cd_low = (float64x2_t)vzip1q_f32(c, d), cd_high = (float64x2_t)vzip2q_f32(c, d);
    vstore(out, (vf)vzip1q_f64(ab_low, cd_low));
    vstore(out + stride, (vf)vzip2q_f64(ab_low, cd_low));
    vstore(out + 2 * stride, (vf)vzip1q_f64(ab_high, cd_high));
    vstore(out + 3 * stride, (vf)vzip2q_f64(ab_high, cd_high));
}
LANE vf vfma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
LANE vf vround(vf a) { return (vf)vrndnq_f32((float32x4_t)a); }
LANE vi vtoint(vf a) { return (vi)vcvtq_s32_f32((float32x4_t)a); }
LANE vf vload_bf16(const uint16_t* p) { return (vf)(vshll_n_u16(vld1_u16(p), 15) << 1); }
LANE void vstore_bf16(uint16_t* p, vf x) {
    const uint32x4_t bits = (uint32x4_t)x, odd = vshrq_n_u32(bits, 16) & 1;
    vst1_u16(p, vshrn_n_u32(bits + 0x7fff + odd, 16));
}
LANE vi vload_pairs(const void* p) { return (vi)vld1q_u8((const uint8_t*)p); }
LANE vi vset_pair(const int16_t* p) { return (vi)vdupq_n_s32(word_at(p)); }
LANE void vstore_int(int32_t* p, vi x) { vst1q_s32(p, (int32x4_t)x); }
struct vsum {  // products of the first 2 lanes, and of the last 2
    int32x4_t low, high;
};
LANE vi veven_bytes(vi x) { return (vi)vshrq_n_s16(vshlq_n_s16((int16x8_t)x, 8), 8); }
LANE vi vodd_bytes(vi x) { return (vi)vshrq_n_s16((int16x8_t)x, 8); }
LANE vi vpair_bytes(const int8_t* p, const int8_t* q) {
    const int8x8_t low = (int8x8_t)vdup_n_s32(word_at(p)), high = (int8x8_t)vdup_n_s32(word_at(q));
    return (vi)vmovl_s8(vzip1_s8(low, high));
}
LANE vsum vzero_sum() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
LANE vsum vadd_pairs(vsum sum, vi a, vi b) {
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return {vmlal_s16(sum.low, vget_low_s16(x), vget_low_s16(y)), vmlal_high_s16(sum.high, x, y)};
}
LANE vf vtotal(vsum sum) { return (vf)vcvtq_f32_s32(vpaddq_s32(sum.low, sum.high)); }
LANE void vround_i16(int16_t* p, vf x) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32((float32x4_t)x))); }
LANE vf vload_f16(const uint16_t* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
LANE void vstore_f16(uint16_t* p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x))); }
#else
LANE vf vload(const float* p) {
    vf x;
    memcpy(&x, p, 16);
    return x;
}
LANE void vstore(float* p, vf x) { memcpy(p, &x, 16); }
LANE void vtranspose(vf* r, float* out, int stride) {
    for (int c = 0; c < 4; c++)
        for (int i = 0; i < 4; i++) out[c * stride + i] = r[i][c];
}
LANE vf vfma(vf a, vf b, vf c) { return a * b + c; }
LANE vf vround(vf a) {  // to even, for |a| < 2^22
    vf magic = vset(12582912.f);
    return (a + magic) - magic;
}
LANE vi vtoint(vf a) { return __builtin_convertvector(a, vi); }
LANE vf vload_bf16(const uint16_t* p) {
    vi x = {p[0], p[1], p[2], p[3]};
    return (vf)(x << 16);
}
LANE void vstore_bf16(uint16_t* p, vf x) {
    for (int i = 0; i < 4; i++) {
        uint32_t bits;
        memcpy(&bits, (const char*)&x + 4 * i, 4);
        p[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}
LANE vi vload_pairs(const void* p) {
    vi x;
    memcpy(&x, p, 16);
    return x;
}
LANE vi vset_pair(const int16_t* p) {
    const int32_t pair = word_at(p);
    return vi{pair, pair, pair, pair};
}
LANE void vstore_int(int32_t* p, vi x) { memcpy(p, &x, 16); }
typedef vi vsum;
LANE vi veven_bytes(vi x) { return ((x << 24) >> 24 & 0xffff) | ((x << 8) >> 24 << 16); }
LANE vi vodd_bytes(vi x) { return ((x << 16) >> 24 & 0xffff) | (x >> 24 << 16); }
LANE vi vpair_bytes(const int8_t* p, const int8_t* q) {
    vi x = {p[0], p[1], p[2], p[3]}, y = {q[0], q[1], q[2], q[3]};
    return (x & 0xffff) | (y << 16);
}
LANE vsum vzero_sum() { return vi{0, 0, 0, 0}; }
LANE vsum vadd_pairs(vsum sum, vi a, vi b) {
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
LANE vf vtotal(vsum sum) { return __builtin_convertvector(sum, vf); }
LANE void vround_i16(int16_t* p, vf x) {
    const vi whole = vtoint(vround(x));
    for (int i = 0; i < 4; i++) p[i] = (int16_t)whole[i];
}
LANE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13, bits = rest + (112u << 23);
    float x;
    if (rest >= (31u << 23)) {
        bits = rest | 0x7f800000u;
    } else if (rest < (1u << 23)) {  // subnormal: a multiple of 2^-24
        x = (float)(h & 0x3ff) * 5.9604644775390625e-8f;
        memcpy(&bits, &x, 4);
    }
    bits |= sign;
    memcpy(&x, &bits, 4);
    return x;
}
LANE uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;
    if (bits < 0x38800000u) {  // subnormal: let the adder round
        float y;
        memcpy(&y, &bits, 4);
        y += 0.5f;
        memcpy(&bits, &y, 4);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return sign | (uint16_t)((bits - (112u << 23)) >> 13);
}
LANE vf vload_f16(const uint16_t* p) {
    return vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
LANE void vstore_f16(uint16_t* p, vf x) {
    for (int i = 0; i < 4; i++) p[i] = float_to_half(x[i]);
}
#endif
LANE vf vscale2(vf x, vf n) { return (vf)((vi)x + (vtoint(n) << 23)); }

#endif

// 2^x for x < 128, exactly 0 below -126, NaN for NaN. Relative error below 2e-7.
LANE vf vexp2(vf x) {
    const vf lowest = vset(-126.f);
    vf y = vmin(vset(127.f), vmax(lowest, x)), n = vround(y), f = vsub(y, n);
    vf p = vset(1.32647238e-3f);
    p = vfma(p, f, vset(9.67151299e-3f));
    p = vfma(p, f, vset(5.55073358e-2f));
    p = vfma(p, f, vset(2.40222424e-1f));
    p = vfma(p, f, vset(6.93147004e-1f));
    p = vfma(p, f, vset(1.f));
    return vclear_lt(vscale2(p, n), x, lowest);
}

// The sum of 16 lanes in a fixed order.
LANE float sum16(const float* x) {
    float s[16];
    memcpy(s, x, sizeof s);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

LANE float max16(const float* x) {
    float m = x[0];
    for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
    return m;
}
