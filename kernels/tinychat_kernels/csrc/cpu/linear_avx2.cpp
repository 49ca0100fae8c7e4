// The inner loops for AVX2: products by pairs into 16 bits, then into 32.
#if defined(__x86_64__)

#include <immintrin.h>

#include "dispatch.h"
#include "linear_kernels.h"

TINYCHAT_TARGET_BEGIN(TINYCHAT_AVX2)

namespace tinychat {
namespace {

struct Products {
    static constexpr int kStreamTile = 4;
    static constexpr int kTileRows = 4;
    static constexpr bool kSigned8 = true;

    // Eight pairs of 15 * 127 are at most 30480, below the 32767 that 16 bits hold.
    static void add4(__m256i&, __m256i& small, __m256i weights, __m256i x) {
        small = _mm256_add_epi16(small, _mm256_maddubs_epi16(weights, x));
    }

    static void settle(__m256i& sum, __m256i small) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(small, _mm256_set1_epi16(1)));
    }

    // maddubs takes an unsigned side: the weight's sign goes to x. A pair is at most 2 * 128 * 127 = 32512.
    static void add8(__m256i& sum, __m256i weights, __m256i x) {
        const __m256i w = _mm256_xor_si256(weights, _mm256_set1_epi8(static_cast<char>(kMiddle)));
        settle(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
    }
};

}  // namespace
}  // namespace tinychat

#include "linear_ymm.h"

namespace tinychat {
const LinearKernels kLinearAvx2 = kTable;
}

TINYCHAT_TARGET_END

#endif
