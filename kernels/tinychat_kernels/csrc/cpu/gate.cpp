// Waiting in two steps, by futex where there is one.
#include "gate.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#include <thread>
#endif

namespace tinychat {
namespace {

constexpr int kLooksBetweenClocks = 64;

#if defined(__linux__)

void sleep_on(std::atomic<uint32_t>& word, uint32_t old) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
}

#else

// Leaked: threads may still sleep when the process ends.
std::mutex& mutex() {
    static auto* made = new std::mutex;
    return *made;
}

std::condition_variable& changed() {
    static auto* made = new std::condition_variable;
    return *made;
}

void sleep_on(std::atomic<uint32_t>& word, uint32_t old) {
    std::unique_lock<std::mutex> lock(mutex());
    changed().wait(lock, [&] { return word.load() != old; });
}

void wake_all(std::atomic<uint32_t>&) {
    std::lock_guard<std::mutex> lock(mutex());
    changed().notify_all();
}

#endif

}  // namespace

#if defined(__linux__)

void sleep_among_processes(std::atomic<uint32_t>& word, uint32_t old, std::chrono::nanoseconds limit) {
    constexpr int64_t kSecond = 1000000000;
    timespec time = {};
    time.tv_sec = static_cast<time_t>(limit.count() / kSecond);
    time.tv_nsec = static_cast<long>(limit.count() % kSecond);
    syscall(SYS_futex, &word, FUTEX_WAIT, old, &time, nullptr, 0);
}

void wake_processes(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE, 0x7fffffff, nullptr, nullptr, 0);
}

#else

void sleep_among_processes(std::atomic<uint32_t>&, uint32_t, std::chrono::nanoseconds) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
}

void wake_processes(std::atomic<uint32_t>&) {}

#endif

bool Gate::spin_while(uint32_t old, std::chrono::nanoseconds limit) const {
    const auto end = std::chrono::steady_clock::now() + limit;
    do {
        for (int i = 0; i < kLooksBetweenClocks; ++i) {
            if (word_.load(std::memory_order_acquire) != old) return true;
            pause_cpu();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

void Gate::sleep_while(uint32_t old) {
    sleepers_.fetch_add(1);  // before the last look: advance() changes the word first and counts sleepers then
    while (word_.load() == old) sleep_on(word_, old);
    sleepers_.fetch_sub(1);
}

void Gate::advance() {
    word_.fetch_add(1);
    if (sleepers_.load() > 0) wake_all(word_);
}

}  // namespace tinychat
