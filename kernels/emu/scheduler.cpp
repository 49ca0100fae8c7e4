// Runs the blocks of a launch: who goes on, who waits, and what has gone wrong.
#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <new>

namespace emu {

namespace {

constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11;

dim3 position(unsigned index, const dim3& size) {
    return {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
}

template <size_t>
using Integer = uint64_t;
template <size_t>
using Float = double;

// Calls a function of any signature: registers that it does not take do no harm, nor does the rest of the stack.
template <size_t... I, size_t... F, size_t... S>
void call(void* entry, const Arguments& arguments, std::index_sequence<I...>, std::index_sequence<F...>,
          std::index_sequence<S...>) {
    using Entry = void (*)(Integer<I>..., Float<F>..., Integer<S>...);
    reinterpret_cast<Entry>(entry)(arguments.integers[I]..., arguments.floats[F]..., arguments.stack[S]...);
}

void body() {
    Worker& worker = *this_fiber().worker;
    call(worker.launch().entry, worker.launch().arguments, std::make_index_sequence<Arguments::kIntegers>(),
         std::make_index_sequence<Arguments::kFloats>(), std::make_index_sequence<Arguments::kStack>());
    worker.end();
}

}  // namespace

void fail(const char* format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    this_fiber().worker->abandon(text);
}

int barrier(int value) { return this_fiber().worker->barrier(value); }

void meet(unsigned mask, Act act, void* argument) { this_fiber().worker->meet(mask, act, argument); }

Worker::Worker(Launch& launch)
    : launch_(launch),
      threads_(launch.block.x * launch.block.y * launch.block.z),
      stacks_((threads_ + 1) * kStackSize, PROT_READ | PROT_WRITE),
      shared_(launch.shared),
      warps_((threads_ + 31) / 32),
      runnable_((threads_ + 63) / 64) {
    for (unsigned i = 0; i < threads_; ++i) {
        new (&fiber(i)) Fiber();
        *reinterpret_cast<uint64_t*>(stack(i)) = kCanary;
    }
}

Worker::~Worker() {
    for (unsigned i = 0; i < threads_; ++i) fiber(i).~Fiber();
}

unsigned char* Worker::stack(unsigned index) const {
    const uintptr_t first = round_up(reinterpret_cast<uintptr_t>(stacks_.data()), kStackSize);
    return reinterpret_cast<unsigned char*>(first + index * kStackSize);
}

Fiber& Worker::fiber(unsigned index) const {
    return *reinterpret_cast<Fiber*>(stack(index) + kStackSize - kFiberRoom);
}

void Worker::run() {
    const unsigned blocks = launch_.grid.x * launch_.grid.y * launch_.grid.z;
    if (setjmp(escape_) != 0) return;
    while (!launch_.failed) {
        const unsigned index = launch_.next_block++;
        if (index >= blocks) return;
        run_block(launch_.backwards() ? blocks - 1 - index : index);
    }
}

void Worker::run_block(unsigned index) {
    shared_.poison();
    const dim3 block = position(index, launch_.grid);
    for (unsigned i = 0; i < threads_; ++i) start(i, block);
    living_ = threads_;
    at_barrier_ = 0;
    arriving_sum_ = 0;
    current_ = launch_.backwards() ? 0 : threads_ - 1;
    while (living_ > 0) {
        const int next = next_runnable();
        if (next < 0) deadlock();
        current_ = static_cast<unsigned>(next);
        give_way(scheduler_, fiber(current_).context);
    }
    if (!shared_.margin_is_whole()) abandon("somebody wrote before the beginning of shared memory");
    for (unsigned i = 0; i < threads_; ++i) {
        if (*reinterpret_cast<uint64_t*>(stack(i)) != kCanary) abandon("a thread's stack has overflown");
    }
}

void Worker::start(unsigned index, dim3 block) {
    Fiber& started = fiber(index);
    started.thread = {position(index, launch_.block), block, launch_.block, launch_.grid, shared_.begin(), index};
    started.worker = this;
    started.at_barrier = false;
    started.copies.clear();
    started.group = 0;
    prepare(started.context, stack(index), reinterpret_cast<unsigned char*>(&started), body);
    set_runnable(index, true);
    Warp& warp = warps_[index / 32];
    if (index % 32 == 0) warp = Warp();
    warp.living |= 1u << index % 32;
}

void Worker::set_runnable(unsigned index, bool runnable) {
    const uint64_t bit = uint64_t{1} << index % 64;
    runnable_[index / 64] = runnable ? runnable_[index / 64] | bit : runnable_[index / 64] & ~bit;
}

int Worker::first_runnable(unsigned from) const {
    for (size_t word = from / 64; word < runnable_.size(); ++word) {
        const uint64_t bits = word == from / 64 ? runnable_[word] & ~uint64_t{0} << from % 64 : runnable_[word];
        if (bits != 0) return static_cast<int>(word * 64) + __builtin_ctzll(bits);
    }
    return -1;
}

int Worker::last_runnable(int from) const {
    for (int word = from / 64; from >= 0 && word >= 0; --word) {
        const uint64_t bits = runnable_[word] & (word == from / 64 ? ~uint64_t{0} >> (63 - from % 64) : ~uint64_t{0});
        if (bits != 0) return word * 64 + 63 - __builtin_clzll(bits);
    }
    return -1;
}

int Worker::next_runnable() const {
    const int last = static_cast<int>(threads_) - 1, current = static_cast<int>(current_);
    int found = -1;
    if (launch_.order == Order::forward) found = first_runnable(current_ + 1);
    if (launch_.order == Order::reverse) found = last_runnable(current - 1);
    if (found >= 0) return found;
    return launch_.backwards() ? last_runnable(last) : first_runnable(0);
}

void Worker::wait() {
    set_runnable(current_, false);
    give_way(fiber(current_).context, scheduler_);
}

int Worker::barrier(int value) {
    ++at_barrier_;
    arriving_sum_ += value;
    fiber(current_).at_barrier = true;
    if (at_barrier_ == living_) {
        leave_barrier();
    } else {
        wait();
    }
    return barrier_sum_;
}

void Worker::leave_barrier() {
    barrier_sum_ = arriving_sum_;
    at_barrier_ = 0;
    arriving_sum_ = 0;
    for (unsigned i = 0; i < threads_; ++i) {
        if (fiber(i).at_barrier) set_runnable(i, true);
        fiber(i).at_barrier = false;
    }
}

void Worker::meet(unsigned mask, Act act, void* argument) {
    const unsigned lane = current_ % 32;
    if ((mask >> lane & 1u) == 0) fail("a lane that is not in its own mask %08x", mask);
    Warp& warp = warps_[current_ / 32];
    Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
    if (meeting.arrived == 0) meeting = {mask, 0, act, {}};
    if (meeting.mask != mask || meeting.act != act) fail("lanes of a warp come to different operations or masks");
    meeting.arrived |= 1u << lane;
    meeting.arguments[lane] = argument;
    if (!finish(warp, meeting)) wait();
}

bool Worker::finish(Warp& warp, Meeting& meeting) {
    if (meeting.arrived == 0 || meeting.arrived != (meeting.mask & warp.living)) return false;
    meeting.act(meeting.arguments);
    const unsigned first = static_cast<unsigned>(&warp - warps_.data()) * 32;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (meeting.arrived >> lane & 1u) set_runnable(first + lane, true);
    }
    meeting.arrived = 0;
    return true;
}

void Worker::end() {
    Fiber& ended = fiber(current_);
    if (!ended.copies.empty()) fail("a thread ends while %zu of its copies are under way", ended.copies.size());
    --living_;
    Warp& warp = warps_[current_ / 32];
    warp.living &= ~(1u << current_ % 32);
    for (Meeting& meeting : warp.meetings) finish(warp, meeting);
    if (at_barrier_ > 0 && at_barrier_ == living_) leave_barrier();
    for (;;) wait();
}

void Worker::deadlock() {
    char text[128];
    std::snprintf(text, sizeof text, "deadlock: %u of %u threads wait at a barrier, %u for lanes of their warp",
                  at_barrier_, living_, living_ - at_barrier_);
    abandon(text);
}

void Worker::abandon(const char* what) {
    const Thread& thread = fiber(current_).thread;
    char where[128];
    std::snprintf(where, sizeof where, "block (%u, %u, %u), thread %u: ", thread.block.x, thread.block.y,
                  thread.block.z, thread.linear);
    {
        const std::lock_guard<std::mutex> lock(launch_.mutex);
        if (!launch_.failed) launch_.message = std::string(where) + what;
        launch_.failed = true;
    }
    longjmp(escape_, 1);
}

}  // namespace emu
