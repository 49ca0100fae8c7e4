// What the lanes of a warp do together, and asynchronous copies.
#include <cstring>

#include "scheduler.h"

#include "include/cuda_fp16.h"

namespace emu {

namespace {

struct Exchange {
    uint64_t value;
    unsigned source;
    uint64_t result;
};

void act_exchange(void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
        Exchange* own = static_cast<Exchange*>(lanes[i]);
        if (own == nullptr) continue;
        const Exchange* source = static_cast<Exchange*>(lanes[own->source]);
        if (source == nullptr) fail("lane %d shuffles from lane %u, which does not take part", i, own->source);
        own->result = source->value;
    }
}

struct Vote {
    bool predicate;
    unsigned result;
};

void act_vote(void* const* lanes) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) {
        if (lanes[i] != nullptr && static_cast<Vote*>(lanes[i])->predicate) votes |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
        if (lanes[i] != nullptr) static_cast<Vote*>(lanes[i])->result = votes;
    }
}

void check_whole(void* const* lanes, const char* what) {
    for (int i = 0; i < 32; ++i) {
        if (lanes[i] == nullptr) fail("%s without lane %d, which has ended", what, i);
    }
}

struct MatrixLoad {
    unsigned* fragments;
    const unsigned char* row;
};

// Lanes 8i to 8i+7 give the rows of matrix i; lane 4g+t gets elements 2t and 2t+1 of row g.
void act_load_matrix(void* const* lanes) {
    check_whole(lanes, "ldmatrix");
    for (int i = 0; i < 32; ++i) {
        const MatrixLoad& own = *static_cast<MatrixLoad*>(lanes[i]);
        for (int matrix = 0; matrix < 4; ++matrix) {
            const MatrixLoad& giver = *static_cast<MatrixLoad*>(lanes[8 * matrix + i / 4]);
            std::memcpy(own.fragments + matrix, giver.row + 4 * (i % 4), 4);
        }
    }
}

struct Product {
    void* d;
    const unsigned *a, *b;
    const void* c;
};

struct Half {
    using Sum = float;
    static constexpr int kPerWord = 2;
    static float value(unsigned word, int i) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> (16 * i))));
    }
};
struct Bfloat16 {
    using Sum = float;
    static constexpr int kPerWord = 2;
    static float value(unsigned word, int i) { return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u); }
};
struct Int8 {
    using Sum = int;
    static constexpr int kPerWord = 4;
    static int value(unsigned word, int i) { return static_cast<int8_t>(word >> (8 * i)); }
};

// d [Rows, 8] = a [Rows, depth] b [depth, 8] + c, as PTX lays out the fragments: with w values a word, word (r, k) of a
// holds row g + 8r, columns w*(4k + t) on; of b column g; d has row g + 8r, columns 2t and 2t+1 in elements 2r and
// 2r+1.
template <class Type, int Rows, int Depth>
void act_product(void* const* lanes) {
    check_whole(lanes, "mma");
    constexpr int kWide = Type::kPerWord, kHeight = Rows / 8, kSteps = Depth / (4 * kWide);
    typename Type::Sum a[Rows][Depth], b[Depth][8], d[Rows][8];
    for (int i = 0; i < 32; ++i) {
        const Product& own = *static_cast<Product*>(lanes[i]);
        const int g = i / 4, t = i % 4;
        for (int k = 0; k < kSteps; ++k) {
            for (int e = 0; e < kWide; ++e) {
                const int depth = kWide * (4 * k + t) + e;
                for (int r = 0; r < kHeight; ++r) a[g + 8 * r][depth] = Type::value(own.a[kHeight * k + r], e);
                b[depth][g] = Type::value(own.b[k], e);
            }
        }
        for (int r = 0; r < 2 * kHeight; ++r) {
            d[g + 8 * (r / 2)][2 * t + r % 2] = static_cast<const typename Type::Sum*>(own.c)[r];
        }
    }
    for (int row = 0; row < Rows; ++row) {
        for (int k = 0; k < Depth; ++k) {
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int i = 0; i < 32; ++i) {
        typename Type::Sum* out = static_cast<typename Type::Sum*>(static_cast<Product*>(lanes[i])->d);
        for (int r = 0; r < 2 * kHeight; ++r) out[r] = d[i / 4 + 8 * (r / 2)][i % 4 * 2 + r % 2];
    }
}

void deliver(const Copy& copy) {
    if (copy.valid) {
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    } else {
        std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    }
}

bool aligned(const void* at, int bytes) { return reinterpret_cast<uintptr_t>(at) % static_cast<unsigned>(bytes) == 0; }

}  // namespace

uint64_t exchange(unsigned mask, uint64_t value, unsigned source) {
    Exchange own = {value, source, 0};
    meet(mask, act_exchange, &own);
    return own.result;
}

unsigned ballot(unsigned mask, bool predicate) {
    Vote own = {predicate, 0};
    meet(mask, act_vote, &own);
    return own.result;
}

void load_matrix(unsigned* fragments, const void* row) {
    if (!aligned(row, 16)) fail("ldmatrix from a row that is not aligned to 16 bytes");
    if (!this_fiber().worker->shared().holds(row, 16)) fail("ldmatrix from outside shared memory");
    MatrixLoad own = {fragments, static_cast<const unsigned char*>(row)};
    meet(kWarp, act_load_matrix, &own);
}

void mma_f16(float* d, const unsigned* a, const unsigned* b, const float* c, int depth) {
    Product own = {d, a, b, c};
    meet(kWarp, depth == 16 ? act_product<Half, 16, 16> : act_product<Half, 16, 8>, &own);
}

void mma_bf16(float* d, const unsigned* a, const unsigned* b, const float* c, int depth) {
    Product own = {d, a, b, c};
    meet(kWarp, depth == 16 ? act_product<Bfloat16, 16, 16> : act_product<Bfloat16, 16, 8>, &own);
}

void mma_int8(int* d, const unsigned* a, const unsigned* b, const int* c) {
    Product own = {d, a, b, c};
    meet(kWarp, act_product<Int8, 16, 32>, &own);
}

void mma_int8_turing(int* d, unsigned a, unsigned b, const int* c) {
    Product own = {d, &a, &b, c};
    meet(kWarp, act_product<Int8, 8, 16>, &own);
}

// Copied late, the bytes are poison until they are waited for: the GPU may write them at any time in between.
void copy_async(void* shared, const void* global, int bytes, bool valid) {
    Fiber& fiber = this_fiber();
    if (!aligned(shared, bytes) || (valid && !aligned(global, bytes))) fail("a copy of %d bytes is not aligned", bytes);
    if (!fiber.worker->shared().holds(shared, static_cast<size_t>(bytes))) fail("a copy to outside shared memory");
    const Copy copy = {shared, global, bytes, valid, fiber.group};
    if (fiber.worker->launch().eager) return deliver(copy);
    std::memset(shared, kPoison, static_cast<size_t>(bytes));
    fiber.copies.push_back(copy);
}

void copy_commit() { ++this_fiber().group; }

void copy_wait(int groups) {
    Fiber& fiber = this_fiber();
    size_t done = 0;
    for (; done < fiber.copies.size() && fiber.copies[done].group < fiber.group - groups; ++done) {
        deliver(fiber.copies[done]);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<long>(done));
}

}  // namespace emu
