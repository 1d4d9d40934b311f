// What attention on Hopper needs besides the instructions of linear/hopper.cuh: products of a warpgroup whose left operand
// is in registers, barriers of some of a block's warps, and tiles in shared memory.
#pragma once
#include "attention/ptx.cuh"
#include "dependent.cuh"
#include "linear/hopper.cuh"

// A tile is boxes of 64 elements (128 bytes) of each row, one box after the other: chunk c of 16 bytes of row i of a box lies
// at chunk c ^ (i % 8), as the TMA writes it.
constexpr u32 BOX_ROW = 128;

// An operand: a tile whose boxes have ROWS rows. Its address is the low half of its descriptor; to reach the next part of
// it is one addition (tiles end before the address would carry).
// By rows: the contraction runs along a row, a part is 16 elements. By columns: it runs down the rows, a part is 16 rows.
template <int ROWS, bool COLUMNS> struct Operand {
    u64 first;

    __device__ __forceinline__ explicit Operand(u32 tile)
        : first(describe(tile, COLUMNS ? ROWS * BOX_ROW : 16, 8 * BOX_ROW)) {}
    // Part `i` of what lies `bytes` further.
    __device__ __forceinline__ u64 part(int i, u32 bytes = 0) const {
        return first + (COLUMNS ? i * 16 * BOX_ROW : i / 4 * ROWS * BOX_ROW + i % 4 * 32) / 16 + bytes / 16;
    }
};
template <int ROWS> using ByRows = Operand<ROWS, false>;
template <int ROWS> using ByColumns = Operand<ROWS, true>;

// The same in every lane, which the compiler does not see by itself.
__device__ __forceinline__ u32 uniform(u32 x) { return __shfl_sync(~0u, x, 0); }

// Sums of a warpgroup [64, 2·N] as left operands, 16 columns each. The two layouts agree lane by lane.
template <typename T, int N> __device__ __forceinline__ void to_operands(u32 (&a)[N / 8][4], const float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
#pragma unroll
        for (int c = 0; c < 4; c++) a[i][c] = pair<T>(d[8 * i + 2 * c], d[8 * i + 2 * c + 1]);
    }
}

// Writes a warp's 16 rows of a warpgroup's sums [64, D], row l / 4 of lane l times `low` and row l / 4 + 8 times `high`, to
// `valid` rows `stride` elements apart in global memory, by way of 16·D elements of shared memory that are its own.
template <typename T, int D>
__device__ __forceinline__ void write_rows(const float (&d)[D / 2], float low, float high, u32 tile, T* to, u32 stride,
                                           int valid) {
    constexpr u32 PIECES = D / 8;
    const u32 lane = threadIdx.x % WARP, row = lane % 16;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const float* x = d + 8 * i;
        store_matrices(tile + row * D * 2 + ((2 * i + lane / 16) ^ row % 8) * 16, pair<T>(x[0] * low, x[1] * low),
                       pair<T>(x[2] * high, x[3] * high), pair<T>(x[4] * low, x[5] * low),
                       pair<T>(x[6] * high, x[7] * high));
    }
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < 16 * PIECES / WARP; i++) {
        const u32 at = i * WARP + lane, r = at / PIECES, piece = at % PIECES;
        const uint4 x = load_shared_uint4(tile + r * D * 2 + (piece ^ r % 8) * 16);
        if ((int)r < valid) *reinterpret_cast<uint4*>(to + (u64)r * stride + piece * 8) = x;
    }
}
