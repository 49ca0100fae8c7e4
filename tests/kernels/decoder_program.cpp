// Decoders: a digest of each answer, the same for every instruction set with fused multiplications and additions and
// any number of threads, whether rows stand together or alone, their prompts in one piece or in chunks.
#include <cinttypes>
#include <cstdio>
#include <deque>

#include "decoder.h"
#include "program.h"

namespace {

constexpr int64_t kWidth = 64, kInner = 96, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kGroup = 32, kVocabulary = 50;
constexpr int64_t kLayers = 2, kSlots = 3, kCapacity = 80, kSteps = 3;
constexpr int64_t kPrompts[] = {41, 23};  // tokens of the two rows
constexpr int32_t kRowSlots[] = {2, 0};
constexpr int64_t kChunk = 16;

struct Setting {
    const char* name;
    int32_t cache;
    bool exact;
    bool head_in_float;
};

constexpr Setting kSettings[] = {
    {"fp16 keys and values", TC_F16, false, false},
    {"int8 keys and values", TC_I8, false, true},
    {"fp32 keys and values, exact", TC_F32, true, false},
    {"bf16 keys and values, exact", TC_BF16, true, true},
};

using Floats = std::vector<float>;

// Weights of a decoder, and the memory that they lie in.
class Decoder {
  public:
    Decoder(const Setting& setting, Random& random) : random_(random) {
        const int64_t qkv = (kHeads + 2 * kKvHeads) * kHeadDim, mixed = kHeads * kHeadDim;
        for (int64_t i = 0; i < kLayers; ++i) {
            layers_[i] = {};
            layers_[i].qkv = weights(kWidth, qkv, 4);
            layers_[i].out = weights(mixed, kWidth, 4);
            layers_[i].gate_up = weights(kWidth, 2 * kInner, 4);
            layers_[i].down = weights(kInner, kWidth, 4);
            layers_[i].qkv_bias = i == 0 ? numbers(qkv, 0.2f) : nullptr;
            layers_[i].attention_norm = numbers(kWidth, 1.0f);
            layers_[i].mlp_norm = numbers(kWidth, 1.0f);
            layers_[i].window = i == 0 ? 0 : 19;
        }
        const float* table = numbers(kVocabulary * kWidth, 1.0f);
        decoder = {layers_, kLayers, kWidth, kInner, kHeads, kKvHeads, kHeadDim, kVocabulary};
        decoder.norm = numbers(kWidth, 1.0f);
        if (setting.head_in_float) decoder.head_table = {table, TC_F32};
        else decoder.head = weights(kWidth, kVocabulary, 8);
        decoder.embeddings = {numbers(kVocabulary * kWidth, 1.0f), TC_F32};
        decoder.eps = 1e-5f;
        decoder.exact = setting.exact ? 1 : 0;
        cos = numbers(kCapacity * kHeadDim / 2, 1.0f);
        sin = numbers(kCapacity * kHeadDim / 2, 1.0f);
    }

    tc_decoder decoder;
    const float* cos;
    const float* sin;

  private:
    const float* numbers(int64_t count, float size) {
        Floats& made = floats_.emplace_back(static_cast<size_t>(count));
        for (float& value : made) value = random_.normal() * size;
        return made.data();
    }

    tc_weights weights(int64_t inputs, int64_t outputs, int32_t bits) {
        tc_weights w = {nullptr, inputs, outputs, kGroup, bits, TC_F32};
        const Floats scales(static_cast<size_t>(inputs / kGroup * outputs), bits == 4 ? 0x1p-6f : 0x1p-10f);
        void* blocks = blocks_.emplace_back(tc_packed_size(&w)).data;
        w.blocks = blocks;
        if (bits == 8) {
            std::vector<int8_t> values(static_cast<size_t>(inputs * outputs));
            for (auto& value : values) value = static_cast<int8_t>(random_.next() >> 40);
            tc_pack_w8(&w, values.data(), scales.data(), blocks);
            return w;
        }
        std::vector<int32_t> words(static_cast<size_t>(inputs * outputs / 8));
        for (auto& word : words) word = static_cast<int32_t>(random_.next() >> 32);
        const std::vector<int32_t> zeros(static_cast<size_t>(inputs / kGroup * outputs / 8), 0x77777777);
        tc_pack_w4(&w, words.data(), zeros.data(), scales.data(), kGroup, blocks);
        return w;
    }

