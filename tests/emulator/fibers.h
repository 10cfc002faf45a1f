// Running the threads of a block as fibers.
#pragma once
#include "worker.h"
#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT  // may be asked for, to test it
#include <ucontext.h>
#endif

namespace emulator {

// Stacks for blocks of so many threads.
void prepare_fibers(Worker& worker, unsigned threads);
// Runs all threads of the worker's block; leaves by Worker::leave where that fails.
void run_fibers(Worker& worker, unsigned seed);

// ---- Changing from one stack to another ----
// All of this is inlined in what a kernel calls. A return predicted from the calls that the other fiber made is mostly
// predicted wrong: so there is one return only, that to the kernel, and a jump, which is predicted by its history.

#define INLINED inline __attribute__((always_inline))

#ifndef EMULATOR_UCONTEXT
#ifdef __AVX512F__
#define VECTORS_512 \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", \
        "xmm29", "xmm30", "xmm31", "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#else
#define VECTORS_512
#endif
// The registers that the compiler does not save are saved on the stack that is left (which must have no red zone).
INLINED void change_stack(void** save, void* load) {
    asm volatile(
        "pushq %%rbp\n\tpushq %%rbx\n\t"
        "leaq 1f(%%rip), %%rax\n\tpushq %%rax\n\t"
        "movq %%rsp, (%%rdi)\n\tmovq %%rsi, %%rsp\n\t"
        "popq %%rax\n\tjmp *%%rax\n"
        "1:\n\tpopq %%rbx\n\tpopq %%rbp\n"
        : "+D"(save), "+S"(load)
        :
        : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory", "xmm0", "xmm1", "xmm2",
          "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
          "xmm15" VECTORS_512);
}
// A stack on which change_stack enters a function.
inline void* new_stack(unsigned char* end, void (*entry)()) {
    void** top = reinterpret_cast<void**>(end);
    *--top = nullptr;  // where a caller's return address would be: the ABI's alignment
    *--top = reinterpret_cast<void*>(entry);
    return top;
}
#else
// The context lies at the end of the stack that it describes.
inline void change_stack(void** save, void* load) {
    ucontext_t own;
    *save = &own;
    swapcontext(&own, static_cast<ucontext_t*>(load));
}
inline void* new_stack(unsigned char* end, void (*entry)()) {
    ucontext_t* context = reinterpret_cast<ucontext_t*>(end - (sizeof(ucontext_t) + 63) / 64 * 64);
    getcontext(context);
    context->uc_stack.ss_sp = end - STACK / 2;
    context->uc_stack.ss_size = reinterpret_cast<unsigned char*>(context) - (end - STACK / 2);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

// ---- Waiting ----

// The running thread, which must be a fiber.
INLINED Fiber& running(Worker& worker) {
    if (__builtin_expect(worker.current == nullptr, 0))
        worker.fail("a collective or barrier in a kernel that was taken for one without any");
    return *worker.current;
}
inline bool runnable(const Fiber& fiber) { return *fiber.awaited != fiber.until; }
// A thread that may run, for one that waits and whose neighbour may not; fails where there is none.
Fiber* find_runnable(Worker& worker, Fiber* me);

// Lets another thread run; returns when this one may go on.
INLINED void wait(Worker& worker, Fiber* me) {
    Fiber* next = me->next;
    if (__builtin_expect(!runnable(*next), 0)) next = find_runnable(worker, me);
    worker.current = next;
    worker.thread = next;
    change_stack(&me->stack_pointer, next->stack_pointer);
}

// Fails where a lane does not come to what the others of its warp came to.
void begin_collective(Worker& worker, Warp& warp, EmulatorCollective kind, int width, int line);

// The running lane comes to a collective, its operands being with the warp; returns when all lanes have come and
// `complete` has run.
INLINED void arrive(Worker& worker, Fiber* me, EmulatorCollective kind, int width, int line) {
    Warp& warp = *me->warp;
    if (warp.arrived == 0 || warp.kind != kind || warp.width != width || warp.line != line)
        begin_collective(worker, warp, kind, width, line);
    if (++warp.arrived == WARP) {
        warp.arrived = 0;
        complete(warp);
        ++warp.generation;
        return;
    }
    me->awaited = &warp.generation;
    me->until = warp.generation;
    me->line = line;
    wait(worker, me);
}

}  // namespace emulator
