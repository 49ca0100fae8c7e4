// Memory with forbidden pages around it: a block's shared memory, and tensors that end where they must not be left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <sys/mman.h>

namespace emu {

constexpr size_t kPage = 64 << 10;       // the largest that Linux has on x86-64 and Arm
constexpr unsigned char kPoison = 0xff;  // NaN as float, half and bfloat16; -1 as an integer
constexpr size_t kAlignment = 16;

inline size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

class Pages {
  public:
    Pages(size_t size, int protection) : size_(size) {
        data_ = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (data_ == MAP_FAILED) data_ = nullptr;
    }
    ~Pages() {
        if (data_ != nullptr) munmap(data_, size_);
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    unsigned char* data() const { return static_cast<unsigned char*>(data_); }

  private:
    size_t size_;
    void* data_;
};

// `size` bytes that end, rounded up to 16, at a forbidden page; another one lies before them. At first all are poison.
class Guarded {
  public:
    explicit Guarded(size_t size)
        : room_(round_up(size, kPage)), size_(round_up(size, kAlignment)), pages_(room_ + 2 * kPage, PROT_NONE) {
        if (usable() && room_ != 0) mprotect(pages_.data() + kPage, room_, PROT_READ | PROT_WRITE);
        if (usable()) poison();
    }

    bool usable() const { return pages_.data() != nullptr; }
    unsigned char* begin() const { return end() - size_; }
    unsigned char* end() const { return pages_.data() + kPage + room_; }
    bool holds(const void* at, size_t bytes) const { return at >= begin() && at <= end() - bytes; }

    void poison() { std::memset(margin(), kPoison, static_cast<size_t>(end() - margin())); }

    // Whether what lies just before the bytes still is poison.
    bool margin_is_whole() const {
        for (const unsigned char* at = margin(); at < begin(); ++at) {
            if (*at != kPoison) return false;
        }
        return true;
    }

  private:
    static constexpr size_t kMargin = 1024;
    unsigned char* margin() const { return begin() - (room_ - size_ < kMargin ? room_ - size_ : kMargin); }

    size_t room_, size_;
    Pages pages_;
};

}  // namespace emu
