// Blocks of CUDA threads: a fiber per thread, barriers, and the order in which warps and lanes run.
//
// A warp runs until all its lanes wait, then another one does: whatever a kernel does not order by a barrier happens in
// an extreme order, which the seed turns around.

#include "fibers.h"

#include <algorithm>
#include <cstdarg>
#include <cstring>

__thread EmulatorPlace* emulator_place;

namespace emulator {

static const uint32_t NEVER = 0;  // what an exited fiber awaits

std::string text(const char* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

std::string Origin::describe() const {
    if (line != 0) return text(", line %d", line);
    const char* begin = static_cast<const char*>(worker()->kernel->image_begin);
    const char* end = static_cast<const char*>(worker()->kernel->image_end);
    const char* at = static_cast<const char*>(code);
    return at >= begin && at < end ? text(", code 0x%lx", static_cast<unsigned long>(at - 1 - begin)) : "";
}

void Worker::leave() { siglongjmp(escape, 1); }

void Worker::fail(const std::string& what) {
    error = text("kernel %s, block %u, thread %u: ", kernel->name, block.x, thread_number()) + what;
    leave();
}

// All threads that a condition holds for, as text: "0-31, 40".
template <class Condition> static std::string list_threads(const Worker& worker, Condition holds) {
    std::string found;
    for (unsigned i = 0; i < worker.threads; ++i) {
        if (!holds(worker.fibers[i])) continue;
        unsigned last = i;
        while (last + 1 < worker.threads && holds(worker.fibers[last + 1])) ++last;
        found += text("%s%u", found.empty() ? "" : ", ", i) + (last > i ? text("-%u", last) : "");
        i = last;
    }
    return found;
}

// Why no thread of the block can go on.
static std::string describe_deadlock(const Worker& worker) {
    std::string report = "the block cannot go on";
    std::vector<std::string> seen;
    for (unsigned i = 0; i < worker.threads; ++i) {
        const auto kind = [&](const Fiber& fiber) -> std::string {
            if (fiber.exited) return "have returned";
            const char* name = fiber.at_barrier ? "barrier" : name_of(fiber.warp->kind);
            return text("wait at %s, line %d", name, fiber.line);
        };
        const std::string what = kind(worker.fibers[i]);
        if (std::find(seen.begin(), seen.end(), what) != seen.end()) continue;
        seen.push_back(what);
        report += "; threads " + list_threads(worker, [&](const Fiber& f) { return kind(f) == what; }) + " " + what;
    }
    return report;
}

Fiber* find_runnable(Worker& worker, Fiber* me) {
    Warp* warp = me->warp;
    for (Fiber* fiber = me->next; fiber != me; fiber = fiber->next)
        if (runnable(*fiber)) return fiber;
    for (Warp* other = warp->next; other != warp; other = other->next) {
        Fiber* fiber = other->first;
        do {
            if (runnable(*fiber)) return fiber;
            fiber = fiber->next;
        } while (fiber != other->first);
    }
    worker.fail(describe_deadlock(worker));
}

void begin_collective(Worker& worker, Warp& warp, EmulatorCollective kind, int width, int line) {
    if (warp.size != WARP) worker.fail(text("%s in a warp of %u threads, line %d", name_of(kind), warp.size, line));
    if (warp.arrived != 0)
        worker.fail(text("divergent warp: this lane is at %s, line %d, others at %s, line %d", name_of(kind), line,
                         name_of(warp.kind), warp.line));
    warp.kind = kind;
    warp.width = width;
    warp.line = line;
}

// The first function on every fiber's stack.
static void enter() {
    Worker& here = *worker();
    here.kernel->thread(here.parameters);
    Fiber* me = here.current;
    me->exited = true;
    me->awaited = &NEVER;
    me->until = NEVER;
    if (++here.exited == here.threads) {
        here.current = nullptr;
        change_stack(&me->stack_pointer, here.main_stack_pointer);
    }
    wait(here, me);
    __builtin_trap();
}

// Successive numbers of a generator of Knuth's, the upper bits.
static uint32_t random_number(uint64_t& state) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return state >> 33;
}

// An order of `count` things: as they are for seed 0, turned around for seed 1, else shuffled.
static void order(unsigned* result, unsigned count, unsigned seed, uint64_t& state) {
    for (unsigned i = 0; i < count; ++i) result[i] = seed == 1 ? count - 1 - i : i;
    if (seed > 1)
        for (unsigned i = count; i > 1; --i) std::swap(result[i - 1], result[random_number(state) % i]);
}

void prepare_fibers(Worker& worker, unsigned threads) {
    if (worker.stacks == nullptr) {
        worker.stacks = static_cast<unsigned char*>(map_pages(LARGEST_BLOCK * STACK));
        for (unsigned i = 0; i < LARGEST_BLOCK; ++i) forbid_page(worker.stacks + i * STACK);
    }
    worker.threads = threads;
    if (worker.fibers.size() < threads) worker.fibers.resize(threads);
    worker.warps.resize((threads + WARP - 1) / WARP);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = worker.fibers[i];
        fiber.stack_begin = worker.stacks + i * STACK;
        // Were all stacks to begin at the same offset in a page, a warp's would share a few lines of the cache.
        fiber.stack_end = fiber.stack_begin + STACK - i % WARP * 1984;
    }
}

