// The operations of floats.h with NEON, or as the compiler makes them of plain C++; and the choice of a table.
#include <cstring>

#include "dispatch.h"
#include "floats.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LANES 128

namespace tinychat {
namespace {
#include "lanes.h"
#include "attention_kernel.h"
#include "attention_int8.h"
#include "rows_kernel.h"
}  // namespace

#if defined(__x86_64__)
extern const FloatOps kFloatsAvx512, kFloatsAvx2;
#endif

const FloatOps& float_ops() {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return kFloatsAvx512;
    if (isa() == Isa::avx2 || isa() == Isa::avxvnni) return kFloatsAvx2;
#endif
    return kFloatOps;
}

}  // namespace tinychat
