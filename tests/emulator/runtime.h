// What compiled kernels (prelude.h) ask of the emulator: plain C, so that a kernel's text compiles in milliseconds.
#pragma once

extern "C" {

struct EmulatorIndex {
    unsigned x, y, z;
};

// A CUDA thread, as far as kernels see it.
struct EmulatorThread {
    EmulatorIndex index;
};

// Where the running CUDA thread is: its block, that block's size, the number of blocks.
struct EmulatorPlace {
    EmulatorThread* thread;
    EmulatorIndex block, block_size, grid_size;
    unsigned char* shared;
};

// Initial-exec: one load per access; the variable lives in the runtime, so kernels take no static TLS of their own.
extern __thread EmulatorPlace* emulator_place __attribute__((tls_model("initial-exec")));

// Collectives of a warp. All lanes of a warp must come to the same one, from the same line.
enum EmulatorCollective {
    EMULATOR_WARP_BARRIER,
    EMULATOR_SHUFFLE_XOR,
    EMULATOR_SHUFFLE_DOWN,
    EMULATOR_SHUFFLE_UP,
    EMULATOR_SHUFFLE,
    EMULATOR_BALLOT,
    EMULATOR_LOAD_MATRIX,
    EMULATOR_LOAD_MATRIX_TRANSPOSED,
    EMULATOR_MULTIPLY_F16,
    EMULATOR_MULTIPLY_BF16,
    EMULATOR_MULTIPLY_TF32,
    EMULATOR_MULTIPLY_S8S8,
    EMULATOR_MULTIPLY_S8U8,
    EMULATOR_MULTIPLY_U8S8,
    EMULATOR_MULTIPLY_U8U8,
};

void emulator_barrier(int line);
void emulator_warp_barrier(int line);
// `argument` is the mask, delta or lane; values have 4 or 8 bytes.
void emulator_shuffle(EmulatorCollective kind, const void* value, void* result, int bytes, int argument, int line);
unsigned emulator_ballot(bool holds, int line);
void emulator_load_matrix(EmulatorCollective kind, unsigned* registers, const void* row, int matrices, int line);
void emulator_multiply(EmulatorCollective kind, void* c, const unsigned* a, const unsigned* b, int line);

void emulator_copy_async(void* shared, const void* global, int bytes, bool valid, int line);
void emulator_copy_async_commit();
void emulator_copy_async_wait(int pending);

// Checked kernels call this before an atomic update of `bytes` at `target`; `code` is an address in the kernel.
void emulator_check_atomic(void* target, int bytes, const void* code);

// A vector is loaded or stored at an address that is no multiple of its bytes.
[[noreturn]] void emulator_misaligned(const void* address, unsigned long bytes, const char* what);

// A kernel, as the text behind it declares it.
struct EmulatorKernel {
    const char* name;
    unsigned largest_block;                // of __launch_bounds__
    bool needs_fibers;                     // it uses barriers, collectives or shared memory
    bool checked;                          // it was compiled with the hooks of check.cpp
    void (*thread)(const void*);           // runs one thread
    void (*block)(const void*, unsigned);  // runs that many threads one after another
    const void *image_begin, *image_end;   // the loaded library that it is in
};

// Runs a kernel; `parameters` is CUDA's parameter buffer. Returns 0, or 1 and emulator_error() says what went wrong.
int emulator_launch(const EmulatorKernel* kernel, const void* parameters, const unsigned* grid, const unsigned* block,
                    unsigned long shared_bytes);
// The last launch's report on this OS thread.
const char* emulator_error();
// For the next launch of this OS thread: the order of warps, lanes and blocks, and how many OS threads share the
// blocks. Not called: ONNXC_EMULATOR_SEED and ONNXC_EMULATOR_THREADS of the environment, or 0 and 1.
void emulator_configure(unsigned seed, unsigned os_threads);
// Memory that kernels may read, and write where `writable`. Checked kernels may touch no other; where none is registered,
// only their accesses to shared memory are checked.
void emulator_register_range(const void* begin, unsigned long bytes, const char* name, int writable);
void emulator_forget_range(const void* begin);
}
