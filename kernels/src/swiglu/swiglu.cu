// SwiGLU and its gradients (formulas in mod.rs).
//
// Bound by memory: forward reads two arrays and writes one, backward reads three and writes three.
#include "runs.cuh"
#include "swiglu/element.cuh"

constexpr int THREADS = 256, RUNS = 2;

template <typename T>
__device__ __forceinline__ void forward(
    const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out, u64 n) {
    constexpr int N = RUN<T>, BLOCK = RUNS * THREADS * N;
    u64 begin = (u64)blockIdx.x * BLOCK;
    if (begin + BLOCK <= n && aligned(gate, up, out)) {
        float gates[RUNS][N], ups[RUNS][N];
        u64 first = begin + threadIdx.x * N;
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            load(gate + first + r * THREADS * N, gates[r]);
            load(up + first + r * THREADS * N, ups[r]);
        }
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
#pragma unroll
            for (int j = 0; j < N; j++) gates[r][j] = gated<T>(gates[r][j], ups[r][j]);
            store(out + first + r * THREADS * N, gates[r]);
        }
    } else {
        for (u64 i = begin + threadIdx.x; i < min(begin + BLOCK, n); i += THREADS)
            out[i] = narrow<T>(gated<T>(wide(gate[i]), wide(up[i])));
    }
}

// In place: gate [n] and up [n] become their gradients, grad [n] the output.
template <typename T> __device__ __forceinline__ void backward(T* gate, T* up, T* grad, u64 n) {
    constexpr int N = RUN<T>, BLOCK = THREADS * N;
    u64 begin = (u64)blockIdx.x * BLOCK;
    if (begin + BLOCK <= n && aligned(gate, up, grad)) {
        float gates[N], ups[N], grads[N];
        u64 i = begin + threadIdx.x * N;
        load(gate + i, gates);
        load(up + i, ups);
        load(grad + i, grads);
#pragma unroll
        for (int j = 0; j < N; j++) differentiate<T>(gates[j], ups[j], grads[j]);
        store(gate + i, gates);
        store(up + i, ups);
        store(grad + i, grads);
    } else {
        for (u64 i = begin + threadIdx.x; i < min(begin + BLOCK, n); i += THREADS) {
            float g = wide(gate[i]), u = wide(up[i]), d = wide(grad[i]);
            differentiate<T>(g, u, d);
            gate[i] = narrow<T>(g);
            up[i] = narrow<T>(u);
            grad[i] = narrow<T>(d);
        }
    }
}

// All arrays [n].
#define SWIGLU(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS) void swiglu_forward_##NAME( \
        const T* gate, const T* up, T* out, u64 n) { \
        forward(gate, up, out, n); \
    } \
    extern "C" __global__ __launch_bounds__(THREADS) void swiglu_backward_##NAME( \
        T* gate, T* up, T* grad, u64 n) { \
        backward(gate, up, grad, n); \
    }
FOR_FLOATS(SWIGLU)
