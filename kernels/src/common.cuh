// What all kernels share: number types, 16-byte accesses, reductions, random numbers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef __half f16;
typedef __nv_bfloat16 bf16;

constexpr int WARP = 32;
#define INFINITY __int_as_float(0x7f800000)

// Any float type to f32 and back (round to nearest even).
__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(f16 x) { return __half2float(x); }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }
template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 narrow<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

// Two floats rounded to T, the first in the low half. One instruction, where two roundings one by one take many times as long.
template <typename T> __device__ __forceinline__ u32 pair(float low, float high);
template <> __device__ __forceinline__ u32 pair<bf16>(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<u32*>(&two);
}
template <> __device__ __forceinline__ u32 pair<f16>(float low, float high) {
    __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<u32*>(&two);
}

// Two 16-bit elements as floats: the inverse of pair.
template <typename T> __device__ __forceinline__ float2 both(u32 x);
template <> __device__ __forceinline__ float2 both<bf16>(u32 x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 both<f16>(u32 x) {
    return __half22float2(*reinterpret_cast<__half2*>(&x));
}

// 16 bytes of T, loaded and stored at once. The address must be a multiple of 16.
template <typename T> struct alignas(16) Pack {
    static constexpr int SIZE = 16 / sizeof(T);
    T at[SIZE];
};
template <typename T> __device__ __forceinline__ Pack<T> load_pack(const T* p) {
    Pack<T> pack;
    *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(p);
    return pack;
}
template <typename T> __device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&pack);
}

// Sum and maximum over a warp; every lane gets the result, in the same order each time.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
}

// Sum and maximum over a block of whole warps; every thread gets the result. May be called again at once.
template <float (*REDUCE)(float)> __device__ __forceinline__ float block_reduce(float x, float neutral) {
    __shared__ float parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = REDUCE(x);
    __syncthreads();
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return REDUCE(lane < warps ? parts[lane] : neutral);
}
__device__ __forceinline__ float block_sum(float x) { return block_reduce<warp_sum>(x, 0.0f); }
__device__ __forceinline__ float block_max(float x) { return block_reduce<warp_max>(x, -INFINITY); }

// One of the ten rounds of philox.
__device__ __forceinline__ uint4 philox_round(uint4 c, u32 k0, u32 k1) {
    u32 a_low = 0xD2511F53u * c.x, a_high = __umulhi(0xD2511F53u, c.x);
    u32 b_low = 0xCD9E8D57u * c.z, b_high = __umulhi(0xCD9E8D57u, c.z);
    return make_uint4(b_high ^ c.y ^ k0, b_low, a_high ^ c.w ^ k1, a_low);
}

// Philox4x32-10 (Salmon et al., SC 2011): the block of four random words at `block` of the stream that `step` and
// `purpose_layer` (purpose << 16 | layer) name under `seed`. The same words as on the CPU.
__device__ __forceinline__ uint4 philox(u64 seed, u32 step, u32 purpose_layer, u64 block) {
    uint4 c = make_uint4((u32)block, (u32)(block >> 32), step, purpose_layer);
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        c = philox_round(c, k0, k1);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}
