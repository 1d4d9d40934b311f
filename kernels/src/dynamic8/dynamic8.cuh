// Codes of the dynamic 8-bit map, as kernels/src/dynamic8 on the CPU. `map` is the table of 256 values, in shared memory.
#pragma once
#include "common.cuh"

// Index of the entry nearest to x in the map for values of both signs, or for those that are not negative. Of each decade
// below 1 the map has the middles of 2^d even cells (2^(d + 1) in the unsigned map), so that decade and cell of |x| are the entry or one
// beside it, also where approximate powers miss by one; the entry and its neighbours then decide. The midpoint itself goes
// to the even index; NaN gives 0.
template <bool SIGNED> __device__ __forceinline__ u32 dynamic8_encode(const float* map, float x) {
    float size = fabsf(x);
    int decade = min(max(__float2int_rd(__log2f(size) * 0.30103f), -7), -1) + 7;
    int cells = SIGNED ? 1 << decade : 2 << decade;
    // size / 10^(decade - 6), counted in cells of 0.9 / cells.
    float cell = size * exp2f((SIGNED ? 20.0835695f : 21.0835695f) - 2.3219281f * decade) - cells * (1.0f / 9.0f);
    int within = min(max((int)cell, 0), cells - 1);
    int at = !SIGNED ? cells - 1 + within : x < 0.0f ? 127 - cells - within : 127 + cells + within;
    float here = map[at], above = 0.5f * (map[at + 1] + here), below = 0.5f * (map[max(at - 1, 0)] + here);
    bool odd = at % 2 != 0, up = x > above || (odd && x == above), down = at > 0 && (x < below || (odd && x == below));
    return x == x ? at + up - down : 0;
}

// In the signed map, of a value that is first rounded to one of 65,536 even steps from -1 to 1; the midpoint goes to the lower
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
