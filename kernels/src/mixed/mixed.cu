// Rows of one batch that belong to different adapters. Bound by memory: one read and one write of small matrices.
#include "runs.cuh"

constexpr int THREADS = 256;

// t [rows, width] in place: an element whose column is of its row's adapter is multiplied by the column's scale, any other
// becomes zero. `owners` i32 [rows], `columns` i32 [width], `scales` f32 [width].
template <typename T>
__device__ __forceinline__ void keep_own(T* t, const int* owners, const int* columns, const float* scales, u32 rows, u32 width) {
    u64 n = (u64)rows * width;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < n; i += (u64)gridDim.x * THREADS) {
        u32 row = i / width, column = i % width;
        t[i] = owners[row] == columns[column] ? narrow<T>(wide(t[i]) * scales[column]) : narrow<T>(0.0f);
    }
}

// y [rows, width] in place: each row times the gains of its adapter, f32 [adapters, width]; rows of no adapter stay.
template <typename T>
__device__ __forceinline__ void scale_own(T* y, const int* owners, const float* gains, u32 rows, u32 width) {
    u64 n = (u64)rows * width;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < n; i += (u64)gridDim.x * THREADS) {
        int owner = owners[i / width];
        if (owner >= 0) y[i] = narrow<T>(wide(y[i]) * gains[(u64)owner * width + i % width]);
    }
}

#define MIXED(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS) void mixed_keep_own_##NAME( \
        T* t, const int* owners, const int* columns, const float* scales, u32 rows, u32 width) { \
        keep_own(t, owners, columns, scales, rows, width); \
    } \
    extern "C" __global__ __launch_bounds__(THREADS) void mixed_scale_own_##NAME( \
        T* y, const int* owners, const float* gains, u32 rows, u32 width) { \
        scale_own(y, owners, gains, rows, width); \
    }
FOR_FLOATS(MIXED)
