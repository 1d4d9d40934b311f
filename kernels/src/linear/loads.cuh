// Reads of global memory by its caches, and the transpose of an 8×8 matrix in registers.
#pragma once
#include "common.cuh"

// 16, 8 or 4 bytes, zeros if not `valid`; predicated, so that loads in a row stay in a row. load_once and load_cached: of
// memory that the kernel does not write. load_once: past the first-level cache, for what no other warp reads; volatile,
// because the compiler would otherwise put each load just before its use. load_now: of what the kernel before may have
// written; not from the read-only cache, which may hold what was there when this kernel started.
#define LOAD_16(ASM, LOAD)                                                                                             \
    uint4 v;                                                                                                           \
    ASM("{.reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"             \
        "@q " LOAD ".v4.u32 {%0,%1,%2,%3}, [%4];}"                                                                     \
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)                                                               \
        : "l"(p), "r"((u32)valid));                                                                                    \
    return v;
__device__ __forceinline__ uint4 load_once(const void* p, bool valid) {
    LOAD_16(asm volatile, "ld.global.nc.L1::no_allocate")
}
__device__ __forceinline__ uint4 load_cached(const void* p, bool valid) { LOAD_16(asm, "ld.global.nc") }
__device__ __forceinline__ uint4 load_now(const void* p, bool valid) { LOAD_16(asm volatile, "ld.global") }
#undef LOAD_16
__device__ __forceinline__ uint2 load_once8(const void* p, bool valid) {
    uint2 v;
    asm volatile("{.reg .pred q; setp.ne.u32 q, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
        "@q ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];}"
        : "=&r"(v.x), "=&r"(v.y)
        : "l"(p), "r"((u32)valid));
    return v;
}
__device__ __forceinline__ u32 load_once4(const void* p, bool valid) {
    u32 v;
    asm volatile("{.reg .pred q; setp.ne.u32 q, %2, 0; mov.u32 %0, 0; @q ld.global.nc.L1::no_allocate.u32 %0, [%1];}"
        : "=&r"(v)
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
