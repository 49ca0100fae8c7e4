// Vision towers: a digest of each result, from every instruction set with fused multiplication and additions.
#include <cinttypes>
#include <cstdio>
#include <deque>

#include "program.h"
#include "tower.h"

namespace {

struct Sizes {
    int64_t heads, head_dim, inner, grid, patch, group;
    bool has_first;
    int32_t gelu;
};

constexpr Sizes kSizes[] = {
    {2, 16, 96, 4, 27, 32, true, TC_GELU_ERF},
    {4, 24, 160, 5, 48, 32, false, TC_GELU_TANH},
    {2, 64, 128, 17, 12, 64, true, TC_GELU_QUICK},
};
constexpr int64_t kLayers = 2;

// Weights of a tower, and the memory that they lie in.
class Tower {
  public:
    Tower(const Sizes& sizes, Random& random) : random_(random), width_(sizes.heads * sizes.head_dim) {
        for (auto& layer : layers) {
            layer = {};
            layer.qkv = weights(width_, 3 * width_, sizes.group);
            layer.out = weights(width_, width_, sizes.group);
            layer.up = weights(width_, sizes.inner, sizes.group);
            layer.down = weights(sizes.inner, width_, sizes.group);
            layer.qkv_bias = numbers(3 * width_, 0.1f);
            layer.down_bias = numbers(width_, 0.1f);
            layer.attention_norm = norm();
            layer.mlp_norm = norm();
        }
        const int64_t patches = sizes.grid * sizes.grid, tokens = patches + sizes.has_first;
        tower = {layers, width_, sizes.inner, sizes.heads, sizes.head_dim, sizes.patch, patches};
        tower.embedding = numbers((width_ + 63) / 64 * sizes.patch * 64, 0.1f);
        tower.patch_bias = sizes.has_first ? nullptr : numbers(width_, 0.1f);
        tower.first = sizes.has_first ? numbers(width_, 1.0f) : nullptr;
        tower.positions = numbers(tokens * width_, 0.5f);
        if (sizes.has_first) tower.norm = norm();
        tower.eps = 1e-5f;
        tower.gelu = sizes.gelu;
        pixels = numbers(patches * sizes.patch, 1.0f);
        result.resize(static_cast<size_t>(tokens * width_));
    }

    std::vector<float> encode() {
        const Aligned memory(tc_picture_memory(&tower, kLayers));
        const tc_picture picture = {pixels, kLayers, result.data(), memory.data, nullptr};
        tc_encode(&tower, &picture);
        return result;
    }

  private:
    const float* numbers(int64_t count, float size) {
        std::vector<float>& made = floats_.emplace_back(static_cast<size_t>(count));
        for (float& value : made) value = random_.normal() * size;
        return made.data();
    }

    tc_layer_norm norm() { return {numbers(width_, 1.0f), numbers(width_, 0.2f)}; }

    tc_weights weights(int64_t inputs, int64_t outputs, int64_t group) {
        tc_weights w = {nullptr, inputs, outputs, group, 8, TC_F32};
        std::vector<int8_t> values(static_cast<size_t>(inputs * outputs));
        for (auto& value : values) value = static_cast<int8_t>(random_.next() >> 40);
        const std::vector<float> scales(static_cast<size_t>(inputs / group * outputs), 0x1p-10f);
        w.blocks = blocks_.emplace_back(tc_packed_size(&w)).data;
        tc_pack_w8(&w, values.data(), scales.data(), const_cast<void*>(w.blocks));
        return w;
    }

    Random& random_;
    int64_t width_;
    std::deque<std::vector<float>> floats_;
    std::deque<Aligned> blocks_;

  public:
    tc_tower_layer layers[kLayers];
    tc_tower tower;
    const float* pixels;
    std::vector<float> result;
};

bool check(const Sizes& sizes, Random& random) {
    Tower tower(sizes, random);
    std::vector<float> expected;
    bool good = true;
    for (const char* isa : kIsas) {
#if defined(__x86_64__)
        if (std::strcmp(isa, "generic") == 0) continue;  // multiplies and adds apart: other bits
#endif
        if (tc_set_isa(isa) != 0) continue;
        for (int threads = 1; threads <= 4; ++threads) {
            tc_set_threads(threads);
            const std::vector<float> found = tower.encode();
            if (expected.empty()) expected = found;
            if (found == expected) continue;
            std::printf("differs: a tower, %s, %d threads\n", isa, threads);
            good = false;
        }
    }
    std::printf("tower of %" PRId64 " x %" PRId64 " and %" PRId64 " patches: %016" PRIx64 "\n", sizes.heads,
                sizes.head_dim, sizes.grid * sizes.grid, digest(expected));
    return good;
}

}  // namespace

bool check_towers() {
    Random random = {362436069u};
    bool good = true;
    for (const Sizes& sizes : kSizes) good &= check(sizes, random);
    return good;
}
