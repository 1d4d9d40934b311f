// Values of 4-bit codes and scales of their blocks, as kernels/src/quantize.
#pragma once
#include "common.cuh"

__constant__ float CODE_VALUES[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
     -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}, // NF4
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, -0.0f, -0.0625f / 12, -8.0f / 12, -1.0f,
     -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12}, // FP4
};

// The scales of a quantized matrix: f32, or 8-bit codes of f32 with `nested` not null.
struct Scales {
    const void* absmax;
    const float* nested;
    float offset;
    u32 block_shift, nested_shift;

    // What to read of a block's scale before it is needed, and the scale from it; `map` is the table of 256 values.
    __device__ __forceinline__ uint2 fetch(u64 block) const {
        if (nested == nullptr) return make_uint2(__ldg((const u32*)absmax + block), 0);
        return make_uint2(__ldg((const u8*)absmax + block), __ldg((const u32*)nested + (block >> nested_shift)));
    }
    __device__ __forceinline__ float value(uint2 raw, const float* map) const {
        if (nested == nullptr) return __uint_as_float(raw.x);
        // Two roundings, as the reference: no fused multiply-add.
        return __fadd_rn(__fmul_rn(map[raw.x], __uint_as_float(raw.y)), offset);
    }
};
