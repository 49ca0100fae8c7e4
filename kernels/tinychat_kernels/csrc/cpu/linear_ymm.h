// The inner loops for registers of 256 bits: half a line, 8 outputs. Included by linear_avx2.cpp and
// linear_avxvnni.cpp inside their target, each after its own Products:
//   kTileRows                        rows of a tile
//   kStreamTile                      rows that streaming takes at once
//   kSigned8                         8-bit weights are made signed first
//   add4(sum, small, weights, x)     sum += the products of 0..15 and int8, maybe put off in `small`
//   settle(sum, small)               what was put off, after at most 32 inputs
//   add8(sum, weights, x)            sum += the products of a byte of the blocks and int8

#include "unrolled.h"

namespace tinychat {
namespace {

constexpr int kHalf = 8;
constexpr int64_t kAhead = 2048;   // bytes that streaming reads ahead
constexpr int64_t kSettle = 32;    // inputs

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline __m256i quad(const int8_t* values) {
    int32_t four;
    __builtin_memcpy(&four, values, sizeof four);
    return _mm256_set1_epi32(four);
}

inline __m256 scales_of(const uint8_t* block, int scale, int half) {
    const uint8_t* at = block + scales_at(scale) + half * kHalf * scale_size(scale);
    if (scale == TC_F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if (scale == TC_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline __m256i zeros_of(const uint8_t* block, int half) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(block + half * kHalf)));
}

// zero points (0 to 15) times the sum of a group's values, which fits into 16 bits
inline __m256i correction(__m256i zeros, int32_t sum) {
    return _mm256_madd_epi16(zeros, _mm256_set1_epi32(sum & 0xffff));
}

// What a sum of 8-bit products begins with.
inline __m256i beginning8(int32_t sum) {
    return Products::kSigned8 ? _mm256_setzero_si256() : _mm256_set1_epi32(-kMiddle * sum);
}

uint32_t largest_of(const float* x, int64_t count) {
    const __m256i magnitude = _mm256_set1_epi32(static_cast<int>(kMagnitude));
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + kHalf <= count; i += kHalf) largest = _mm256_max_epi32(largest, _mm256_and_si256(load(x + i), magnitude));
    alignas(32) uint32_t lanes[kHalf];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
    uint32_t most = 0;
    for (uint32_t lane : lanes) most = lane > most ? lane : most;
    for (; i < count; ++i) {
        const uint32_t bits = to_bits(x[i]) & kMagnitude;
        most = bits > most ? bits : most;
    }
    return most;
}

int32_t round_values(const float* x, int64_t count, float inverse, int8_t* to) {
    __m256i sums = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + kHalf <= count; i += kHalf) {
        const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(inverse)));
        sums = _mm256_add_epi32(sums, rounded);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i), _mm_packs_epi16(words, words));
    }
    alignas(32) int32_t lanes[kHalf];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    int32_t sum = 0;
    for (int32_t lane : lanes) sum += lane;
    for (; i < count; ++i) {
        to[i] = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(x[i] * inverse)));
        sum += to[i];
    }
    return sum;
}

}  // namespace
}  // namespace tinychat

#include "linear_round.h"

namespace tinychat {
namespace {

template <int kRows>
using Tile = __m256i[kRows][2];  // 16 outputs of each row

// Each half (0 and 1) of each row of a tile.
template <int kRows, class Body>
inline TINYCHAT_INLINE void each(Body&& body) {
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE { unrolled<2>([&](auto half) TINYCHAT_INLINE { body(r, half); }); });
}

// Adds a group's dot products, times both scales, to the sums [kRows, 16] of a tile.
template <int kRows>
inline TINYCHAT_INLINE void add_group(const Tile<kRows>& dots, __m256 first, __m256 second, const float* row_scales,
                                      int64_t groups, float* sums, int64_t ld) {
    unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
        const __m256 row_scale = _mm256_set1_ps(row_scales[r * groups]);
        unrolled<2>([&](auto half) TINYCHAT_INLINE {
            float* to = sums + r * ld + half * kHalf;
            const __m256 scale = _mm256_mul_ps(half == 0 ? first : second, row_scale);
            _mm256_storeu_ps(to, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[r][half]), _mm256_loadu_ps(to)));
        });
    });
}

