// What the machine can do at best: bytes read from memory a second, and int8 multiply-adds a second, on all threads.
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef uint64_t Lanes __attribute__((vector_size(64), aligned(64)));

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Work>
void on_threads(int threads, Work work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

uint64_t read_all(const Lanes* at, size_t count) {
  Lanes a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{};
  for (size_t i = 0; i < count; i += 8) {
    a ^= at[i], b ^= at[i + 1], c ^= at[i + 2], d ^= at[i + 3];
    e ^= at[i + 4], f ^= at[i + 5], g ^= at[i + 6], h ^= at[i + 7];
  }
  a ^= b ^ c ^ d ^ e ^ f ^ g ^ h;
  uint64_t sum = 0;
  for (int i = 0; i < 8; i++) sum ^= a[i];
  return sum;
}

volatile uint64_t sink;

// Twelve independent chains keep both multiply units busy. Returns multiply-adds, each counted as two operations.
double multiply(long turns) {
#if defined(__AVX512VNNI__)
  for (long i = 0; i < turns; i++)
    asm volatile(
        "vpdpbusd %%zmm30,%%zmm31,%%zmm0\nvpdpbusd %%zmm30,%%zmm31,%%zmm1\nvpdpbusd %%zmm30,%%zmm31,%%zmm2\n"
        "vpdpbusd %%zmm30,%%zmm31,%%zmm3\nvpdpbusd %%zmm30,%%zmm31,%%zmm4\nvpdpbusd %%zmm30,%%zmm31,%%zmm5\n"
        "vpdpbusd %%zmm30,%%zmm31,%%zmm6\nvpdpbusd %%zmm30,%%zmm31,%%zmm7\nvpdpbusd %%zmm30,%%zmm31,%%zmm8\n"
        "vpdpbusd %%zmm30,%%zmm31,%%zmm9\nvpdpbusd %%zmm30,%%zmm31,%%zmm10\nvpdpbusd %%zmm30,%%zmm31,%%zmm11\n" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
  return 12.0 * turns * 64 * 2;
#elif defined(__AVX2__)
  // vpmaddubsw and vpmaddwd, with the addition: what AVX2 has instead of a dot product.
  for (long i = 0; i < turns; i++)
    asm volatile(
        "vpmaddubsw %%ymm14,%%ymm15,%%ymm0\nvpmaddwd %%ymm0,%%ymm13,%%ymm0\nvpaddd %%ymm0,%%ymm4,%%ymm4\n"
        "vpmaddubsw %%ymm14,%%ymm15,%%ymm1\nvpmaddwd %%ymm1,%%ymm13,%%ymm1\nvpaddd %%ymm1,%%ymm5,%%ymm5\n"
        "vpmaddubsw %%ymm14,%%ymm15,%%ymm2\nvpmaddwd %%ymm2,%%ymm13,%%ymm2\nvpaddd %%ymm2,%%ymm6,%%ymm6\n"
        "vpmaddubsw %%ymm14,%%ymm15,%%ymm3\nvpmaddwd %%ymm3,%%ymm13,%%ymm3\nvpaddd %%ymm3,%%ymm7,%%ymm7\n" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7");
  return 4.0 * turns * 32 * 2;
#elif defined(__ARM_FEATURE_DOTPROD)
  for (long i = 0; i < turns; i++)
    asm volatile(
        "sdot v0.4s,v30.16b,v31.16b\nsdot v1.4s,v30.16b,v31.16b\nsdot v2.4s,v30.16b,v31.16b\n"
        "sdot v3.4s,v30.16b,v31.16b\nsdot v4.4s,v30.16b,v31.16b\nsdot v5.4s,v30.16b,v31.16b\n"
        "sdot v6.4s,v30.16b,v31.16b\nsdot v7.4s,v30.16b,v31.16b\n" ::
            : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7");
  return 8.0 * turns * 16 * 2;
#else
  (void)turns;
  return 0;
#endif
}

}  // namespace

extern "C" {

void* make_buffer(size_t bytes) {
  void* found = aligned_alloc(size_t(2) << 20, bytes);
  if (!found) return nullptr;
#if defined(__linux__)
  madvise(found, bytes, MADV_HUGEPAGE);
#endif
  memset(found, 1, bytes);
  return found;
}

double read_seconds(const void* buffer, size_t bytes, int threads) {
  const size_t part = bytes / sizeof(Lanes) / threads / 8 * 8;
  const double started = now();
  on_threads(threads, [=](int i) { sink = read_all(static_cast<const Lanes*>(buffer) + i * part, part); });
  return (now() - started) * bytes / (part * threads * sizeof(Lanes));
}

double int8_per_second(int threads, long turns) {
  double done = 0;
  const double started = now();
  on_threads(threads, [&](int i) {
    const double mine = multiply(turns);
    if (i == 0) done = mine;
  });
  return done * threads / (now() - started);
}
}
