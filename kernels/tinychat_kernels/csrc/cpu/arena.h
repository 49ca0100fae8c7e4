// Arrays one after the other in memory that somebody else owns, each aligned to 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinychat {

class Arena {
  public:
    // Aligned to 64 bytes; nullptr: nothing but used() means anything.
    explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t n) {
        char* found = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(found);
    }

    size_t used() const { return used_; }

  private:
    char* memory_;
    size_t used_ = 0;
};

}  // namespace tinychat
