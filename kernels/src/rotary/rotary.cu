// Rotary embedding in place: the pair (i, i + half) of each head turns by its token's angle.
//
// One read and one write, bound by memory. A thread turns the same run of pairs in HEADS heads of a token, so that the
// angles, f32 from the caches, are not a second stream as wide as the heads themselves; two heads at a time, so that enough
// loads are in flight.
#include "runs.cuh"

constexpr int THREADS = 256, HEADS = 4, TOGETHER = 2;

template <typename T, int N>
__device__ __forceinline__ void rotary(
    T* q, T* k, const int* positions, const float* cos, const float* sin, u32 tokens, u32 q_heads, u32 k_heads, u32 half,
    u32 length, float sign) {
    const u32 runs = half / N, q_groups = (q_heads + HEADS - 1) / HEADS, groups = q_groups + (k_heads + HEADS - 1) / HEADS;
    // The host keeps this below 2^31.
    const u32 work = tokens * groups * runs;
    for (u32 item = blockIdx.x * THREADS + threadIdx.x; item < work; item += gridDim.x * THREADS) {
        const u32 at = item % runs * N, token = item / runs / groups, group = item / runs % groups;
        const bool of_q = group < q_groups;
        const u32 first = (of_q ? group : group - q_groups) * HEADS, heads = of_q ? q_heads : k_heads;
        // The host has checked positions that it made; a wrong one must not read outside of the table all the same.
        const u32 position = min((u32)max(positions[token], 0), length - 1);
        float c[N], s[N];
        load(cos + (u64)position * half + at, c);
        load(sin + (u64)position * half + at, s);
#pragma unroll
        for (int j = 0; j < N; j++) s[j] *= sign;
        T* head = (of_q ? q : k) + ((u64)token * heads + first) * 2 * half + at;
#pragma unroll 1
        for (u32 h = first; h < min(first + HEADS, heads); h += TOGETHER, head += TOGETHER * 2 * half) {
            float low[TOGETHER][N], high[TOGETHER][N];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                if (h + i >= heads) break;
                load(head + i * 2 * half, low[i]);
                load(head + i * 2 * half + half, high[i]);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                if (h + i >= heads) break;
#pragma unroll
                for (int j = 0; j < N; j++) {
                    const float turned = low[i][j] * c[j] - high[i][j] * s[j];
                    high[i][j] = high[i][j] * c[j] + low[i][j] * s[j];
                    low[i][j] = turned;
                }
                store(head + i * 2 * half, low[i]);
                store(head + i * 2 * half + half, high[i]);
            }
        }
    }
}

// q [tokens, q_heads · 2 · half] and k, or no k_heads; positions [tokens], cos and sin [length, half]; sign -1 turns back.
#define ROTARY(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS) void rotary_apply_##NAME( \
        T* q, T* k, const int* positions, const float* cos, const float* sin, u32 tokens, u32 q_heads, u32 k_heads, \
        u32 half, u32 length, float sign) { \
        if (half % RUN<T> == 0 && aligned(q, k, cos, sin)) \
            rotary<T, RUN<T>>(q, k, positions, cos, sin, tokens, q_heads, k_heads, half, length, sign); \
        else \
            rotary<T, 1>(q, k, positions, cos, sin, tokens, q_heads, k_heads, half, length, sign); \
    }
FOR_FLOATS(ROTARY)
