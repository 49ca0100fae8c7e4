// Finds out what the CPU has.
#include "dispatch.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tinychat {
namespace {

constexpr const char* kNames[kIsaCount] = {"generic", "avx2", "avxvnni", "avx512", "dotprod", "i8mm"};

#if defined(__x86_64__)

// Leaf 7, subleaf 1: newer than what every compiler's __builtin_cpu_supports knows.
bool leaf7_1_eax(int bit) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> bit & 1) != 0;
}

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

bool cpu_has(Isa isa) {
    switch (isa) {
        case Isa::generic: return true;
        case Isa::avx2: return has_avx2();
        case Isa::avxvnni: return TINYCHAT_HAS_AVXVNNI != 0 && has_avx2() && leaf7_1_eax(4);
        case Isa::avx512: return has_avx512();
        default: return false;
    }
}

#elif defined(__aarch64__)

#if defined(__linux__)
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#elif defined(__APPLE__)
bool feature(const char* key) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

bool cpu_has(Isa isa) {
    switch (isa) {
        case Isa::generic: return true;
        case Isa::dotprod: return has_dotprod();
        case Isa::i8mm: return TINYCHAT_HAS_I8MM != 0 && has_dotprod() && has_i8mm();
        default: return false;
    }
}

#else

bool cpu_has(Isa isa) { return isa == Isa::generic; }

#endif

std::atomic<int> chosen{-1};

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool supported(Isa isa) {
    static const unsigned mask = [] {
        unsigned bits = 0;
        for (int i = 0; i < kIsaCount; ++i) bits |= static_cast<unsigned>(cpu_has(static_cast<Isa>(i))) << i;
        return bits;
    }();
    return (mask >> static_cast<int>(isa) & 1) != 0;
}

Isa best_isa() {
    int best = kIsaCount - 1;
    while (!supported(static_cast<Isa>(best))) --best;
    return static_cast<Isa>(best);
}

Isa isa() {
    const int found = chosen.load(std::memory_order_relaxed);
    return found >= 0 ? static_cast<Isa>(found) : best_isa();
}

void set_isa(Isa isa) { chosen.store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace tinychat
