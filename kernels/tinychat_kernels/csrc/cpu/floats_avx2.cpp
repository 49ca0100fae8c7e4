// The operations of floats.h with AVX2 and FMA.
#include "dispatch.h"
#include "floats.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

TINYCHAT_TARGET_BEGIN(TINYCHAT_AVX2)
#define LANES 256

namespace tinychat {
namespace {
#include "lanes.h"
#include "attention_kernel.h"
#include "attention_int8.h"
#include "rows_kernel.h"
}  // namespace

extern const FloatOps kFloatsAvx2;
const FloatOps kFloatsAvx2 = kFloatOps;

}  // namespace tinychat

TINYCHAT_TARGET_END
#endif
