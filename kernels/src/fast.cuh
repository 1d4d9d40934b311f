// What the special function unit computes in one instruction. Subnormal numbers count as 0.
#pragma once
#include "common.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// 2^x to 2 units in the last place; 0 for -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x to 1 unit in the last place; 0 for infinity.
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
