// Reads of what a kernel does not write, and the transpose of an 8×8 matrix in registers.
#pragma once
#include "common.cuh"

// 16, 8 or 4 bytes of memory that the kernel does not write, zeros if not `valid`; predicated, so that loads in a row
// stay in a row. load_once: past the first-level cache, for what no other warp reads; volatile, because the compiler
// would otherwise put each load just before its use.
__device__ __forceinline__ uint4 load_once(const void* p, bool valid) {
    uint4 v;
    asm volatile("{.reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        "@q ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"((u32)valid));
    return v;
}
__device__ __forceinline__ uint2 load_once8(const void* p, bool valid) {
    uint2 v;
    asm volatile("{.reg .pred q; setp.ne.u32 q, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
        "@q ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];}"
        : "=&r"(v.x), "=&r"(v.y)
        : "l"(p), "r"((u32)valid));
    return v;
}
__device__ __forceinline__ uint4 load_cached(const void* p, bool valid) {
    uint4 v;
    asm("{.reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        "@q ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"((u32)valid));
    return v;
}
__device__ __forceinline__ u32 load_cached4(const void* p, bool valid) {
    u32 v;
    asm("{.reg .pred q; setp.ne.u32 q, %2, 0; mov.u32 %0, 0; @q ld.global.nc.u32 %0, [%1];}"
        : "=&r"(v)
        : "l"(p), "r"((u32)valid));
    return v;
}

// Transposes an 8×8 matrix of 16-bit elements, of which lane l holds (l / 4, 2 (l % 4)) and the one to the right.
__device__ __forceinline__ u32 transpose8(u32 pair) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}
