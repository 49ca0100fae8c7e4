// How packed weights lie in memory: one layout for all instruction sets, for one row and for many.
//
// A block is 16 outputs times one group of inputs; the blocks of 16 outputs follow each other by group. A block is a
// header and then lines of 64 bytes:
//   header   0: 16 zero points, a byte each (4 bits only)   32: 16 scales of 16 bits, or   64: 16 scales of 32 bits
//   4 bits   line j holds inputs 8j..8j+7: byte 4r+i has output r's input 8j+i below and 8j+4+i above
//   8 bits   line j holds inputs 4j..4j+3: byte 4r+i has output r's input 4j+i, plus 128; what is no input is 128
// So a lane of 32 bits is an output everywhere, and no sum runs across lanes. Outputs past the last one have scale 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "tinychat.h"

namespace tinychat {

constexpr int kLanes = 16;
constexpr int64_t kLine = 64;
constexpr int kMiddle = 128;  // what 8-bit weights are stored with

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Blocks {
    explicit Blocks(const tc_weights& w)
        : data(static_cast<const uint8_t*>(w.blocks)),
          outputs(w.outputs),
          group(w.group),
          groups(w.inputs / w.group),
          bits(w.bits),
          scale(w.scale),
          header(w.scale == TC_F32 ? 128 : 64),
          lines((w.group * w.bits + 31) / 32),
          bytes(header + lines * kLine) {}

    const uint8_t* at(int64_t block, int64_t g) const { return data + (block * groups + g) * bytes; }
    int64_t count() const { return (outputs + kLanes - 1) / kLanes; }

    const uint8_t* data;
    int64_t outputs;
    int64_t group;
    int64_t groups;
    int bits;
    int scale;
    int64_t header;
    int64_t lines;  // of a block
    int64_t bytes;  // of a block
};

constexpr int64_t scale_size(int scale) { return scale == TC_F32 ? 4 : 2; }
constexpr int64_t scales_at(int scale) { return scale == TC_F32 ? 64 : 32; }

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// IEEE half -> float, subnormal numbers and all.
inline float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Shifted into a float the exponent is 112 too small; one multiplication mends it for subnormal numbers too.
    const float value = from_bits(magnitude << 13) * 0x1p112f;
    return from_bits(sign | to_bits(value));
}

inline float scale_of(const uint8_t* block, int scale, int lane) {
    const uint8_t* at = block + scales_at(scale);
    if (scale == TC_F32) {
        float value;
        std::memcpy(&value, at + 4 * lane, sizeof value);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, at + 2 * lane, sizeof half);
    return scale == TC_BF16 ? from_bits(static_cast<uint32_t>(half) << 16) : from_half(half);
}

}  // namespace tinychat
