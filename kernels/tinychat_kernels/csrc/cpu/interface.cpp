// The C interface of what this folder holds: each call is one job.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "blocks.h"
#include "dispatch.h"
#include "linear.h"
#include "pack.h"
#include "pool.h"
#include "tinychat.h"

using namespace tinychat;

namespace {

constexpr size_t kAlignment = 64;

struct Freed {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory of the calling thread for rounded rows: it outlives the call. NULL where there is none.
void* rows_memory(size_t bytes) {
    thread_local std::unique_ptr<void, Freed> memory;
    thread_local size_t size = 0;
    if (bytes > size) {
        const size_t wanted = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        memory.reset();
        memory.reset(std::aligned_alloc(kAlignment, wanted));
        size = memory == nullptr ? 0 : wanted;
    }
    return memory.get();
}

const Isa* find_isa(const char* wanted) {
    static constexpr Isa kAll[kIsaCount] = {Isa::generic, Isa::avx2,    Isa::avxvnni,
                                            Isa::avx512,  Isa::dotprod, Isa::i8mm};
    for (const Isa& one : kAll)
        if (std::strcmp(name(one), wanted) == 0) return &one;
    return nullptr;
}

}  // namespace

extern "C" {

int tc_abi(void) { return TC_ABI; }

const char* tc_isa(void) { return name(isa()); }

int tc_set_isa(const char* wanted) {
    if (wanted == nullptr) {
        set_isa(best_isa());
        return 0;
    }
    const Isa* found = find_isa(wanted);
    if (found == nullptr) return 1;
    if (!supported(*found)) return 2;
    set_isa(*found);
    return 0;
}

int tc_isa_supported(const char* wanted) {
    const Isa* found = find_isa(wanted);
    return found != nullptr && supported(*found) ? 1 : 0;
}

int tc_threads(void) { return threads(); }
void tc_set_threads(int count) { set_threads(count); }
void tc_set_least_work(int64_t work) { set_least_work(work); }
int tc_usable_cores(void) { return usable_cores(); }

size_t tc_packed_size(const tc_weights* w) { return packed_size(*w); }

void tc_pack_w4(const tc_weights* w, const int32_t* qweight, const int32_t* qzeros, const void* scales,
                int64_t source_group, void* blocks) {
    run([&](Team& team) { pack_w4(team, *w, qweight, qzeros, scales, source_group, blocks); },
        w->inputs * w->outputs);
}

void tc_pack_w8(const tc_weights* w, const int8_t* values, const void* scales, void* blocks) {
    run([&](Team& team) { pack_w8(team, *w, values, scales, blocks); }, w->inputs * w->outputs);
}

int tc_linear(const tc_weights* w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy,
              const float* bias, int exact) {
    const int64_t work = rows * w->inputs * w->outputs;
    if (exact != 0) {
        return run([&](Team& team) { linear_exact(team, *w, x, ldx, rows, y, ldy, bias); }, work) ? 0 : 1;
    }
    const size_t size = quantized_size(rows, w->inputs, w->group);
    void* memory = rows_memory(size);
    if (size != 0 && memory == nullptr) return 1;
    const Quantized rounded = quantized_at(memory, rows, w->inputs, w->group);
    const bool done = run([&](Team& team) {
        quantize(team, x, ldx, rows, w->inputs, w->group, rounded);
        team.barrier();
        linear(team, *w, rounded, rows, y, ldy, bias);
    }, work);
    return done ? 0 : 1;
}

int tc_quantize(const float* x, int64_t rows, int64_t inputs, int64_t group, int8_t* values, float* scales) {
    const size_t size = quantized_size(rows, inputs, group);
    void* memory = rows_memory(size);
    if (size != 0 && memory == nullptr) return 1;
    const Quantized rounded = quantized_at(memory, rows, inputs, group);
    run([&](Team& team) { quantize(team, x, inputs, rows, inputs, group, rounded); }, rows * inputs);
    for (int64_t row = 0; row < rows; ++row)
        std::memcpy(values + row * inputs, rounded.values + row * rounded.stride, static_cast<size_t>(inputs));
    std::memcpy(scales, rounded.scales, static_cast<size_t>(rows * rounded.groups) * sizeof(float));
    return 0;
}

}  // extern "C"