void run_fibers(Worker& worker, unsigned seed) {
    uint64_t state = (worker.block_number + 1) * 0x9e3779b97f4a7c15ull + seed;
    const unsigned warps = worker.warps.size();
    unsigned warp_order[LARGEST_BLOCK / WARP], lane_order[WARP];
    order(warp_order, warps, seed, state);
    for (unsigned i = 0; i < warps; ++i) {
        Warp& warp = worker.warps[warp_order[i]];
        const unsigned begin = warp_order[i] * WARP;
        warp.size = std::min(WARP, worker.threads - begin);
        warp.next = &worker.warps[warp_order[(i + 1) % warps]];
        warp.generation = 1;
        warp.arrived = 0;
        warp.barriers = 0;
        order(lane_order, warp.size, seed, state);
        for (unsigned k = 0; k < warp.size; ++k) {
            Fiber& fiber = worker.fibers[begin + lane_order[k]];
            warp.lanes[lane_order[k]] = &fiber;
            fiber.index = {begin + lane_order[k], 0, 0};
            fiber.lane = lane_order[k];
            fiber.warp = &warp;
            fiber.next = &worker.fibers[begin + lane_order[(k + 1) % warp.size]];
            fiber.awaited = &warp.generation;
            fiber.until = 0;
            fiber.exited = fiber.at_barrier = false;
            fiber.group = 0;
            fiber.copies.clear();
            fiber.performed = 0;
            fiber.segment = 0;
            fiber.stack_pointer = new_stack(fiber.stack_end, enter);
        }
        warp.first = &worker.fibers[begin + lane_order[0]];
    }
    worker.barrier_generation = 1;
    worker.at_barrier = worker.exited = 0;
    Fiber* first = worker.warps[warp_order[0]].first;
    worker.current = first;
    worker.thread = first;
    change_stack(&worker.main_stack_pointer, first->stack_pointer);
}

[[noreturn]] static void fail_at_barrier(Worker& here, int line) {
    here.fail(text("divergent barrier: this thread is at the one of line %d, others at that of line %d", line,
                   here.barrier_line));
}

INLINED void pass_barrier(int line) {
    Worker& here = *worker();
    Fiber* me = &running(here);
    if (here.at_barrier == 0) here.barrier_line = line;
    if (here.barrier_line != line)
        fail_at_barrier(here, line);
    me->segment = 0;
    if (++here.at_barrier == here.threads) {
        here.at_barrier = 0;
        ++here.barrier_generation;
        return;
    }
    me->at_barrier = true;
    me->awaited = &here.barrier_generation;
    me->until = here.barrier_generation;
    me->line = line;
    wait(here, me);
    me->at_barrier = false;
}

}  // namespace emulator

void emulator_barrier(int line) { emulator::pass_barrier(line); }
