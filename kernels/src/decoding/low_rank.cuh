// RMSNorm of at most 16 rows, and the products of the result with the A's of adapters, in one launch; or those products
// alone.
//
// A block has a row of x and a row of A: it sums up squares and products at once, since t = s · rstd · Σ x·w·a. The first
// blocks of a row of x normalize a share of it, too. Bound by the start of a launch.
#pragma once
#include "dependent.cuh"
#include "decoding/token.cuh"
#include "runs.cuh"

struct LowRank {
    const void *x, *weight; // [tokens, k]; norm [k] of a float type, null: x is as it has to be
    const void* a;          // [columns, k] of T
    const int* owner;       // i32 [columns]: the adapter that a row of A is of
    const float* scale;     // f32 [columns]
    const Token* tokens_at;
    void *n, *t;            // [tokens, k] (with a norm), [tokens, columns]
    u32 weight_type, k, columns;
    float eps;
};

constexpr int LOW_THREADS = 256;

// Grid: rows of A (at least as many as normalize), tokens.
template <typename T> __device__ __forceinline__ void low_rank(const LowRank& p) {
    constexpr int N = RUN<T>;
    __shared__ float2 parts[LOW_THREADS / WARP];
    const u32 token = blockIdx.y, column = blockIdx.x, mine = (column * LOW_THREADS + threadIdx.x) * N;
    const T *x = (const T*)p.x + (u64)token * p.k, *a = (const T*)p.a + (u64)column * p.k;
    const bool normalizes = p.weight != nullptr && column * LOW_THREADS * N < p.k;
    bool own = column < p.columns;
    let_next();
    float square = 0.0f, product = 0.0f;
    if (own) own = p.tokens_at[token].owner == p.owner[column];
    if (column < p.columns && !own && threadIdx.x == 0) ((T*)p.t)[(u64)token * p.columns + column] = narrow<T>(0.0f);
    if (!own && !normalizes) return;
#pragma unroll 4
    for (u32 at = threadIdx.x * N; at < p.k; at += LOW_THREADS * N) {
        float w[N], v[N], from[N];
#pragma unroll
        for (int j = 0; j < N; j++) w[j] = 1.0f, v[j] = 0.0f;
        if (own) load(a + at, v);
        if (p.weight) load_any(p.weight, p.weight_type, at, w);
        load(x + at, from);
#pragma unroll
        for (int j = 0; j < N; j++) {
            square = fmaf(from[j], from[j], square);
            product = fmaf(from[j] * w[j], v[j], product);
        }
    }
    square = warp_sum(square), product = warp_sum(product);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = make_float2(square, product);
    __syncthreads();
    square = product = 0.0f;
#pragma unroll
    for (int from = 0; from < LOW_THREADS / WARP; from++) square += parts[from].x, product += parts[from].y;
    const float rstd = p.weight ? 1.0f / sqrtf(square / p.k + p.eps) : 1.0f;
    if (own && threadIdx.x == 0)
        ((T*)p.t)[(u64)token * p.columns + column] = narrow<T>(p.scale[column] * rstd * product);
    if (!normalizes || mine >= p.k) return;
    float from[N], w[N];
    load(x + mine, from);
    load_any(p.weight, p.weight_type, mine, w);
#pragma unroll
    for (int j = 0; j < N; j++) from[j] = from[j] * rstd * w[j];
    store((T*)p.n + (u64)token * p.k + mine, from);
}
