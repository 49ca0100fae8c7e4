// The same rounding on every thread, whatever the caller has set: to the nearest, subnormal numbers kept.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tinychat {

class DefaultFloatMode {
  public:
    DefaultFloatMode() : before_(read()) { write(kDefault); }
    ~DefaultFloatMode() { write(before_); }
    DefaultFloatMode(const DefaultFloatMode&) = delete;
    DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

  private:
#if defined(__x86_64__)
    using Word = unsigned;
    static constexpr Word kDefault = 0x1f80;  // all exceptions masked
    static Word read() { return _mm_getcsr(); }
    static void write(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
    using Word = uint64_t;
    static constexpr Word kDefault = 0;
    static Word read() {
        Word word;
        asm volatile("mrs %0, fpcr" : "=r"(word));
        return word;
    }
    static void write(Word word) { asm volatile("msr fpcr, %0" ::"r"(word)); }
#else
    using Word = int;
    static constexpr Word kDefault = 0;
    static Word read() { return kDefault; }
    static void write(Word) {}
#endif
    Word before_;
};

}  // namespace tinychat
