// Attention of single tokens over a cache: parts of the keys run beside each other, and are combined afterwards.
//
// A block is a part of a row's keys with up to 8 query heads that share them; a warp takes every fourth tile of 16
// keys, straight from memory into fragments. Keys, then values, are a (16 keys, or 16 channels, are its rows), query
// heads are the 8 columns of b. Channels may stand in any order in a fragment as long as both sides have the same, so
// that a lane loads 16 bytes at a time. Lane = 4g + t, as device.cuh says of mma.
#include "attn_cache.cuh"

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kTile = 16;          // keys that a warp takes at a time
constexpr int kRound = 2 * kTile;  // parts are multiples of so many keys
constexpr int kHeads = 8;          // query heads of a block
constexpr int kMostSplits = kThreads;
constexpr float kLog2E = 1.4426950408889634f;
constexpr u32 kAll = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

struct Row {
    int slot, first, end;  // keys first to end - 1 are seen
};

__device__ __forceinline__ Row row_of(const int* positions, const int* slots, const int* begins, int row, int capacity,
                                      int window) {
    const int last = min(positions[row], capacity - 1);
    const int begin = begins == nullptr ? 0 : begins[row];
    return {slots[row], max(max(begin, 0), window > 0 ? last + 1 - window : 0), last + 1};
}

// What a warp knows of its share of the keys, for query heads 2t and 2t + 1: the largest exponent so far, and in units
// of its power the sum of this lane's weights, and the weighted sum of values.
template <class Type, int Dim, class Cache>
struct Attention {
    using S = Shape<Dim, Cache>;
    using Math = typename Cache::Math;

    const unsigned char *keys, *values;        // of this slot and key head
    const float *key_scales, *value_scales;    // likewise
    int end;                                   // of the part
    int g, t;
    u32 q[S::kKeyChunks][S::kSteps][2];
    float factors[2];                          // of the scores of heads 2t and 2t + 1: to exponents of 2
    float most[2] = {-infinity(), -infinity()}, weights[2] = {0, 0};
    float above[2] = {-infinity(), -infinity()};  // the largest of exponent and scale together, less `most`
    float sums[S::kValueChunks][S::kTiles][4] = {};  // channels 2i and 2i + 1 of this lane, heads 2t and 2t + 1
    Words<S::kKeyWords> key_words[S::kPieces][S::kKeyPiece][2];        // keys g and g + 8
    Words<S::kValueWords> value_words[S::kPieces][S::kValuePiece][4];  // keys 2t, 2t + 1, 2t + 8 and 2t + 9
    float scales[4];                           // of keys g and g + 8: of the key, and the logarithm of the value's

    // Behind the last key, the last one again: its weight is 0.
    __device__ __forceinline__ int at(int key) const { return min(key, end - 1); }

