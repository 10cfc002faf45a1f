// A stand-in for NVIDIA's libcuda.so.1: what PyCUDA and the runtime call of the driver, on the CPU, for tests.
//
// Kernels are functions of a shared library (an image is "ONNXCEMU" and its path). It is as late and as strict as a
// driver may be: work queued on a stream is done only when something waits for it; fresh memory holds 0xff bytes and
// ends at a page that must not be touched; copies, launches and captures are checked. Allocations and launches can be
// made to fail, and everything is counted (the standin_ functions at the end).
#include <dlfcn.h>

#include <cstdio>

#include "device.h"

#define DRIVER(name, ...) extern "C" __attribute__((visibility("default"))) int name(__VA_ARGS__)

// Devices and contexts

DRIVER(cuInit, unsigned) {
    LOCKED;
    if (getenv("STANDIN_NO_DEVICE")) return NO_DEVICE;
    if (!addresses) {
        addresses = (char*)mmap(nullptr, ADDRESSES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (addresses == MAP_FAILED) return OUT_OF_MEMORY;
    }
    initialized = true;
    return SUCCESS;
}
DRIVER(cuDriverGetVersion, int* version) { *version = 13000; return SUCCESS; }
DRIVER(cuDeviceGetCount, int* count) { *count = 1; return initialized ? SUCCESS : NOT_INITIALIZED; }
DRIVER(cuDeviceGet, int* device, int ordinal) { *device = 0; return ordinal ? INVALID_DEVICE : SUCCESS; }
DRIVER(cuDeviceGetName, char* name, int length, int) { snprintf(name, length, "stand-in for an H200"); return SUCCESS; }
DRIVER(cuDeviceTotalMem_v2, size_t* bytes, int) { *bytes = memory_limit; return SUCCESS; }
DRIVER(cuDeviceGetPCIBusId, char* text, int length, int) { snprintf(text, length, "0000:00:00.0"); return SUCCESS; }
DRIVER(cuDeviceComputeCapability, int* major, int* minor, int) { *major = 9; *minor = 0; return SUCCESS; }
DRIVER(cuDeviceGetAttribute, int* value, int attribute, int) {
    static const std::map<int, int> known = {
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, INT_MAX}, {6, 65535}, {7, 65535},  // threads, block, grid
        {8, SHARED_DEFAULT}, {9, 65536}, {10, 32}, {11, INT_MAX}, {12, 65536}, {13, 1980000},  // up to the clock in kHz
        {14, 512}, {16, 132}, {31, 1}, {32, 0}, {36, 3201000}, {37, 6144}, {38, 50 << 20}, {39, 2048}, {40, 3},
        {41, 1}, {75, 9}, {76, 0}, {81, 233472}, {82, 65536}, {97, SHARED_LARGEST}, {106, 32}, {111, 1024},
    };
    const auto found = known.find(attribute);
    *value = found == known.end() ? 0 : found->second;
    return SUCCESS;
}
DRIVER(cuDevicePrimaryCtxRetain, void** context, int) {
    LOCKED;
    if (!initialized) return NOT_INITIALIZED;
    ++counters["contexts"];
    *context = &primary_context;
    return SUCCESS;
}
DRIVER(cuDevicePrimaryCtxRelease_v2, int) { LOCKED; --counters["contexts"]; return SUCCESS; }
DRIVER(cuCtxPushCurrent_v2, void* context) {
    if (context != &primary_context) return INVALID_CONTEXT;
    contexts.push_back(context);
    return SUCCESS;
}
DRIVER(cuCtxPopCurrent_v2, void** context) {
    if (contexts.empty()) return INVALID_CONTEXT;
    if (context) *context = contexts.back();
    contexts.pop_back();
    return SUCCESS;
}
DRIVER(cuCtxGetCurrent, void** context) { *context = contexts.empty() ? nullptr : contexts.back(); return SUCCESS; }
DRIVER(cuCtxGetDevice, int* device) { *device = 0; return contexts.empty() ? INVALID_CONTEXT : SUCCESS; }
DRIVER(cuCtxGetApiVersion, void*, unsigned* version) { *version = 13000; return SUCCESS; }
DRIVER(cuCtxSynchronize) {
    LOCKED;
    TRY(ready());
    TRY(outside_captures(true));
    drain_all();
    return broken;
}
DRIVER(cuGetErrorString, int code, const char** text) {
    const auto found = NAMES.find(code);
    *text = found == NAMES.end() ? "unrecognized error code" : found->second;
    return SUCCESS;
}
DRIVER(cuGetErrorName, int code, const char** text) { return cuGetErrorString(code, text); }

