// Codes of the dynamic 8-bit map, as kernels/src/dynamic8 on the CPU. `map` is the table of 256 values, in shared memory.
#pragma once
#include "common.cuh"

// Index of the entry nearest to x: a search over the odd entries, then the neighbours of the even one that it ends at.
// The midpoint itself goes to the even index; NaN gives 0.
__device__ __forceinline__ u32 dynamic8_encode(const float* map, float x) {
    int at = 127;
#pragma unroll
    for (int step = 64; step > 0; step /= 2) at += x > map[at] ? step : -step;
    float here = map[at];
    bool up = x > 0.5f * (map[at + 1] + here);
    bool down = at > 0 && x < 0.5f * (map[max(at - 1, 0)] + here);
    return at + up - down;
}

// The same for a value that is first rounded to one of 65,536 even steps from -1 to 1; the midpoint goes to the lower
// index. Every operation is rounded to f32.
__device__ __forceinline__ u32 dynamic8_encode_stepped(const float* map, float x) {
    // Of NaN, fmaxf takes the other operand; the CPU's cast takes 0, which is the step of -1.
    float clamped = fminf(fmaxf(x, -1.0f), 1.0f);
    float step = __fadd_rn(__fmul_rn(__fmul_rn(__fadd_rn(clamped, 1.0f), 0.5f), 65535.0f), 0.5f);
    float value = __fadd_rn(-1.0f, __fdiv_rn(2.0f * truncf(step), 65535.0f));
    // The number of midpoints below the value.
    int at = 0;
#pragma unroll
    for (int half = 128; half > 0; half /= 2) {
        if (0.5f * (map[at + half - 1] + map[at + half]) < value) at += half;
    }
    return at;
}

// Copies a map into shared memory; a barrier must follow.
__device__ __forceinline__ void dynamic8_load(float* shared, const float* map) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared[i] = map[i];
}