template <int kRows>
void stream4(const Blocks& w, int64_t block, const Quantized& x, int64_t row, float* out) {
    const __m256i below = _mm256_set1_epi8(0x0f);
    __builtin_memset(out, 0, kRows * kLanes * sizeof(float));
    const uint8_t* at = w.at(block, 0);
    for (int64_t g = 0; g < w.groups; ++g, at += w.bytes) {
        const int8_t* values = x.values + row * x.stride + g * w.group;
        const uint8_t* line = at + w.header;
        const int64_t of_group = row * x.groups + g, stride = x.stride;
        const __m256i zeros[2] = {zeros_of(at, 0), zeros_of(at, 1)};
        Tile<kRows> dots;
        each<kRows>([&](auto r, auto half) TINYCHAT_INLINE {
            dots[r][half] = _mm256_sub_epi32(_mm256_setzero_si256(),
                                             correction(zeros[half], x.sums[of_group + r * x.groups]));
        });
        for (int64_t k = 0; k < w.group; k += kSettle) {
            Tile<kRows> small;
            each<kRows>([&](auto r, auto half) TINYCHAT_INLINE { small[r][half] = _mm256_setzero_si256(); });
            for (int j = 0; j < kSettle / 8; ++j, line += kLine, values += 8) {
                _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0);
                unrolled<2>([&](auto half) TINYCHAT_INLINE {
                    const __m256i pair = load(line + half * kLine / 2);
                    const __m256i first = _mm256_and_si256(pair, below);
                    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(pair, 4), below);
                    unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
                        Products::add4(dots[r][half], small[r][half], first, quad(values + r * stride));
                        Products::add4(dots[r][half], small[r][half], second, quad(values + r * stride + 4));
                    });
                });
            }
            each<kRows>([&](auto r, auto half) TINYCHAT_INLINE { Products::settle(dots[r][half], small[r][half]); });
        }
        add_group<kRows>(dots, scales_of(at, w.scale, 0), scales_of(at, w.scale, 1), x.scales + of_group, x.groups,
                         out, kLanes);
    }
}

template <int kRows>
void stream8(const Blocks& w, int64_t block, const Quantized& x, int64_t row, float* out) {
    __builtin_memset(out, 0, kRows * kLanes * sizeof(float));
    const uint8_t* at = w.at(block, 0);
    for (int64_t g = 0; g < w.groups; ++g, at += w.bytes) {
        const int8_t* values = x.values + row * x.stride + g * w.group;
        const uint8_t* line = at + w.header;
        const int64_t of_group = row * x.groups + g, stride = x.stride;
        Tile<kRows> dots;
        each<kRows>([&](auto r, auto half) TINYCHAT_INLINE {
            dots[r][half] = beginning8(x.sums[of_group + r * x.groups]);
        });
        for (int64_t j = 0; j < w.lines; ++j, line += kLine, values += 4) {
            _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0);
            const __m256i first = load(line), second = load(line + kLine / 2);
            unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
                const __m256i four = quad(values + r * stride);
                Products::add8(dots[r][0], first, four);
                Products::add8(dots[r][1], second, four);
            });
        }
        add_group<kRows>(dots, scales_of(at, w.scale, 0), scales_of(at, w.scale, 1), x.scales + of_group, x.groups,
                         out, kLanes);
    }
}

using StreamRows = void (*)(const Blocks&, int64_t, const Quantized&, int64_t, float*);
constexpr int kStreamTile = Products::kStreamTile;

// Rows beyond the first tile find the block in the cache.
template <StreamRows kTile, StreamRows kOne>
void stream(const Blocks& w, int64_t block, const Quantized& x, int64_t row, int rows, float* out) {
    int r = 0;
    for (; r + kStreamTile <= rows; r += kStreamTile) kTile(w, block, x, row + r, out + r * kLanes);
    for (; r < rows; ++r) kOne(w, block, x, row + r, out + r * kLanes);
}

void clear(const Panel& panel, int64_t count, int b) {
    for (int64_t g = 0; g < count; ++g) {
        __builtin_memset(panel.part(g, b), 0, static_cast<size_t>(panel.quads * kLine));
        __builtin_memset(panel.scales_of(g, b), 0, kLanes * sizeof(float));
        __builtin_memset(panel.zeros_of(g, b), 0, kLanes * sizeof(int32_t));
    }
}

inline void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

