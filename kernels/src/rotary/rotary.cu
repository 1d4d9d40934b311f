// Rotary embedding in place: the pair (i, i + half) of each head turns by its token's angle.
//
// One read and one write, bound by memory. A thread turns the same run of pairs in HEADS heads of a token, so that the
// angles, f32 from the caches, are not a second stream as wide as the heads themselves.
#include "runs.cuh"

constexpr int THREADS = 256, HEADS = 4;

template <typename T, int N>
__device__ __forceinline__ void rotary(
    T* x, const int* positions, const float* cos, const float* sin, u32 tokens, u32 heads, u32 half, u32 length,
    float sign) {
    u32 runs = half / N, groups = (heads + HEADS - 1) / HEADS;
    // The host keeps this below 2^31.
    u32 work = tokens * groups * runs;
    for (u32 item = blockIdx.x * THREADS + threadIdx.x; item < work; item += gridDim.x * THREADS) {
        u32 at = item % runs * N, token = item / runs / groups, first = item / runs % groups * HEADS;
        // The host has checked positions that it made; a wrong one must not read outside of the table all the same.
        u32 position = min((u32)max(positions[token], 0), length - 1);
        float c[N], s[N];
        load(cos + (u64)position * half + at, c);
        load(sin + (u64)position * half + at, s);
#pragma unroll
        for (int j = 0; j < N; j++) s[j] *= sign;
        T* head = x + ((u64)token * heads + first) * 2 * half + at;
        // One head after the other: enough loads are in flight by the number of threads that so few registers allow.
#pragma unroll 1
        for (u32 h = first; h < min(first + HEADS, heads); h++, head += 2 * half) {
            float low[N], high[N];
            load(head, low);
            load(head + half, high);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float turned = low[j] * c[j] - high[j] * s[j];
                high[j] = high[j] * c[j] + low[j] * s[j];
                low[j] = turned;
            }
            store(head, low);
            store(head + half, high);
        }
    }
}

// x [tokens, heads · 2 · half], positions [tokens], cos and sin [length, half]; sign -1 turns back.
#define ROTARY(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS) void rotary_apply_##NAME( \
        T* x, const int* positions, const float* cos, const float* sin, u32 tokens, u32 heads, u32 half, u32 length, \
        float sign) { \
        if (half % RUN<T> == 0 && aligned(x, cos, sin)) \
            rotary<T, RUN<T>>(x, positions, cos, sin, tokens, heads, half, length, sign); \
        else \
            rotary<T, 1>(x, positions, cos, sin, tokens, heads, half, length, sign); \
    }
FOR_FLOATS(ROTARY)
