// Loss of rows of logits and its gradient, as cross_entropy.cu, for vocabularies whose rows no multiprocessor holds (Hopper).
//
// A cluster takes a row; each of its blocks holds a part of it in shared memory, so that the logits are read once. Blocks
// exchange the largest logit and the sum of their parts, and add up the sums in the order of their ranks. Several clusters
// share the multiprocessors: some wait for logits while others compute or store. Bound by memory, as long as a logit takes no
// more than these few instructions: for the label's logit alone nothing is asked of all others.
#include "cluster.cuh"
#include "fast.cuh"
#include "linear/hopper.cuh"
#include "runs.cuh"

constexpr int THREADS = 512;
constexpr u32 CLUSTER = 8;
constexpr float LOWEST = -3.402823466e38f;

// Pieces of a part, of which the first is looked at while the others come.
constexpr u32 PIECES = 4;

// Where things lie in shared memory: what the blocks send, 16 bytes each, barriers, and the logits.
constexpr u32 RECEIVED = 0, FULL = RECEIVED + CLUSTER * 16, SENT = FULL + 8 * PIECES, LOGITS = SENT + 16;

extern __shared__ __align__(1024) u8 dynamic_shared[];

// e^x for x ≤ 0.
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2_E); }

// Calls `use` with each four logits of this thread, of those from `begin`, a multiple of THREADS · 4, to `end` in shared memory,
// and with the column of the first.
template <typename F> __device__ __forceinline__ void each_four(u32 begin, u32 end, const F& use) {
#pragma unroll 4
    for (u32 at = begin + threadIdx.x * 4; at < end; at += THREADS * 4)
        use(reinterpret_cast<float4*>(dynamic_shared + LOGITS)[at / 4], at);
}

template <typename T> __device__ __forceinline__ void store_four(T* to, const float4& x) {
    if constexpr (sizeof(T) == 4) *reinterpret_cast<float4*>(to) = x;
    else *reinterpret_cast<uint2*>(to) = make_uint2(pair<T>(x.x, x.y), pair<T>(x.z, x.w));
}

template <typename T>
__device__ __forceinline__ void cross_entropy(
    float* logits, const int* labels, const int* rows, T* grad, u32 want_grad, float* nll, u8* correct, u32 vocab,
    float scale) {
    // The last row first: the product has just written it, and it is in the second-level cache still.
    const u32 row = (gridDim.x - 1 - blockIdx.x) / CLUSTER, rank = cluster_rank(), shared = shared_address(dynamic_shared);
    // This block's columns: multiples of 8, so that all addresses are of 16 bytes.
    const u32 part = (vocab + 8 * CLUSTER - 1) / (8 * CLUSTER) * 8, begin = min(rank * part, vocab);
    const u32 count = min(part, vocab - begin);
    const u32 piece = (part + THREADS * 4 * PIECES - 1) / (THREADS * 4 * PIECES) * THREADS * 4;
    logits += (u64)row * vocab;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < PIECES; i++) barrier_init(shared + FULL + 8 * i, 1);
        barrier_init(shared + SENT, 1);
        barriers_ready();
        barrier_expect(shared + SENT, CLUSTER * 16);
        for (u32 i = 0; i < PIECES; i++) {
            const u32 first = min(i * piece, count), bytes = (min(first + piece, count) - first) * 4;
            barrier_expect(shared + FULL + 8 * i, bytes);
            if (bytes > 0) copy_bulk(shared + LOGITS + first * 4, logits + begin + first, bytes, shared + FULL + 8 * i);
        }
    }
    const u32 label = labels[row];
    const float own = logits[label];
    cluster_sync(); // all barriers are made

    float top = LOWEST;
    for (u32 i = 0; i < PIECES; i++) {
        barrier_wait(shared + FULL + 8 * i, 0);
        each_four(i * piece, min((i + 1) * piece, count), [&](const float4& x, u32) {
            top = fmaxf(fmaxf(top, fmaxf(x.x, x.y)), fmaxf(x.z, x.w));
        });
    }
    top = block_max(top);
    // Whether a logit before the label is as large, which only matters where the label's is the largest.
    float earlier = 0.0f;
    if (own == top) {
        const float* x = reinterpret_cast<const float*>(dynamic_shared + LOGITS);
        for (u32 at = threadIdx.x; at < count; at += THREADS)
            if (x[at] == own && begin + at < label) earlier = 1.0f;
        earlier = block_max(earlier);
    }
    float sum = 0.0f;
    each_four(0, count, [&](float4& x, u32) {
        const float4 e = make_float4(exp_fast(x.x - top), exp_fast(x.y - top), exp_fast(x.z - top), exp_fast(x.w - top));
        sum += e.x, sum += e.y, sum += e.z, sum += e.w;
        x = e;
    });
    sum = block_sum(sum);

    if (threadIdx.x < CLUSTER) {
        const float mine[4] = {top, sum, earlier, 0.0f};
        send(of_block(shared + RECEIVED + rank * 16, threadIdx.x), mine, of_block(shared + SENT, threadIdx.x));
    }
    wait_sent(shared + SENT, 0);
    const float4* received = reinterpret_cast<const float4*>(dynamic_shared + RECEIVED);
    float row_top = LOWEST, row_sum = 0.0f, row_earlier = 0.0f;
#pragma unroll
    for (u32 i = 0; i < CLUSTER; i++) row_top = fmaxf(row_top, received[i].x);
#pragma unroll
    for (u32 i = 0; i < CLUSTER; i++) {
        row_sum += received[i].y * exp_fast(received[i].x - row_top);
        row_earlier = fmaxf(row_earlier, received[i].z);
    }
    if (rank == 0 && threadIdx.x == 0) {
        nll[rows[row]] = logf(row_sum) + (row_top - own);
        correct[rows[row]] = own == row_top && row_earlier == 0.0f;
    }
    if (!want_grad) return;
    T* to;
    if constexpr (sizeof(T) == 4) to = logits + begin;
    else to = grad + (u64)row * vocab + begin;
    const float softmax = scale / row_sum, factor = softmax * exp_fast(top - row_top);
    each_four(0, count, [&](const float4& x, u32 at) {
        store_four(to + at, make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor));
    });
    // By the thread that has just stored it without its share of `scale`.
    const u32 at = label - begin;
    if (at < count && at / 4 % THREADS == threadIdx.x) to[at] = narrow<T>(softmax * exp_fast(own - row_top) - scale);
}

// As `cross_entropy_rows` of cross_entropy.cu, in clusters of CLUSTER blocks. vocab is a multiple of 8, and logits and grad are
// at multiples of 16 bytes.
#define CROSS_ENTROPY(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS, 3) void cross_entropy_cluster_##NAME( \
        float* logits, const int* labels, const int* rows, T* grad, u32 want_grad, float* nll, u8* correct, u32 vocab, \
        float scale) { \
        cross_entropy(logits, labels, rows, grad, want_grad, nll, correct, vocab, scale); \
    }
FOR_FLOATS(CROSS_ENTROPY)
