// The stand-in driver's GPU: its memory, its streams, the failures asked for, what is counted.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define LOCKED std::lock_guard<std::recursive_mutex> guard(everything)
#define TRY(call) do { if (const int result_ = (call)) return result_; } while (0)

namespace {

enum Result : int {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400, ILLEGAL_STATE = 401,
    NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, LAUNCH_OUT_OF_RESOURCES = 701, LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_IMPLICIT = 906, UPDATE_FAILURE = 910,
};
const std::map<int, const char*> NAMES = {
    {SUCCESS, "no error"}, {INVALID_VALUE, "invalid argument"}, {OUT_OF_MEMORY, "out of memory"},
    {NOT_INITIALIZED, "initialization error"}, {NO_DEVICE, "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "invalid device ordinal"}, {INVALID_IMAGE, "device kernel image is invalid"},
    {INVALID_CONTEXT, "invalid device context"}, {INVALID_HANDLE, "invalid resource handle"},
    {NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"},
    {ILLEGAL_STATE, "the operation cannot be performed in the present state"}, {NOT_FOUND, "named symbol not found"},
    {NOT_READY, "device not ready"}, {ILLEGAL_ADDRESS, "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"},
    {LAUNCH_FAILED, "unspecified launch failure"}, {801, "operation not supported"},
    {CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"},
    {CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing blocking stream"},
    {UPDATE_FAILURE, "the graph update was not performed"},
};

const size_t PAGE = 4096, ALIGNMENT = 256, ADDRESSES = size_t(1) << 40;
const unsigned SHARED_DEFAULT = 49152, SHARED_LARGEST = 232448, PARAMETERS_LARGEST = 32764;
const char MAGIC[] = "ONNXCEMU";

using Address = uint64_t;
using Work = std::function<int()>;
using Clock = std::chrono::steady_clock;
using Entry = int (*)(const void*, const unsigned*, const unsigned*, unsigned long);

struct Stream;
struct Mark { std::shared_ptr<Stream> stream; uint64_t position = 0; };
struct Operation { Work run; std::vector<Mark> after; };
struct Node { std::string kind; Work run; };
struct Graph { std::vector<Node> nodes; };
struct Stream {
    bool blocking = true;  // towards the legacy stream
    long number = 0;
    std::deque<Operation> queue;
    uint64_t submitted = 0, done = 0;
    std::unique_ptr<Graph> capture;
    int capture_mode = 0;
    void* capture_thread = nullptr;
    bool capture_broken = false;
};
struct Event { Mark mark; Clock::time_point time; };
struct Module { void* library; std::vector<std::unique_ptr<struct Function>> functions; };
struct Function { std::string name; Entry entry; const char* (*error)(); unsigned shared; };
struct Allocation { size_t bytes, mapped; };
struct Failure { long after, count; };

std::recursive_mutex everything;
std::map<std::string, long> counters;
std::map<std::string, Failure> failures;
std::string last_message;
int broken = SUCCESS;  // what every call answers after a kernel has failed, as the driver does
bool initialized = false;
size_t memory_limit = size_t(16) << 30, memory_used = 0, addresses_used = 0;
char* addresses = nullptr;
std::map<Address, Allocation> allocations;
std::map<char*, size_t> pinned;
std::map<void*, std::shared_ptr<Stream>> streams;
const std::shared_ptr<Stream> legacy = std::make_shared<Stream>();
int primary_context;
thread_local std::vector<void*> contexts;
thread_local char this_thread;

bool fails(const char* point) {
    const auto found = failures.find(point);
    if (found == failures.end() || found->second.count == 0) return false;
    if (found->second.after-- > 0) return false;
    return found->second.count-- > 0;
}

int ready() {
    if (!initialized) return NOT_INITIALIZED;
    if (contexts.empty()) return INVALID_CONTEXT;
    return broken;
}

// Streams

std::shared_ptr<Stream> stream_of(void* handle) {
    if (handle == nullptr || handle == (void*)1 || handle == (void*)2) return legacy;
    const auto found = streams.find(handle);
    return found == streams.end() ? nullptr : found->second;
}

void drain(Stream& stream, uint64_t position) {
    while (stream.done < position && !stream.queue.empty()) {
        Operation operation = std::move(stream.queue.front());
        stream.queue.pop_front();
        for (const Mark& mark : operation.after) drain(*mark.stream, mark.position);
        if (!broken) broken = operation.run();
        ++stream.done;
    }
}

// Whether there was anything to do. The newest streams come first: nothing orders them but what they wait for.
bool drain_all() {
    std::vector<std::shared_ptr<Stream>> waiting;
    for (auto& [handle, stream] : streams) waiting.push_back(stream);
    std::sort(waiting.begin(), waiting.end(), [](auto& a, auto& b) { return a->number > b->number; });
    waiting.push_back(legacy);
    bool pending = false;
    for (auto& stream : waiting) pending |= stream->done < stream->submitted;
    for (auto& stream : waiting) drain(*stream, stream->submitted);
    return pending;
}

// A call that may be dangerous to captures breaks those that forbid it.
int outside_captures(bool whole_context = false) {
    for (auto& [handle, stream] : streams) {
        if (!stream->capture) continue;
        if (whole_context || stream->capture_mode == 0
            || (stream->capture_mode == 1 && stream->capture_thread == &this_thread)) {
            stream->capture_broken = true;
            return CAPTURE_UNSUPPORTED;
        }
    }
    return SUCCESS;
}

int submit(void* handle, const std::string& kind, Work run, std::vector<Mark> after = {}, Mark* mark = nullptr) {
    TRY(ready());
    const auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) {
        if (stream->capture_broken) return CAPTURE_INVALIDATED;
        if (kind == "event" || kind == "wait") {
            stream->capture_broken = true;
            return CAPTURE_UNSUPPORTED;
        }
        stream->capture->nodes.push_back({kind, std::move(run)});
        return SUCCESS;
    }
    if (stream == legacy) {
        ++counters["legacy_operations"];
        for (auto& [other_handle, other] : streams) {
            if (!other->blocking) continue;
            if (other->capture) {
                other->capture_broken = true;
                return CAPTURE_IMPLICIT;
            }
            after.push_back({other, other->submitted});
        }
    } else if (stream->blocking) {
        after.push_back({legacy, legacy->submitted});
    }
    stream->queue.push_back({std::move(run), std::move(after)});
    ++stream->submitted;
    if (mark) *mark = {stream, stream->submitted};
    static const char* immediate = getenv("CUDA_LAUNCH_BLOCKING");
    if (immediate && *immediate == '1') {
        drain(*stream, stream->submitted);
        return broken;
    }
    return SUCCESS;
}

int wait_for(Stream& stream) {
    if (stream.capture) {
        stream.capture_broken = true;
        return CAPTURE_UNSUPPORTED;
    }
    drain(stream, stream.submitted);
    return broken;
}

// Memory

bool inside(Address address, size_t bytes) {
    auto found = allocations.upper_bound(address);
    if (found == allocations.begin()) return false;
    --found;
    return address + bytes <= found->first + found->second.bytes;
}

bool is_pinned(const void* address) {
    auto found = pinned.upper_bound((char*)address);
    if (found == pinned.begin()) return false;
    --found;
    return (char*)address < found->first + found->second;
}

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

int move(char* target, const char* source, size_t bytes) {
    memmove(target, source, bytes);
    return SUCCESS;
}

int copy(void* handle, const char* kind, void* target, const void* source, size_t bytes, bool wait) {
    const bool to_device = strcmp(kind, "dtoh") != 0, from_device = strcmp(kind, "htod") != 0;
    TRY(ready());
    if ((to_device && !inside((Address)target, bytes)) || (from_device && !inside((Address)source, bytes)))
        return bytes ? INVALID_VALUE : SUCCESS;
    if (fails("copy")) return INVALID_VALUE;
    if (wait) TRY(outside_captures());
    ++counters[kind];
    counters[std::string(kind) + "_bytes"] += bytes;
    const auto run = [=] {
        if ((to_device && !inside((Address)target, bytes)) || (from_device && !inside((Address)source, bytes)))
            return int(ILLEGAL_ADDRESS);
        return move((char*)target, (const char*)source, bytes);
    };
    const auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!from_device && !is_pinned(source) && !stream->capture) {
        // Pageable memory has been read when the call returns.
        const auto content = std::make_shared<std::string>((const char*)source, bytes);
        TRY(submit(handle, kind, [=] { return move((char*)target, content->data(), bytes); }));
    } else {
        TRY(submit(handle, kind, run));
    }
    if (stream->capture) return SUCCESS;
    return wait || (!to_device && !is_pinned(target)) ? wait_for(*stream) : SUCCESS;
}

int fill(void* handle, Address target, unsigned value, size_t unit, size_t count, bool wait) {
    TRY(ready());
    if (!inside(target, unit * count)) return count ? INVALID_VALUE : SUCCESS;
    TRY(submit(handle, "memset", [=] {
        for (size_t i = 0; i < count; ++i) memcpy((char*)target + i * unit, &value, unit);
        return int(SUCCESS);
    }));
    return wait ? wait_for(*legacy) : SUCCESS;
}

struct Copy2D {
    size_t source_x, source_y;
    unsigned source_type;
    const char* source_host;
    Address source_device;
    void* source_array;
    size_t source_pitch, target_x, target_y;
    unsigned target_type;
    char* target_host;
    Address target_device;
    void* target_array;
    size_t target_pitch, width, height;
};

int copy_2d(const Copy2D& c, void* handle, bool wait) {
    TRY(ready());
    if (!c.width || !c.height) return SUCCESS;
    if (c.source_type != 2 || c.target_type != 2) return 801;
    const size_t source_pitch = c.source_pitch ? c.source_pitch : c.width;
    const size_t target_pitch = c.target_pitch ? c.target_pitch : c.width;
    if (source_pitch < c.width || target_pitch < c.width) return INVALID_VALUE;
    const Address source = c.source_device + c.source_y * source_pitch + c.source_x;
    const Address target = c.target_device + c.target_y * target_pitch + c.target_x;
    const size_t rows = c.height, width = c.width;
    if (!inside(source, source_pitch * (rows - 1) + width) || !inside(target, target_pitch * (rows - 1) + width))
        return INVALID_VALUE;
    ++counters["dtod"];
    counters["dtod_bytes"] += width * rows;
    TRY(submit(handle, "dtod", [=] {
        for (size_t i = 0; i < rows; ++i)
            memmove((char*)target + i * target_pitch, (char*)source + i * source_pitch, width);
        return int(SUCCESS);
    }));
    return wait ? wait_for(*stream_of(handle)) : SUCCESS;
}

}  // namespace