    __device__ __forceinline__ void load_keys(int tile, int piece) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned char* row = keys + static_cast<long long>(at(tile + g + 8 * i)) * S::kRow;
#pragma unroll
            for (int c = 0; c < S::kKeyPiece; ++c) {
                const int byte = S::key_byte(piece * S::kKeyPiece + c, t);
                key_words[piece][c][i].load(row + min(byte, S::kRow - 4 * S::kKeyWords));
            }
        }
    }
    __device__ __forceinline__ void load_values(int tile, int piece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = at(tile + 2 * t + i % 2 + 8 * (i / 2));
            const unsigned char* row = values + static_cast<long long>(key) * S::kRow;
#pragma unroll
            for (int c = 0; c < S::kValuePiece; ++c) {
                const int byte = S::value_byte(piece * S::kValuePiece + c, g);
                value_words[piece][c][i].load(row + min(byte, S::kRow - 4 * S::kValueWords));
            }
        }
    }
    __device__ __forceinline__ void load_scales(int tile) {
        if constexpr (Cache::kScaled) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                scales[i] = __ldg(key_scales + at(tile + g + 8 * i));
                const float value = __ldg(value_scales + at(tile + g + 8 * i));
                scales[2 + i] = log2f(value == 0 ? 1e-30f : value);  // such values are 0 anyway
            }
        }
    }

    // q of head g, at this lane's channels; zeros where there is no such head or channel. For int8, a power of 2 is
    // taken out, so that every q fits half precision.
    __device__ __forceinline__ void load_q(const typename Type::One* from, bool there, float scale) {
        u32 largest = 0;
#pragma unroll
        for (int c = 0; c < S::kKeyChunks; ++c) {
#pragma unroll
            for (int s = 0; s < S::kSteps; ++s) {
                const int channel = S::key_byte(c, t) / Cache::kBytes + 4 * s;
                const bool valid = there && channel < Dim;
                const uint2 four = valid ? *reinterpret_cast<const uint2*>(from + channel) : make_uint2(0, 0);
                q[c][s][0] = four.x;
                q[c][s][1] = four.y;
                if constexpr (Cache::kScaled) largest = max(largest, max(magnitudes(four.x), magnitudes(four.y)));
            }
        }
        float power = 1.0f;
        if constexpr (Cache::kScaled) {
            largest = join_lanes<Largest>(largest, 4) & 0x7f800000u;
            if (largest != 0) power = __uint_as_float(largest);
            halve_q(1.0f / power);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) factors[i] = scale * kLog2E * __shfl_sync(kAll, power, 8 * t + 4 * i);
    }
    __device__ static __forceinline__ u32 magnitudes(u32 word) {
        const float2 two = Type::to_floats(bit_cast<typename Type::Two>(word));
        return max(magnitude(two.x), magnitude(two.y));
    }
    __device__ __forceinline__ void halve_q(float by) {
#pragma unroll
        for (int i = 0; i < S::kKeyChunks * S::kSteps * 2; ++i) {
            u32& word = q[i / (2 * S::kSteps)][i / 2 % S::kSteps][i % 2];
            const float2 two = Type::to_floats(bit_cast<typename Type::Two>(word));
            word = bit_cast<u32>(Math::from_floats(two.x * by, two.y * by));
        }
    }

    // scores: keys g and g + 8 (upper pair) times heads 2t and 2t + 1.
    __device__ __forceinline__ void score(int piece, float (&scores)[4]) const {
#pragma unroll
        for (int c = 0; c < S::kKeyPiece; ++c) {
#pragma unroll
            for (int s = 0; s < S::kSteps; ++s) {
                u32 rows[2][2];
                Cache::key(key_words[piece][c][0], s, rows[0]);
                Cache::key(key_words[piece][c][1], s, rows[1]);
                const u32 a[4] = {rows[0][0], rows[1][0], rows[0][1], rows[1][1]};
                mma<Math>(scores, a, q[piece * S::kKeyPiece + c][s], scores);
            }
        }
    }

    // Over the lanes that share heads 2t and 2t + 1.
    __device__ static __forceinline__ float largest(float x) {
#pragma unroll
        for (int other = 4; other < kWarpSize; other *= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, other));
        return x;
    }

    // Scores become weights of values. A value's scale goes into the exponent, and the largest exponent is taken off,
    // so that no weight is above 1 and the largest is 1 whatever the scales are.
    __device__ __forceinline__ void weigh(int tile, float (&scores)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            scores[j] *= factors[j % 2];
            if constexpr (Cache::kScaled) scores[j] *= scales[j / 2];
            if (tile + g + 8 * (j / 2) >= end) scores[j] = -infinity();
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float &near = scores[i], &far = scores[2 + i];
            const float top = fmaxf(most[i], largest(fmaxf(near, far)));
            float kept = exp2f(most[i] - top);
            near -= top;
            far -= top;
            if constexpr (Cache::kScaled) {
                weights[i] = fmaf(weights[i], kept, exp2f(near) + exp2f(far));
                near += scales[2];
                far += scales[3];
                const float before = above[i] + (most[i] - top);
                above[i] = fmaxf(before, largest(fmaxf(near, far)));
                kept = exp2f(before - above[i]);
                near = exp2f(near - above[i]);
                far = exp2f(far - above[i]);
            } else {
                near = exp2f(near);
                far = exp2f(far);
                weights[i] = fmaf(weights[i], kept, near + far);
            }
            most[i] = top;
#pragma unroll
            for (int c = 0; c < S::kValueChunks * S::kTiles; ++c) {
                sums[c / S::kTiles][c % S::kTiles][i] *= kept;
                sums[c / S::kTiles][c % S::kTiles][2 + i] *= kept;
            }
        }
    }

    // b for the values: weights of keys 2t, 2t + 1 and 2t + 8, 2t + 9 for head g, as rounded, and what rounding took.
    struct Weights {
        u32 rounded[2], rest[2];
    };
    __device__ __forceinline__ Weights turned(const float (&scores)[4]) const {
        Weights out;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto two = Math::from_floats(scores[2 * i], scores[2 * i + 1]);
            out.rounded[i] = transpose_matrix(bit_cast<u32>(two));
            if constexpr (kCoarse<Math>) {
                const float2 as = Math::to_floats(two);
                const auto rest = Math::from_floats(scores[2 * i] - as.x, scores[2 * i + 1] - as.y);
                out.rest[i] = transpose_matrix(bit_cast<u32>(rest));
            }
        }
        return out;
    }
    __device__ __forceinline__ void add(int piece, const Weights& by) {
#pragma unroll
        for (int c = 0; c < S::kValuePiece; ++c) {
            const Words<S::kValueWords>(&rows)[4] = value_words[piece][c];
#pragma unroll
            for (int i = 0; i < S::kTiles; ++i) {
                u32 near[2], far[2];
                Cache::values(rows[0], rows[1], i, near);
                Cache::values(rows[2], rows[3], i, far);
                const u32 a[4] = {near[0], near[1], far[0], far[1]};
                float(&to)[4] = sums[piece * S::kValuePiece + c][i];
                mma<Math>(to, a, by.rounded, to);
                if constexpr (kCoarse<Math>) mma<Math>(to, a, by.rest, to);
            }
        }
    }

    // Pieces of a tile by number, its keys before its values; those after its last belong to the next tile.
    __device__ __forceinline__ void load(int piece, int tile, int next) {
        const int number = piece % (2 * S::kPieces);
        const bool later = piece != number;
        if (later && next >= end) return;
        if (number < S::kPieces) {
            load_keys(later ? next : tile, number);
        } else {
            load_values(later ? next : tile, number - S::kPieces);
        }
    }

    // Tiles from `tile` on, `stride` apart. Each piece is asked for as soon as the last but one before it is used.
    __device__ __forceinline__ void run(int tile, int stride) {
        if (tile >= end) return;
        load_scales(tile);
        load(0, tile, tile);
        load(1, tile, tile);
        for (; tile < end; tile += stride) {
            const int next = tile + stride;
            float scores[4] = {0, 0, 0, 0};
#pragma unroll
            for (int piece = 0; piece < S::kPieces; ++piece) {
                score(piece, scores);
                load(piece + 2, tile, next);
            }
            weigh(tile, scores);
            if (next < end) load_scales(next);
            const Weights by = turned(scores);
#pragma unroll
            for (int piece = 0; piece < S::kPieces; ++piece) {
                add(piece, by);
                load(S::kPieces + piece + 2, tile, next);
            }
        }
    }

    // What the warps know becomes what the part knows. Shared memory: [warps][2][kHeads], then [warps][heads][Dim].
    __device__ __forceinline__ void write(float* shared, int heads, float* out_sums, float2* out_stats, int splits) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        float* parts = shared + kWarps * 2 * kHeads;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int other = 4; other < kWarpSize; other *= 2) weights[i] += __shfl_xor_sync(kAll, weights[i], other);
            if (g == 0) shared[warp * 2 * kHeads + 2 * t + i] = most[i];
            if (g == 0) shared[(warp * 2 + 1) * kHeads + 2 * t + i] = weights[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int head = 2 * t + i;
            if (head >= heads) continue;
            const float kept = exp2f(most[i] - most_of(shared, head) + (Cache::kScaled ? above[i] : 0.0f));
#pragma unroll
            for (int c = 0; c < S::kValueChunks; ++c) {
                const int channel = S::value_byte(c, g) / Cache::kBytes;
                if (channel >= Dim) continue;
                float2* to = reinterpret_cast<float2*>(parts + (warp * heads + head) * Dim + channel);
#pragma unroll
                for (int k = 0; k < S::kTiles; ++k) to[k] = make_float2(sums[c][k][i] * kept, sums[c][k][2 + i] * kept);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < heads * Dim; i += kThreads) {
            float sum = 0;
            for (int w = 0; w < kWarps; ++w) sum += parts[w * heads * Dim + i];
            out_sums[static_cast<long long>(i / Dim) * splits * Dim + i % Dim] = sum;
        }
        if (warp == 0 && lane < heads) {
            const float top = most_of(shared, lane);
            float sum = 0;
            for (int w = 0; w < kWarps; ++w) {
                sum += shared[(w * 2 + 1) * kHeads + lane] * exp2f(shared[w * 2 * kHeads + lane] - top);
            }
            out_stats[lane * splits] = make_float2(top, sum);
        }
    }
    __device__ static __forceinline__ float most_of(const float* shared, int head) {
        float top = shared[head];
        for (int w = 1; w < kWarps; ++w) top = fmaxf(top, shared[w * 2 * kHeads + head]);
        return top;
    }
};

