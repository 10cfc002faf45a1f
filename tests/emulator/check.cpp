// Checked kernels: every access to memory comes by here, through the hooks that g++ -fsanitize=thread calls.
//
// For each byte a history is kept: who wrote it last, and two who have read it since. Two accesses are ordered where one
// thread made both, or a barrier of the block, or of their warp, lies between; two others of which one is a write race,
// whatever the order in which they were emulated. Threads of different blocks are never ordered. Atomic updates do not
// race with one another. Collectives other than warp_barrier order no memory: CUDA does not promise it.

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "worker.h"

namespace emulator {

// What a thread does between two barriers.
struct Segment {
    uint32_t block, thread, barrier, warp_barrier;
};

constexpr uint32_t ATOMIC_UPDATE = 1u << 31;  // flags of Cell::writer
constexpr uint32_t PENDING_COPY = 1u << 30;
constexpr uint32_t SEGMENT = PENDING_COPY - 1;
constexpr size_t MOST_SEGMENTS = 1u << 26;  // 1 GiB; beyond, what other blocks did is forgotten

// The history of a byte: numbers of segments, 0 for none.
struct Cell {
    uint32_t writer, reader, other_reader;
};

// Memory with a history.
struct Shadow {
    Range range;
    Cell* cells;  // null until the range is touched
};

class Checker {
   public:
    explicit Checker(Worker& worker)
        : worker_(worker), segments_(1), shared_cells_(new_cells(LARGEST_SHARED)),
          stack_top_(reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) + PAGE) {
        for (Range& range : registered_ranges()) shadows_.push_back({std::move(range), nullptr});
    }

    ~Checker() {
        munmap(shared_cells_, LARGEST_SHARED * sizeof(Cell));
        forget();
    }

    void check(uintptr_t address, size_t bytes, Access access, const Origin& origin) {
        if (is_private(address, bytes)) return;
        const uintptr_t shared = reinterpret_cast<uintptr_t>(worker_.shared);
        if (address >= shared && address < shared + worker_.shared_bytes) {
            if (address + bytes > shared + worker_.shared_bytes) outside(address, bytes, access, origin);
            for (size_t i = 0; i < bytes; ++i) touch(shared_cells_[address - shared + i], address, bytes, access, origin, true);
            return;
        }
        if (Shadow* shadow = find(address)) {
            const Range& range = shadow->range;
            if (address + bytes > range.end) outside(address, bytes, access, origin);
            if (!range.writable) {
                if (access != Access::READ) report("write to the read-only ", address, bytes, origin);
                return;  // nobody writes it: no history is needed
            }
            if (shadow->cells == nullptr) shadow->cells = new_cells(range.end - range.begin);
            Cell* cells = shadow->cells + (address - range.begin);
            for (size_t i = 0; i < bytes; ++i) touch(cells[i], address, bytes, access, origin, false);
            return;
        }
        if (shadows_.empty()) return;  // nobody said which memory there is
        const bool constant = address >= reinterpret_cast<uintptr_t>(worker_.kernel->image_begin) &&
                              address < reinterpret_cast<uintptr_t>(worker_.kernel->image_end);
        if (!constant || access != Access::READ) outside(address, bytes, access, origin);
    }

    [[noreturn]] void misaligned(uintptr_t address, size_t bytes, const char* what, const Origin& origin) {
        worker_.fail(text("misaligned %s of %zu bytes: ", what, bytes) + name_of_place(worker_, address) + origin.describe());
    }

   private:
    static Cell* new_cells(size_t count) { return static_cast<Cell*>(map_pages(count * sizeof(Cell))); }

    void forget() {
        for (Shadow& shadow : shadows_) {
            if (shadow.cells) munmap(shadow.cells, (shadow.range.end - shadow.range.begin) * sizeof(Cell));
            shadow.cells = nullptr;
        }
        segments_.resize(1);
    }

    // Whether this is the running thread's own memory: its stack.
    bool is_private(uintptr_t address, size_t bytes) const {
        if (const Fiber* fiber = worker_.current)
            return address >= reinterpret_cast<uintptr_t>(fiber->stack_begin) &&
                   address + bytes <= reinterpret_cast<uintptr_t>(fiber->stack_end);
        const uintptr_t here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
        return address >= here && address < stack_top_;
    }

    Shadow* find(uintptr_t address) {
        const auto contains = [&](const Shadow& s) { return address >= s.range.begin && address < s.range.end; };
        if (last_ < shadows_.size() && contains(shadows_[last_])) return &shadows_[last_];
        const auto after = std::upper_bound(shadows_.begin(), shadows_.end(), address,
                                            [](uintptr_t a, const Shadow& s) { return a < s.range.begin; });
        if (after == shadows_.begin() || !contains(*(after - 1))) return nullptr;
        last_ = after - 1 - shadows_.begin();
        return &shadows_[last_];
    }

    [[noreturn]] void report(const std::string& what, uintptr_t address, size_t bytes, const Origin& origin) {
        worker_.fail(what + name_of_place(worker_, address) + text(", %zu bytes", bytes) + origin.describe());
    }

    [[noreturn]] void outside(uintptr_t address, size_t bytes, Access access, const Origin& origin) {
        report(std::string(name_of(access)) + " outside of all buffers: ", address, bytes, origin);
    }

    static const char* name_of(Access access) {
        static const char* const names[] = {"read", "write", "atomic update", "asynchronous copy", "asynchronous copy"};
        return names[int(access)];
    }

