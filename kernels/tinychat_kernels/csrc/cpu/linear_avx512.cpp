// The inner loops for AVX-512 with VNNI: a register is a line, a lane of it an output.
#if defined(__x86_64__)

#include <immintrin.h>

#include "dispatch.h"
#include "linear_kernels.h"

TINYCHAT_TARGET_BEGIN(TINYCHAT_AVX512)

#include "unrolled.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 2048;  // bytes that streaming reads ahead

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

inline __m512i quad(const int8_t* values) {
    int32_t four;
    __builtin_memcpy(&four, values, sizeof four);
    return _mm512_set1_epi32(four);
}

inline __m512 scales_of(const uint8_t* block, int scale) {
    const uint8_t* at = block + scales_at(scale);
    if (scale == TC_F32) return _mm512_loadu_ps(at);
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if (scale == TC_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512i zeros_of(const uint8_t* block) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block)));
}

// zero points (0 to 15) times the sum of a group's values, which fits into 16 bits
inline __m512i correction(__m512i zeros, int32_t sum) {
    return _mm512_madd_epi16(zeros, _mm512_set1_epi32(sum & 0xffff));
}

void quantize(const float* x, int64_t inputs, int64_t group, const Quantized& out, int64_t row) {
    const __m512i magnitude = _mm512_set1_epi32(static_cast<int>(kMagnitude));
    int8_t* values = out.values + row * out.stride;
    for (int64_t g = 0; g < inputs / group; ++g) {
        const float* from = x + g * group;
        int8_t* to = values + g * group;
        __m512i largest = _mm512_setzero_si512();
        for (int64_t i = 0; i < group; i += kLanes) {
            const __mmask16 some = group - i < kLanes ? static_cast<__mmask16>((1u << (group - i)) - 1) : 0xffff;
            const __m512i bits = _mm512_maskz_loadu_epi32(some, from + i);
            largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
        }
        const Rounding rounding = rounding_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
        // Inf times 0 would not be 0.
        const __mmask16 finite = rounding.inverse == 0.0f ? 0 : 0xffff;
        const __m512 inverse = _mm512_set1_ps(rounding.inverse);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < group; i += kLanes) {
            const __mmask16 some = group - i < kLanes ? static_cast<__mmask16>((1u << (group - i)) - 1) : 0xffff;
            const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(some & finite, from + i), inverse);
            const __m512i rounded = _mm512_cvtps_epi32(scaled);
            sum = _mm512_add_epi32(sum, rounded);
            _mm512_mask_cvtepi32_storeu_epi8(to + i, some, rounded);
        }
        out.scales[row * out.groups + g] = rounding.scale;
        out.sums[row * out.groups + g] = _mm512_reduce_add_epi32(sum);
    }
    __builtin_memset(values + inputs, 0, static_cast<size_t>(out.stride - inputs));
}

// sum += dot product times both scales
inline void add_group(__m512& sum, __m512i dot, __m512 scales, float row_scale) {
    sum = _mm512_fmadd_ps(_mm512_mul_ps(scales, _mm512_set1_ps(row_scale)), _mm512_cvtepi32_ps(dot), sum);
}

template <int kRows>
inline void store(const __m512 (&sums)[kRows], float* out) {
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE { _mm512_storeu_ps(out + r * kLanes, sums[r]); });
}

