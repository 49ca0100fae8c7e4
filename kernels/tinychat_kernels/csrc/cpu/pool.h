// A team of threads that runs one job at a time, every thread the same function (SPMD).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace tinychat {

class Pool;

struct Range {
    int64_t begin;
    int64_t end;
};

// Memory of one thread that lives on between jobs; who uses which, so that an op never overwrites its caller's.
enum class Scratch { linear, attention, decoder, count };

// What one thread of a running job sees.
class Team {
  public:
    Team(Pool* pool, int index, int count) : pool_(pool), index_(index), count_(count) {}

    int index() const { return index_; }
    int count() const { return count_; }

    // Waits for all threads of the team. What they wrote before it, everyone reads after it. Throws std::bad_alloc
    // where one of them found no memory: nobody goes on with what it has not written.
    void barrier();

    // 0, 1, 2, ... handed out over all threads; starts anew at each barrier and at the start of a job. So two
    // loops that use it need a barrier between them.
    int64_t next();

    // This thread's part of 0..n where every thread gets about the same number of whole units.
    Range share(int64_t n, int64_t unit = 1) const {
        const int64_t units = (n + unit - 1) / unit;
        const int64_t begin = units * index_ / count_ * unit;
        const int64_t end = units * (index_ + 1) / count_ * unit;
        return {begin < n ? begin : n, end < n ? end : n};
    }

    // At least `bytes` of this thread's own, aligned to 64 bytes, contents undefined; valid until a larger request.
    // Throws std::bad_alloc.
    void* scratch(Scratch who, size_t bytes);

  private:
    Pool* pool_;
    int index_;
    int count_;
    int64_t own_counter_ = 0;  // of a team without a pool
};

using Job = void (*)(Team&, void* context);

// Runs job(team, context) on every thread of the pool and returns when all are done. Callers wait for each other;
// a job that calls run() itself gets a team of one. So does one with less `work` (about as many int8 products, or
// bytes read) than waking others is worth: it waits for nobody. Returns whether there was memory for it: a job that
// throws std::bad_alloc, on whatever threads, ends on all of them.
constexpr int64_t kMuchWork = INT64_MAX;
bool run(Job job, void* context, int64_t work = kMuchWork);

// The same with a callable: run([&](Team& team) { ... }).
template <class Body, class = std::enable_if_t<std::is_invocable_v<Body&, Team&>>>
bool run(Body&& body, int64_t work = kMuchWork) {
    using Plain = std::remove_reference_t<Body>;
    return run([](Team& team, void* context) { (*static_cast<Plain*>(context))(team); },
               const_cast<void*>(static_cast<const void*>(&body)), work);
}

// The work from which on a job gets the whole team; 0: always.
void set_least_work(int64_t work);

// The number of threads from the next job on. 0 means the default: the physical cores this process may use.
void set_threads(int count);
int threads();

// Physical cores in the process's cpuset, at most its CPU quota; at least 1.
int usable_cores();

}  // namespace tinychat
