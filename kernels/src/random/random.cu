// Standard normals times `std`, numbered as on the CPU (see random/mod.rs). A block of random words gives two.
#include "common.cuh"

__device__ __forceinline__ float unit(u32 bits) { return (bits >> 8) * (1.0f / (1 << 24)); }

template <typename T> __device__ __forceinline__ void normal(T* out, u64 numel, float std, u64 seed, u32 step, u32 stream) {
    u64 pair = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (2 * pair >= numel) return;
    uint4 words = philox(seed, step, stream, pair);
    // 1 - u lies in (0, 1], so that the logarithm is finite.
    float first = sqrtf(-2.0f * logf(1.0f - unit(words.x))) * cosf(6.2831853f * unit(words.y));
    float second = sqrtf(-2.0f * logf(1.0f - unit(words.z))) * cosf(6.2831853f * unit(words.w));
    out[2 * pair] = narrow<T>(std * first);
    if (2 * pair + 1 < numel) out[2 * pair + 1] = narrow<T>(std * second);
}

#define ENTRY(T)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
    random_normal_##T(T* out, u64 numel, float std, u64 seed, u32 step, u32 stream) {                                  \
        normal(out, numel, std, seed, step, stream);                                                                   \
    }
typedef float f32;
ENTRY(f32)
ENTRY(f16)
ENTRY(bf16)
