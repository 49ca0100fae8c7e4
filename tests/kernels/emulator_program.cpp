// Emulated kernels in all eight modes, with a digest of what they compute. The output is the same on every machine, and
// with contexts of another kind: see test_cuda_emulator.py.
#include <cinttypes>
#include <cstdio>
#include <vector>

#include "w4_gemv.cu"

extern "C" int emu_launch(void* entry, const unsigned* grid, const unsigned* block, unsigned shared, int order,
                          int eager, int threads, const char* kinds, const uint64_t* words, char* message, size_t room);

namespace {

struct Random {
    uint64_t state = 88172645463325252u;
    uint32_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return static_cast<uint32_t>(state >> 32);
    }
};

uint64_t digest(const std::vector<float>& values) {
    uint64_t hash = 1469598103934665603u;
    for (float value : values) hash = (hash ^ __float_as_uint(value)) * 1099511628211u;
    return hash;
}

uint64_t address(const void* at) { return reinterpret_cast<uintptr_t>(at); }

}  // namespace

int main() {
    constexpr unsigned kRows = 5, kInputs = 1024, kOutputs = 40, kUnits = 8, kOutputTiles = 3;
    Random random;
    std::vector<uint4> words(kOutputTiles * kUnits * 64);
    for (uint4& four : words) four = {random.next(), random.next(), random.next(), random.next()};
    std::vector<uint2> scales(kOutputTiles * kUnits * 4 * 8);
    const auto scale = [&] { return random.next() & 0x003fe00fu | 0x3c000000u; };
    for (uint2& two : scales) two = {scale(), scale()};
    std::vector<__half> x(kRows * kInputs);
    for (__half& value : x) value = __float2half(static_cast<float>(random.next() % 2001) / 1000.0f - 1.0f);
    std::vector<float> out(kRows * kOutputs);
    const unsigned grid[3] = {kOutputTiles, 1, 1}, block[3] = {256, 1, 1};
    const unsigned shared = 8 * 16 * 8 * 4 + 2 * kRows * (kInputs + 8);
    uint64_t arguments[] = {address(x.data()), address(words.data()), address(scales.data()), 0, address(out.data()),
                            kRows, kInputs, kOutputs, kInputs, kUnits, 1};
    void* entry = reinterpret_cast<void*>(w4_gemv_f16_g32_m8);
    for (int mode = 0; mode < 8; ++mode) {
        char message[256] = "";
        out.assign(out.size(), 0);
        const int failed = emu_launch(entry, grid, block, shared, mode % 4, mode / 4, 2, "iiiiiiiiiii", arguments,
                                      message, sizeof message);
        std::printf("%d %016" PRIx64 " %s\n", failed, digest(out), message);
    }
    arguments[0] = 0;
    char message[256] = "";
    const int failed = emu_launch(entry, grid, block, shared, 0, 1, 1, "iiiiiiiiiii", arguments, message,
                                  sizeof message);
    std::printf("%d %s\n", failed, message);
}
