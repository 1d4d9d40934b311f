// A kernel that starts while the one before it in the stream still runs (programmatic dependent launch, Hopper): what it
// reads before `wait_before` was there before that one started, and what that one writes is there after. Where the launch did
// not ask for it, and on other chips, both do nothing.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 900
#define DEPENDENT(INSTRUCTION) asm volatile(INSTRUCTION ::: "memory")
#else
#define DEPENDENT(INSTRUCTION)
#endif
__device__ __forceinline__ void wait_before() { DEPENDENT("griddepcontrol.wait;"); }
// The next kernel may start once all blocks have come here.
__device__ __forceinline__ void let_next() { DEPENDENT("griddepcontrol.launch_dependents;"); }

// 16 bytes that the kernel before may have written, zeros if not `valid`: not from the read-only cache, which may hold what
// was there when this kernel started.
__device__ __forceinline__ uint4 load_now(const void* p, bool valid) {
    uint4 v;
    asm volatile("{.reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        "@q ld.global.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"((u32)valid));
    return v;
}