    Random& random_;
    std::deque<Floats> floats_;
    std::deque<Aligned> blocks_;
    tc_layer layers_[kLayers];
};

// Keys and values, full of what must not be read.
class Cache {
  public:
    explicit Cache(int32_t kind) {
        const size_t places = kSlots * kKvHeads * kCapacity;
        const size_t bytes = places * kHeadDim * (kind == TC_F32 ? 4 : kind == TC_I8 ? 1 : 2);
        for (int64_t layer = 0; layer < kLayers; ++layer)
            for (int part = 0; part < 2; ++part) {
                pointers_[part][layer] = values_.emplace_back(bytes, static_cast<uint8_t>(0x7f)).data();
                scales_[part][layer] = numbers_.emplace_back(places, 1e30f).data();
            }
        float* const* key_scales = kind == TC_I8 ? scales_[0] : nullptr;
        float* const* value_scales = kind == TC_I8 ? scales_[1] : nullptr;
        cache = {pointers_[0], pointers_[1], key_scales, value_scales, kCapacity, kind};
    }

    tc_cache cache;

  private:
    std::deque<std::vector<uint8_t>> values_;
    std::deque<Floats> numbers_;
    void* pointers_[2][kLayers];
    float* scales_[2][kLayers];
};

std::vector<int64_t> tokens_of(int row, int64_t begin, int64_t count) {
    std::vector<int64_t> tokens;
    for (int64_t i = begin; i < begin + count; ++i) tokens.push_back((i * 17 + row * 5 + 3) % kVocabulary);
    return tokens;
}

// Logits of each row's last token.
Floats forward(const Decoder& d, const Cache& cache, const std::vector<int64_t>& tokens,
               const std::vector<int32_t>& slots, const std::vector<int32_t>& starts) {
    const int64_t rows = static_cast<int64_t>(slots.size()), count = static_cast<int64_t>(tokens.size()) / rows;
    int64_t longest = 0;
    for (const int32_t start : starts) longest = start + count > longest ? start + count : longest;
    const Aligned memory(tc_step_memory(&d.decoder, rows, count, longest));
    Floats logits(static_cast<size_t>(rows * kVocabulary));
    const tc_step step = {nullptr, tokens.data(), slots.data(), starts.data(), d.cos, d.sin, nullptr, rows,
                          count, 0, logits.data(), memory.data, nullptr};
    tc_forward(&d.decoder, &cache.cache, &step);
    return logits;
}

// The first row's prompt in chunks, the second's in one piece, and then both together, token by token.
Floats together(const Decoder& d, int32_t kind) {
    const Cache cache(kind);
    for (int64_t begin = 0; begin < kPrompts[0]; begin += kChunk) {
        const int64_t count = kPrompts[0] - begin < kChunk ? kPrompts[0] - begin : kChunk;
        forward(d, cache, tokens_of(0, begin, count), {kRowSlots[0]}, {static_cast<int32_t>(begin)});
    }
    forward(d, cache, tokens_of(1, 0, kPrompts[1]), {kRowSlots[1]}, {0});
    Floats all;
    for (int64_t step = 0; step < kSteps; ++step) {
        std::vector<int64_t> tokens;
        std::vector<int32_t> slots, starts;
        for (int row = 0; row < 2; ++row) {
            const int64_t at = kPrompts[row] + step;
            tokens.push_back(tokens_of(row, at, 1)[0]);
            slots.push_back(kRowSlots[row]);
            starts.push_back(static_cast<int32_t>(at));
        }
        const Floats logits = forward(d, cache, tokens, slots, starts);
        all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
}

// A row's last logits, had it been alone and all of it one prompt.
Floats alone(const Decoder& d, int32_t kind, int row) {
    const Cache cache(kind);
    return forward(d, cache, tokens_of(row, 0, kPrompts[row] + kSteps), {1}, {0});
}

bool same_rows(const Decoder& d, int32_t kind, const Floats& found) {
    Floats last = alone(d, kind, 0);
    const Floats second = alone(d, kind, 1);
    last.insert(last.end(), second.begin(), second.end());
    return std::memcmp(last.data(), found.data() + found.size() - last.size(), last.size() * sizeof(float)) == 0;
}

bool check(const Setting& setting, Random& random) {
    const Decoder decoder(setting, random);
    Floats expected;
    bool good = true;
    for (const char* isa : kIsas) {
#if defined(__x86_64__)
        const bool fused = std::strcmp(isa, "generic") != 0;  // it multiplies and adds apart: other bits
#else
        const bool fused = true;
#endif
        if (tc_set_isa(isa) != 0) continue;
        Floats first;
        for (int threads = 1; threads <= 4; ++threads) {
            tc_set_threads(threads);
            const Floats found = together(decoder, setting.cache);
            if (first.empty()) first = found;
            if (fused && expected.empty()) expected = found;
            if (found == (fused ? expected : first) && same_rows(decoder, setting.cache, found)) continue;
            std::printf("differs: a decoder, %s, %s, %d threads\n", setting.name, isa, threads);
            good = false;
        }
    }
    std::printf("decoder, %s: %016" PRIx64 "\n", setting.name, digest(expected));
    return good;
}

}  // namespace

bool check_decoders() {
    Random random = {521288629u};
    bool good = true;
    for (const Setting& setting : kSettings) good &= check(setting, random);
    return good;
}
