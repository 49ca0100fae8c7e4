// Weights in tiles of 16 outputs times 64 inputs, and how they become 16-bit numbers. cuda_layout.py packs them.
//
// A lane's 16 bytes of a tile are four words, one for 16 inputs each. With g = lane / 4 and t = lane % 4, word s holds
// inputs 16s + 2t, +1, +8, +9 of outputs g and g + 8: just the fragment that mma takes as 16 rows of a, and as two
// times 8 columns of b. Pair p of a word is the fragment's word p: output g + 8 (p & 1), inputs 16s + 2t + 8 (p >> 1)
// and the next; its two nibbles lie at bits 4p and 4p + 16. Two tiles (128 inputs) are a unit. 8-bit weights have two
// planes a unit: q = 16 (high - 8) + low. A group's scale is a float whose lowest 8 bits are its zero point; those of
// outputs g and g + 8 lie together.
#pragma once

#include "device.cuh"

constexpr int kTileOutputs = 16;
constexpr int kUnitInputs = 128;

// The word of a tile's four that holds inputs 16 step to 16 step + 15.
__device__ __forceinline__ u32 word_of(const uint4& four, int step) {
    switch (step) {
        case 0: return four.x;
        case 1: return four.y;
        case 2: return four.z;
        default: return four.w;
    }
}

// What a lane has of a unit.
template <int Bits>
struct Unit {
    static constexpr int kPlanes = Bits / 4;
    static constexpr int kStride = 32 * 2 * kPlanes;  // from a unit to the next
    uint4 tiles[kPlanes][2];

    __device__ __forceinline__ void load(const uint4* lane_words, bool wanted) {
#pragma unroll
        for (int i = 0; i < 2 * kPlanes; ++i) tiles[i / 2][i % 2] = load_once(lane_words + 32 * i, wanted);
    }
    __device__ __forceinline__ u32 word(int plane, int step) const { return word_of(tiles[plane][step / 4], step % 4); }
};

template <class Two>
__device__ __forceinline__ u32 bits_of(const Two& two) {
    return bit_cast<u32>(two);
}

// What is taken off the magic numbers of a group: those of outputs g and of outputs g + 8.
struct Zeros {
    u32 first, second;
};

// Which bits of a word are taken at a time. A constant the compiler would write into a register before each use, so
// these come from a value that it does not know: the upper bits of the number of inputs, which are 0.
struct Masks {
    u32 low, high;
    __device__ __forceinline__ explicit Masks(int inputs)
        : low(0x000f000fu + (inputs >> 30)), high(0x00f000f0u + (inputs >> 30)) {}
};

// The zero point in a scale's word, in both halves of one.
__device__ __forceinline__ u32 zero_twice(u32 scale) { return __byte_perm(scale, 0, 0x4040); }
__device__ __forceinline__ float scale_of(u32 scale) { return __uint_as_float(scale & 0xffffff00u); }

// The nibbles of a word less their zero point, exactly, as four words of two numbers.
template <class Type>
struct Nibbles;

template <>
struct Nibbles<F16> {  // 0x6400 | q is 1024 + q; with q four bits higher, 1024 + 16q, a sixteenth of which is 64 + q
    static constexpr u32 kMagic = 0x64006400u, kSixteenth = 0x2c002c00u;

    __device__ static __forceinline__ Zeros zeros(u32 first, u32 second) {  // -(1024 + z) and -(64 + z)
        return {zero_twice(first) | 0xe400e400u, zero_twice(second) << 4 | 0xd400d400u};
    }
    __device__ static __forceinline__ void decode(u32 word, const Zeros& zeros, const Masks& masks,
                                                  u32 (&out)[4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i, word >>= 8) {
            const u32 low = (word & masks.low) | kMagic, high = (word & masks.high) | kMagic;
            out[2 * i] = bits_of(__hadd2(bit_cast<__half2>(low), bit_cast<__half2>(zeros.first)));
            out[2 * i + 1] = bits_of(
                __hfma2(bit_cast<__half2>(high), bit_cast<__half2>(kSixteenth), bit_cast<__half2>(zeros.second)));
        }
    }
};

#ifdef TINYCHAT_BF16
template <>
struct Nibbles<BF16> {  // 0x4300 | q is 128 + q; there is no room for a q four bits higher
    static constexpr u32 kMagic = 0x43004300u;

    __device__ static __forceinline__ Zeros zeros(u32 first, u32 second) {  // -(128 + z)
        return {zero_twice(first) | 0xc300c300u, zero_twice(second) | 0xc300c300u};
    }
    __device__ static __forceinline__ void decode(u32 word, const Zeros& zeros, const Masks& masks,
                                                  u32 (&out)[4]) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 magic = (word >> (4 * p) & masks.low) | kMagic, zero = p % 2 ? zeros.second : zeros.first;
            out[p] = bits_of(__hadd2(bit_cast<__nv_bfloat162>(magic), bit_cast<__nv_bfloat162>(zero)));
        }
    }
};
#endif

// A lane's weights of 16 inputs as a fragment, without their scale.
template <class Type, int Bits>
__device__ __forceinline__ void decode(const Unit<Bits>& unit, int step, const Zeros& zeros, const Masks& masks,
                                       u32 (&out)[4]) {
    if (Bits == 4) return Nibbles<Type>::decode(unit.word(0, step), zeros, masks, out);
    using Two = typename Type::Two;
    u32 high[4], low[4];
    Nibbles<Type>::decode(unit.word(0, step), Nibbles<Type>::zeros(8, 8), masks, high);
    Nibbles<Type>::decode(unit.word(Bits / 4 - 1, step), Nibbles<Type>::zeros(0, 0), masks, low);
    const Two sixteen = Type::from_floats(16.0f, 16.0f);
#pragma unroll
    for (int p = 0; p < 4; ++p) out[p] = bits_of(__hfma2(bit_cast<Two>(high[p]), sixteen, bit_cast<Two>(low[p])));
}

// The entries of a unit, made by DO(name, Type, group) for every type and group, or for those alone that a compilation
// names: TINYCHAT_TYPE=f16, TINYCHAT_GROUP=128.
#define FOR_GROUPS_f16(DO) FOR_GROUPS(DO, f16, F16)
#ifdef TINYCHAT_BF16
#define FOR_GROUPS_bf16(DO) FOR_GROUPS(DO, bf16, BF16)
#else
#define FOR_GROUPS_bf16(DO)
#endif
#ifdef TINYCHAT_GROUP
#define FOR_GROUPS(DO, name, Type) EXPANDED(DO, name, Type, TINYCHAT_GROUP)
#else
#define FOR_GROUPS(DO, name, Type) DO(name, Type, 32) DO(name, Type, 64) DO(name, Type, 128)
#endif
#ifdef TINYCHAT_TYPE
#define FOR_ALL(DO) CHOSEN(TINYCHAT_TYPE, DO)
#else
#define FOR_ALL(DO) FOR_GROUPS_f16(DO) FOR_GROUPS_bf16(DO)
#endif
#define EXPANDED(DO, name, Type, group) DO(name, Type, group)
#define CHOSEN(type, DO) JOINED(FOR_GROUPS_, type)(DO)
#define JOINED(a, b) a##b
