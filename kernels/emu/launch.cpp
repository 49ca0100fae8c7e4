// The emulator's C interface: launches, and memory with guards. A fault inside a kernel ends the launch, not the
// process.
#include <csignal>
#include <cstdio>
#include <thread>

#include "scheduler.h"

namespace emu {

namespace {

constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
constexpr size_t kSignalStack = 64 << 10;

thread_local Worker* running = nullptr;

// Handlers stand while a launch is under way.
std::mutex handlers_mutex;
int launches = 0;
struct sigaction previous[sizeof kFaults / sizeof *kFaults];

const char* said_of(int signal) {
    switch (signal) {
        case SIGILL: return "an address that is not aligned, or an index that is out of its array";
        case SIGFPE: return "a division by zero";
        default: return "memory was touched that belongs to no buffer";
    }
}

void on_fault(int signal, siginfo_t* info, void*) {
    if (running != nullptr) {
        char text[128];
        std::snprintf(text, sizeof text, "%s (at %p)", said_of(signal), info->si_addr);
        running->abandon(text);
    }
    for (size_t i = 0; i < sizeof kFaults / sizeof *kFaults; ++i) {
        if (kFaults[i] == signal) sigaction(signal, &previous[i], nullptr);  // it faults again, and then as before
    }
}

void install_handlers() {
    const std::lock_guard<std::mutex> lock(handlers_mutex);
    if (launches++ > 0) return;
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < sizeof kFaults / sizeof *kFaults; ++i) sigaction(kFaults[i], &action, &previous[i]);
}

void remove_handlers() {
    const std::lock_guard<std::mutex> lock(handlers_mutex);
    if (--launches > 0) return;
    for (size_t i = 0; i < sizeof kFaults / sizeof *kFaults; ++i) sigaction(kFaults[i], &previous[i], nullptr);
}

void work(Launch& launch) {
    const Pages alternative(kSignalStack, PROT_READ | PROT_WRITE);
    stack_t own = {}, before = {};
    own.ss_sp = alternative.data();
    own.ss_size = kSignalStack;
    sigaltstack(&own, &before);
    {
        Worker worker(launch);
        running = &worker;
        worker.run();
        running = nullptr;
    }
    sigaltstack(&before, nullptr);
}

// kinds: one letter an argument, 'f' for a float; words: their bits. False where there are too many.
bool place(const char* kinds, const uint64_t* words, Arguments& out) {
    int integers = 0, floats = 0, on_stack = 0;
    for (int i = 0; kinds[i] != '\0'; ++i) {
        if (kinds[i] == 'f' && floats < Arguments::kFloats) {
            std::memcpy(&out.floats[floats++], &words[i], sizeof(double));
        } else if (kinds[i] != 'f' && integers < Arguments::kIntegers) {
            out.integers[integers++] = words[i];
        } else if (on_stack < Arguments::kStack) {
            out.stack[on_stack++] = words[i];
        } else {
            return false;
        }
    }
    return true;
}

int said(const char* what, char* message, size_t room) {
    std::snprintf(message, room, "%s", what);
    return 1;
}

}  // namespace

}  // namespace emu

using namespace emu;

#define EMU_INTERFACE extern "C" __attribute__((visibility("default")))

// 0, or 1 with what went wrong in `message`.
EMU_INTERFACE int emu_launch(void* entry, const unsigned* grid, const unsigned* block, unsigned shared, int order,
                             int eager, int threads, const char* kinds, const uint64_t* words, char* message,
                             size_t room) {
    Launch launch = {};
    launch.entry = entry;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.shared = shared;
    launch.order = static_cast<Order>(order);
    launch.eager = eager != 0;
    if (!place(kinds, words, launch.arguments)) return said("too many arguments", message, room);
    install_handlers();
    std::vector<std::thread> team;
    for (int i = 1; i < threads; ++i) team.emplace_back(work, std::ref(launch));
    work(launch);
    for (std::thread& member : team) member.join();
    remove_handlers();
    return launch.failed ? said(launch.message.c_str(), message, room) : 0;
}

EMU_INTERFACE void* emu_allocate(size_t size) {
    Guarded* made = new Guarded(size);
    if (made->usable()) return made;
    delete made;
    return nullptr;
}
EMU_INTERFACE void* emu_begin(void* memory) { return static_cast<Guarded*>(memory)->begin(); }
EMU_INTERFACE void emu_release(void* memory) { delete static_cast<Guarded*>(memory); }