void unpack4(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    if (block >= w.count()) return clear(panel, count, b);
    const __m256i below = _mm256_set1_epi8(0x0f);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* at = w.at(block, first + g);
        const uint8_t* line = at + w.header;
        uint8_t* to = panel.part(g, b);
        for (int64_t j = 0; j < w.lines; ++j, line += kLine, to += 2 * kLine) {
            for (int half = 0; half < 2; ++half) {
                const __m256i pair = load(line + half * kLine / 2);
                store(to + half * kLine / 2, _mm256_and_si256(pair, below));
                store(to + kLine + half * kLine / 2, _mm256_and_si256(_mm256_srli_epi16(pair, 4), below));
            }
        }
        for (int half = 0; half < 2; ++half) {
            _mm256_storeu_ps(panel.scales_of(g, b) + half * kHalf, scales_of(at, w.scale, half));
            store(panel.zeros_of(g, b) + half * kHalf,
                  _mm256_sub_epi32(_mm256_setzero_si256(), zeros_of(at, half)));
        }
    }
}

void unpack8(const Blocks& w, int64_t block, int64_t first, int64_t count, int b, const Panel& panel) {
    if (block >= w.count()) return clear(panel, count, b);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* at = w.at(block, first + g);
        __builtin_memcpy(panel.part(g, b), at + w.header, static_cast<size_t>(w.lines * kLine));
        for (int half = 0; half < 2; ++half)
            _mm256_storeu_ps(panel.scales_of(g, b) + half * kHalf, scales_of(at, w.scale, half));
    }
}

// Rows times one group of one block, 4 bits.
template <int kRows>
inline TINYCHAT_INLINE void dots4(const uint8_t* line, const int8_t* values, int64_t stride, int64_t quads,
                                  Tile<kRows>& dots) {
    do {
        Tile<kRows> small;
        each<kRows>([&](auto r, auto half) TINYCHAT_INLINE { small[r][half] = _mm256_setzero_si256(); });
        for (int j = 0; j < kSettle / 4; ++j, line += kLine, values += 4) {
            const __m256i first = load(line), second = load(line + kLine / 2);
            unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
                const __m256i four = quad(values + r * stride);
                Products::add4(dots[r][0], small[r][0], first, four);
                Products::add4(dots[r][1], small[r][1], second, four);
            });
        }
        each<kRows>([&](auto r, auto half) TINYCHAT_INLINE { Products::settle(dots[r][half], small[r][half]); });
        quads -= kSettle / 4;
    } while (quads > 0);
}

// The same with 8 bits.
template <int kRows>
inline TINYCHAT_INLINE void dots8(const uint8_t* line, const int8_t* values, int64_t stride, int64_t quads,
                                  Tile<kRows>& dots) {
    do {
        const __m256i first = load(line), second = load(line + kLine / 2);
        unrolled<kRows>([&](auto r) TINYCHAT_INLINE {
            const __m256i four = quad(values + r * stride);
            Products::add8(dots[r][0], first, four);
            Products::add8(dots[r][1], second, four);
        });
        line += kLine;
        values += 4;
    } while (--quads > 0);
}

// The pointers are its own copies, since a store of a vector may alias everything.
template <int kBits, int kRows>
inline TINYCHAT_INLINE void multiply_block(const uint8_t* weights, const float* scales, const int32_t* zeros,
                                           int64_t quads, const int8_t* values, int64_t stride,
                                           const float* row_scales, const int32_t* row_sums, int64_t groups,
                                           float* sums) {
    Tile<kRows> dots;
    each<kRows>([&](auto r, auto half) TINYCHAT_INLINE {
        const int32_t sum = row_sums[r * groups];
        dots[r][half] = kBits == 8 ? beginning8(sum) : correction(load(zeros + half * kHalf), sum);
    });
    if constexpr (kBits == 8) dots8<kRows>(weights, values, stride, quads, dots);
    else dots4<kRows>(weights, values, stride, quads, dots);
    add_group<kRows>(dots, _mm256_loadu_ps(scales), _mm256_loadu_ps(scales + kHalf), row_scales, groups, sums,
                     kPanelColumns);
}

template <int kBits, int kRows>
void multiply_tile(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, float* sums) {
    const int8_t* values = x.values + row * x.stride + first * panel.quads * 4;
    const int64_t of_group = row * x.groups + first;
    for (int64_t g = 0; g < count; ++g)
        for (int b = 0; b < kPanelBlocks; ++b)
            multiply_block<kBits, kRows>(panel.part(g, b), panel.scales_of(g, b), panel.zeros_of(g, b), panel.quads,
                                         values + g * panel.quads * 4, x.stride, x.scales + of_group + g,
                                         x.sums + of_group + g, x.groups, sums + b * kLanes);
}

