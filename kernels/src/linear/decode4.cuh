// 4-bit weights to 16-bit ones, on the way to a product.
//
// Every weight of a block is one of 16 products `value * absmax`. A thread takes 32 weights that share a scale, makes
// the 16 products (f32, rounded once to T: the same bits as dequantizing the matrix would give), splits them into a
// table of low bytes and one of high bytes, four registers each, and looks up four weights at a time by byte permutes.
// No shared memory is read per weight: 16 multiplications for the table and about 2.6 integer instructions a weight.
#pragma once
#include "codes.cuh"
#include "linear/ptx.cuh"

constexpr int UNIT = 32; // weights that a thread decodes at a time; the smallest block

// Codes of 32 weights and what their scale is made of, on the way from global memory.
struct Raw {
    uint4 codes;
    uint2 scale;
};
constexpr u32 OUTSIDE = ~0u; // as `scale.x`: there are no such weights, they count as zeros

// Starts to load the 32 weights at flat element `at` (a multiple of 32).
__device__ __forceinline__ Raw fetch(const u8* packed, const Scales& scales, u64 at, bool inside) {
    Raw raw;
    raw.codes = make_uint4(0, 0, 0, 0);
    raw.scale = make_uint2(OUTSIDE, 0);
    if (inside) {
        raw.codes = __ldg(reinterpret_cast<const uint4*>(packed + at / 2));
        raw.scale = scales.fetch(at >> scales.block_shift);
    }
    return raw;
}

// The scale of the weights, as Scales::value gives it; selects rather than branches, which would part the products
// around them. `map`: the dynamic map in shared memory.
__device__ __forceinline__ float scale_of(const Scales& scales, const Raw& raw, const float* map) {
    float nested = __fadd_rn(__fmul_rn(map[raw.scale.x & 255], __uint_as_float(raw.scale.y)), scales.offset);
    float scale = scales.nested ? nested : __uint_as_float(raw.scale.x);
    return raw.scale.x == OUTSIDE ? 0.0f : scale;
}

// The 16 products as bytes: bytes of entries 4i to 4i + 3 in word i.
struct Table {
    u32 low[4], high[4];

    // Makes entries 4i to 4i + 3.
    template <typename T> __device__ __forceinline__ void make(int i, const float* values, float scale) {
        float4 v = reinterpret_cast<const float4*>(values)[i];
        u32 a = pair<T>(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale));
        u32 b = pair<T>(__fmul_rn(v.z, scale), __fmul_rn(v.w, scale));
        low[i] = __byte_perm(a, b, 0x6420);
        high[i] = __byte_perm(a, b, 0x7531);
    }
};

// Eight weights in the making.
struct Eight {
    u32 in_half, which_half; // selectors of the four that are next
    u32 to[4];               // elements 2i (low half) and 2i + 1

    __device__ __forceinline__ void start(u32 codes) {
        in_half = codes & 0x77777777u;                           // which of eight entries,
        which_half = ((codes >> 1) & 0x44444444u) | 0x32103210u; // then: byte i of the lower or of the upper half
    }
    // Looks up four, `half` 0 and then 1. The even element is the high nibble of its byte.
    __device__ __forceinline__ void look_up(int half, const Table& table) {
        u32 low = __byte_perm(__byte_perm(table.low[0], table.low[1], in_half),
                              __byte_perm(table.low[2], table.low[3], in_half), which_half);
        u32 high = __byte_perm(__byte_perm(table.high[0], table.high[1], in_half),
                               __byte_perm(table.high[2], table.high[3], in_half), which_half);
        to[2 * half] = __byte_perm(low, high, 0x4051);
        to[2 * half + 1] = __byte_perm(low, high, 0x6273);
        in_half >>= 16;
        which_half >>= 16;
    }
};
