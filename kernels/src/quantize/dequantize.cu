// The matrix of 4-bit codes: value * scale in f32, rounded once.
//
// Bound by memory: half a byte is read and 2 (or 4) bytes are written for each weight. A thread turns 4 bytes of codes into
// 8 weights, 4 times; the 16 values lie in 16 banks of shared memory, so that their look-ups do not collide.
#include "codes.cuh"
#include "runs.cuh"

constexpr int THREADS = 128;
constexpr int PACK = 8;
constexpr int PACKS = 4;

template <typename T>
__device__ __forceinline__ void dequantize(
    const u8* packed, const Scales& scales, const float* map, T* out, u64 numel, u32 book) {
    __shared__ float values[16];
    u64 start = (u64)blockIdx.x * (THREADS * PACK * PACKS) + threadIdx.x * PACK;
    u32 words[PACKS];
    uint2 raw[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        u64 first = start + p * THREADS * PACK;
        words[p] = 0;
        raw[p] = make_uint2(0, 0);
        if (first >= numel) continue;
        raw[p] = scales.fetch(first >> scales.block_shift);
        if (first + PACK <= numel) {
            words[p] = *reinterpret_cast<const u32*>(packed + first / 2);
        } else {
            for (u64 i = 0; 2 * i < numel - first; i++) words[p] |= (u32)packed[first / 2 + i] << (8 * i);
        }
    }
    if (threadIdx.x < 16) values[threadIdx.x] = CODE_VALUES[book][threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        u64 first = start + p * THREADS * PACK;
        if (first >= numel) continue;
        float scale = scales.value(raw[p], map);
        float weights[PACK];
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            u32 code = words[p] >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0)) & 15;
            weights[i] = __fmul_rn(values[code], scale);
        }
        if (first + PACK <= numel) {
            store(out + first, weights);
        } else {
#pragma unroll
            for (int i = 0; i < PACK; i++) {
                if (first + i < numel) out[first + i] = narrow<T>(weights[i]);
            }
        }
    }
}

#define DEQUANTIZE(T, TYPE)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_##TYPE(                                                   \
        const u8* packed, const void* absmax, const float* nested, const float* map, const float* offset, T* out,              \
        u64 numel, u32 block_shift, u32 nested_shift, u32 book) {                                                              \
        Scales scales = {absmax, nested, nested ? *offset : 0.0f, block_shift, nested_shift};                                  \
        dequantize<T>(packed, scales, map, out, numel, book);                                                                  \
    }
DEQUANTIZE(float, f32)
DEQUANTIZE(f16, f16)
DEQUANTIZE(bf16, bf16)
