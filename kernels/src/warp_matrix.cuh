// Instructions that C++ has no words for, as functions: 16-bit matrix products of a warp, transposes, asynchronous copies.
//
// Fragments of a warp (PTX ISA, "Matrix fragments for mma.m16n8k16"), with g = lane / 4 and i = lane % 4; a register
// holds two neighbours, the one with the lower index in its low half:
//   a [16, 16]: a[0] row g, columns 2i..; a[1] row g + 8; a[2], a[3] the same rows, columns 2i + 8..
//   b [16, 8]:  b0 rows 2i.. of column g; b1 rows 2i + 8..
//   c [16, 8]:  c[0], c[1] row g, columns 2i..; c[2], c[3] row g + 8
#pragma once
#include "common.cuh"

// c += a·b, products exact, sums in f32.
template <typename T> __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ __forceinline__ void mma<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8×8 matrix of which each lane holds row g, columns 2i and 2i + 1.
__device__ __forceinline__ u32 transpose8(u32 pair) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

// Four 8×8 matrices, transposed: lanes 8j..8j + 8 give the addresses (shared, multiples of 16) of the rows of matrix j;
// then lane g, i holds rows 2i, 2i + 1 of column g of each.
__device__ __forceinline__ void load_transposed(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"((u32)__cvta_generic_to_shared(row)));
}

// 16, 8 or 4 bytes of memory that the kernel does not write, zeros if not `valid`; predicated, so that loads in a row stay
// in a row. load_once: past the first-level cache, for what no other warp reads;
// volatile, because the compiler would otherwise put each load just before its use.
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
    asm("{.reg .pred q; setp.ne.u32 q, %2, 0; mov.u32 %0, 0; @q ld.global.nc.u32 %0, [%1];}" : "=&r"(v) : "l"(p), "r"((u32)valid));
    return v;
}

// Copies 16 bytes from global to shared memory without waiting; zeros instead if not `valid`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// Closes the group of copies begun since the last call; waits until at most LEFT groups are under way.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
