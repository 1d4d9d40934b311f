// 4-bit weights to 16-bit ones, on the way to a product.
//
// Every weight of a block is one of 16 products `value * absmax`. A thread takes 32 weights that share a scale, makes
// the 16 products (f32, rounded once to T: the same bits as dequantizing the matrix would give), splits them into a
// table of low bytes and one of high bytes, four registers each, and looks four weights up at a time with byte permutes.
// No shared memory is read per weight: 16 multiplications for the table and about 2.6 integer instructions a weight.
#pragma once
#include "linear/ptx.cuh"

constexpr int UNIT = 32; // weights that a thread decodes at a time; the smallest block

// Where a 4-bit matrix is. Blocks run over the flat matrix.
struct Codes {
    const u8* packed;
    const void* absmax;   // f32, or u8 if doubly quantized
    const float* absmax2; // f32, null if singly
    float offset;
    int block_shift, nested_shift; // logarithms of the block sizes
};

// Codes of 32 weights and what their scale is made of, on the way from global memory.
struct Raw {
    uint4 codes;
    u32 first;    // bits of absmax, or its code
    float second; // scale of that code
};
constexpr u32 OUTSIDE = ~0u; // as `first`: there are no such weights, they count as zeros

// Starts to load the 32 weights at flat element `at` (a multiple of 32).
__device__ __forceinline__ Raw fetch(const Codes& from, u64 at, bool inside) {
    Raw raw;
    raw.codes = make_uint4(0, 0, 0, 0);
    raw.first = OUTSIDE;
    raw.second = 0.0f;
    if (inside) {
        raw.codes = __ldg(reinterpret_cast<const uint4*>(from.packed + at / 2));
        const u32 block = (u32)(at >> from.block_shift);
        if (from.absmax2) {
            raw.first = __ldg(static_cast<const u8*>(from.absmax) + block);
            raw.second = __ldg(from.absmax2 + (block >> from.nested_shift));
        } else {
            raw.first = __float_as_uint(__ldg(static_cast<const float*>(from.absmax) + block));
        }
    }
    return raw;
}

// The scale of the weights. `map`: the dynamic map in shared memory. Two roundings, as on the CPU.
__device__ __forceinline__ float scale_of(const Codes& from, const Raw& raw, const float* map) {
    // Selects rather than branches, which would part the products around them.
    float nested = __fadd_rn(__fmul_rn(map[raw.first & 255], raw.second), from.offset);
    float scale = from.absmax2 ? nested : __uint_as_float(raw.first);
    return raw.first == OUTSIDE ? 0.0f : scale;
}

// The 16 products as bytes: bytes of entries 4i to 4i + 3 in word i.
struct Table {
    u32 low[4], high[4];
};

template <typename T> __device__ __forceinline__ Table make_table(const float* values, float scale) {
    Table table;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float4 v = reinterpret_cast<const float4*>(values)[i];
        u32 a = pair<T>(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale));
        u32 b = pair<T>(__fmul_rn(v.z, scale), __fmul_rn(v.w, scale));
        table.low[i] = __byte_perm(a, b, 0x6420);
        table.high[i] = __byte_perm(a, b, 0x7531);
    }
    return table;
}

// Eight weights: `to[i]` gets elements 2i (low half) and 2i + 1. The even element is the high nibble of its byte.
__device__ __forceinline__ void look_up(const Table& table, u32 codes, u32 (&to)[4]) {
    u32 in_half = codes & 0x77777777u;                           // which of eight entries,
    u32 which_half = ((codes >> 1) & 0x44444444u) | 0x32103210u; // then: byte i of the lower or of the upper half
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 low = __byte_perm(__byte_perm(table.low[0], table.low[1], in_half),
                              __byte_perm(table.low[2], table.low[3], in_half), which_half);
        u32 high = __byte_perm(__byte_perm(table.high[0], table.high[1], in_half),
                               __byte_perm(table.high[2], table.high[3], in_half), which_half);
        to[2 * i] = __byte_perm(low, high, 0x4051);
        to[2 * i + 1] = __byte_perm(low, high, 0x6273);
        in_half >>= 16;
        which_half >>= 16;
    }
}
