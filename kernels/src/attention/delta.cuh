// What attention's backward kernels read besides lse: D = rowsum(dO ∘ O), called delta here. Bound by reading dO and O.
#pragma once
#include "common.cuh"

// delta [heads, rows] = rowsum(dO ∘ O) of each head. 16 lanes a row; a block takes 16 rows of one head. The last rows come first:
// a product has just written dO, and its last rows are in the second-level cache still.
constexpr int DELTA_THREADS = 256, DELTA_LANES = 16, DELTA_ROWS = DELTA_THREADS / DELTA_LANES;
template <typename T>
__device__ __forceinline__ void make_delta(const T* o, const T* grad, float* delta, u32 heads, u32 d, u32 total) {
    const u32 block = gridDim.x - 1 - blockIdx.x, head = block % heads, lane = threadIdx.x % DELTA_LANES;
    const u64 row = (u64)(block / heads) * DELTA_ROWS + threadIdx.x / DELTA_LANES;
    const u64 first = (row * heads + head) * d;
    float sum = 0.0f;
    if (row < total) {
        if (d % Pack<T>::SIZE == 0) {
            for (u32 e = lane * Pack<T>::SIZE; e < d; e += DELTA_LANES * Pack<T>::SIZE) {
                Pack<T> a = load_pack(o + first + e), b = load_pack(grad + first + e);
#pragma unroll
                for (int i = 0; i < Pack<T>::SIZE; i++) sum += wide(a.at[i]) * wide(b.at[i]);
            }
        } else {
            for (u32 e = lane; e < d; e += DELTA_LANES) sum += wide(o[first + e]) * wide(grad[first + e]);
        }
    }
#pragma unroll
    for (int lanes = DELTA_LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (row < total && lane == 0) delta[(u64)head * total + row] = sum;
}
