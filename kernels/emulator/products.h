// Products of a warpgroup (wgmma) and of a warp (mma.sync), and 8x8 matrices between registers and shared memory.
#pragma once
#include "machine.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace emulator {

template <typename T> constexpr bool BF16 = std::is_same_v<T, __nv_bfloat16>;

// ---- wgmma ----
struct ProductKind {
    u32 n;
    bool bf16;
    bool a_columns, b_columns; // MN-major ("transposed"): the contraction does not run along rows
};
void products_fence();           // wgmma.fence
void products_commit();          // wgmma.commit_group
void products_wait(u32 pending); // wgmma.wait_group
// d [64, n] of the warpgroup, n / 2 floats of each thread: a · b, added to d if `keep`. They are NaN until a wait that covers
// the product. Operands are read at a random later time, before that wait ends; so are the 4 registers of held_a (null if
// `a` describes shared memory), which have to stay where they are.
void product(float* d, u64 a, const u32* held_a, u64 b, u32 keep, ProductKind kind);
template <typename T, bool A_COLUMNS, bool B_COLUMNS, int SIZE>
void product_shared(float (&d)[SIZE], u64 a, u64 b, u32 keep) {
    product(d, a, nullptr, b, keep, {2 * SIZE, BF16<T>, A_COLUMNS, B_COLUMNS});
}
template <typename T, bool B_COLUMNS, int SIZE> void product_held(float (&d)[SIZE], const u32 (&a)[4], u64 b, u32 keep) {
    product(d, 0, a, b, keep, {2 * SIZE, BF16<T>, false, B_COLUMNS});
}

// ---- mma.sync.m16n8k16, d += a · b ----
void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bool bf16);

// ---- 8x8 matrices: ldmatrix.x4, stmatrix.x4, movmatrix ----
void load_matrices(u32 (&to)[4], u32 address, bool transposed);
void store_matrices(u32 address, const u32 (&from)[4]);
u32 transpose_matrix(u32 x);

} // namespace emulator
