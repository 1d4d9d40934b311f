// The entries of gemm.cuh: names `gemm_<weight>_<direction>_<tile rows>_<type>`, one parameter list for all.
#pragma once
#include "linear/gemm.cuh"

#define GEMM_ENTRY(TYPE, WEIGHT, QUANT, DIRECTION, FORWARD, BM, WARPS_M, WARPS_N, BLOCKS)                              \
    extern "C" __global__ void __launch_bounds__((WARPS_M) * (WARPS_N) * WARP, BLOCKS)                                 \
        gemm_##WEIGHT##_##DIRECTION##_##BM##_##TYPE(                                                                   \
            void* out, const void* in, const void* a, const void* b, const void* absmax, const float* absmax2,         \
            const float* map, const void* a2, const void* b2, u32 m, u32 n, u32 k, u32 rank, float scale,              \
            const float* offset, u32 block_shift, u32 nested_shift, u32 book, u32 add, u32 wide, u32 stages) {                \
        Problem p;                                                                                                     \
        p.out = out;                                                                                                   \
        p.in = add ? out : in;                                                                                         \
        p.a = a;                                                                                                       \
        p.b = b;                                                                                                       \
        p.scales = Scales{absmax, absmax2, absmax2 ? *offset : 0.0f, block_shift, nested_shift};                       \
        p.map = map;                                                                                                   \
        p.book = book;                                                                                                 \
        p.a2 = a2;                                                                                                     \
        p.b2 = b2;                                                                                                     \
        p.m = m;                                                                                                       \
        p.n = n;                                                                                                       \
        p.k = k;                                                                                                       \
        p.rank = rank;                                                                                                 \
        p.scale = scale;                                                                                               \
        p.wide = wide;                                                                                                 \
        p.stages = stages;                                                                                             \
        gemm<TYPE, QUANT, FORWARD, BM, 128, WARPS_M, WARPS_N>(p);                                                      \
    }

#define GEMM_TILES(TYPE, WEIGHT, QUANT, DIRECTION, FORWARD)                                                            \
    GEMM_ENTRY(TYPE, WEIGHT, QUANT, DIRECTION, FORWARD, 256, 4, 2, 1)                                                  \
    GEMM_ENTRY(TYPE, WEIGHT, QUANT, DIRECTION, FORWARD, 128, 2, 2, 2)                                                  \
    GEMM_ENTRY(TYPE, WEIGHT, QUANT, DIRECTION, FORWARD, 64, 2, 2, 2)

#define GEMM_ENTRIES(TYPE, WEIGHT, QUANT)                                                                              \
    GEMM_TILES(TYPE, WEIGHT, QUANT, forward, true)                                                                     \
    GEMM_TILES(TYPE, WEIGHT, QUANT, input_grad, false)
