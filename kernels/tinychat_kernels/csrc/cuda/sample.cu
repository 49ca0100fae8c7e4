// The next token of each row: the likeliest, or drawn at a temperature by inverting the distribution at a given number.
//
// A row of logits is cut into as many parts as blocks share it. sample_parts leaves what each knows of its part, four
// floats: the largest logit, its index (as bits), and the sums of exp(logit - largest) and of exp((logit - largest) /
// temperature). sample_pick joins them in their order and looks for the token in one part alone.
#include "rows.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kColdest = 1e-6f;  // temperature

__device__ __forceinline__ float none() { return __uint_as_float(0xff800000u); }  // -infinity

struct F32 {
    using One = float;
    __device__ static __forceinline__ float to_float(One x) { return x; }
};

// A logit and where it stands; of equal ones the first is the likelier, NaN counts as none.
struct Likeliest {
    float logit;
    int index;

    __device__ __forceinline__ void take(float other, int at) {
        if (other > logit || (other == logit && at < index)) {
            logit = other;
            index = at;
        }
    }
};

// The likeliest of a block's; all threads get it. `scratch`: room for a pair a warp.
__device__ __forceinline__ Likeliest likeliest_of_block(Likeliest own, float2* scratch) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int other = kWarpSize / 2; other > 0; other /= 2) {
        const float logit = __shfl_xor_sync(0xffffffffu, own.logit, other);
        own.take(logit, __shfl_xor_sync(0xffffffffu, own.index, other));
    }
    if (lane == 0) scratch[threadIdx.x / kWarpSize] = make_float2(own.logit, __int_as_float(own.index));
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) own.take(scratch[i].x, __float_as_int(scratch[i].y));
    return own;
}

__device__ __forceinline__ float inverse_of(float temperature) { return 1.0f / fmaxf(temperature, kColdest); }

struct Part {
    int first, end;
};
__device__ __forceinline__ Part part_of(int index, int parts, int vocabulary) {
    const int size = (vocabulary + parts - 1) / parts;
    return {min(index * size, vocabulary), min((index + 1) * size, vocabulary)};
}

// Blocks: x over a row's parts, y over rows. Shared memory: room for joining, twice.
template <class Type>
__device__ __forceinline__ void sample_parts(const typename Type::One* logits, const float* temperature, float4* parts,
                                             int vocabulary) {
    const typename Type::One* row = logits + static_cast<long long>(blockIdx.y) * vocabulary;
    const Part part = part_of(blockIdx.x, gridDim.x, vocabulary);
    float2* scratch = shared_memory<float2>();
    Likeliest most = {none(), vocabulary};
    for (int i = part.first + static_cast<int>(threadIdx.x); i < part.end; i += kThreads) {
        most.take(Type::to_float(row[i]), i);
    }
    most = likeliest_of_block(most, scratch);
    const float inverse = inverse_of(temperature[blockIdx.y]);
    float plain = 0, tempered = 0;
    for (int i = part.first + static_cast<int>(threadIdx.x); i < part.end; i += kThreads) {
        const float logit = Type::to_float(row[i]);
        const float below = logit == none() ? none() : logit - most.logit;
        plain += __expf(below);
        tempered += __expf(below * inverse);
    }
    float* sums = reinterpret_cast<float*>(scratch + kMostWarps);
    plain = join_block<Sum>(plain, 0.0f, sums);
    tempered = join_block<Sum>(tempered, 0.0f, sums + kMostWarps);
    if (threadIdx.x == 0) {
        parts[blockIdx.y * gridDim.x + blockIdx.x] =
            make_float4(most.logit, __int_as_float(most.index), plain, tempered);
    }
}

// What all parts of a row say together, and the part in which a number falls.
struct Joined {
    Likeliest most;
    float plain;  // sum of exp(logit - most)
    int part;     // -1: none
    float left;   // of the number times the sum of tempered weights, within that part
};

