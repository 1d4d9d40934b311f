// The sum of squares of many tensors, and from it what a step does with its gradients (see norm/mod.rs).
#include "tensor_list.cuh"

constexpr int THREADS = 256;
constexpr u32 PIECE = 1 << 14; // elements a block sums
enum Kind : u32 { KIND_F32, KIND_F16, KIND_BF16 };

// One tensor; laid out as the host writes it.
struct Entry {
    const void* values;
    u64 partial; // where the sum of its first piece goes
    u64 numel;
    u32 first_piece;
    u32 kind;
};

// Sum over a block in double precision, in a fixed order; the first thread gets it.
__device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double parts[THREADS / WARP];
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0)
        for (int i = 0; i < THREADS / WARP; i++) sum += parts[i];
    return sum;
}

template <typename T> __device__ __forceinline__ double sum_of_squares(const T* values, u64 from, u64 to) {
    double sum = 0.0;
    constexpr int SIZE = Pack<T>::SIZE;
    u64 at = from + threadIdx.x * SIZE;
    if (((u64)(values + from) & 15) == 0) {
        for (; at + SIZE <= to; at += THREADS * SIZE) {
            Pack<T> pack = load_pack(values + at);
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                double x = wide(pack.at[i]);
                sum += x * x;
            }
        }
    } else {
        for (; at + SIZE <= to; at += THREADS * SIZE)
            for (int i = 0; i < SIZE; i++) {
                double x = wide(values[at + i]);
                sum += x * x;
            }
    }
    for (; at < to; at++) { // fewer than SIZE are left, for one thread
        double x = wide(values[at]);
        sum += x * x;
    }
    return sum;
}

// partial[entry.partial + i] = the sum of squares of the elements of the entry's i-th piece.
extern "C" __global__ void __launch_bounds__(THREADS) norm_pieces(const Entry* table, u32 count, double* partial) {
    const Entry& entry = tensor_of_piece(table, count, blockIdx.x);
    u64 from = (u64)(blockIdx.x - entry.first_piece) * PIECE, to = min(from + PIECE, entry.numel);
    double sum = 0.0;
    if (entry.kind == KIND_F32) sum = sum_of_squares((const float*)entry.values, from, to);
    else if (entry.kind == KIND_F16) sum = sum_of_squares((const f16*)entry.values, from, to);
    else sum = sum_of_squares((const bf16*)entry.values, from, to);
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) partial[entry.partial + (blockIdx.x - entry.first_piece)] = sum;
}

// clip = {norm, factor, 1 if the norm is finite, 1 for parameters not yet found to be infinite}; one block. Where the last
// update (`before`, unless null) found infinite parameters, 0 for both: the next one must not be made.
extern "C" __global__ void __launch_bounds__(THREADS)
norm_clip(const double* partial, u32 pieces, double max_norm, float loss_scale, const float* before, float* clip) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < pieces; i += THREADS) sum += partial[i];
    sum = block_sum_double(sum);
    if (threadIdx.x != 0) return;
    double norm = sqrt(sum) / loss_scale;
    double factor = max_norm > 0.0 && max_norm < INFINITY ? fmin(max_norm / (norm + 1e-6), 1.0) : 1.0;
    float rounded = (float)norm;
    clip[0] = rounded;
    clip[1] = (float)factor / loss_scale;
    bool sound = before == nullptr || before[3] != 0.0f;
    clip[2] = sound && rounded < INFINITY ? 1.0f : 0.0f; // false for NaN too
    clip[3] = sound ? 1.0f : 0.0f;
}