// The nibbles above are left in place and count 16 fold; one shift of their sum mends that. A single row has two
// sums more, so that no product waits for the one before it.
template <int kRows>
void stream4(const Blocks& w, int64_t block, const Quantized& x, int64_t row, float* out) {
    constexpr int kChains = kRows == 1 ? 2 : 1;
    const __m512i below = _mm512_set1_epi8(0x0f), above = _mm512_set1_epi8(static_cast<char>(0xf0));
    __m512 sums[kRows];
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE { sums[r] = _mm512_setzero_ps(); });
    const uint8_t* at = w.at(block, 0);
    for (int64_t g = 0; g < w.groups; ++g, at += w.bytes) {
        const int8_t* values = x.values + row * x.stride + g * w.group;
        const uint8_t* line = at + w.header;
        __m512i low[kChains][kRows], high[kChains][kRows];
        unrolled<kChains * kRows>([&](auto i) TINYCHAT_INLINE {
            low[i / kRows][i % kRows] = high[i / kRows][i % kRows] = _mm512_setzero_si512();
        });
        for (int64_t j = 0; j < w.lines; j += 2, line += 2 * kLine, values += 16) {
            unrolled<2>([&](auto u) TINYCHAT_INLINE {
                constexpr int c = u % kChains;
                const __m512i pair = load(line + u * kLine);
                _mm_prefetch(reinterpret_cast<const char*>(line + u * kLine + kAhead), _MM_HINT_T0);
                const __m512i first = _mm512_and_si512(pair, below), second = _mm512_and_si512(pair, above);
                unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
                    const int8_t* from = values + r * x.stride + 8 * u;
                    low[c][r] = _mm512_dpbusd_epi32(low[c][r], first, quad(from));
                    high[c][r] = _mm512_dpbusd_epi32(high[c][r], second, quad(from + 4));
                });
            });
        }
        const __m512i zeros = zeros_of(at);
        const __m512 scales = scales_of(at, w.scale);
        const int64_t of_group = row * x.groups + g;
        unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
            if constexpr (kChains == 2) {
                low[0][r] = _mm512_add_epi32(low[0][r], low[1][r]);
                high[0][r] = _mm512_add_epi32(high[0][r], high[1][r]);
            }
            const __m512i both = _mm512_add_epi32(low[0][r], _mm512_srai_epi32(high[0][r], 4));
            const __m512i dot = _mm512_sub_epi32(both, correction(zeros, x.sums[of_group + r * x.groups]));
            add_group(sums[r], dot, scales, x.scales[of_group + r * x.groups]);
        });
    }
    store<kRows>(sums, out);
}

template <int kRows>
void stream8(const Blocks& w, int64_t block, const Quantized& x, int64_t row, float* out) {
    constexpr int kChains = kRows <= 2 ? 4 : 2;
    __m512 sums[kRows];
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE { sums[r] = _mm512_setzero_ps(); });
    const uint8_t* at = w.at(block, 0);
    for (int64_t g = 0; g < w.groups; ++g, at += w.bytes) {
        const int8_t* values = x.values + row * x.stride + g * w.group;
        const uint8_t* line = at + w.header;
        const int64_t of_group = row * x.groups + g;
        __m512i dots[kChains][kRows];
        unrolled<kChains * kRows>([&](auto i) TINYCHAT_INLINE {
            constexpr int r = i % kRows;
            dots[i / kRows][r] = _mm512_set1_epi32(i < kRows ? -kMiddle * x.sums[of_group + r * x.groups] : 0);
        });
        int64_t j = 0;
        for (; j + kChains <= w.lines; j += kChains, line += kChains * kLine, values += kChains * 4) {
            unrolled<kChains>([&](auto c) TINYCHAT_INLINE {
                const __m512i four = load(line + c * kLine);
                _mm_prefetch(reinterpret_cast<const char*>(line + c * kLine + kAhead), _MM_HINT_T0);
                unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
                    dots[c][r] = _mm512_dpbusd_epi32(dots[c][r], four, quad(values + r * x.stride + 4 * c));
                });
            });
        }
        for (; j < w.lines; ++j, line += kLine, values += 4)
            unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
                dots[0][r] = _mm512_dpbusd_epi32(dots[0][r], load(line), quad(values + r * x.stride));
            });
        const __m512 scales = scales_of(at, w.scale);
        unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
            unrolled<kChains - 1>([&](auto c) TINYCHAT_INLINE {
                dots[0][r] = _mm512_add_epi32(dots[0][r], dots[c + 1][r]);
            });
            add_group(sums[r], dots[0][r], scales, x.scales[of_group + r * x.groups]);
        });
    }
    store<kRows>(sums, out);
}

using StreamRows = void (*)(const Blocks&, int64_t, const Quantized&, int64_t, float*);
constexpr StreamRows kStream4[kStreamRows] = {stream4<1>, stream4<2>, stream4<3>, stream4<4>,
                                              stream4<5>, stream4<6>, stream4<7>, stream4<8>};
constexpr StreamRows kStream8[kStreamRows] = {stream8<1>, stream8<2>, stream8<3>, stream8<4>,
                                              stream8<5>, stream8<6>, stream8<7>, stream8<8>};

