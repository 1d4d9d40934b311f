// Conversion between float types, rounded to nearest even; the suffix is the target's type.
//
// Bound by memory: one read and one write. A thread makes two runs of the target, so that enough loads are in flight.
#include "runs.cuh"

constexpr int THREADS = 256, RUNS = 2;

// Elements that a block makes.
template <typename T> constexpr u32 BLOCK = RUNS * THREADS * RUN<T>;

template <typename T> __device__ __forceinline__ void cast(const void* x, u32 type, T* out, u64 n, u32 block) {
    constexpr int N = RUN<T>, BLOCK = ::BLOCK<T>;
    u64 begin = (u64)block * BLOCK;
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
        cast(x, type, out, n, blockIdx.x); \
    }
FOR_FLOATS(CAST)

// The same of several arrays of one type, out_i [n_i] of x_i; those that there are not have no elements.
#define ARRAY(I) const void *x##I, void *out##I, u32 n##I
#define LOOK(I) \
    if (!found) { \
        const u32 blocks = (n##I + BLOCK<T> - 1) / BLOCK<T>; \
        found = block < blocks; \
        if (found) x = x##I, out = static_cast<T*>(out##I), n = n##I; \
        else block -= blocks; \
    }
#define CAST_ALL(NAME, TYPE) \
    extern "C" __global__ __launch_bounds__(THREADS) void cast_all_##NAME( \
        u32 type, ARRAY(0), ARRAY(1), ARRAY(2), ARRAY(3), ARRAY(4), ARRAY(5), ARRAY(6), ARRAY(7), ARRAY(8), ARRAY(9), \
        ARRAY(10), ARRAY(11), ARRAY(12), ARRAY(13), ARRAY(14), ARRAY(15), ARRAY(16), ARRAY(17), ARRAY(18), ARRAY(19)) { \
        typedef TYPE T; \
        const void* x = nullptr; \
        T* out = nullptr; \
        u32 n = 0, block = blockIdx.x; \
        bool found = false; \
        LOOK(0) LOOK(1) LOOK(2) LOOK(3) LOOK(4) LOOK(5) LOOK(6) LOOK(7) LOOK(8) LOOK(9) LOOK(10) LOOK(11) LOOK(12) LOOK(13) \
        LOOK(14) LOOK(15) LOOK(16) LOOK(17) LOOK(18) LOOK(19) \
        if (found) cast(x, type, out, n, block); \
    }
FOR_FLOATS(CAST_ALL)