struct Sizes {
    int q_stride, heads, kv_heads, capacity, window;
    float scale;
};

// Grid: parts of a row's keys, key heads with up to 8 of their query heads, rows.
template <class Type, int Dim, class Cache>
__device__ __forceinline__ void attn_decode(const typename Type::One* q, const void* keys, const void* values,
                                            const float* key_scales, const float* value_scales, const int* positions,
                                            const int* slots, const int* begins, float* sums, float* stats,
                                            const Sizes& sizes) {
    const int splits = gridDim.x, split = blockIdx.x, row = blockIdx.z;
    const int shared_by = sizes.heads / sizes.kv_heads, blocks = (shared_by + kHeads - 1) / kHeads;
    const int kv_head = blockIdx.y / blocks, skipped = blockIdx.y % blocks * kHeads;
    const int head = kv_head * shared_by + skipped, heads = min(shared_by - skipped, kHeads);
    const Row seen = row_of(positions, slots, begins, row, sizes.capacity, sizes.window);
    const int count = max(seen.end - seen.first, 0);
    const int part = ((count + splits - 1) / splits + kRound - 1) / kRound * kRound, begin = seen.first + split * part;
    const long long place = (static_cast<long long>(row) * sizes.heads + head) * splits + split;
    float2* out_stats = reinterpret_cast<float2*>(stats) + place;
    if (begin >= seen.end) {
        if (threadIdx.x < heads) out_stats[threadIdx.x * splits] = make_float2(-infinity(), 0.0f);
        return;
    }
    using A = Attention<Type, Dim, Cache>;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const long long first = (static_cast<long long>(seen.slot) * sizes.kv_heads + kv_head) * sizes.capacity;
    A self;
    self.keys = static_cast<const unsigned char*>(keys) + first * A::S::kRow;
    self.values = static_cast<const unsigned char*>(values) + first * A::S::kRow;
    self.key_scales = Cache::kScaled ? key_scales + first : nullptr;
    self.value_scales = Cache::kScaled ? value_scales + first : nullptr;
    self.end = min(begin + part, seen.end);
    self.g = lane / 4;
    self.t = lane % 4;
    const long long from = static_cast<long long>(row) * sizes.q_stride + (head + min(self.g, heads - 1)) * Dim;
    self.load_q(q + from, self.g < heads, sizes.scale);
    self.run(begin + warp * kTile, kWarps * kTile);
    self.write(shared_memory<float>(), heads, sums + place * Dim, out_stats, splits);
}