// `parts` [count]. A part without a logit that is above -infinity weighs nothing.
__device__ __forceinline__ Joined join_parts(const float4* parts, int count, float inverse, float uniform) {
    Joined out = {{parts[0].x, __float_as_int(parts[0].y)}, 0, -1, 0};
    for (int i = 1; i < count; ++i) out.most.take(parts[i].x, __float_as_int(parts[i].y));
    float total = 0, before = 0;
    for (int i = 0; i < count; ++i) {
        if (parts[i].x == none() && parts[i].w == 0) continue;
        out.plain += parts[i].z * __expf(parts[i].x - out.most.logit);
        total += parts[i].w * __expf((parts[i].x - out.most.logit) * inverse);
    }
    const float target = uniform * total;
    for (int i = 0; i < count; ++i) {
        if (parts[i].x == none()) continue;
        const float weight = parts[i].w * __expf((parts[i].x - out.most.logit) * inverse);
        if (weight > 0 && before <= target) {
            out.part = i;
            out.left = target - before;
        }
        before += weight;
    }
    return out;
}

// Sums over the block's threads before this one. `scratch`: room for a value a warp.
__device__ __forceinline__ float sum_before(float own, float* scratch) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    float sum = own;
#pragma unroll
    for (int other = 1; other < kWarpSize; other *= 2) {
        const float before = __shfl_up_sync(0xffffffffu, sum, other);
        if (lane >= other) sum += before;
    }
    const float inside = __shfl_up_sync(0xffffffffu, sum, 1);
    if (lane == kWarpSize - 1) scratch[warp] = sum;
    __syncthreads();
    float out = 0;
    for (int i = 0; i < warp; ++i) out += scratch[i];
    return lane == 0 ? out : out + inside;
}

// The token of a part at which the weights' sum passes `left`; -1: none has a weight. A thread looks at neighbours.
// `scratch`: room for a value a warp, twice.
template <class Type>
__device__ __forceinline__ int pick(const typename Type::One* row, const Part& part, float most, float inverse,
                                    float left, float* scratch) {
    const int each = (part.end - part.first + kThreads - 1) / kThreads;
    const int first = min(part.first + static_cast<int>(threadIdx.x) * each, part.end);
    const int end = min(first + each, part.end);
    float own = 0;
    for (int i = first; i < end; ++i) own += __expf((Type::to_float(row[i]) - most) * inverse);
    float sum = sum_before(own, scratch);
    int found = -1;
    for (int i = first; i < end && sum <= left; ++i) {
        const float weight = __expf((Type::to_float(row[i]) - most) * inverse);
        if (weight > 0) found = i;
        sum += weight;
    }
    // The last one whose weight begins below: all weights' sum, rounded otherwise, may end a trifle too low.
    return join_block<Largest>(found, -1, reinterpret_cast<int*>(scratch + kMostWarps));
}

// A block a row. Shared memory: the parts, and room for joining, twice.
template <class Type>
__device__ __forceinline__ void sample_pick(const typename Type::One* logits, const float* temperature,
                                            const float* uniform, const float4* parts, int* tokens, float* logprobs,
                                            int* positions, int vocabulary, int blocks) {
    const int row = blockIdx.x, thread = threadIdx.x;
    float4* staged = shared_memory<float4>();
    if (thread < blocks) staged[thread] = parts[row * blocks + thread];
    __syncthreads();
    const typename Type::One* own = logits + static_cast<long long>(row) * vocabulary;
    const float inverse = inverse_of(temperature[row]);
    const Joined all = join_parts(staged, blocks, inverse, uniform[row]);
    int token = min(all.most.index, vocabulary - 1);
    if (temperature[row] > 0 && all.part >= 0) {
        const Part part = part_of(all.part, blocks, vocabulary);
        float* scratch = reinterpret_cast<float*>(staged + blocks);
        const int drawn = pick<Type>(own, part, all.most.logit, inverse, all.left, scratch);
        token = drawn < 0 ? token : drawn;
    }
    if (thread > 0) return;
    tokens[row] = token;
    logprobs[row] = Type::to_float(own[token]) - all.most.logit - logf(all.plain);
    positions[row] += 1;
}

}  // namespace

#define ENTRIES(name, Type)                                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads) sample_parts_##name(                                 \
        const Type::One* logits, const float* temperature, float4* parts, int vocabulary) {                     \
        sample_parts<Type>(logits, temperature, parts, vocabulary);                                             \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads) sample_pick_##name(                                  \
        const Type::One* logits, const float* temperature, const float* uniform, const float4* parts,           \
        int* tokens, float* logprobs, int* positions, int vocabulary, int blocks) {                             \
        sample_pick<Type>(logits, temperature, uniform, parts, tokens, logprobs, positions, vocabulary, blocks); \
    }

ENTRIES(f32, F32)
ENTRIES(f16, F16)
#ifdef TINYCHAT_BF16
ENTRIES(bf16, BF16)
#endif
