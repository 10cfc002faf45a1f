// Memory that launches may touch, by address and name.

#include <sys/mman.h>

#include <algorithm>
#include <mutex>

#include "worker.h"

namespace emulator {

static std::mutex ranges_lock;
static std::vector<Range> ranges;  // ordered by begin

std::vector<Range> registered_ranges() {
    std::lock_guard<std::mutex> lock(ranges_lock);
    return ranges;
}

// How far an address lies from the bytes [begin, end): 0 inside of them and at their end.
static uintptr_t distance_to(uintptr_t address, uintptr_t begin, uintptr_t end) {
    return address < begin ? begin - address : address >= end ? address - end : 0;
}

// An address by the memory that it is in or nearest to, "x0 + 64 bytes (x0 has 60)". The system may map a buffer right
// beside the worker's own memory: what lies between belongs to the nearer one.
std::string name_of_place(const Worker& worker, uintptr_t address) {
    const uintptr_t shared = reinterpret_cast<uintptr_t>(worker.shared);
    const uintptr_t shared_end = reinterpret_cast<uintptr_t>(worker.shared_end);
    const uintptr_t stacks = reinterpret_cast<uintptr_t>(worker.stacks);
    const std::string of_shared =
        text("shared memory %+ld (of %zu bytes)", long(address - shared), worker.shared_bytes);
    if (address >= shared_end - SHARED_ROOM && address < shared_end + PAGE) return of_shared;
    if (stacks && address >= stacks && address < stacks + LARGEST_BLOCK * STACK)
        return text("the local memory of thread %zu", size_t(address - stacks) / STACK);
    const std::vector<Range> known = registered_ranges();
    const Range* best = nullptr;
    uintptr_t best_distance = 1 << 20;
    for (const Range& range : known) {
        const uintptr_t distance = distance_to(address, range.begin, range.end);
        if (distance < best_distance) {
            best = &range;
            best_distance = distance;
        }
    }
    const uintptr_t from_shared = distance_to(address, shared, shared + worker.shared_bytes);
    if (worker.shared_bytes > 0 && from_shared <= LARGEST_SHARED && from_shared < best_distance) return of_shared;
    if (best == nullptr) return text("address 0x%lx, near no buffer", static_cast<unsigned long>(address));
    const long offset = static_cast<long>(address) - static_cast<long>(best->begin);
    return best->name + text(" %c %ld bytes (%s has %lu)", offset < 0 ? '-' : '+', offset < 0 ? -offset : offset,
                             best->name.c_str(), static_cast<unsigned long>(best->end - best->begin));
}

void* map_pages(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    return found;
}

void forbid_page(void* begin) {
    if (mprotect(begin, PAGE, PROT_NONE) != 0) throw std::bad_alloc();
}

}  // namespace emulator

using namespace emulator;

void emulator_misaligned(const void* address, unsigned long bytes, const char* what) {
    const std::string place = name_of_place(*worker(), reinterpret_cast<uintptr_t>(address));
    worker()->fail(text("misaligned %s of %lu bytes: ", what, bytes) + place + Origin{0, __builtin_return_address(0)}.describe());
}

void emulator_register_range(const void* begin, unsigned long bytes, const char* name, int writable) {
    std::lock_guard<std::mutex> lock(ranges_lock);
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
    const auto after = std::upper_bound(ranges.begin(), ranges.end(), first,
                                        [](uintptr_t address, const Range& range) { return address < range.begin; });
    ranges.insert(after, {first, first + bytes, name, writable != 0});
}

void emulator_forget_range(const void* begin) {
    std::lock_guard<std::mutex> lock(ranges_lock);
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
    const auto found = std::find_if(ranges.begin(), ranges.end(), [&](const Range& range) { return range.begin == first; });
    if (found != ranges.end()) ranges.erase(found);
}