template <int kBits>
void multiply(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, int64_t rows,
              float* sums) {
    int64_t r = 0;
    for (; r + Products::kTileRows <= rows; r += Products::kTileRows)
        multiply_tile<kBits, Products::kTileRows>(panel, first, count, x, row + r, sums + r * kPanelColumns);
    for (; r + 2 <= rows; r += 2) multiply_tile<kBits, 2>(panel, first, count, x, row + r, sums + r * kPanelColumns);
    for (; r < rows; ++r) multiply_tile<kBits, 1>(panel, first, count, x, row + r, sums + r * kPanelColumns);
}

// Input i (0 to 3) of a quad, of each lane, less the zero points.
inline __m256 weight(__m256i four, int shift, int mask, __m256i zeros) {
    const __m256i value = _mm256_and_si256(_mm256_srli_epi32(four, shift), _mm256_set1_epi32(mask));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(value, zeros));
}

template <int kBits, int kRows>
void exact_half(const Blocks& w, int64_t block, int half, const float* x, int64_t ldx, float* out) {
    constexpr int kQuadsALine = 8 / kBits, kMask = (1 << kBits) - 1;
    __m256 sums[kRows];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* at = w.at(block, g);
        const __m256i zeros = kBits == 8 ? _mm256_set1_epi32(kMiddle) : zeros_of(at, half);
        const float* from = x + g * w.group;
        __m256 parts[kRows][4];
        for (auto& row : parts)
            for (auto& part : row) part = _mm256_setzero_ps();
        for (int64_t k = 0; k < w.group; k += 4) {
            const __m256i four = load(at + w.header + k / 4 / kQuadsALine * kLine + half * kLine / 2);
            const int above = k / 4 % kQuadsALine != 0 ? kBits : 0;
            const int some = w.group - k < 4 ? static_cast<int>(w.group - k) : 4;
            for (int i = 0; i < some; ++i) {
                const __m256 value = weight(four, 8 * i + above, kMask, zeros);
                for (int r = 0; r < kRows; ++r)
                    parts[r][i] = _mm256_fmadd_ps(value, _mm256_set1_ps(from[r * ldx + k + i]), parts[r][i]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const __m256 dot = _mm256_add_ps(_mm256_add_ps(parts[r][0], parts[r][1]),
                                             _mm256_add_ps(parts[r][2], parts[r][3]));
            sums[r] = _mm256_fmadd_ps(scales_of(at, w.scale, half), dot, sums[r]);
        }
    }
    for (int r = 0; r < kRows; ++r) _mm256_storeu_ps(out + r * kLanes + half * kHalf, sums[r]);
}

template <int kBits>
void exact(const Blocks& w, int64_t block, const float* x, int64_t ldx, int rows, float* out) {
    for (int half = 0; half < 2; ++half) {
        int r = 0;
        for (; r + 2 <= rows; r += 2) exact_half<kBits, 2>(w, block, half, x + r * ldx, ldx, out + r * kLanes);
        for (; r < rows; ++r) exact_half<kBits, 1>(w, block, half, x + r * ldx, ldx, out + r * kLanes);
    }
}

int64_t products(int64_t rounds) {
    constexpr int kSums = 12;
    __m256i sums[kSums], small[kSums];
    unrolled<kSums>([&](auto n) TINYCHAT_INLINE { sums[n] = small[n] = _mm256_setzero_si256(); });
    __m256i ones = _mm256_set1_epi8(1);
    for (int64_t i = 0; i < rounds; ++i)
        unrolled<kSums>([&](auto n) TINYCHAT_INLINE {
            asm volatile("" : "+x"(ones));  // so that no product is computed once for all
            Products::add4(sums[n], small[n], ones, ones);
        });
    unrolled<kSums>([&](auto n) TINYCHAT_INLINE { asm volatile("" ::"x"(sums[n]), "x"(small[n])); });
    return rounds * kSums * kLine / 2;
}

constexpr LinearKernels kTable = {
    quantize, stream<stream4<kStreamTile>, stream4<1>>, stream<stream8<kStreamTile>, stream8<1>>,
    unpack4,  unpack8,
    multiply<4>, multiply<8>, exact<4>, exact<8>, products};

}  // namespace
}  // namespace tinychat
