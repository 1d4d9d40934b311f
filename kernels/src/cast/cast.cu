// Conversion between float types, rounded to nearest even; the suffix is the target's type.
//
// Bound by memory: one read and one write. A thread makes two runs of the target, so that enough loads are in flight.
#include "runs.cuh"

constexpr int THREADS = 256, RUNS = 2;

template <typename T> __device__ __forceinline__ void cast(const void* x, u32 type, T* out, u64 n) {
    constexpr int N = RUN<T>, BLOCK = RUNS * THREADS * N;
    u64 begin = (u64)blockIdx.x * BLOCK;
    if (begin + BLOCK <= n && aligned(x, out)) {
        float values[RUNS][N];
        u64 first = begin + threadIdx.x * N;
#pragma unroll
        for (int r = 0; r < RUNS; r++) load_any(x, type, first + r * THREADS * N, values[r]);
#pragma unroll
        for (int r = 0; r < RUNS; r++) store(out + first + r * THREADS * N, values[r]);
    } else {
        for (u64 i = begin + threadIdx.x; i < min(begin + BLOCK, n); i += THREADS) {
            float value[1];
            load_any(x, type, i, value);
            store(out + i, value);
        }
    }
}

// x [n] of `type`, out [n].
#define CAST(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS) void cast_##NAME(const void* x, u32 type, T* out, u64 n) { \
        cast(x, type, out, n); \
    }
FOR_FLOATS(CAST)
