// A stand-in for the NVIDIA driver whose calls return at once and compute nothing: what a program takes with it is the host's
// time alone. Addresses of device memory are reserved and never touched. What is read back is ones in f32, which pass for a
// loss, a gradient norm and "all finite"; results mean nothing else. See scripts/host-time.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int Result;
enum { SUCCESS = 0, OUT_OF_MEMORY = 2, ONE = 0x3f800000 };

static uint64_t launches, handle = 0x1000;

static Result new_handle(void* to) {
    *(uint64_t*)to = handle += 16;
    return SUCCESS;
}
static Result number(int* to, int value) {
    *to = value;
    return SUCCESS;
}
static size_t total_memory(void) {
    const char* given = getenv("HOST_TIME_GIB");
    return (size_t)(given ? atoi(given) : 64) << 30;
}

// The GPU: as an H200, whose kernels are chosen by these.
Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int* version) { return number(version, 13000); }
Result cuDeviceGetCount(int* count) { return number(count, 1); }
Result cuDeviceGet(int* device, int ordinal) { return number(device, 0); }
Result cuCtxGetDevice(int* device) { return number(device, 0); }
Result cuDeviceGetName(char* name, int length, int device) {
    snprintf(name, length, "NVIDIA H200");
    return SUCCESS;
}
Result cuDeviceTotalMem_v2(size_t* bytes, int device) {
    *bytes = total_memory();
    return SUCCESS;
}
Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    *total = total_memory();
    *free = *total - *total / 16;
    return SUCCESS;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
    case 16: return number(value, 132);    // multiprocessors
    case 75: return number(value, 9);      // compute capability, major
    case 76: return number(value, 0);      // and minor
    case 97: return number(value, 232448); // shared memory of a block
    default: return number(value, 1);
    }
}

// Contexts, streams, events, graphs, modules: names without anything behind them.
Result cuDevicePrimaryCtxRetain(void** context, int device) { return new_handle(context); }
Result cuCtxSetCurrent(void* context) { return SUCCESS; }
Result cuCtxGetStreamPriorityRange(int* least, int* greatest) { return number(least, 0) | number(greatest, -1); }
Result cuStreamCreate(void** stream, unsigned flags) { return new_handle(stream); }
Result cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) { return new_handle(stream); }
Result cuStreamWaitEvent(void* stream, void* event, unsigned flags) { return SUCCESS; }
Result cuStreamBeginCapture_v2(void* stream, int mode) { return SUCCESS; }
Result cuStreamEndCapture(void* stream, void** graph) { return new_handle(graph); }
Result cuGraphInstantiateWithFlags(void** exec, void* graph, uint64_t flags) { return new_handle(exec); }
Result cuGraphLaunch(void* exec, void* stream) { return SUCCESS; }
Result cuGraphExecDestroy(void* exec) { return SUCCESS; }
Result cuGraphDestroy(void* graph) { return SUCCESS; }
Result cuEventCreate(void** event, unsigned flags) { return new_handle(event); }
Result cuEventRecord(void* event, void* stream) { return SUCCESS; }
Result cuEventQuery(void* event) { return SUCCESS; }
Result cuEventDestroy_v2(void* event) { return SUCCESS; }
Result cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    *milliseconds = 1.0f;
    return SUCCESS;
}
Result cuModuleLoadDataEx(void** module) { return new_handle(module); }
Result cuModuleGetFunction(void** function) { return new_handle(function); }
Result cuFuncGetAttribute(int* value) { return number(value, 0); }
Result cuFuncSetAttribute(void) { return SUCCESS; }
Result cuOccupancyMaxActiveClusters(int* clusters) { return number(clusters, 30); }
Result cuTensorMapEncodeTiled(void) { return SUCCESS; }
Result cuLaunchKernelEx(void) {
    launches++;
    return SUCCESS;
}

// Device memory.
Result cuMemGetAllocationGranularity(size_t* granule) {
    *granule = 2 << 20;
    return SUCCESS;
}
Result cuMemAddressReserve(uint64_t* address, size_t bytes) {
    void* reserved = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return OUT_OF_MEMORY;
    *address = (uint64_t)reserved;
    return SUCCESS;
}
Result cuMemAddressFree(uint64_t address, size_t bytes) { return SUCCESS; }
Result cuMemCreate(uint64_t* memory) { return new_handle(memory); }
Result cuMemMap(void) { return SUCCESS; }
Result cuMemSetAccess(void) { return SUCCESS; }
Result cuMemUnmap(void) { return SUCCESS; }
Result cuMemRelease(void) { return SUCCESS; }
Result cuMemAllocManaged(void) { return OUT_OF_MEMORY; }
Result cuMemsetD8Async(void) { return SUCCESS; }
Result cuMemsetD32Async(void) { return SUCCESS; }
Result cuMemcpyAsync(void) { return SUCCESS; }

// Host memory: results come back in small pinned buffers, when the host waits.
static uint32_t* small[64];
static size_t small_bytes[64], smalls;

Result cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
    if (posix_memalign(memory, 4096, bytes)) return OUT_OF_MEMORY;
    if (bytes <= 8 << 20 && smalls < 64) {
        small[smalls] = *memory;
        small_bytes[smalls++] = bytes < 4096 ? bytes : 4096;
    }
    return SUCCESS;
}
Result cuMemHostGetDevicePointer_v2(uint64_t* address, void* memory, unsigned flags) {
    *address = (uint64_t)memory;
    return SUCCESS;
}
Result cuMemFreeHost(void* memory) { return SUCCESS; }
Result cuMemcpyDtoHAsync_v2(uint32_t* to, uint64_t from, size_t bytes, void* stream) {
    for (size_t i = 0; i < bytes / 4; i++) to[i] = ONE;
    return SUCCESS;
}
static Result wait(void) {
    for (size_t i = 0; i < smalls; i++) {
        for (size_t j = 0; j < small_bytes[i] / 4; j++) small[i][j] = ONE;
    }
    return SUCCESS;
}
Result cuStreamSynchronize(void* stream) { return wait(); }
Result cuEventSynchronize(void* event) { return wait(); }
Result cuCtxSynchronize(void) { return wait(); }

Result cuGetErrorString(int error, const char** text) {
    *text = "refused by the stand-in for the driver";
    return SUCCESS;
}
Result cuGetErrorName(int error, const char** text) { return cuGetErrorString(error, text); }

__attribute__((destructor)) static void say(void) {
    if (launches) fprintf(stderr, "%llu launches\n", (unsigned long long)launches);
}
