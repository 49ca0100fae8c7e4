// The calls of ranks.h. A tensor goes piece by piece, a turn each: a rank copies its piece into a buffer of its own,
// publishes the turn, waits until all others have, and reads what all have brought.
//
// Turns take the two buffers by turns, and one wait a turn is enough. A rank writes for turn t where it wrote for t - 2.
// It has seen all others publish t - 1 before; each of them had read all that it needed of t - 2 by then, and the
// release of its counter, met by an acquire here, puts those reads before this write. Nobody is ever two turns ahead.
//
// Who waits for long sleeps on the other's counter (a futex) and does not yield: that would give a whole slice of time
// to whatever else runs on the core.
#include "ranks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "blocks.h"
#include "float_mode.h"
#include "floats.h"
#include "gate.h"

namespace tinychat {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kLooksBetweenClocks = 32;
constexpr int64_t kChunk = 1024;  // numbers that are added up in the first cache

struct Control {
    std::atomic<uint32_t> turn;
    std::atomic<uint32_t> sleepers;
    int64_t lengths[2];  // bytes of the rank's whole tensor, by turns as the buffers
    char free[TC_RANK_CONTROL - 24];
};
static_assert(sizeof(Control) == TC_RANK_CONTROL, "as ranks.h says");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "processes share it");

Control& control(const tc_ranks& ranks, int64_t rank) { return static_cast<Control*>(ranks.memory)[rank]; }

uint8_t* buffer(const tc_ranks& ranks, int64_t rank) {
    const int64_t index = 2 * rank + static_cast<int64_t>(ranks.turn % 2);
    return static_cast<uint8_t*>(ranks.memory) + ranks.size * TC_RANK_CONTROL + index * ranks.piece;
}

void publish(tc_ranks& ranks, const uint8_t* own, int64_t length) {
    ++ranks.turn;
    const int64_t bytes = std::min(ranks.piece, length - ranks.done);
    if (bytes > 0) std::memcpy(buffer(ranks, ranks.rank), own + ranks.done, static_cast<size_t>(bytes));
    Control& mine = control(ranks, ranks.rank);
    mine.lengths[ranks.turn % 2] = length;
    mine.turn.store(ranks.turn);  // before sleepers are counted; one that sleeps counts itself and then looks again
    if (mine.sleepers.load() != 0) wake_processes(mine.turn);
}

bool has_come(const Control& other, uint32_t turn) { return static_cast<int32_t>(other.turn.load() - turn) >= 0; }

bool wait_for(Control& other, const tc_ranks& ranks, Clock::time_point end) {
    const auto start = Clock::now();
    for (;;) {
        for (int i = 0; i < kLooksBetweenClocks; ++i) {
            if (has_come(other, ranks.turn)) return true;
            pause_cpu();
        }
        const auto now = Clock::now();
        if (now >= end) return false;
        if (now - start < std::chrono::nanoseconds(ranks.spin)) continue;
        other.sleepers.fetch_add(1);
        const uint32_t seen = other.turn.load();
        if (static_cast<int32_t>(seen - ranks.turn) < 0) sleep_among_processes(other.turn, seen, end - now);
        other.sleepers.fetch_sub(1);
    }
}

// length_of(rank): the bytes that it brings. take(begin, end): reads these of all ranks' tensors from their buffers.
template <class LengthOf, class Take>
int exchange(tc_ranks& ranks, const void* own, LengthOf length_of, int64_t nanoseconds, Take take) {
    const auto end = Clock::now() + std::chrono::nanoseconds(nanoseconds);
    int64_t longest = 0;
    for (int64_t rank = 0; rank < ranks.size; ++rank) longest = std::max(longest, length_of(rank));
    while (ranks.done < longest) {
        if (ranks.waiting == 0) publish(ranks, static_cast<const uint8_t*>(own), length_of(ranks.rank));
        ranks.waiting = 1;
        for (int64_t rank = 0; rank < ranks.size; ++rank) {
            if (!wait_for(control(ranks, rank), ranks, end)) return TC_RANKS_NOT_YET;
            if (control(ranks, rank).lengths[ranks.turn % 2] != length_of(rank)) return TC_RANKS_OUT_OF_STEP;
        }
        take(ranks.done, std::min(longest, ranks.done + ranks.piece));
        ranks.waiting = 0;
        ranks.done += ranks.piece;
        if (ranks.done < longest && Clock::now() >= end) return TC_RANKS_NOT_YET;
    }
    ranks.done = 0;
    return TC_RANKS_DONE;
}

// The sum of `count` numbers, kChunk at most, that lie `at` bytes into every rank's buffer.
void add_up(const tc_ranks& ranks, Kind kind, int64_t at, int64_t count, void* to) {
    const FloatOps& ops = float_ops();
    const int64_t whole = round_up(count, kSums);  // what stands behind the last number is not given out
    alignas(64) float sum[kChunk], more[kChunk];
    ops.load[index(kind)](buffer(ranks, 0) + at, whole, sum);
    for (int64_t rank = 1; rank < ranks.size; ++rank) {
        ops.load[index(kind)](buffer(ranks, rank) + at, whole, more);
        ops.add(sum, more, whole);
    }
    ops.store[index(kind)](sum, whole, more);
    std::memcpy(to, more, static_cast<size_t>(count * kind_size(kind)));
}

}  // namespace
}  // namespace tinychat

using namespace tinychat;

extern "C" {

size_t tc_ranks_memory(int64_t size, int64_t piece) { return static_cast<size_t>(size * (TC_RANK_CONTROL + 2 * piece)); }

int tc_ranks_sum(tc_ranks* ranks, void* x, int64_t count, int32_t kind, int64_t nanoseconds) {
    DefaultFloatMode mode;
    const int64_t size = kind_size(static_cast<Kind>(kind));
    auto take = [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += kChunk * size) {
            const int64_t numbers = std::min(kChunk, (end - at) / size);
            add_up(*ranks, static_cast<Kind>(kind), at - begin, numbers, static_cast<uint8_t*>(x) + at);
        }
    };
    return exchange(*ranks, x, [&](int64_t) { return count * size; }, nanoseconds, take);
}

int tc_ranks_gather(tc_ranks* ranks, const void* x, const int64_t* widths, int64_t rows, void* y,
                    int64_t nanoseconds) {
    int64_t total = 0;
    for (int64_t rank = 0; rank < ranks->size; ++rank) total += widths[rank];
    auto take = [&](int64_t begin, int64_t end) {
        int64_t first = 0;  // of the rank's columns
        for (int64_t rank = 0; rank < ranks->size; first += widths[rank++]) {
            const int64_t width = widths[rank];
            for (int64_t at = begin, last = std::min(end, rows * width), bytes; at < last; at += bytes) {
                bytes = std::min(width - at % width, last - at);
                std::memcpy(static_cast<uint8_t*>(y) + at / width * total + first + at % width,
                            buffer(*ranks, rank) + at - begin, static_cast<size_t>(bytes));
            }
        }
    };
    return exchange(*ranks, x, [&](int64_t rank) { return rows * widths[rank]; }, nanoseconds, take);
}

}  // extern "C"
