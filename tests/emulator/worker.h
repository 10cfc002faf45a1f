// The state of one OS thread that runs blocks: fibers, warps, and what is shared by the files of the runtime.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime.h"

namespace emulator {

constexpr unsigned WARP = 32;
constexpr unsigned LARGEST_BLOCK = 1024;
constexpr size_t LARGEST_SHARED = 227 * 1024;
constexpr size_t PAGE = 4096;
constexpr size_t SHARED_ROOM = (LARGEST_SHARED + PAGE - 1) / PAGE * PAGE;
constexpr size_t STACK = 256 * 1024;  // of a fiber: its local memory
constexpr size_t SIGNAL_STACK = 64 * 1024;

struct Warp;

// An asynchronous copy that was started and is not performed yet.
struct Copy {
    unsigned char* target;
    const unsigned char* source;
    int bytes;
    bool valid;
    unsigned group;
    int line;
};

// A CUDA thread with a stack of its own. It may run where *awaited != until.
struct Fiber : EmulatorThread {
    void* stack_pointer;
    Fiber* next;  // the lane that runs after this one: a cycle through the warp
    Warp* warp;
    unsigned lane;
    const uint32_t* awaited;
    uint32_t until;
    bool exited, at_barrier;
    int line;  // of the barrier or collective that it waits at
    std::vector<Copy> copies;
    size_t performed;  // of the copies
    unsigned group;
    uint32_t segment;  // of check.cpp; 0: none yet since the last barrier
    unsigned char *stack_begin, *stack_end;
};

// Operands of a matrix multiplication as 32-bit registers: rows of a along K, rows of b along its columns.
struct Fragments {
    alignas(64) uint32_t a[16][8];
    alignas(64) uint32_t b[8][8];
    alignas(64) uint32_t c[16][8];
};

// What lanes take of each other. One may come to the next collective, not to the one after that, before another has
// taken its result: a warp has two of these, in turn.
struct Exchange {
    uint64_t values[WARP];
    uint32_t votes;
};

struct Warp {
    Fragments fragments;
    Exchange exchanges[2];
    const void* rows[WARP];  // of matrices to load: where they are, and then what they are
    alignas(16) uint16_t row_elements[WARP][8];
    uint32_t generation;  // collectives completed
    unsigned arrived, size;
    EmulatorCollective kind;
    int width, line;  // width: bytes of a shuffled value, number of matrices loaded
    uint32_t barriers;  // warp barriers completed
    Warp* next;         // a cycle through the block
    Fiber* first;       // of the order of lanes
    Fiber* lanes[WARP];
};

struct Range {
    uintptr_t begin, end;
    std::string name;
    bool writable;
};

class Checker;

struct Worker : EmulatorPlace {
    Fiber* current;  // null while threads run without fibers
    EmulatorThread plain;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned threads;
    uint64_t block_number;
    uint32_t barrier_generation;
    unsigned at_barrier, exited;
    int barrier_line;
    size_t shared_bytes;
    unsigned char *shared_end, *stacks, *signal_stack;  // the shared memory ends where a page may not be touched
    const EmulatorKernel* kernel;
    const void* parameters;
    int copy_line;  // of the asynchronous copy that is performed; 0: none is
    Checker* checker;  // null where the kernel is not checked
    void* main_stack_pointer;
    sigjmp_buf escape;
    std::string error;

    // Ends the launch with a report on the running thread; does not return.
    [[noreturn]] void fail(const std::string& what);
    [[noreturn]] void leave();
    unsigned thread_number() const { return (current ? current : &plain)->index.x; }
};

inline Worker* worker() { return static_cast<Worker*>(emulator_place); }
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// memory.cpp: registered memory.
std::vector<Range> registered_ranges();  // ordered by address
std::string name_of_place(const Worker& worker, uintptr_t address);
void* map_pages(size_t bytes);  // zeroed, taken from the system as it is touched
void forbid_page(void* begin);

// faults.cpp: a signal becomes a report.
struct FaultGuard {
    explicit FaultGuard(Worker& worker);
    ~FaultGuard();
    FaultGuard(const FaultGuard&) = delete;
    stack_t former_stack;
};

// warp.cpp: what a collective does once all lanes have come.
void complete(Warp& warp);
const char* name_of(EmulatorCollective kind);

// Where in the kernel something happens: a line of its text, or the address after an instruction.
struct Origin {
    int line;
    const void* code;
    std::string describe() const;  // ", line 12"; an address is named by its offset in the library, ", code 0x1a2"
};

// check.cpp
enum class Access { READ, WRITE, ATOMIC, COPY_START, COPY_END };
Checker* make_checker(Worker& worker);
void delete_checker(Checker* checker);
void begin_checked_block(Checker& checker);
void check(Worker& worker, const void* address, size_t bytes, Access access, const Origin& origin);

}  // namespace emulator
