// Runs the linears, then vision towers and decoders, over shapes, rows, threads and instruction sets and prints a
// digest of each result. Fails where two instruction sets or two numbers of threads differ. Its output is the same on
// every machine, so it is compared between a native build, one with sanitizers, and one for another machine. See
// scripts/check_cpu_kernels.
#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "pool.h"
#include "program.h"

namespace {

constexpr int64_t kMostRows = 33;

struct Shape {
    int bits;
    int scale;
    int64_t inputs, outputs, group;
};

constexpr Shape kShapes[] = {
    {4, TC_F16, 128, 8, 32},    {4, TC_F16, 384, 72, 128},   {4, TC_BF16, 320, 136, 64}, {4, TC_F32, 1152, 40, 128},
    {4, TC_F16, 1536, 200, 128}, {4, TC_F32, 96, 24, 32},    {8, TC_F32, 588, 50, 588},  {8, TC_F16, 384, 130, 128},
    {8, TC_F32, 33, 7, 33},     {8, TC_F32, 1024, 64, 1024}, {8, TC_BF16, 256, 17, 64},
};

// A scale between 2^-7 and 2^-6 in the dtype that the blocks hold.
void put_scale(Random& random, int scale, std::vector<uint8_t>& to) {
    const auto mantissa = static_cast<uint32_t>(random.next() & 0x7f);
    if (scale == TC_F32) {
        const uint32_t bits = 0x3c000000u | mantissa << 16 | static_cast<uint32_t>(random.next() & 0xffff);
        for (int i = 0; i < 4; ++i) to.push_back(static_cast<uint8_t>(bits >> 8 * i));
        return;
    }
    const uint32_t bits = scale == TC_BF16 ? 0x3c00u | mantissa : 0x2000u | mantissa << 3;
    for (int i = 0; i < 2; ++i) to.push_back(static_cast<uint8_t>(bits >> 8 * i));
}

void pack(const Shape& shape, const tc_weights& w, void* blocks, Random& random) {
    const int64_t groups = shape.inputs / shape.group;
    std::vector<uint8_t> scales;
    for (int64_t i = 0; i < groups * shape.outputs; ++i) put_scale(random, shape.scale, scales);
    if (shape.bits == 8) {
        std::vector<int8_t> values(static_cast<size_t>(shape.inputs * shape.outputs));
        for (auto& value : values) value = static_cast<int8_t>(random.next() >> 40);
        tc_pack_w8(&w, values.data(), scales.data(), blocks);
        return;
    }
    std::vector<int32_t> qweight(static_cast<size_t>(shape.inputs * shape.outputs / 8));
    std::vector<int32_t> qzeros(static_cast<size_t>(groups * shape.outputs / 8));
    for (auto& word : qweight) word = static_cast<int32_t>(random.next() >> 32);
    for (auto& word : qzeros) word = static_cast<int32_t>(random.next() >> 32);
    tc_pack_w4(&w, qweight.data(), qzeros.data(), scales.data(), shape.group, blocks);
}

std::vector<float> activations(const Shape& shape, Random& random) {
    std::vector<float> x(static_cast<size_t>(kMostRows * shape.inputs));
    for (size_t i = 0; i < x.size(); ++i) x[i] = random.normal() * (i % 61 == 0 ? 40.0f : 1.0f);
    for (int64_t i = 0; i < shape.inputs; ++i) x[static_cast<size_t>(3 * shape.inputs + i)] = 0.0f;
    x[static_cast<size_t>(5 * shape.inputs)] = 1e-38f;  // beside others
    return x;
}

std::vector<float> run(const tc_weights& w, const std::vector<float>& x, const std::vector<float>& bias, int64_t rows,
                       int exact) {
    std::vector<float> y(static_cast<size_t>(rows * w.outputs), -1.0f);
    tc_linear(&w, x.data(), w.inputs, rows, y.data(), w.outputs, bias.data(), exact);
    return y;
}

bool same(const std::vector<float>& some, const std::vector<float>& all, const std::string& what) {
    if (some.empty() || std::memcmp(some.data(), all.data(), some.size() * sizeof(float)) == 0) return true;
    std::printf("differs: %s\n", what.c_str());
    return false;
}

bool check(const Shape& shape, Random& random) {
    tc_weights w = {nullptr, shape.inputs, shape.outputs, shape.group, shape.bits, shape.scale};
    const Aligned blocks(tc_packed_size(&w));
    pack(shape, w, blocks.data, random);
    w.blocks = blocks.data;
    const std::vector<float> x = activations(shape, random);
    std::vector<float> bias(static_cast<size_t>(shape.outputs));
    for (auto& value : bias) value = random.normal();
    bool good = true;
    for (int exact = 0; exact < 2; ++exact) {
        tc_set_isa("generic");
        tc_set_threads(1);
        const std::vector<float> all = run(w, x, bias, kMostRows, exact);
        std::printf("%d bits, %" PRId64 " x %" PRId64 ", group %" PRId64 ", exact %d: blocks %016" PRIx64
                    " result %016" PRIx64 "\n",
                    shape.bits, shape.inputs, shape.outputs, shape.group, exact,
                    digest(blocks.data, tc_packed_size(&w)), digest(all));
        for (const char* isa : kIsas) {
            if (tc_set_isa(isa) != 0) continue;
            for (int threads = 1; threads <= 4; ++threads) {
                tc_set_threads(threads);
                for (int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 33})
                    good &= same(run(w, x, bias, rows, exact), all,
                                 std::string(isa) + ", " + std::to_string(threads) + " threads, " +
                                     std::to_string(rows) + " rows");
            }
        }
    }
    return good;
}

