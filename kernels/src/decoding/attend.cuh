// Attention of one query a sequence over its keys in a cache, in one launch: parts over chunks of the keys (as
// attention/decode.cuh), and the block that is last of a token and a head's group adds them up, in the order of the keys.
#pragma once
#include "attention/decode.cuh"
#include "decoding/token.cuh"

constexpr u32 MOST_PARTS = WARP;

struct Attend {
    const void *q, *keys, *values; // [tokens, heads · d]; the cache
    const Token* tokens_at;
    float *part_o, *part_lse;      // [tokens, parts, heads, d], [tokens, parts, heads]
    u32* arrived;                  // [tokens, heads of keys], zeros before and after
    void* o;                       // [tokens, heads · d]
    u32 heads, group, d, parts;
    float scale_log2;
    u32 unused;
};

// Sums `count` parts of a token and a group of heads, in the order of the keys, as `combine` does it.
template <typename T>
__device__ __forceinline__ void sum_parts(const Attend& p, u32 token, u32 first_head, u32 count, float (*weights)[MOST_PARTS]) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u64 first = (u64)token * p.parts * p.heads + first_head;
    for (u32 member = warp; member < p.group; member += PARTS) {
        float lse = lane < count ? __ldcg(p.part_lse + first + member + lane * p.heads) : -INFINITY;
        float high = warp_max(lse), weight = exp2_fast(lse - high);
        weights[member][lane] = weight / warp_sum(weight);
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < p.group * p.d; e += THREADS) {
        const u32 member = e / p.d;
        float x = 0.0f;
#pragma unroll 4
        for (u32 i = 0; i < count; i++) x = fmaf(weights[member][i], __ldcg(p.part_o + (first + i * p.heads) * p.d + e), x);
        ((T*)p.o)[((u64)token * p.heads + first_head) * p.d + e] = narrow<T>(x);
    }
}

// Grid: tokens · parts, heads of keys. A group has at most 16 heads.
template <typename T, int D> __device__ __forceinline__ void attend(const Attend& p) {
    __shared__ float weights[DECODE_ROWS][MOST_PARTS];
    __shared__ bool last;
    const u32 token = blockIdx.x / p.parts, part = blockIdx.x % p.parts, kv = blockIdx.y;
    const Token who = p.tokens_at[token];
    const u32 keys = who.position + 1;
    const u32 length = max((keys + p.parts - 1) / p.parts + KEYS - 1, (u32)KEYS) / KEYS * KEYS;
    const u32 count = (keys + length - 1) / length, start = part * length;
    if (part >= count) return;
    const int4 chunk = make_int4(token, 1, who.first + start, min(length, keys - start));
    decode_chunk<T, D>((const T*)p.q, (const T*)p.keys, (const T*)p.values, p.part_o, p.part_lse, blockIdx.x, chunk,
                       keys - start, p.heads, p.group, p.d, 1, p.scale_log2);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(p.arrived + token * gridDim.y + kv, 1) == count - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    sum_parts<T>(p, token, kv * p.group, count, weights);
    if (threadIdx.x == 0) p.arrived[token * gridDim.y + kv] = 0;
}
