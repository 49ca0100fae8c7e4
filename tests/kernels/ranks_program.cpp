// The part of the program of scripts/check_cpu_kernels that adds up over ranks: threads in place of processes.
#include <cinttypes>
#include <cstdio>
#include <thread>
#include <vector>

#include "program.h"
#include "ranks.h"

namespace {

constexpr int64_t kMostRanks = 4, kPiece = 256, kSpin = 2000, kSoon = 20000;
constexpr int64_t kCounts[] = {1, 64, 63, 500, 1, 129, 65, 3};
constexpr int64_t kWidths[kMostRanks] = {3, 12, 260, 1};

// What one rank computes; its calls come back early and are made again.
std::vector<float> compute(void* memory, int64_t rank, int64_t size) {
    tc_ranks ranks = {memory, rank, size, kPiece, kSpin, 0, 0, 0};
    Random random = {521288629u + static_cast<uint64_t>(rank)};
    std::vector<float> results;
    for (int round = 0; round < 20; ++round) {
        for (const int64_t count : kCounts) {
            std::vector<float> x(static_cast<size_t>(count));
            for (float& value : x) value = random.normal();
            while (tc_ranks_sum(&ranks, x.data(), count, TC_F32, kSoon) == TC_RANKS_NOT_YET) {}
            results.insert(results.end(), x.begin(), x.end());
        }
        int64_t total = 0;
        for (int64_t one = 0; one < size; ++one) total += kWidths[one];
        std::vector<uint8_t> own(static_cast<size_t>(5 * kWidths[rank])), all(static_cast<size_t>(5 * total));
        for (uint8_t& value : own) value = static_cast<uint8_t>(random.next());
        while (tc_ranks_gather(&ranks, own.data(), kWidths, 5, all.data(), kSoon) == TC_RANKS_NOT_YET) {}
        for (const uint8_t value : all) results.push_back(value);
    }
    return results;
}

bool check(int64_t size) {
    Aligned memory(tc_ranks_memory(size, kPiece));
    std::vector<std::vector<float>> results(static_cast<size_t>(size));
    std::vector<std::thread> threads;
    for (int64_t rank = 0; rank < size; ++rank)
        threads.emplace_back([&, rank] { results[static_cast<size_t>(rank)] = compute(memory.data, rank, size); });
    for (std::thread& thread : threads) thread.join();
    for (const std::vector<float>& one : results) {
        if (one == results[0]) continue;
        std::printf("differs: a sum over %" PRId64 " ranks\n", size);
        return false;
    }
    std::printf("%" PRId64 " ranks: %016" PRIx64 "\n", size, digest(results[0]));
    return true;
}

// One that brings another number is told apart.
bool check_out_of_step() {
    Aligned memory(tc_ranks_memory(2, kPiece));
    tc_ranks one = {memory.data, 0, 2, kPiece, kSpin, 0, 0, 0}, other = {memory.data, 1, 2, kPiece, kSpin, 0, 0, 0};
    float x[2] = {1, 2};
    const bool waits = tc_ranks_sum(&one, x, 2, TC_F32, kSoon) == TC_RANKS_NOT_YET;
    const bool differs = tc_ranks_sum(&other, x, 1, TC_F32, kSoon) == TC_RANKS_OUT_OF_STEP;
    if (!waits || !differs) std::printf("differs: ranks out of step\n");
    return waits && differs;
}

}  // namespace

bool check_ranks() {
    bool good = check_out_of_step();
    for (int64_t size = 1; size <= kMostRanks; ++size) good &= check(size);
    return good;
}
