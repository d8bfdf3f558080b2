/* runtime.cc - the part of the CUDA runtime that the host side uses, emulated.
 *
 * Work is queued and done as late as can be: when somebody waits for it. So a result that is
 * read, or a pinned buffer that is written again, without waiting shows. One list for all
 * streams in order of submission: nothing waits for what comes later in it.
 *
 *   LATTE_EMULATE_DEVICES  how many devices there are (default 1)
 *   LATTE_EMULATE_MEMORY   bytes of each (default 8 GiB)
 *   LATTE_EMULATE_PDL      1: hide from a kernel what those before it wrote, until it waits
 *   LATTE_EMULATE_FAIL     n: the n-th kernel done from now on (from when the variable got its
 *                          value) fails; its device stays broken while the variable is set
 *
 * Threads: any; one lock around everything.
 */
#include "engine/kernels/cuda/device.cuh"
#include "tests/emulate/block.h"

#include <stdlib.h>
#include <time.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

using emulate::work;

namespace
{

enum { MAX_DEVICES = 16, N_SMS = 8 };

struct device {
    cudaError_t broken;
    size_t used;
};

struct allocation {
    size_t n_bytes;
    int device;
};

struct mark { /* of an event; outlives it while queued */
    long recorded, reached;
    double ms;
};

struct step {
    work todo;
    int device;
    bool is_kernel, early; /* early: does not wait for the kernels before it to end */
    cudaStream_t stream;
};

} // namespace

struct CUgraph_st {
    std::vector<step> steps;
};
struct CUgraphExec_st {
    std::vector<step> steps;
};
struct CUstream_st {
    CUgraph_st *capture;
    int device;
};
struct CUevent_st {
    std::shared_ptr<mark> state;
    CUgraph_st *capture;
};

static std::mutex lock;
static device devices[MAX_DEVICES];
static std::map<char *, allocation> allocations;
static std::map<char *, size_t> pinned;
static std::deque<step> pending;
static std::set<CUstream_st *> streams;
static std::set<CUgraph_st *> captures; /* being recorded */
static std::string fail_value;
static long n_kernels, fail_at;
static thread_local int current_device;
static thread_local cudaError_t last_error;

static long number_of(const char *variable, long otherwise)
{
    const char *value = getenv(variable);
    return value && *value ? atol(value) : otherwise;
}

static int n_devices(void)
{
    const long n = number_of("LATTE_EMULATE_DEVICES", 1);
    return n < 0 ? 0 : n > MAX_DEVICES ? MAX_DEVICES : (int)n;
}

static size_t device_bytes(void)
{
    return (size_t)number_of("LATTE_EMULATE_MEMORY", 8L << 30);
}

/* ---- doing what was queued ---- */

static bool next_kernel_fails(void)
{
    const char *value = getenv("LATTE_EMULATE_FAIL");
    if (fail_value != (value ? value : "")) {
        fail_value = value ? value : "";
        fail_at = n_kernels + atol(fail_value.c_str());
    }
    return ++n_kernels == fail_at;
}

static cudaError_t broken(int d)
{
    if (devices[d].broken && !getenv("LATTE_EMULATE_FAIL"))
        devices[d].broken = cudaSuccess;
    return devices[d].broken;
}

/* Device memory as it was before the kernels that may still run: those of one stream since work
 * that waits for all before it. */
static std::map<char *, std::vector<char>> before;
static cudaStream_t before_stream;
static std::vector<emulate::range> written;

static void add_written(char *memory, const std::vector<char> &was)
{
    enum { CHUNK = 4096 };
    for (size_t i = 0; i < was.size(); i++) {
        while (i % CHUNK == 0 && i + CHUNK < was.size() && !memcmp(memory + i, &was[i], CHUNK))
            i += CHUNK;
        if (memory[i] == was[i])
            continue;
        auto p = (unsigned char *)memory + i;
        if (!written.empty() && written.back().start + written.back().n_bytes == p)
            written.back().n_bytes++;
        else
            written.push_back({p, 1});
    }
}

static void find_written(const step &s)
{
    written.clear();
    if (!number_of("LATTE_EMULATE_PDL", 0))
        return;
    if (!s.early || s.stream != before_stream)
        before.clear();
    before_stream = s.stream;
    if (!s.is_kernel || !s.early)
        return;
    for (const auto &one : allocations) {
        auto found = before.find(one.first);
        if (found != before.end() && found->second.size() == one.second.n_bytes)
            add_written(one.first, found->second);
        else
            before[one.first] = std::vector<char>(one.first, one.first + one.second.n_bytes);
    }
}

