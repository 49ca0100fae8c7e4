// Packs weights into blocks: 4-bit ones from AWQ's GEMM layout, 8-bit ones from rows of int8.
#include "pack.h"

#include <algorithm>
#include <vector>

#include "blocks.h"

namespace tinychat {
namespace {

constexpr int64_t kPerWord = 8;
constexpr uint32_t kLowNibbles = 0x0f0f0f0f;

// Columns of a word's bytes in AWQ's order: of the nibbles below, and of those above.
constexpr int kColumnsBelow[4] = {0, 4, 1, 5};
constexpr int kColumnsAbove[4] = {2, 6, 3, 7};

void put_bytes(uint32_t bytes, const int (&columns)[4], int i, uint8_t* line) {
    for (int b = 0; b < 4; ++b) line[4 * columns[b] + i] = static_cast<uint8_t>(bytes >> 8 * b);
}

// Eight columns of eight inputs: words `near` and `far` are inputs 4 apart and share their bytes.
void put_words(uint32_t near, uint32_t far, int i, uint8_t* line) {
    put_bytes((near & kLowNibbles) | (far & kLowNibbles) << 4, kColumnsBelow, i, line);
    put_bytes((near >> 4 & kLowNibbles) | (far & ~kLowNibbles), kColumnsAbove, i, line);
}

struct Awq {
    const int32_t* qweight;
    const int32_t* qzeros;
    const uint8_t* scales;
    int64_t words;  // of a row
    int64_t groups_a_scale;
};

void pack_header4(const Blocks& w, const Awq& from, int64_t block, int64_t g, uint8_t* to) {
    const int64_t source = g / from.groups_a_scale, size = scale_size(w.scale);
    const int64_t column = block * kLanes, columns = std::min<int64_t>(kLanes, w.outputs - column);
    for (int64_t word = 0; word < columns / kPerWord; ++word) {
        const auto zeros = static_cast<uint32_t>(from.qzeros[source * from.words + column / kPerWord + word]);
        for (int b = 0; b < 4; ++b) {
            to[word * kPerWord + kColumnsBelow[b]] = zeros >> 8 * b & 15;
            to[word * kPerWord + kColumnsAbove[b]] = zeros >> (8 * b + 4) & 15;
        }
    }
    std::memcpy(to + scales_at(w.scale), from.scales + (source * w.outputs + column) * size,
                static_cast<size_t>(columns * size));
}

void pack_block4(const Blocks& w, const Awq& from, int64_t block, int64_t g, uint8_t* to) {
    std::memset(to, 0, static_cast<size_t>(w.bytes));
    pack_header4(w, from, block, g, to);
    const int64_t first = block * kLanes / kPerWord, words = std::min<int64_t>(2, from.words - first);
    for (int64_t j = 0; j < w.lines; ++j) {
        for (int64_t word = 0; word < words; ++word) {
            const int32_t* column = from.qweight + (g * w.group + 8 * j) * from.words + first + word;
            uint8_t* line = to + w.header + j * kLine + word * 4 * kPerWord;
            for (int i = 0; i < 4; ++i)
                put_words(static_cast<uint32_t>(column[i * from.words]),
                          static_cast<uint32_t>(column[(i + 4) * from.words]), i, line);
        }
    }
}

void pack_block8(const Blocks& w, const int8_t* values, const uint8_t* scales, int64_t block, int64_t g, uint8_t* to) {
    std::memset(to, 0, static_cast<size_t>(w.header));
    std::memset(to + w.header, kMiddle, static_cast<size_t>(w.lines * kLine));
    const int64_t inputs = w.groups * w.group, size = scale_size(w.scale);
    const int64_t columns = std::min<int64_t>(kLanes, w.outputs - block * kLanes);
    for (int64_t lane = 0; lane < columns; ++lane) {
        const int64_t output = block * kLanes + lane;
        const int8_t* from = values + output * inputs + g * w.group;
        uint8_t* lines = to + w.header + 4 * lane;
        for (int64_t i = 0; i < w.group; ++i) lines[i / 4 * kLine + i % 4] = static_cast<uint8_t>(from[i] + kMiddle);
        std::memcpy(to + scales_at(w.scale) + size * lane, scales + (output * w.groups + g) * size,
                    static_cast<size_t>(size));
    }
}

uint8_t* block_at(const Blocks& w, void* blocks, int64_t block, int64_t g) {
    return static_cast<uint8_t*>(blocks) + (block * w.groups + g) * w.bytes;
}

}  // namespace

size_t packed_size(const tc_weights& w) {
    const Blocks blocks(w);
    return static_cast<size_t>(blocks.count() * blocks.groups * blocks.bytes);
}

void pack_w4(Team& team, const tc_weights& w, const int32_t* qweight, const int32_t* qzeros, const void* scales,
             int64_t source_group, void* blocks) {
    const Blocks layout(w);
    const Awq from = {qweight, qzeros, static_cast<const uint8_t*>(scales), w.outputs / kPerWord,
                      source_group / w.group};
    const Range mine = team.share(layout.count(), 8);
    for (int64_t block = mine.begin; block < mine.end; ++block)
        for (int64_t g = 0; g < layout.groups; ++g) pack_block4(layout, from, block, g, block_at(layout, blocks, block, g));
}

void pack_w8(Team& team, const tc_weights& w, const int8_t* values, const void* scales, void* blocks) {
    const Blocks layout(w);
    const Range mine = team.share(layout.count());
    for (int64_t block = mine.begin; block < mine.end; ++block)
        for (int64_t g = 0; g < layout.groups; ++g)
            pack_block8(layout, values, static_cast<const uint8_t*>(scales), block, g,
                        block_at(layout, blocks, block, g));
}

}  // namespace tinychat
