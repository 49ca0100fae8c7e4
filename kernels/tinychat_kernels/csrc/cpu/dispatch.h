// Which instructions the kernels use: the best that this CPU has, or the one asked for.
//
// How to write a kernel for several of them: the plain C++ goes into NAME_generic.cpp and one file more for each
// instruction set, NAME_avx2.cpp and so on. Such a file is empty on other machines, includes what it needs, and then
// opens TINYCHAT_TARGET_BEGIN("avx2,fma,f16c") ... TINYCHAT_TARGET_END. Inside: no header is included, no function of
// the standard library is called, and everything has internal linkage but for one table or function. Otherwise the
// linker may give the plain path an inline function that was compiled for a larger CPU.
#pragma once

#define TINYCHAT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TINYCHAT_TARGET_BEGIN(list) \
    TINYCHAT_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define TINYCHAT_TARGET_END TINYCHAT_PRAGMA(clang attribute pop)
#else
#define TINYCHAT_TARGET_BEGIN(list) TINYCHAT_PRAGMA(GCC push_options) TINYCHAT_PRAGMA(GCC target(list))
#define TINYCHAT_TARGET_END TINYCHAT_PRAGMA(GCC pop_options)
#endif

// Compilers that know AVX-VNNI.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define TINYCHAT_HAS_AVXVNNI 1
#else
#define TINYCHAT_HAS_AVXVNNI 0
#endif

// Compilers that know Arm's products of matrices.
#if defined(__aarch64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 10)
#define TINYCHAT_HAS_I8MM 1
#else
#define TINYCHAT_HAS_I8MM 0
#endif

#define TINYCHAT_AVX2 "avx2,fma,f16c"
#define TINYCHAT_AVXVNNI "avx2,fma,f16c,avxvnni"
#define TINYCHAT_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#if defined(__clang__)
#define TINYCHAT_DOTPROD "dotprod"
#define TINYCHAT_I8MM "dotprod,i8mm"
#else
#define TINYCHAT_DOTPROD "arch=armv8.2-a+dotprod"
#define TINYCHAT_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif

namespace tinychat {

// From the plainest to the best; of the x86 and Arm ones, only a machine's own are ever supported.
enum class Isa { generic, avx2, avxvnni, avx512, dotprod, i8mm };
constexpr int kIsaCount = 6;

const char* name(Isa isa);
bool supported(Isa isa);

// The one in use.
Isa isa();
void set_isa(Isa isa);  // one that is supported
Isa best_isa();

}  // namespace tinychat
