// Signals that a kernel raises become the launch's report: a touched guard page, a write to read-only memory, a division
// of integers by zero, a stack that is too small.

#include <signal.h>
#include <ucontext.h>

#include <mutex>

#include "worker.h"

namespace emulator {

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};
static std::mutex handlers_lock;
static unsigned guards;  // launches that run, on all OS threads
static struct sigaction former_handlers[3];

static void hand_on(int number) {
    for (int i = 0; i < 3; ++i)
        if (SIGNALS[i] == number) sigaction(number, &former_handlers[i], nullptr);
    // The instruction is executed again, and the former handler sees the signal.
}

static void on_signal(int number, siginfo_t* information, void* context) {
    Worker* here = worker();
    if (here == nullptr) return hand_on(number);
    const char* what = "access";
    Origin origin{here->copy_line, nullptr};
#if defined(__x86_64__)
    const greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    origin.code = reinterpret_cast<const void*>(registers[REG_RIP] + 1);
    if (number == SIGFPE) here->fail("a division of integers by zero" + origin.describe());
    if (registers[REG_TRAPNO] == 13) here->fail("a vector access at a misaligned address" + origin.describe());
    what = registers[REG_ERR] & 2 ? "write" : "read";
#else
    (void)context;
    if (number == SIGFPE) here->fail("a division of integers by zero");
#endif
    const uintptr_t address = reinterpret_cast<uintptr_t>(information->si_addr);
    if (here->current && address >= reinterpret_cast<uintptr_t>(here->current->stack_begin) &&
        address < reinterpret_cast<uintptr_t>(here->current->stack_begin) + PAGE)
        here->fail("the thread's local memory is larger than the emulator's stacks");
    for (const Range& range : registered_ranges())
        if (address >= range.begin && address < range.end && !range.writable)
            here->fail("write to the read-only " + name_of_place(*here, address) + origin.describe());
    here->fail(text("%s outside of all buffers: ", what) + name_of_place(*here, address) + origin.describe());
}

FaultGuard::FaultGuard(Worker& worker) {
    stack_t own{};
    own.ss_sp = worker.signal_stack;
    own.ss_size = SIGNAL_STACK;
    sigaltstack(&own, &former_stack);
    std::lock_guard<std::mutex> lock(handlers_lock);
    if (guards++ > 0) return;
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &action, &former_handlers[i]);
}

FaultGuard::~FaultGuard() {
    {
        std::lock_guard<std::mutex> lock(handlers_lock);
        if (--guards == 0)
            for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &former_handlers[i], nullptr);
    }
    sigaltstack(&former_stack, nullptr);
}

}  // namespace emulator
