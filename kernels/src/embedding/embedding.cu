// Rows of a table by token id, and the gradient of the table.
//
// Both are bound by memory. The gradient takes an index of the tokens by id that the host makes (it knows the ids): a
// block adds the tokens of one id in their order, so that the sum is the CPU's to the bit, without atomics.
#include "runs.cuh"

constexpr int THREADS = 128;

template <typename T, int N>
__device__ __forceinline__ void forward(int id, const void* table, u32 type, T* out, u32 vocab, u32 width) {
    for (u32 at = threadIdx.x * N; at < width; at += THREADS * N) {
        float row[N];
        if (id >= 0 && id < vocab) {
            load_any(table, type, (u64)id * width + at, row);
        } else {
            // The host has checked ids that it uploads: this shows a mistake, and keeps it from reading elsewhere.
#pragma unroll
            for (int j = 0; j < N; j++) row[j] = __int_as_float(0x7fc00000);
        }
        store(out + at, row);
    }
}

// A group of column runs of one id: the sum over tokens[starts[i] .. starts[i + 1]].
template <typename T, int N>
__device__ __forceinline__ void backward(
    const int* ids, const int* starts, const int* tokens, const T* grad, float* table, u32 width) {
    int begin = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    float* row = table + (u64)ids[blockIdx.x] * width;
    for (u32 at = (blockIdx.y * THREADS + threadIdx.x) * N; at < width; at += gridDim.y * THREADS * N) {
        float sums[N] = {};
#pragma unroll 4
        for (int i = begin; i < end; i++) {
            float values[N];
            load(grad + (u64)tokens[i] * width + at, values);
#pragma unroll
            for (int j = 0; j < N; j++) sums[j] += values[j];
        }
        store(row + at, sums);
    }
}

// Forward: out [gridDim.x, width] from table [vocab, width] of `type`. Backward: the f32 rows of the gridDim.x distinct
// ids; rows that no token reads are left as they are.
#define EMBEDDING(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS) void embedding_forward_##NAME( \
        const int* ids, const void* table, u32 type, T* out, u32 vocab, u32 width) { \
        out += (u64)blockIdx.x * width; \
        if (width % RUN<T> == 0 && aligned(table, out)) \
            forward<T, RUN<T>>(ids[blockIdx.x], table, type, out, vocab, width); \
        else \
            forward<T, 1>(ids[blockIdx.x], table, type, out, vocab, width); \
    } \
    extern "C" __global__ __launch_bounds__(THREADS) void embedding_backward_##NAME( \
        const int* ids, const int* starts, const int* tokens, const T* grad, float* table, u32 width) { \
        if (width % RUN<T> == 0 && aligned(grad, table)) \
            backward<T, RUN<T>>(ids, starts, tokens, grad, table, width); \
        else \
            backward<T, 1>(ids, starts, tokens, grad, table, width); \
    }
FOR_FLOATS(EMBEDDING)