static void do_first(void)
{
    step s = std::move(pending.front());
    pending.pop_front();
    if (broken(s.device))
        return;
    if (s.is_kernel && next_kernel_fails()) {
        devices[s.device].broken = cudaErrorLaunchFailure;
        return;
    }
    find_written(s);
    cudaError_t error = s.todo();
    if (error)
        devices[s.device].broken = error;
}

static cudaError_t do_all(void)
{
    while (!pending.empty())
        do_first();
    return broken(current_device);
}

static cudaError_t put(cudaStream_t stream, work todo, bool is_kernel, bool early = false)
{
    if (stream && !streams.count(stream))
        return cudaErrorInvalidResourceHandle;
    const int d = stream ? stream->device : current_device;
    step s = {std::move(todo), d, is_kernel, early, stream};
    if (stream && stream->capture)
        stream->capture->steps.push_back(std::move(s));
    else
        pending.push_back(std::move(s));
    return cudaSuccess;
}

static cudaError_t note(cudaError_t error)
{
    if (error && error != cudaErrorNotReady)
        last_error = error;
    return error;
}

/* A runtime function: locked, nothing on a broken device, the error kept for cudaGetLastError. */
template <class F> static cudaError_t function(F f)
{
    std::lock_guard<std::mutex> guard(lock);
    if (current_device >= n_devices())
        return note(cudaErrorNoDevice);
    cudaError_t error = broken(current_device);
    return note(error ? error : f());
}

