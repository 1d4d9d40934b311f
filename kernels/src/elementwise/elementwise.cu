// Element-wise sums. Bound by memory: two reads and one write.
#include "runs.cuh"

constexpr int THREADS = 256, RUNS = 2;

template <typename T> __device__ __forceinline__ void add_assign(T* into, const void* x, u32 type, u64 n) {
    constexpr int N = RUN<T>, BLOCK = RUNS * THREADS * N;
    u64 begin = (u64)blockIdx.x * BLOCK;
    if (begin + BLOCK <= n && aligned(into, x)) {
        float sums[RUNS][N], terms[RUNS][N];
        u64 first = begin + threadIdx.x * N;
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            load(into + first + r * THREADS * N, sums[r]);
            load_any(x, type, first + r * THREADS * N, terms[r]);
        }
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
#pragma unroll
            for (int j = 0; j < N; j++) sums[r][j] += terms[r][j];
            store(into + first + r * THREADS * N, sums[r]);
        }
    } else {
        for (u64 i = begin + threadIdx.x; i < min(begin + BLOCK, n); i += THREADS) {
            float term[1];
            load_any(x, type, i, term);
            into[i] = narrow<T>(wide(into[i]) + term[0]);
        }
    }
}

// into [n] += x [n] of `type`.
#define ADD_ASSIGN(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS) void elementwise_add_assign_##NAME( \
        T* into, const void* x, u32 type, u64 n) { \
        add_assign(into, x, type, n); \
    }
FOR_FLOATS(ADD_ASSIGN)
