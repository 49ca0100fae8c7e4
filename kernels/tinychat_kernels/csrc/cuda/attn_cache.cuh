// How the rows of a cache become fragments: what a lane loads of a key and of a value, in 16 bits and in 8.
#pragma once

#include "rows.cuh"

// So many words from memory that is read once.
template <int words>
struct Words {
    u32 at[words];

    __device__ __forceinline__ void load(const unsigned char* from) {
        if constexpr (words == 4) {
            const uint4 four = load_once(from);
            at[0] = four.x, at[1] = four.y, at[2] = four.z, at[3] = four.w;
        } else if constexpr (words == 2) {
            const uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
            at[0] = two.x, at[1] = two.y;
        } else {
            at[0] = __ldg(reinterpret_cast<const u32*>(from));
        }
    }
};

// Whether a weight of this type is too coarse: its rest is multiplied too.
template <class Type>
constexpr bool kCoarse = true;
template <>
constexpr bool kCoarse<F16> = false;

// A cache of the activations' type.
template <class Type>
struct Plain {
    using Math = Type;
    static constexpr int kBytes = 2;
    static constexpr bool kScaled = false;

    // Four channels of a key from its words: two words of two.
    template <int words>
    __device__ static __forceinline__ void key(const Words<words>& from, int step, u32 (&out)[2]) {
        out[0] = from.at[2 * step];
        out[1] = from.at[2 * step + 1];
    }
    // Channels 2i and 2i + 1 of two keys: a word for each channel.
    template <int words>
    __device__ static __forceinline__ void values(const Words<words>& first, const Words<words>& second, int i,
                                                  u32 (&out)[2]) {
        out[0] = __byte_perm(first.at[i], second.at[i], 0x5410);
        out[1] = __byte_perm(first.at[i], second.at[i], 0x7632);
    }
};

// A cache of int8, whose numbers are exact in half precision; scales come later.
struct Rounded {
    using Math = F16;
    static constexpr int kBytes = 1;
    static constexpr bool kScaled = true;

    // Bytes x + 128 in the order of the selector -> halves x: 0x6400 | byte is 1024 + byte.
    __device__ static __forceinline__ u32 halves(u32 bytes, u32 selector) {
        const u32 magic = __byte_perm(bytes, 0x64646464u, selector), offset = 0xe480e480u;  // -1152
        return bit_cast<u32>(__hadd2(bit_cast<__half2>(magic), bit_cast<__half2>(offset)));
    }
    template <int words>
    __device__ static __forceinline__ void key(const Words<words>& from, int step, u32 (&out)[2]) {
        const u32 bytes = from.at[step] ^ 0x80808080u;
        out[0] = halves(bytes, 0x4140);
        out[1] = halves(bytes, 0x4342);
    }
    template <int words>
    __device__ static __forceinline__ void values(const Words<words>& first, const Words<words>& second, int i,
                                                  u32 (&out)[2]) {
        const u32 pairs = __byte_perm(first.at[i / 2], second.at[i / 2], i % 2 ? 0x7362 : 0x5140) ^ 0x80808080u;
        out[0] = halves(pairs, 0x4140);
        out[1] = halves(pairs, 0x4342);
    }
};

// How the channels of a head lie in fragments. A lane's place in a row ends with the row: what it has twice then meets
// zeros of q, or gives sums that nobody wants.
template <int Dim, class Cache>
struct Shape {
    static constexpr int kRow = Dim * Cache::kBytes;
    static constexpr int kKeyWords = kRow >= 64 ? 4 : kRow / 16, kValueWords = kRow >= 80 ? 4 : kRow / 32;
    static constexpr int kKeyChunk = 16 * kKeyWords, kValueChunk = 32 * kValueWords;  // bytes: 4 lanes, 8 lanes
    static constexpr int kKeyChunks = (kRow + kKeyChunk - 1) / kKeyChunk;
    static constexpr int kValueChunks = (kRow + kValueChunk - 1) / kValueChunk;
    static constexpr int kPieces = kRow > 256 ? 4 : 1;  // that a tile's keys, and its values, are loaded in
    static constexpr int kKeyPiece = kKeyChunks / kPieces, kValuePiece = kValueChunks / kPieces;
    static constexpr int kSteps = kKeyWords / Cache::kBytes;        // of 16 channels, a chunk: 4 of them a lane
    static constexpr int kTiles = 2 * kValueWords / Cache::kBytes;  // of 16 channels, a chunk: 2 of them a lane
    static_assert(kKeyChunks % kPieces == 0 && kValueChunks % kPieces == 0, "pieces are of one size");

    __device__ static __forceinline__ int key_byte(int chunk, int t) { return chunk * kKeyChunk + 4 * kKeyWords * t; }
    __device__ static __forceinline__ int value_byte(int chunk, int g) {
        return chunk * kValueChunk + 4 * kValueWords * g;
    }
};
