// Launches: the blocks of a grid, run one after another or shared by several OS threads.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>

#include "fibers.h"

namespace emulator {

struct Options {
    unsigned seed, os_threads;
};

static unsigned number_of_environment(const char* name, unsigned otherwise) {
    const char* found = getenv(name);
    return found && *found ? unsigned(strtoul(found, nullptr, 10)) : otherwise;
}

static thread_local std::unique_ptr<Options> options;
static thread_local std::string last_error;

static Options take_options() {
    if (options) {
        const Options chosen = *options;
        options.reset();
        return chosen;
    }
    return {number_of_environment("ONNXC_EMULATOR_SEED", 0), number_of_environment("ONNXC_EMULATOR_THREADS", 1)};
}

// Workers are kept: their stacks are mapped once.
static std::mutex idle_lock;
static std::vector<Worker*> idle;

static Worker* take_worker() {
    std::lock_guard<std::mutex> lock(idle_lock);
    if (idle.empty()) {
        Worker* made = new Worker{};
        made->shared_end = static_cast<unsigned char*>(map_pages(SHARED_ROOM + PAGE)) + SHARED_ROOM;
        forbid_page(made->shared_end);
        made->signal_stack = static_cast<unsigned char*>(map_pages(SIGNAL_STACK));
        return made;
    }
    Worker* found = idle.back();
    idle.pop_back();
    return found;
}

static void give_back(Worker* worker) {
    std::lock_guard<std::mutex> lock(idle_lock);
    idle.push_back(worker);
}

struct Launch {
    const EmulatorKernel* kernel;
    const void* parameters;
    unsigned blocks, threads;
    size_t shared_bytes;
    unsigned seed;
    std::atomic<unsigned> next{0};
    std::atomic<bool> failed{false};
    std::mutex lock{};
    std::string error{};

    // Which block is run as the n-th: in order for seed 0, backwards for seed 1, else by a step prime to their number.
    unsigned block_of(unsigned n) const {
        if (seed == 0) return n;
        if (seed == 1) return blocks - 1 - n;
        uint64_t step = (seed * 2654435761ull) % blocks | 1;
        while (std::gcd(step, uint64_t(blocks)) != 1) step += 2;
        return (seed + n * step) % blocks;
    }
};

// Runs blocks until none is left or one failed; false where it was this worker's. Nothing here is destroyed at the end
// of its scope: a failure leaves by longjmp.
static bool run_blocks(Launch& launch, Worker& here) {
    if (sigsetjmp(here.escape, 1) != 0) return false;
    for (unsigned n; !launch.failed && (n = launch.next++) < launch.blocks;) {
        here.block = {launch.block_of(n), 0, 0};
        here.block_number = here.block.x;
        if (here.checker) begin_checked_block(*here.checker);
        if (launch.kernel->needs_fibers) {
            memset(here.shared, 0xff, (launch.shared_bytes + 127) / 128 * 128);  // NaN as f16, bf16, f32, f64
            run_fibers(here, launch.seed);
        } else {
            launch.kernel->block(launch.parameters, launch.threads);
        }
    }
    return true;
}

static void work(Launch& launch) {
    Worker& here = *take_worker();
    FaultGuard guard(here);
    here.kernel = launch.kernel;
    here.parameters = launch.parameters;
    here.current = nullptr;
    here.copy_line = 0;
    here.block_size = {launch.threads, 1, 1};
    here.grid_size = {launch.blocks, 1, 1};
    here.shared_bytes = launch.shared_bytes;
    here.shared = here.shared_end - (launch.shared_bytes + 127) / 128 * 128;
    here.plain = {};
    here.thread = &here.plain;
    if (launch.kernel->needs_fibers) prepare_fibers(here, launch.threads);
    here.checker = launch.kernel->checked ? make_checker(here) : nullptr;
    emulator_place = &here;
    if (!run_blocks(launch, here)) {
        std::lock_guard<std::mutex> lock(launch.lock);
        if (!launch.failed.exchange(true)) launch.error = here.error;
    }
    emulator_place = nullptr;
    if (here.checker) delete_checker(here.checker);
    here.checker = nullptr;
    give_back(&here);
}

static std::string refusal(const Launch& launch, const unsigned* grid, const unsigned* block) {
    const unsigned bound = launch.kernel->largest_block;
    if (grid[1] != 1 || grid[2] != 1 || block[1] != 1 || block[2] != 1) return "grid and block have one dimension only";
    if (grid[0] == 0 || grid[0] > 2147483647u) return text("a grid of %u blocks", grid[0]);
    if (block[0] == 0 || block[0] > LARGEST_BLOCK || (bound != 0 && block[0] > bound))
        return text("a block of %u threads, at most %u can be", block[0], bound ? bound : LARGEST_BLOCK);
    if (launch.shared_bytes > LARGEST_SHARED)
        return text("%zu bytes of shared memory, there are %zu", launch.shared_bytes, LARGEST_SHARED);
    return "";
}

}  // namespace emulator

using namespace emulator;

int emulator_launch(const EmulatorKernel* kernel, const void* parameters, const unsigned* grid, const unsigned* block,
                    unsigned long shared_bytes) {
    const Options chosen = take_options();
    Launch launch{kernel, parameters, grid[0], block[0], shared_bytes, chosen.seed};
    last_error = refusal(launch, grid, block);
    if (!last_error.empty()) {
        last_error = text("kernel %s: ", kernel->name) + last_error;
        return 1;
    }
    // The checker keeps one history for all blocks.
    const unsigned workers = kernel->checked ? 1 : std::min(chosen.os_threads, launch.blocks);
    if (workers <= 1) {
        work(launch);
    } else {
        std::vector<std::thread> threads;
        for (unsigned i = 0; i < workers; ++i) threads.emplace_back([&] { work(launch); });
        for (std::thread& thread : threads) thread.join();
    }
    last_error = launch.error;
    return launch.failed ? 1 : 0;
}

const char* emulator_error() { return last_error.c_str(); }

void emulator_configure(unsigned seed, unsigned os_threads) { options.reset(new Options{seed, os_threads}); }
