// Loss of rows of logits and its gradient: nll = log Σ exp(x − max) + max − x[label], and
// dlogits = scale · (softmax(x) − onehot(label)).
//
// One block a row of f32 logits. The first pass makes maximum and sum together (Milakov & Gimelshein, "Online normalizer
// calculation for softmax", arXiv 1805.02867); the second makes the gradient. A row of a large vocabulary (half a
// megabyte at 128256) does not fit on an SM; so that the second-level cache still serves part of the second pass, it
// walks backwards, from what was read last. Bound by memory: the logits twice, the gradient once. Sums have a fixed order.
#include "fast.cuh"
#include "runs.cuh"

constexpr int MAX_THREADS = 1024;
// Runs that a thread has in flight in the first pass.
constexpr int RUNS = 4;
constexpr float LOWEST = -3.402823466e38f;

// eˣ for x ≤ 0, within 2 ulp of f32 near 0 and 1e-5 where it hardly counts any more; the hardware makes 2ˣ.
__device__ __forceinline__ float exp_fast(float x) { return exp2f(x * LOG2_E); }

// What a thread has seen of a row.
struct Seen {
    // The largest logit, or LOWEST: a finite start, so that differences are never ∞ − ∞.
    float top = LOWEST;
    // Σ exp(x − top).
    float sum = 0.0f;
    // Whether a logit before the label is as large as the label's.
    bool earlier = false;

    // Takes the N logits from column `at` on.
    template <int N> __device__ __forceinline__ void add(const float (&x)[N], u32 at, u32 label, float own) {
        float largest = x[0];
#pragma unroll
        for (int j = 1; j < N; j++) largest = fmaxf(largest, x[j]);
        if (largest > top) {
            sum *= exp_fast(top - largest);
            top = largest;
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum += exp_fast(x[j] - top);
            earlier |= x[j] >= own && at + j < label;
        }
    }
};

// N logits at a time; 1 where rows have no alignment.
template <int N> __device__ __forceinline__ Seen read_row(const float* logits, u32 vocab, u32 label, float own) {
    Seen seen;
    u32 stride = blockDim.x * N, at = threadIdx.x * N;
    for (; (u64)at + (RUNS - 1) * stride < vocab; at += RUNS * stride) {
        float x[RUNS][N];
#pragma unroll
        for (int r = 0; r < RUNS; r++) load(logits + at + r * stride, x[r]);
#pragma unroll
        for (int r = 0; r < RUNS; r++) seen.add(x[r], at + r * stride, label, own);
    }
    for (; at < vocab; at += stride) {
        float x[N];
        load(logits + at, x);
        seen.add(x, at, label, own);
    }
    return seen;
}

// The gradient of a row, from its end to its start. `grad` may be the logits themselves where T is f32.
template <typename T, int N>
__device__ __forceinline__ void write_row(
    const float* logits, T* grad, u32 vocab, u32 label, float top, float factor, float scale) {
    u32 stride = blockDim.x * N, first = threadIdx.x * N;
    if (first >= vocab) return;
#pragma unroll 2
    for (u32 turn = (vocab - 1 - first) / stride + 1; turn-- > 0;) {
        u32 at = first + turn * stride;
        float x[N];
        load(logits + at, x);
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[j] = factor * exp_fast(x[j] - top);
            if (at + j == label) x[j] -= scale;
        }
        store(grad + at, x);
    }
}

template <typename T>
__device__ __forceinline__ void cross_entropy(
    float* logits, const int* labels, const int* rows, T* grad, u32 want_grad, float* nll, u8* correct, u32 vocab,
    float scale) {
    u64 start = (u64)blockIdx.x * vocab;
    logits += start;
    u32 label = labels[blockIdx.x];
    float own = logits[label];
    bool whole = vocab % RUN<T> == 0 && aligned(logits, grad);
    Seen seen = whole ? read_row<4>(logits, vocab, label, own) : read_row<1>(logits, vocab, label, own);
    float top = block_max(seen.top);
    float sum = block_sum(seen.sum * exp_fast(seen.top - top));
    bool earlier = __syncthreads_or(seen.earlier);
    if (threadIdx.x == 0) {
        nll[rows[blockIdx.x]] = logf(sum) + (top - own);
        correct[rows[blockIdx.x]] = own == top && !earlier;
    }
    if (!want_grad) return;
    T* target;
    if constexpr (sizeof(T) == 4) target = logits;
    else target = grad + start;
    if (whole) write_row<T, RUN<T>>(logits, target, vocab, label, top, scale / sum, scale);
    else write_row<T, 1>(logits, target, vocab, label, top, scale / sum, scale);
}

// logits [R, vocab] for R = gridDim.x rows, their labels [R] and places rows [R] in nll and correct. The gradient goes to
// grad [R, vocab]; in f32 it takes the place of the logits, and grad is null.
#define CROSS_ENTROPY(NAME, T) \
    extern "C" __global__ __launch_bounds__(MAX_THREADS) void cross_entropy_rows_##NAME( \
        float* logits, const int* labels, const int* rows, T* grad, u32 want_grad, float* nll, u8* correct, u32 vocab, \
        float scale) { \
        cross_entropy(logits, labels, rows, grad, want_grad, nll, correct, vocab, scale); \
    } \
    extern "C" __global__ __launch_bounds__(128) void cross_entropy_scatter_##NAME( \
        const T* from, const int* rows, T* into, u32 width) { \
        from += (u64)blockIdx.x * width; \
        into += (u64)rows[blockIdx.x] * width; \
        if (width % RUN<T> == 0 && aligned(from, into)) \
            for (u32 at = threadIdx.x * RUN<T>; at < width; at += 128 * RUN<T>) \
                store_pack(into + at, load_pack(from + at)); \
        else \
            for (u32 at = threadIdx.x; at < width; at += 128) into[at] = from[at]; \
    }
FOR_FLOATS(CROSS_ENTROPY)
