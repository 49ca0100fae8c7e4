// What the parts of the program of scripts/check_cpu_kernels share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tinychat.h"

constexpr const char* kIsas[] = {"generic", "avx2", "avxvnni", "avx512", "dotprod", "i8mm"};

struct Random {
    uint64_t state;

    uint64_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state;
    }

    // The sum of uniform numbers: exact arithmetic, the same everywhere.
    float normal() {
        int64_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += static_cast<int64_t>(next() >> 48) - 32768;
        return static_cast<float>(sum) / 32768.0f;
    }
};

struct Aligned {
    explicit Aligned(size_t size) : data(std::aligned_alloc(64, (size + 63) / 64 * 64)) { std::memset(data, 0, size); }
    ~Aligned() { std::free(data); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    void* data;
};

inline uint64_t digest(const void* data, size_t size) {
    uint64_t hash = 1469598103934665603u;
    for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
    return hash;
}

inline uint64_t digest(const std::vector<float>& values) { return digest(values.data(), values.size() * sizeof(float)); }

// Vision towers with random weights, for the instructions and numbers of threads there are; false where bits differ.
bool check_towers();

// The same of decoders, which also fail where a row's bits depend on its company or on chunks.
bool check_decoders();

// Sums and joins over ranks; false where two ranks have other bits.
bool check_ranks();