// The parts of a row and head, each weighed by its largest exponent, become the output. Grid: heads, rows. Shared
// memory: room for joining twice, the weights of the parts, and four numbers a thread.
template <class Type, int Dim>
__device__ __forceinline__ void attn_combine(const float* sums, const float* stats, typename Type::One* out,
                                             int splits) {
    constexpr int kLanes = Dim / 4, kTeams = kThreads / kLanes;  // a team adds up every kTeams'th part
    float *scratch = shared_memory<float>(), *weights = scratch + 2 * kMostWarps;
    float4* parts = reinterpret_cast<float4*>(weights + kMostSplits);
    const long long place = (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * splits;
    const int thread = threadIdx.x, team = thread / kLanes, lane = thread % kLanes;
    float2 own = make_float2(-infinity(), 0.0f);
    if (thread < splits) own = reinterpret_cast<const float2*>(stats)[place + thread];
    const float top = join_block<Largest>(own.x, -infinity(), scratch);
    const float weight = own.y == 0 ? 0.0f : exp2f(own.x - top);
    weights[thread] = weight;
    const float all = join_block<Sum>(weight * own.y, 0.0f, scratch + kMostWarps);
    const float4* from = reinterpret_cast<const float4*>(sums + place * Dim) + lane;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int split = team; team < kTeams && split < splits; split += kTeams) {
        const float by = weights[split];
        if (by == 0) continue;  // a part without keys has written no sums
        const float4 part = from[split * kLanes];
        sum.x = fmaf(by, part.x, sum.x);
        sum.y = fmaf(by, part.y, sum.y);
        sum.z = fmaf(by, part.z, sum.z);
        sum.w = fmaf(by, part.w, sum.w);
    }
    parts[thread] = sum;
    __syncthreads();
    for (int i = thread; i < Dim; i += kThreads) {
        float total = 0;
        for (int j = 0; j < kTeams; ++j) total += reinterpret_cast<const float*>(parts)[j * Dim + i];
        const long long row = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
        out[row * Dim + i] = Type::from_float(all == 0 ? 0.0f : total / all);
    }
}

}  // namespace

