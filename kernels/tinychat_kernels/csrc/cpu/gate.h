// A word that threads wait on: they look at it for a while, then sleep until it changes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace tinychat {

// Between two looks at a word: the other thread of the core gets its turn.
inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
}

// Of a word in memory that processes share: sleep while it is `old`, for so long at most (or for less); wake who sleeps.
void sleep_among_processes(std::atomic<uint32_t>& word, uint32_t old, std::chrono::nanoseconds limit);
void wake_processes(std::atomic<uint32_t>& word);

class Gate {
  public:
    uint32_t value() const { return word_.load(std::memory_order_acquire); }

    // Returns once the value is another than `old`.
    void wait_while(uint32_t old, std::chrono::nanoseconds spin) {
        if (!spin_while(old, spin)) sleep_while(old);
    }

    // Changes the value and wakes who sleeps.
    void advance();

  private:
    bool spin_while(uint32_t old, std::chrono::nanoseconds limit) const;
    void sleep_while(uint32_t old);

    alignas(64) std::atomic<uint32_t> word_{0};
    alignas(64) std::atomic<int> sleepers_{0};
};

}  // namespace tinychat