template <const StreamRows (&kTable)[kStreamRows]>
void stream(const Blocks& w, int64_t block, const Quantized& x, int64_t row, int rows, float* out) {
    kTable[rows - 1](w, block, x, row, out);
}

void clear(const Panel& panel, int64_t count, int b) {
    for (int64_t g = 0; g < count; ++g) {
        __builtin_memset(panel.part(g, b), 0, static_cast<size_t>(panel.quads * kLine));
        __builtin_memset(panel.scales_of(g, b), 0, kLanes * sizeof(float));
        __builtin_memset(panel.zeros_of(g, b), 0, kLanes * sizeof(int32_t));
    }
}

void unpack4(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    if (block >= w.count()) return clear(panel, count, b);
    const __m512i below = _mm512_set1_epi8(0x0f);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* at = w.at(block, first + g);
        const uint8_t* line = at + w.header;
        uint8_t* to = panel.part(g, b);
        for (int64_t j = 0; j < w.lines; ++j, line += kLine, to += 2 * kLine) {
            const __m512i pair = load(line);
            _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0);
            _mm512_storeu_si512(to, _mm512_and_si512(pair, below));
            _mm512_storeu_si512(to + kLine, _mm512_and_si512(_mm512_srli_epi16(pair, 4), below));
        }
        _mm512_storeu_ps(panel.scales_of(g, b), scales_of(at, w.scale));
        _mm512_storeu_si512(panel.zeros_of(g, b), _mm512_sub_epi32(_mm512_setzero_si512(), zeros_of(at)));
    }
}

void unpack8(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    if (block >= w.count()) return clear(panel, count, b);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* at = w.at(block, first + g);
        __builtin_memcpy(panel.part(g, b), at + w.header, static_cast<size_t>(w.lines * kLine));
        _mm512_storeu_ps(panel.scales_of(g, b), scales_of(at, w.scale));
    }
}

// acc += unsigned weights * signed values. Compilers spill the accumulators of a tile where the intrinsic is used.
inline __attribute__((always_inline)) void add_products(__m512i& acc, __m512i weights, __m512i values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(values));
}

// One group of a tile: rows times kPanelBlocks blocks. The pointers are its own copies, since a store of a vector may
// alias everything, and the empty statement keeps the sums of the group before out of the registers.
template <int kBits, int kRows>
inline TINYCHAT_INLINE void multiply_group(const uint8_t* weights, const float* scales, const int32_t* zeros, int64_t quads,
                                           const int8_t* values, int64_t stride, const float* row_scales,
                                           const int32_t* row_sums, int64_t groups, float* sums) {
    const int64_t next_block = Panel::part_size(quads);
    __m512i dots[kRows][kPanelBlocks];
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
        const int32_t row_sum = row_sums[r * groups];
        unrolled<kPanelBlocks>([&](auto b) TINYCHAT_INLINE {
            if constexpr (kBits == 8) dots[r][b] = _mm512_set1_epi32(-kMiddle * row_sum);
            else dots[r][b] = correction(load(zeros + b * kLanes), row_sum);
        });
    });
    do {
        __m512i line[kPanelBlocks];
        unrolled<kPanelBlocks>([&](auto b) TINYCHAT_INLINE { line[b] = load(weights + b * next_block); });
        unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
            const __m512i four = quad(values + r * stride);
            unrolled<kPanelBlocks>([&](auto b) TINYCHAT_INLINE { add_products(dots[r][b], line[b], four); });
        });
        weights += kLine;
        values += 4;
    } while (--quads > 0);
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
        const float row_scale = row_scales[r * groups];
        unrolled<kPanelBlocks>([&](auto b) TINYCHAT_INLINE {
            float* to = sums + r * kPanelColumns + b * kLanes;
            __m512 sum = _mm512_loadu_ps(to);
            add_group(sum, dots[r][b], _mm512_loadu_ps(scales + b * kLanes), row_scale);
            _mm512_storeu_ps(to, sum);
        });
    });
    asm volatile("" ::: "memory");
}

