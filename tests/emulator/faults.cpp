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
    if (number == SIGFPE) here->fail("a division of integers by zero");
    const uintptr_t address = reinterpret_cast<uintptr_t>(information->si_addr);
    if (here->current && address >= reinterpret_cast<uintptr_t>(here->current->stack_begin) &&
        address < reinterpret_cast<uintptr_t>(here->current->stack_begin) + PAGE)
        here->fail("the thread's local memory is larger than the emulator's stacks");
    const uintptr_t shared_end = reinterpret_cast<uintptr_t>(here->shared) + (here->shared_bytes + 127) / 128 * 128;
    const char* what = "access";
#if defined(__x86_64__)
    const greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    if (registers[REG_TRAPNO] == 13) here->fail("a vector access at a misaligned address");
    what = registers[REG_ERR] & 2 ? "write" : "read";
#endif
    if (address >= shared_end && address < shared_end + PAGE)
        here->fail(text("%s at shared memory + %ld of %zu bytes", what,
                        long(address - reinterpret_cast<uintptr_t>(here->shared)), here->shared_bytes));
    const std::vector<Range> ranges = registered_ranges();
    for (const Range& range : ranges)
        if (address >= range.begin && address < range.end && !range.writable)
            here->fail("write to the read-only " + place_name(ranges, address));
    here->fail(text("%s outside of all buffers: ", what) + place_name(ranges, address));
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
