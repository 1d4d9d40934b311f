// Where the largest element of each row is (mod.rs has the contract). Bound by the start of a launch: a row is half a
// megabyte, which a block reads.
#include "common.cuh"

constexpr int THREADS = 1024;

// The larger of two, of equals that with the smaller place.
__device__ __forceinline__ void keep(float& value, u32& place, float other, u32 at) {
    if (other > value || (other == value && at < place)) value = other, place = at;
}

// x [gridDim.x, width], places [gridDim.x].
extern "C" __global__ void __launch_bounds__(THREADS) argmax_rows(const float* x, u32* places, u32 width) {
    __shared__ float values[THREADS / WARP];
    __shared__ u32 ats[THREADS / WARP];
    x += (u64)blockIdx.x * width;
    // No number is the largest so far; where none is, the first place is as good as any.
    float value = -INFINITY;
    u32 place = 0;
#pragma unroll 4
    for (u32 at = threadIdx.x; at < width; at += THREADS) {
        float other = x[at];
        if (other > value) value = other, place = at;
    }
    auto reduce = [&] {
#pragma unroll
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
            float other = __shfl_xor_sync(~0u, value, lanes);
            u32 at = __shfl_xor_sync(~0u, place, lanes);
            keep(value, place, other, at);
        }
    };
    reduce();
    if (threadIdx.x % WARP == 0) values[threadIdx.x / WARP] = value, ats[threadIdx.x / WARP] = place;
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    value = values[threadIdx.x], place = ats[threadIdx.x];
    reduce();
    // Nothing is larger than a NaN at the start, and nothing that is not larger than -∞ is larger than the start.
    bool first = x[0] != x[0] || value == -INFINITY;
    if (threadIdx.x == 0) places[blockIdx.x] = first ? 0 : place;
}