template <int kBits, int kRows>
void multiply_tile(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, float* sums) {
    const int8_t* values = x.values + row * x.stride + first * panel.quads * 4;
    const int64_t of_group = row * x.groups + first;
    for (int64_t g = 0; g < count; ++g)
        multiply_group<kBits, kRows>(panel.part(g, 0), panel.scales_of(g, 0), panel.zeros_of(g, 0), panel.quads,
                                     values + g * panel.quads * 4, x.stride, x.scales + of_group + g,
                                     x.sums + of_group + g, x.groups, sums);
}

constexpr int kTileRows = 6;  // 24 accumulators, 4 lines and a quad: 29 of 32 registers

template <int kBits>
void multiply(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, int64_t rows,
              float* sums) {
    using Tile = void (*)(const Panel&, int64_t, int64_t, const Quantized&, int64_t, float*);
    constexpr Tile kTiles[kTileRows] = {multiply_tile<kBits, 1>, multiply_tile<kBits, 2>, multiply_tile<kBits, 3>,
                                        multiply_tile<kBits, 4>, multiply_tile<kBits, 5>, multiply_tile<kBits, 6>};
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t some = rows - r < kTileRows ? rows - r : kTileRows;
        kTiles[some - 1](panel, first, count, x, row + r, sums + r * kPanelColumns);
    }
}

// Input i (0 to 3) of a quad, of each lane, less the zero points.
inline __m512 weight(__m512i four, int shift, int mask, __m512i zeros) {
    const __m512i value = _mm512_and_si512(_mm512_srli_epi32(four, static_cast<unsigned>(shift)), _mm512_set1_epi32(mask));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(value, zeros));
}

template <int kBits, int kRows>
void exact_tile(const Blocks& w, int64_t block, const float* x, int64_t ldx, float* out) {
    constexpr int kQuadsALine = 8 / kBits, kMask = (1 << kBits) - 1;
    __m512 sums[kRows];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* at = w.at(block, g);
        const __m512i zeros = kBits == 8 ? _mm512_set1_epi32(kMiddle) : zeros_of(at);
        const float* from = x + g * w.group;
        __m512 parts[kRows][4];
        for (auto& row : parts)
            for (auto& part : row) part = _mm512_setzero_ps();
        for (int64_t k = 0; k < w.group; k += 4) {
            const __m512i four = load(at + w.header + k / 4 / kQuadsALine * kLine);
            const int above = k / 4 % kQuadsALine != 0 ? kBits : 0;
            const int some = w.group - k < 4 ? static_cast<int>(w.group - k) : 4;
            for (int i = 0; i < some; ++i) {
                const __m512 value = weight(four, 8 * i + above, kMask, zeros);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r)
                    parts[r][i] = _mm512_fmadd_ps(value, _mm512_set1_ps(from[r * ldx + k + i]), parts[r][i]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const __m512 dot = _mm512_add_ps(_mm512_add_ps(parts[r][0], parts[r][1]),
                                             _mm512_add_ps(parts[r][2], parts[r][3]));
            sums[r] = _mm512_fmadd_ps(scales_of(at, w.scale), dot, sums[r]);
        }
    }
    store<kRows>(sums, out);
}

template <int kBits>
void exact(const Blocks& w, int64_t block, const float* x, int64_t ldx, int rows, float* out) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) exact_tile<kBits, 4>(w, block, x + r * ldx, ldx, out + r * kLanes);
    for (; r < rows; ++r) exact_tile<kBits, 1>(w, block, x + r * ldx, ldx, out + r * kLanes);
}

int64_t products(int64_t rounds) {
    constexpr int kSums = kTileRows * kPanelBlocks;
    __m512i sums[kSums];
    unrolled<kSums>([&](auto n) TINYCHAT_INLINE { sums[n] = _mm512_setzero_si512(); });
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t i = 0; i < rounds; ++i)
        unrolled<kSums>([&](auto n) TINYCHAT_INLINE {
            asm volatile("vpdpbusd %1, %1, %0" : "+v"(sums[n]) : "v"(ones));
        });
    return rounds * kSums * kLine;
}

}  // namespace

const LinearKernels kLinearAvx512 = {quantize,    stream<kStream4>, stream<kStream8>, unpack4,  unpack8,
                                     multiply<4>, multiply<8>,      exact<4>,         exact<8>, products};

}  // namespace tinychat

TINYCHAT_TARGET_END

#endif