#define ENTRIES_OF(name, Type, dim)                                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads) attn_decode_##name##_d##dim(                               \
        const Type::One* q, const Type::One* keys, const Type::One* values, const int* positions, const int* slots,   \
        const int* begins, float* sums, float* stats, int q_stride, int heads, int kv_heads, int capacity, int window, \
        float scale) {                                                                                                \
        attn_decode<Type, dim, Plain<Type>>(q, keys, values, nullptr, nullptr, positions, slots, begins, sums, stats, \
                                            {q_stride, heads, kv_heads, capacity, window, scale});                    \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads) attn_decode_##name##_d##dim##_kv8(                         \
        const Type::One* q, const signed char* keys, const signed char* values, const int* positions,                 \
        const int* slots, const int* begins, float* sums, float* stats, const float* key_scales,                      \
        const float* value_scales, int q_stride, int heads, int kv_heads, int capacity, int window, float scale) {    \
        attn_decode<Type, dim, Rounded>(q, keys, values, key_scales, value_scales, positions, slots, begins, sums,    \
                                        stats, {q_stride, heads, kv_heads, capacity, window, scale});                 \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads) attn_combine_##name##_d##dim(                              \
        const float* sums, const float* stats, Type::One* out, int splits) {                                          \
        attn_combine<Type, dim>(sums, stats, out, splits);                                                            \
    }
#define ENTRIES(name, Type)     \
    ENTRIES_OF(name, Type, 32)  \
    ENTRIES_OF(name, Type, 64)  \
    ENTRIES_OF(name, Type, 80)  \
    ENTRIES_OF(name, Type, 96)  \
    ENTRIES_OF(name, Type, 128) \
    ENTRIES_OF(name, Type, 256)

ENTRIES(f16, F16)
#ifdef TINYCHAT_BF16
ENTRIES(bf16, BF16)
#endif
