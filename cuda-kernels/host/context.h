// Fibers: what must be kept of one, and the switch from one to another. The system's own switch asks the kernel each
// time, which takes longer than most threads run between two barriers.
#pragma once

#if defined(__x86_64__)

struct Context {
    void* stack;
};

// Keeps the registers that a call must keep (System V's ABI) on the old stack, and takes them from the new one.
asm(R"(
    .text
    .type fullbore_switch, @function
fullbore_switch:
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
    .size fullbore_switch, . - fullbore_switch
)");
extern "C" void fullbore_switch(void** keep, void* to);

static inline void switch_to(Context& from, Context& to) { fullbore_switch(&from.stack, to.stack); }

// `entry` is called when it is first switched to, and never returns.
static inline void begin_at(Context& context, char* stack, unsigned long size, void (*entry)()) {
    void** top = (void**)((unsigned long)(stack + size) & ~15ul);
    top[-1] = nullptr;
    top[-2] = (void*)entry;
    for (int i = 3; i <= 8; i++) top[-i] = nullptr;
    context.stack = top - 8;
}

#else

#include <ucontext.h>

struct Context {
    ucontext_t context;
};

static inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

static inline void begin_at(Context& context, char* stack, unsigned long size, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = size;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}

#endif