// A thread that finds no memory ends the job on all of them, wherever they are in it, and the next job runs.
bool check_failures() {
    bool good = true;
    for (int threads = 1; threads <= 4; ++threads) {
        tc_set_threads(threads);
        for (int failing = 0; failing < threads; ++failing)
            for (int after = 0; after < 4; ++after) {
                std::atomic<int> past{0};
                const bool done = tinychat::run([&](tinychat::Team& team) {
                    for (int round = 0; round < 4; ++round) {
                        if (round == after && (team.index() == failing || failing == 3)) throw std::bad_alloc();
                        team.barrier();
                        if (round >= after) past.fetch_add(1);
                    }
                });
                std::atomic<int> ran{0};
                const bool next = tinychat::run([&](tinychat::Team& team) {
                    team.barrier();
                    ran.fetch_add(1);
                });
                good &= !done && past.load() == 0 && next && ran.load() == threads;
            }
    }
    std::printf("jobs without memory: %s\n", good ? "end" : "do not end");
    return good;
}

bool runs_in_a_child(const tc_weights& w, const std::vector<float>& x, const std::vector<float>& bias) {
    const std::vector<float> here = run(w, x, bias, 9, 0);
    const pid_t child = fork();
    if (child == 0) _exit(run(w, x, bias, 9, 0) == here ? 0 : 1);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool check_fork(Random& random) {
    const Shape shape = kShapes[1];
    tc_weights w = {nullptr, shape.inputs, shape.outputs, shape.group, shape.bits, shape.scale};
    const Aligned blocks(tc_packed_size(&w));
    pack(shape, w, blocks.data, random);
    w.blocks = blocks.data;
    const std::vector<float> x = activations(shape, random), bias(static_cast<size_t>(shape.outputs));
    const bool good = runs_in_a_child(w, x, bias);
    std::printf("a child of fork: %s\n", good ? "same" : "differs");
    return good;
}

}  // namespace

// The argument "fork" adds what ThreadSanitizer does not support.
int main(int count, char** arguments) {
    Random random = {88172645463325252u};
    bool good = true;
    tc_set_least_work(0);
    for (const Shape& shape : kShapes) good &= check(shape, random);
    good &= check_failures();
    good &= check_towers();
    good &= check_decoders();
    good &= check_ranks();
    if (count > 1 && std::strcmp(arguments[1], "fork") == 0) good &= check_fork(random);
    for (const char* isa : kIsas)
        if (tc_isa_supported(isa) != 0) std::fprintf(stderr, "ran: %s\n", isa);
    return good ? 0 : 1;
}
