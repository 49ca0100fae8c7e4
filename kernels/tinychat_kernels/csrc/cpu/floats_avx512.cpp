// The operations of floats.h with AVX-512.
#include "dispatch.h"
#include "floats.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

TINYCHAT_TARGET_BEGIN(TINYCHAT_AVX512)
#define LANES 512

namespace tinychat {
namespace {
#include "lanes.h"
#include "attention_kernel.h"
#include "attention_int8.h"
#include "rows_kernel.h"
}  // namespace

extern const FloatOps kFloatsAvx512;
const FloatOps kFloatsAvx512 = kFloatOps;

}  // namespace tinychat

TINYCHAT_TARGET_END
#endif
