// Contexts that give way to each other: an assembly switch on x86-64, ucontext elsewhere (or with EMU_UCONTEXT).
#pragma once

#include <cstdint>

namespace emu {

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)

struct Context {
    void* stack;
};

extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int kSaved = 6;  // registers

inline void prepare(Context& context, unsigned char* bottom, unsigned char* top, void (*body)()) {
    static_cast<void>(bottom);
    void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
    *--stack = nullptr;  // where body would return to; it never does
    *--stack = reinterpret_cast<void*>(body);
    for (int i = 0; i < kSaved; ++i) *--stack = nullptr;
    context.stack = stack;
}

inline void give_way(Context& from, Context& to) { emu_switch(&from.stack, to.stack); }

#else

}  // namespace emu
#include <ucontext.h>
namespace emu {

struct Context {
    ucontext_t state;
};

inline void prepare(Context& context, unsigned char* bottom, unsigned char* top, void (*body)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = bottom;
    context.state.uc_stack.ss_size = static_cast<size_t>(top - bottom);
    context.state.uc_link = nullptr;
    makecontext(&context.state, body, 0);
}

inline void give_way(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

}  // namespace emu
