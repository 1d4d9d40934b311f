// The instructions of sm_80 that attention needs besides those of matrix products. Shared-memory addresses are 32-bit byte
// addresses.
#pragma once
#include "fast.cuh"
#include "linear/ptx.cuh"

// Copies 16 (4) bytes to shared memory in the background; writes zeros if not `valid`, and then reads nothing.
__device__ __forceinline__ void copy_async16(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async4(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
                 : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, float x) { store_shared(address, __float_as_uint(x)); }
__device__ __forceinline__ void store_shared(u32 address, uint4 x) { store16(address, x.x, x.y, x.z, x.w); }
__device__ __forceinline__ float load_shared_float(u32 address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ float2 load_shared_float2(u32 address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}
