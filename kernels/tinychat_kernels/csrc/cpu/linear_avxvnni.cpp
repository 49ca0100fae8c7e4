// The inner loops for AVX-VNNI: four products into 32 bits at once, in registers of 256 bits.
#include "dispatch.h"

#if TINYCHAT_HAS_AVXVNNI

#include <immintrin.h>

#include "linear_kernels.h"

TINYCHAT_TARGET_BEGIN(TINYCHAT_AVXVNNI)

namespace tinychat {
namespace {

struct Products {
    static constexpr int kStreamTile = 4;
    static constexpr int kTileRows = 6;
    static constexpr bool kSigned8 = false;

    static void add4(__m256i& sum, __m256i&, __m256i weights, __m256i x) { add8(sum, weights, x); }
    static void settle(__m256i&, __m256i) {}

    // The intrinsic makes some compilers spill a tile's sums. Only registers below 16 have this encoding.
    static void add8(__m256i& sum, __m256i weights, __m256i x) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(x));
    }
};

}  // namespace
}  // namespace tinychat

#include "linear_ymm.h"

namespace tinychat {
const LinearKernels kLinearAvxVnni = kTable;
}

TINYCHAT_TARGET_END

#endif