// NVRTC looks for a cache of compiled code behind this, and takes for granted that every driver has the function.
DRIVER(cuGetExportTable, const void**, const void*) { return NOT_FOUND; }

// Memory

// The emulator of kernels, which checks their accesses where it was asked to: it is told what memory there is.
static struct {
    void (*add)(const void*, unsigned long, const char*, int) = nullptr;
    void (*forget)(const void*) = nullptr;
} checks;
static void meet_emulator(const char* path) {
    if (checks.add) return;
    void* const kept = dlopen(path, RTLD_NOW | RTLD_LOCAL);  // never closed: these functions stay
    checks.add = (decltype(checks.add))dlsym(kept, "emulator_register_range");
    checks.forget = (decltype(checks.forget))dlsym(kept, "emulator_forget_range");
    for (const auto& [address, allocation] : allocations)
        if (checks.add) checks.add((const void*)address, allocation.bytes, "the GPU's memory", 1);
    for (const auto& [address, bytes] : pinned)
        if (checks.add) checks.add(address, bytes, "page-locked memory", 1);
}
DRIVER(cuMemGetInfo_v2, size_t* free, size_t* total) {
    LOCKED;
    *total = memory_limit;
    *free = memory_limit - memory_used;
    return ready();
}
DRIVER(cuMemAlloc_v2, Address* address, size_t bytes) {
    LOCKED;
    TRY(ready());
    TRY(outside_captures());
    if (!bytes) return INVALID_VALUE;
    const size_t room = rounded(bytes, ALIGNMENT), mapped = rounded(room, PAGE);
    if (fails("alloc") || memory_used + room > memory_limit || addresses_used + mapped + 2 * PAGE > ADDRESSES)
        return OUT_OF_MEMORY;
    char* const first = addresses + addresses_used + PAGE;
    if (mprotect(first, mapped, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
    memset(first, 0xff, mapped);
    addresses_used += mapped + PAGE;
    *address = (Address)(first + mapped - room);  // ends (nearly) where a page begins that must not be touched
    allocations[*address] = {bytes, mapped};
    if (checks.add) checks.add((const void*)*address, bytes, "the GPU's memory", 1);
    memory_used += room;
    ++counters["allocations"];
    counters["bytes"] += bytes;
    counters["bytes_peak"] = std::max(counters["bytes_peak"], counters["bytes"]);
    return SUCCESS;
}
DRIVER(cuMemFree_v2, Address address) {
    LOCKED;
    if (!initialized || contexts.empty()) return INVALID_CONTEXT;
    const auto found = allocations.find(address);
    if (found == allocations.end()) return INVALID_VALUE;
    if (drain_all() && !broken) ++counters["frees_of_pending_work"];
    const size_t bytes = found->second.bytes, room = rounded(bytes, ALIGNMENT), mapped = found->second.mapped;
    for (size_t i = bytes; i < room; ++i)
        if (((unsigned char*)address)[i] != 0xff) {
            ++counters["overruns"];
            break;
        }
    char* const first = (char*)address + room - mapped;
    madvise(first, mapped, MADV_DONTNEED);
    mprotect(first, mapped, PROT_NONE);
    memory_used -= room;
    --counters["allocations"];
    counters["bytes"] -= bytes;
    allocations.erase(found);
    if (checks.forget) checks.forget((const void*)address);
    return broken;
}
DRIVER(cuMemGetAddressRange_v2, Address* base, size_t* bytes, Address address) {
    LOCKED;
    auto found = allocations.upper_bound(address);
    if (found == allocations.begin() || !inside(address, 1)) return INVALID_VALUE;
    --found;
    if (base) *base = found->first;
    if (bytes) *bytes = found->second.bytes;
    return SUCCESS;
}
DRIVER(cuMemHostAlloc, void** address, size_t bytes, unsigned) {
    LOCKED;
    TRY(ready());
    TRY(outside_captures());
    if (fails("pinned")) return OUT_OF_MEMORY;
    char* const found = (char*)aligned_alloc(PAGE, rounded(bytes ? bytes : 1, PAGE));
    if (!found) return OUT_OF_MEMORY;
    memset(found, 0xff, bytes);
    pinned[found] = bytes;
    if (checks.add) checks.add(found, bytes, "page-locked memory", 1);
    *address = found;
    ++counters["pinned"];
    return SUCCESS;
}
DRIVER(cuMemFreeHost, void* address) {
    LOCKED;
    if (!pinned.count((char*)address)) return INVALID_VALUE;
    if (drain_all() && !broken) ++counters["frees_of_pending_work"];
    pinned.erase((char*)address);
    if (checks.forget) checks.forget(address);
    free(address);
    --counters["pinned"];
    return SUCCESS;
}
DRIVER(cuMemcpyHtoD_v2, Address t, const void* s, size_t n) { LOCKED; return copy(nullptr, "htod", (void*)t, s, n, true); }
DRIVER(cuMemcpyDtoH_v2, void* t, Address s, size_t n) { LOCKED; return copy(nullptr, "dtoh", t, (void*)s, n, true); }
DRIVER(cuMemcpyDtoD_v2, Address t, Address s, size_t n) { LOCKED; return copy(nullptr, "dtod", (void*)t, (void*)s, n, false); }
DRIVER(cuMemcpyHtoDAsync_v2, Address t, const void* s, size_t n, void* stream) {
    LOCKED;
    return copy(stream, "htod", (void*)t, s, n, false);
}
DRIVER(cuMemcpyDtoHAsync_v2, void* t, Address s, size_t n, void* stream) {
    LOCKED;
    return copy(stream, "dtoh", t, (void*)s, n, false);
}
DRIVER(cuMemcpyDtoDAsync_v2, Address t, Address s, size_t n, void* stream) {
    LOCKED;
    return copy(stream, "dtod", (void*)t, (void*)s, n, false);
}
DRIVER(cuMemcpy2D_v2, const Copy2D* c) { LOCKED; return copy_2d(*c, nullptr, true); }
DRIVER(cuMemcpy2DUnaligned_v2, const Copy2D* c) { LOCKED; return copy_2d(*c, nullptr, true); }
DRIVER(cuMemcpy2DAsync_v2, const Copy2D* c, void* stream) { LOCKED; return copy_2d(*c, stream, false); }
DRIVER(cuMemsetD8_v2, Address t, unsigned char v, size_t n) { LOCKED; return fill(nullptr, t, v, 1, n, true); }
DRIVER(cuMemsetD32_v2, Address t, unsigned v, size_t n) { LOCKED; return fill(nullptr, t, v, 4, n, true); }
DRIVER(cuMemsetD8Async, Address t, unsigned char v, size_t n, void* s) { LOCKED; return fill(s, t, v, 1, n, false); }
DRIVER(cuMemsetD32Async, Address t, unsigned v, size_t n, void* s) { LOCKED; return fill(s, t, v, 4, n, false); }

// Modules and launches

DRIVER(cuModuleLoadDataEx, Module** module, const void* image, unsigned count, int* options, void** values) {
    LOCKED;
    TRY(ready());
    std::string message;
    int result = SUCCESS;
    if (memcmp(image, MAGIC, sizeof MAGIC - 1)) {
        result = NO_BINARY_FOR_GPU;
    } else if (void* const library = dlopen((const char*)image + sizeof MAGIC - 1, RTLD_NOW | RTLD_LOCAL)) {
        *module = new Module{library, {}};
        meet_emulator((const char*)image + sizeof MAGIC - 1);
        ++counters["modules"];
    } else {
        message = dlerror();
        result = INVALID_IMAGE;
    }
    for (unsigned i = 0; i + 1 < count; ++i) {
        if (options[i] != 3 && options[i] != 5) continue;  // the buffers of the logs, each with its size behind it
        const size_t length = options[i] == 5 ? std::min(message.size(), (size_t)values[i + 1] - 1) : 0;
        memcpy(values[i], message.c_str(), length);
        ((char*)values[i])[length] = 0;
        values[i + 1] = (void*)length;
    }
    return result;
}
DRIVER(cuModuleLoadData, Module** module, const void* image) { return cuModuleLoadDataEx(module, image, 0, nullptr, nullptr); }
DRIVER(cuModuleUnload, Module* module) {
    LOCKED;
    if (drain_all() && !broken) ++counters["frees_of_pending_work"];
    dlclose(module->library);
    delete module;
    --counters["modules"];
    return SUCCESS;
}
DRIVER(cuModuleGetFunction, Function** function, Module* module, const char* name) {
    LOCKED;
    const auto entry = (Entry)dlsym(module->library, (std::string("emulated_") + name).c_str());
    if (!entry) return NOT_FOUND;
    const auto error = (const char* (*)())dlsym(module->library, "emulator_error");
    module->functions.push_back(std::make_unique<Function>(Function{name, entry, error, SHARED_DEFAULT}));
    *function = module->functions.back().get();
    return SUCCESS;
}
DRIVER(cuFuncSetAttribute, Function* function, int attribute, int value) {
    LOCKED;
    if (attribute != 8) return SUCCESS;
    if (value < 0 || value > int(SHARED_LARGEST)) return INVALID_VALUE;
    function->shared = value;
    return SUCCESS;
}
DRIVER(cuFuncGetAttribute, int* value, int attribute, Function* function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : attribute == 8 ? int(function->shared) : 0;
    return SUCCESS;
}
DRIVER(cuFuncSetCacheConfig, Function*, int) { return SUCCESS; }
DRIVER(cuLaunchKernel, Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
       unsigned shared, void* stream, void** parameters, void** extra) {
    LOCKED;
    TRY(ready());
    if (!gx || !gy || !gz || gx > INT_MAX || gy > 65535 || gz > 65535 || !bx || !by || !bz || bz > 64)
        return INVALID_VALUE;
    if (uint64_t(bx) * by * bz > 1024 || shared > function->shared) return INVALID_VALUE;
    if (parameters || !extra) return 801;
    std::string packed;
    const void* start = nullptr;
    for (int i = 0; extra[i]; i += 2) {
        if (extra[i] == (void*)1) start = extra[i + 1];
        if (extra[i] == (void*)2) packed.resize(*(size_t*)extra[i + 1]);
    }
    if (packed.size() > PARAMETERS_LARGEST || (packed.size() && !start)) return INVALID_VALUE;
    if (packed.size()) memcpy(&packed[0], start, packed.size());
    if (fails("launch")) {
        if (const auto target = stream_of(stream); target && target->capture) target->capture_broken = true;
        return LAUNCH_OUT_OF_RESOURCES;
    }
    ++counters["launch_calls"];
    return submit(stream, "kernel " + function->name, [=] {
        if (fails("fault")) return int(ILLEGAL_ADDRESS);
        const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        ++counters["launches"];
        if (!function->entry(packed.data(), grid, block, shared)) return int(SUCCESS);
        last_message = function->name + ": " + (function->error ? function->error() : "failed");
        fprintf(stderr, "stand-in driver: %s\n", last_message.c_str());
        return int(LAUNCH_FAILED);
    });
}

// Streams, events

DRIVER(cuStreamCreate, void** handle, unsigned flags) {
    LOCKED;
    TRY(ready());
    const auto stream = std::make_shared<Stream>();
    stream->blocking = !(flags & 1);
    stream->number = ++counters["streams_made"];
    streams[stream.get()] = stream;
    *handle = stream.get();
    ++counters["streams"];
    return SUCCESS;
}
DRIVER(cuStreamDestroy_v2, void* handle) {
    LOCKED;
    const auto stream = stream_of(handle);
    if (!stream || stream == legacy) return INVALID_HANDLE;
    drain(*stream, stream->submitted);
    streams.erase(handle);
    --counters["streams"];
    return SUCCESS;
}
DRIVER(cuStreamSynchronize, void* handle) {
    LOCKED;
    TRY(ready());
    const auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream == legacy) return submit(nullptr, "wait", [] { return 0; }) ?: wait_for(*legacy);
    return wait_for(*stream);
}
DRIVER(cuStreamQuery, void* handle) {
    LOCKED;
    TRY(ready());
    const auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return wait_for(*stream);
    if (stream->done == stream->submitted) return SUCCESS;
    drain(*stream, stream->done + 1);  // who asks long enough sees the end
    return broken ? broken : NOT_READY;
}
DRIVER(cuStreamWaitEvent, void* handle, Event* event, unsigned) {
    LOCKED;
    if (!event->mark.stream) return ready();
    return submit(handle, "wait", [] { return int(SUCCESS); }, {event->mark});
}
DRIVER(cuEventCreate, Event** event, unsigned) {
    LOCKED;
    TRY(ready());
    *event = new Event{};
    ++counters["events"];
    return SUCCESS;
}
DRIVER(cuEventDestroy_v2, Event* event) {
    LOCKED;
    drain(event->mark.stream ? *event->mark.stream : *legacy, event->mark.position);
    delete event;
    --counters["events"];
    return SUCCESS;
}
DRIVER(cuEventRecord, Event* event, void* handle) {
    LOCKED;
    return submit(handle, "event", [=] { event->time = Clock::now(); return int(SUCCESS); }, {}, &event->mark);
}
DRIVER(cuEventSynchronize, Event* event) {
    LOCKED;
    if (event->mark.stream) drain(*event->mark.stream, event->mark.position);
    return ready();
}
DRIVER(cuEventQuery, Event* event) {
    LOCKED;
    TRY(ready());
    if (!event->mark.stream || event->mark.stream->done >= event->mark.position) return SUCCESS;
    drain(*event->mark.stream, event->mark.stream->done + 1);
    return broken ? broken : NOT_READY;
}
DRIVER(cuEventElapsedTime_v2, float* milliseconds, Event* start, Event* end) {
    LOCKED;
    for (const Event* event : {start, end})
        if (event->mark.stream && event->mark.stream->done < event->mark.position) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return SUCCESS;
}
DRIVER(cuEventElapsedTime, float* milliseconds, Event* start, Event* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }

// Graphs

DRIVER(cuStreamBeginCapture_v2, void* handle, int mode) {
    LOCKED;
    TRY(ready());
    const auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream == legacy) return CAPTURE_UNSUPPORTED;
    if (stream->capture) return ILLEGAL_STATE;
    stream->capture = std::make_unique<Graph>();
    stream->capture_mode = mode;
    stream->capture_thread = &this_thread;
    stream->capture_broken = false;
    ++counters["capturing"];
    return SUCCESS;
}
DRIVER(cuStreamIsCapturing, void* handle, int* status) {
    LOCKED;
    const auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture_broken ? 2 : 1;
    return SUCCESS;
}
DRIVER(cuStreamEndCapture, void* handle, Graph** graph) {
    LOCKED;
    *graph = nullptr;
    const auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!stream->capture) return ILLEGAL_STATE;
    --counters["capturing"];
    std::unique_ptr<Graph> captured = std::move(stream->capture);
    if (stream->capture_broken) return CAPTURE_INVALIDATED;
    ++counters["captures"];
    ++counters["graphs"];
    *graph = captured.release();
    return SUCCESS;
}
DRIVER(cuGraphGetNodes, Graph* graph, void**, size_t* count) { LOCKED; *count = graph->nodes.size(); return SUCCESS; }
DRIVER(cuGraphInstantiateWithFlags, Graph** executable, Graph* graph, unsigned long long) {
    LOCKED;
    TRY(ready());
    if (fails("instantiate")) return OUT_OF_MEMORY;
    *executable = new Graph(*graph);
    ++counters["instantiations"];
    ++counters["graph_executables"];
    return SUCCESS;
}
struct UpdateResult { int result; void *node, *from; };
DRIVER(cuGraphExecUpdate_v2, Graph* executable, Graph* graph, UpdateResult* info) {
    LOCKED;
    TRY(ready());
    bool same = executable->nodes.size() == graph->nodes.size();
    for (size_t i = 0; same && i < graph->nodes.size(); ++i) same = executable->nodes[i].kind == graph->nodes[i].kind;
    if (info) *info = {same ? 0 : 2, nullptr, nullptr};
    if (!same) return UPDATE_FAILURE;
    *executable = *graph;
    ++counters["updates"];
    return SUCCESS;
}
DRIVER(cuGraphLaunch, Graph* executable, void* stream) {
    LOCKED;
    TRY(ready());
    if (fails("graph_launch")) return LAUNCH_OUT_OF_RESOURCES;
    ++counters["graph_launches"];
    const auto nodes = executable->nodes;
    return submit(stream, "graph", [=] {
        for (const Node& node : nodes) TRY(node.run());
        return int(SUCCESS);
    });
}
DRIVER(cuGraphDestroy, Graph* graph) { LOCKED; delete graph; --counters["graphs"]; return SUCCESS; }
DRIVER(cuGraphExecDestroy, Graph* graph) { LOCKED; delete graph; --counters["graph_executables"]; return SUCCESS; }

// For tests

// The n-th use (from 0) of a point, and the next `count - 1`, fail. Points: alloc, pinned, copy, launch (refused at
// once), fault (found out later, and lasting), instantiate, graph_launch.
extern "C" __attribute__((visibility("default"))) void standin_fail(const char* point, long after, long count) {
    LOCKED;
    failures[point] = {after, count};
}
extern "C" __attribute__((visibility("default"))) long standin_counter(const char* name) {
    LOCKED;
    return counters[name];
}
extern "C" __attribute__((visibility("default"))) const char* standin_message() { return last_message.c_str(); }
extern "C" __attribute__((visibility("default"))) void standin_set_memory(size_t bytes) { memory_limit = bytes; }
// Forgets failures, injected ones and those that happened.
extern "C" __attribute__((visibility("default"))) void standin_reset() {
    LOCKED;
    drain_all();
    failures.clear();
    last_message.clear();
    broken = SUCCESS;
    memory_limit = size_t(16) << 30;
}
