// One OS thread's part of a launch: it runs blocks, each as a set of fibers that wait for each other.
#pragma once

#include <atomic>
#include <csetjmp>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "memory.h"

namespace emu {

// Which of the threads that can run does so. Greedy: always the first (or last) of the block, so that warps drift apart
// as far as barriers let them.
enum class Order { forward, reverse, greedy_forward, greedy_reverse };

struct Arguments {  // as the calling conventions of x86-64 and aarch64 pass them
    static constexpr int kFloats = 8, kStack = 32;
#ifdef __x86_64__
    static constexpr int kIntegers = 6;
#else
    static constexpr int kIntegers = 8;
#endif
    uint64_t integers[kIntegers];
    double floats[kFloats];  // the lower half of each is a float
    uint64_t stack[kStack];
};

struct Launch {
    void* entry;
    dim3 grid, block;
    unsigned shared;
    Order order;
    bool eager;  // asynchronous copies land at once, not when they are waited for
    Arguments arguments;

    std::atomic<unsigned> next_block{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string message;  // of the first failure

    bool backwards() const { return order == Order::reverse || order == Order::greedy_reverse; }
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
    int group;
};

class Worker;

struct Fiber {
    Thread thread;  // first: emu::here()
    Worker* worker;
    Context context;
    bool at_barrier;
    std::vector<Copy> copies;
    int group;  // that copies belong to now
};
static_assert(sizeof(Fiber) <= kFiberRoom, "a fiber does not fit above its stack");

inline Fiber& this_fiber() { return reinterpret_cast<Fiber&>(here()); }

// Lanes that have come to an operation of their warp.
struct Meeting {
    unsigned mask, arrived;
    Act act;
    void* arguments[32];
};

struct Warp {
    unsigned living;
    Meeting meetings[32];  // by the lowest lane of their mask
};

class Worker {
  public:
    explicit Worker(Launch& launch);
    ~Worker();
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    void run();

    // For fibers.
    int barrier(int value);
    void meet(unsigned mask, Act act, void* argument);
    [[noreturn]] void end();
    [[noreturn]] void abandon(const char* what);

    const Launch& launch() const { return launch_; }
    const Guarded& shared() const { return shared_; }

  private:
    Fiber& fiber(unsigned index) const;
    unsigned char* stack(unsigned index) const;
    void run_block(unsigned index);
    void start(unsigned index, dim3 block);
    int next_runnable() const;
    int first_runnable(unsigned from) const;
    int last_runnable(int from) const;
    void set_runnable(unsigned index, bool runnable);
    void wait();
    void leave_barrier();
    bool finish(Warp& warp, Meeting& meeting);
    [[noreturn]] void deadlock();

    Launch& launch_;
    unsigned threads_;
    Pages stacks_;
    Guarded shared_;
    std::vector<Warp> warps_;
    std::vector<uint64_t> runnable_;  // a bit each
    unsigned living_ = 0, at_barrier_ = 0, current_ = 0;
    int arriving_sum_ = 0, barrier_sum_ = 0;
    Context scheduler_;
    jmp_buf escape_;
};

}  // namespace emu
