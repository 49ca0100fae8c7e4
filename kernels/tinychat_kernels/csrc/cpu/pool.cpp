// The threads behind a team: started at the first job, asleep between jobs, made anew after a fork.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "float_mode.h"
#include "gate.h"

#include <pthread.h>

namespace tinychat {
namespace {

// How long a thread looks at a word before it sleeps: long enough for the end of a neighbour's equal share, and
// for the Python between two tokens; short enough that another program gets the core.
constexpr std::chrono::microseconds kSpinAtBarrier{100};
constexpr std::chrono::microseconds kSpinBetweenJobs{300};

constexpr int64_t kLeastWork = 1 << 20;  // some ten microseconds of one core

constexpr size_t kAlignment = 64;

struct Freed {
    void operator()(void* memory) const { std::free(memory); }
};

struct ThreadMemory {
    std::unique_ptr<void, Freed> memory;
    size_t size = 0;

    void* at_least(size_t bytes) {
        if (bytes > size) {
            const size_t wanted = (bytes + kAlignment - 1) / kAlignment * kAlignment;
            memory.reset();
            size = 0;
            memory.reset(std::aligned_alloc(kAlignment, wanted));
            if (memory == nullptr) throw std::bad_alloc();
            size = wanted;
        }
        return memory.get();
    }
};

thread_local ThreadMemory scratch_memory[static_cast<size_t>(Scratch::count)];
thread_local bool inside_job = false;

}  // namespace

class Pool {
  public:
    explicit Pool(int count) : count_(count) {}

    bool run(Job job, void* context) {
        std::lock_guard<std::mutex> lock(mutex_);
        start_workers();
        job_ = job;
        context_ = context;
        counter_.store(0, std::memory_order_relaxed);
        failed_.store(false, std::memory_order_relaxed);
        left_.store(0, std::memory_order_relaxed);
        start_.advance();
        execute(0);
        return !failed_.load(std::memory_order_relaxed);
    }

    void resize(int count) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (count == count_) return;
        stop_workers();
        count_ = count;
    }

    int count() {
        std::lock_guard<std::mutex> lock(mutex_);
        return count_;
    }

    void barrier() {
        const uint32_t round = round_.value();
        const int count = count_;  // read before arriving: the last one may go on at once
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < count) {
            round_.wait_while(round, kSpinAtBarrier);
            return;
        }
        arrived_.store(0, std::memory_order_relaxed);
        counter_.store(0, std::memory_order_relaxed);
        over_ = left_.load(std::memory_order_relaxed) == count;
        round_.advance();
    }

    bool failed() const { return failed_.load(std::memory_order_relaxed); }

    int64_t next() { return counter_.fetch_add(1, std::memory_order_relaxed); }

  private:
    void execute(int index) {
        DefaultFloatMode mode;
        inside_job = true;
        Team team(this, index, count_);
        try {
            job_(team, context_);
        } catch (const std::bad_alloc&) {
            failed_.store(true, std::memory_order_relaxed);
        }
        inside_job = false;
        left_.fetch_add(1, std::memory_order_relaxed);
        do {
            barrier();  // with those who are still inside, which need this thread at each of theirs
        } while (!over_);
    }

    void start_workers() {
        quit_ = false;
        while (static_cast<int>(workers_.size()) + 1 < count_) {
            const int index = static_cast<int>(workers_.size()) + 1;
            const uint32_t seen = start_.value();
            try {
                workers_.emplace_back([this, index, seen] { work(index, seen); });
            } catch (const std::system_error&) {  // the system grants no more threads
                count_ = index;
            }
        }
    }

    void stop_workers() {
        quit_ = true;
        start_.advance();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    void work(int index, uint32_t seen) {
        for (;;) {
            start_.wait_while(seen, kSpinBetweenJobs);
            ++seen;
            if (quit_) return;
            execute(index);
        }
    }

    std::mutex mutex_;  // one job at a time
    int count_;
    std::vector<std::thread> workers_;
    Job job_ = nullptr;
    void* context_ = nullptr;
    bool quit_ = false;
    Gate start_;
    Gate round_;
    std::atomic<bool> failed_{false};
    std::atomic<int> left_{0};  // threads that are through with the job, one way or the other
    bool over_ = false;         // whether all were when they last met at a barrier
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int64_t> counter_{0};
};

namespace {

// Never destroyed: threads may still wait in it when the process ends.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<int> wanted{0};
std::atomic<int64_t> least_work{kLeastWork};

// A child has none of its parent's threads and may inherit a locked mutex: it starts with a pool of its own.
void forget_pool() { the_pool.store(nullptr); }

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    const int count = wanted.load() > 0 ? wanted.load() : usable_cores();
    Pool* made = new Pool(count);
    if (the_pool.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
}

}  // namespace

void Team::barrier() {
    own_counter_ = 0;
    if (pool_ == nullptr) return;
    pool_->barrier();
    if (pool_->failed()) throw std::bad_alloc();
}

int64_t Team::next() { return pool_ != nullptr ? pool_->next() : own_counter_++; }

void* Team::scratch(Scratch who, size_t bytes) { return scratch_memory[static_cast<size_t>(who)].at_least(bytes); }

bool run(Job job, void* context, int64_t work) {
    if (!inside_job && work >= least_work.load(std::memory_order_relaxed)) return pool().run(job, context);
    DefaultFloatMode mode;
    Team alone(nullptr, 0, 1);
    try {
        job(alone, context);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

void set_least_work(int64_t work) { least_work.store(work, std::memory_order_relaxed); }

void set_threads(int count) {
    wanted.store(count);
    pool().resize(count > 0 ? count : usable_cores());
}

int threads() { return pool().count(); }

}  // namespace tinychat