    // The number of what the running thread does now.
    uint32_t current_segment() {
        Fiber* fiber = worker_.current;
        const uint32_t block = worker_.block_number, thread = worker_.thread_number();
        if (fiber) {
            if (fiber->segment != 0) return fiber->segment;
        } else if (segments_.size() > 1 && segments_.back().block == block && segments_.back().thread == thread) {
            return segments_.size() - 1;
        }
        segments_.push_back({block, thread, worker_.barrier_generation, fiber ? fiber->warp->barriers : 0});
        if (fiber) fiber->segment = segments_.size() - 1;
        return segments_.size() - 1;
    }

   public:
    // Where a block begins: segments are numbers of 30 bits, and memory.
    void begin_block() {
        if (segments_.size() < MOST_SEGMENTS) return;
        forget();
        memset(shared_cells_, 0, LARGEST_SHARED * sizeof(Cell));
    }

   private:
    bool is_ordered(uint32_t before, const Segment& now, bool is_shared) const {
        const Segment& then = segments_[before & SEGMENT];
        if (then.block != now.block) return is_shared;  // another block's shared memory was other memory
        if (then.thread == now.thread || then.barrier < now.barrier) return true;
        return then.thread / WARP == now.thread / WARP && then.warp_barrier < now.warp_barrier;
    }

    void touch(Cell& cell, uintptr_t address, size_t bytes, Access access, const Origin& origin, bool is_shared) {
        const uint32_t number = current_segment();
        const Segment& now = segments_[number];
        if (cell.writer != 0 && access != Access::COPY_END) {
            const bool same_block = segments_[cell.writer & SEGMENT].block == now.block;
            if ((cell.writer & PENDING_COPY) && same_block)
                conflict("a copy_async", " whose completion no copy_async_wait has waited for", cell.writer, address, bytes,
                         access, origin);
            const bool both_atomic = (cell.writer & ATOMIC_UPDATE) && access == Access::ATOMIC;
            if (!both_atomic && !is_ordered(cell.writer, now, is_shared))
                conflict(cell.writer & ATOMIC_UPDATE ? "an atomic update" : "a write", "", cell.writer, address, bytes, access,
                         origin);
        }
        if (access == Access::READ) {
            if (cell.reader != 0 && cell.reader != number && segments_[cell.reader].thread != now.thread) {
                // Of the two that are kept, one is of another warp than the last, where there is such a one.
                const bool same_warp = segments_[cell.reader].thread / WARP == now.thread / WARP;
                const bool keeps = same_warp && cell.other_reader != 0 && !is_ordered(cell.other_reader, now, is_shared);
                if (!keeps) cell.other_reader = cell.reader;
            }
            cell.reader = number;
            return;
        }
        for (const uint32_t reader : {cell.reader, cell.other_reader})
            if (reader != 0 && !is_ordered(reader, now, is_shared))
                conflict("a read", "", reader, address, bytes, access, origin);
        cell.reader = cell.other_reader = 0;
        cell.writer = number | (access == Access::ATOMIC ? ATOMIC_UPDATE : access == Access::COPY_START ? PENDING_COPY : 0);
    }

    [[noreturn]] void conflict(const char* what, const char* detail, uint32_t other, uintptr_t address, size_t bytes,
                               Access access, const Origin& origin) {
        const Segment& then = segments_[other & SEGMENT];
        report(text("data race: %s, and %s by block %u, thread %u", name_of(access), what, then.block, then.thread) +
                   (*detail ? detail : ", with no barrier between") + ": ",
               address, bytes, origin);
    }

    Worker& worker_;
    std::vector<Segment> segments_;
    Cell* shared_cells_;
    uintptr_t stack_top_;
    std::vector<Shadow> shadows_;
    size_t last_ = 0;
};

Checker* make_checker(Worker& worker) { return new Checker(worker); }
void delete_checker(Checker* checker) { delete checker; }
void begin_checked_block(Checker& checker) { checker.begin_block(); }

void check(Worker& worker, const void* address, size_t bytes, Access access, const Origin& origin) {
    worker.checker->check(reinterpret_cast<uintptr_t>(address), bytes, access, origin);
}

// An access of the compiled code; `size` is what its address must be a multiple of.
static void from_code(void* address, size_t bytes, size_t size, Access access, const void* code) {
    Worker* here = worker();
    if (here == nullptr || here->checker == nullptr) return;
    const Origin origin{0, code};
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (at % size != 0) here->checker->misaligned(at, bytes, access == Access::READ ? "read" : "write", origin);
    here->checker->check(at, bytes, access, origin);
}

}  // namespace emulator

using namespace emulator;

void emulator_check_atomic(void* target, int bytes, const void* code) {
    from_code(target, bytes, bytes, Access::ATOMIC, code);
}

// ---- The hooks: names and meaning are those of the compiler's thread sanitizer ----

#define HOOKS(SIZE)                                                                       \
    void __tsan_read##SIZE(void* address) {                                               \
        from_code(address, SIZE, SIZE, Access::READ, __builtin_return_address(0));        \
    }                                                                                     \
    void __tsan_write##SIZE(void* address) {                                              \
        from_code(address, SIZE, SIZE, Access::WRITE, __builtin_return_address(0));       \
    }                                                                                     \
    void __tsan_unaligned_read##SIZE(void* address) {                                     \
        from_code(address, SIZE, 1, Access::READ, __builtin_return_address(0));           \
    }                                                                                     \
    void __tsan_unaligned_write##SIZE(void* address) {                                    \
        from_code(address, SIZE, 1, Access::WRITE, __builtin_return_address(0));          \
    }
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* address, unsigned long bytes) {
    from_code(address, bytes, 1, Access::READ, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
    from_code(address, bytes, 1, Access::WRITE, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