/* Functions that must not be called while any stream is captured (in the global mode). */
static cudaError_t unsafe(void)
{
    return captures.empty() ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

cudaError_t emulate::enqueue(cudaStream_t stream, work todo)
{
    return function([&] { return put(stream, std::move(todo), true); });
}

cudaError_t emulate::submit(cudaStream_t stream, const void *kernel, dim3 grid, int cluster,
                            int block, size_t shared_bytes, bool early, std::function<void()> body)
{
    return function([&] {
        if (block < 1 || block > 1024 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff ||
            grid.y > 65535 || grid.z > 65535)
            return cudaErrorInvalidConfiguration;
        if (cluster < 0 || cluster > MAX_CLUSTER || (cluster && grid.x % (unsigned)cluster))
            return cudaErrorInvalidClusterSize;
        if (shared_bytes > SHARED_LIMIT)
            return cudaErrorInvalidValue;
        kernel_run launch = {kernel, grid, cluster, block, shared_bytes, std::move(body), early};
        auto todo = [launch] {
            run(launch, n_kernels, written);
            return cudaSuccess;
        };
        return put(stream, todo, true, early);
    });
}

/* ---- devices and errors ---- */

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = n_devices();
    return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaSetDevice(int device)
{
    std::lock_guard<std::mutex> guard(lock);
    if (device < 0 || device >= n_devices())
        return note(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    if (device < 0 || device >= n_devices())
        return note(cudaErrorInvalidDevice);
    memset((void *)p, 0, sizeof(*p));
    snprintf(p->name, sizeof(p->name), "emulated device");
    p->totalGlobalMem = device_bytes();
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = emulate::SHARED_LIMIT;
    p->sharedMemPerMultiprocessor = 228 * 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = 9;
    p->multiProcessorCount = N_SMS;
    p->l2CacheSize = 256 << 10; /* so that small models fill it, too */
    p->concurrentKernels = 1;
    p->asyncEngineCount = 1;
    p->unifiedAddressing = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error)
        return error;
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = p.multiProcessorCount;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = p.major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = p.minor;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)p.sharedMemPerBlockOptin;
        break;
    case cudaDevAttrL2CacheSize:
        *value = p.l2CacheSize;
        break;
    default:
        return note(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    return function([&] {
        *total = device_bytes();
        const size_t used = devices[current_device].used;
        *available = *total > used ? *total - used : 0;
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceSynchronize(void)
{
    return function([] {
        cudaError_t error = unsafe();
        return error ? error : do_all();
    });
}

cudaError_t cudaDeviceReset(void)
{
    std::lock_guard<std::mutex> guard(lock);
    return note(do_all());
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void)
{
    return last_error;
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize", "cluster misconfiguration"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed now"},
};

const char *cudaGetErrorName(cudaError_t error)
{
    for (const auto &e : errors)
        if (e.error == error)
            return e.name;
    return "cudaErrorUnknown";
}

const char *cudaGetErrorString(cudaError_t error)
{
    for (const auto &e : errors)
        if (e.error == error)
            return e.text;
    return "unknown error";
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaSetDeviceFlags(unsigned)
{
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *, enum cudaFuncAttribute attribute, int value)
{
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > emulate::SHARED_LIMIT)
        return note(cudaErrorInvalidValue);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int block,
                                                          size_t shared_bytes)
{
    *n = 2048 / (block < 1 ? 1 : block);
    if (shared_bytes && *n > (int)(228 * 1024 / (shared_bytes + 1024)))
        *n = (int)(228 * 1024 / (shared_bytes + 1024));
    return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **p, size_t n_bytes)
{
    return function([&]() -> cudaError_t {
        if (unsafe())
            return unsafe();
        *p = nullptr;
        if (!n_bytes)
            return cudaSuccess;
        size_t *used = &devices[current_device].used;
        void *memory = nullptr;
        if (n_bytes > device_bytes() || *used > device_bytes() - n_bytes ||
            posix_memalign(&memory, 512, n_bytes))
            return cudaErrorMemoryAllocation;
        memset(memory, 0xff, n_bytes); /* NaN */
        *used += n_bytes;
        allocations[(char *)memory] = {n_bytes, current_device};
        before.clear();
        *p = memory;
        return cudaSuccess;
    });
}

cudaError_t cudaFree(void *p)
{
    std::lock_guard<std::mutex> guard(lock); /* also on a broken device */
    if (!p)
        return cudaSuccess;
    do_all();
    auto found = allocations.find((char *)p);
    if (found == allocations.end())
        return note(cudaErrorInvalidValue);
    devices[found->second.device].used -= found->second.n_bytes;
    memset(p, 0xff, found->second.n_bytes);
    free(p);
    allocations.erase(found);
    before.clear();
    return note(broken(current_device));
}

cudaError_t cudaHostAlloc(void **p, size_t n_bytes, unsigned)
{
    return function([&]() -> cudaError_t {
        if (unsafe())
            return unsafe();
        if (posix_memalign(p, 512, n_bytes ? n_bytes : 1))
            return cudaErrorMemoryAllocation;
        memset(*p, 0xff, n_bytes);
        pinned[(char *)*p] = n_bytes;
        return cudaSuccess;
    });
}

cudaError_t cudaMallocHost(void **p, size_t n_bytes)
{
    return cudaHostAlloc(p, n_bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void *p)
{
    std::lock_guard<std::mutex> guard(lock);
    if (!p)
        return cudaSuccess;
    do_all();
    if (!pinned.erase((char *)p))
        return note(cudaErrorInvalidValue);
    free(p);
    return note(broken(current_device));
}

cudaError_t cudaHostRegister(void *p, size_t n_bytes, unsigned)
{
    return function([&] {
        pinned[(char *)p] = n_bytes;
        return cudaSuccess;
    });
}

cudaError_t cudaHostUnregister(void *p)
{
    return function([&] {
        do_all();
        return pinned.erase((char *)p) ? cudaSuccess : cudaErrorInvalidValue;
    });
}

static bool is_pinned(const void *p)
{
    auto after = pinned.upper_bound((char *)p);
    if (after == pinned.begin())
        return false;
    --after;
    return (const char *)p < after->first + after->second;
}

/* The allocation that p is in: 1 when the bytes lie inside, -1 when they go beyond, 0: host. */
static int on_device(const void *p, size_t n_bytes)
{
    auto after = allocations.upper_bound((char *)p);
    if (after == allocations.begin())
        return 0;
    --after;
    const size_t offset = (size_t)((const char *)p - after->first);
    if (offset >= after->second.n_bytes)
        return 0;
    return n_bytes <= after->second.n_bytes - offset ? 1 : -1;
}

/* Do the pointers fit the kind? */
static bool is_valid(const void *to, const void *from, size_t n_bytes, enum cudaMemcpyKind kind)
{
    const int to_device = on_device(to, n_bytes), from_device = on_device(from, n_bytes);
    if (to_device < 0 || from_device < 0)
        return false;
    return kind == cudaMemcpyDefault ||
           (to_device == (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) &&
            from_device == (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice));
}

static cudaError_t copy(void *to, const void *from, size_t n_bytes, enum cudaMemcpyKind kind,
                        cudaStream_t stream, bool wait)
{
    if (!n_bytes)
        return cudaSuccess;
    if (!is_valid(to, from, n_bytes, kind))
        return cudaErrorInvalidValue;
    auto as_is = [=] {
        memmove(to, from, n_bytes);
        return cudaSuccess;
    };
    const bool from_pageable = !on_device(from, 1) && !is_pinned(from);
    const bool to_pageable = !on_device(to, 1) && !is_pinned(to);
    if (stream && stream->capture)
        return wait ? cudaErrorStreamCaptureUnsupported : put(stream, as_is, false);
    if (from_pageable) { /* taken at once */
        std::vector<char> bytes((const char *)from, (const char *)from + n_bytes);
        cudaError_t error = put(
            stream,
            [=] {
                memcpy(to, bytes.data(), n_bytes);
                return cudaSuccess;
            },
            false);
        return error || !wait ? error : do_all();
    }
    cudaError_t error = put(stream, as_is, false);
    return error || !(wait || to_pageable) ? error : do_all();
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    return function([&] { return copy(to, from, n_bytes, kind, stream, false); });
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n_bytes, enum cudaMemcpyKind kind)
{
    return function([&]() -> cudaError_t {
        if (unsafe())
            return unsafe();
        return copy(to, from, n_bytes, kind, nullptr, true);
    });
}

cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t n_bytes,
                                cudaStream_t stream)
{
    return cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream)
{
    return function([&] {
        cudaError_t error = cudaSuccess;
        for (size_t i = 0; i < height && !error; i++)
            error = copy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width,
                         kind, stream, false);
        return error;
    });
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t n_bytes, cudaStream_t stream)
{
    return function([&] {
        if (!n_bytes)
            return cudaSuccess;
        if (on_device(p, n_bytes) != 1)
            return cudaErrorInvalidValue;
        return put(
            stream,
            [=] {
                memset(p, value, n_bytes);
                return cudaSuccess;
            },
            false);
    });
}

cudaError_t cudaMemset(void *p, int value, size_t n_bytes)
{
    return cudaMemsetAsync(p, value, n_bytes, nullptr);
}

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int)
{
    return function([&] {
        *stream = new CUstream_st{nullptr, current_device};
        streams.insert(*stream);
        return cudaSuccess;
    });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithPriority(stream, 0, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    std::lock_guard<std::mutex> guard(lock);
    do_all();
    if (!streams.erase(stream))
        return note(cudaErrorInvalidResourceHandle);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    return function([&] {
        if (stream && stream->capture)
            return cudaErrorStreamCaptureUnsupported;
        do_all();
        return broken(stream ? stream->device : current_device);
    });
}

cudaError_t cudaStreamQuery(cudaStream_t)
{
    return function([] {
        if (pending.empty())
            return cudaSuccess;
        do_first(); /* somebody polls */
        return cudaErrorNotReady;
    });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    return function([&] {
        *event = new CUevent_st{std::make_shared<mark>(), nullptr};
        return cudaSuccess;
    });
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, 0);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return cudaSuccess;
}

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    return function([&] {
        event->capture = stream ? stream->capture : nullptr;
        if (event->capture)
            return cudaSuccess; /* orders work inside the graph only */
        auto state = event->state;
        const long number = ++state->recorded;
        return put(
            stream,
            [=] {
                state->reached = number;
                state->ms = now_ms();
                return cudaSuccess;
            },
            false, true);
    });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    return function([&] {
        if (event->capture && captures.count(event->capture))
            return cudaErrorStreamCaptureUnsupported;
        while (event->state->reached < event->state->recorded && !pending.empty())
            do_first();
        return broken(current_device);
    });
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    return function([&] {
        if (event->state->reached >= event->state->recorded || pending.empty())
            return broken(current_device);
        do_first();
        return cudaErrorNotReady;
    });
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end)
{
    return function([&] {
        if (start->state->reached < start->state->recorded ||
            end->state->reached < end->state->recorded)
            return cudaErrorNotReady;
        *ms = (float)(end->state->ms - start->state->ms);
        return cudaSuccess;
    });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    return function([&] {
        if (stream && event->capture && captures.count(event->capture))
            stream->capture = event->capture; /* joins the recording */
        return cudaSuccess;                   /* the list is in order */
    });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t f, void *data)
{
    auto todo = [=] {
        f(data);
        return cudaSuccess;
    };
    return function([&] { return put(stream, todo, false); });
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode)
{
    return function([&] {
        if (!stream || stream->capture)
            return cudaErrorIllegalState;
        stream->capture = new CUgraph_st;
        captures.insert(stream->capture);
        return cudaSuccess;
    });
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    return function([&] {
        *graph = nullptr;
        if (!stream || !stream->capture)
            return cudaErrorIllegalState;
        *graph = stream->capture;
        captures.erase(*graph);
        for (CUstream_st *s : streams)
            if (s->capture == *graph)
                s->capture = nullptr;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status =
        stream && stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    return function([&] {
        *exec = new CUgraphExec_st{graph->steps};
        return cudaSuccess;
    });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t)
{
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n)
{
    if (nodes)
        return note(cudaErrorInvalidValue);
    *n = graph->steps.size();
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    return function([&] {
        cudaError_t error = cudaSuccess;
        for (const step &s : exec->steps)
            if (!error)
                error = put(stream, s.todo, s.is_kernel, s.early);
        return error;
    });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}
