// Where the time of a job goes: on thread 0 of a measured one alone.
#pragma once

#include <chrono>
#include <cstdint>

#include "pool.h"

namespace tinychat {

class Stopwatch {
  public:
    // nanoseconds: for each stage, added to; NULL: nothing is measured.
    Stopwatch(const Team& team, int64_t* nanoseconds) : spent_(team.index() == 0 ? nanoseconds : nullptr) {
        if (spent_ != nullptr) last_ = Clock::now();
    }

    // The time since the last mark belongs to this stage.
    void mark(int stage) {
        if (spent_ == nullptr) return;
        const Clock::time_point now = Clock::now();
        spent_[stage] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
        last_ = now;
    }

  private:
    using Clock = std::chrono::steady_clock;
    int64_t* spent_;
    Clock::time_point last_;
};

}  // namespace tinychat
