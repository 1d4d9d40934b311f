// Pairs of 16-bit elements in a register, eights of them in four, and dropout on eights.
#pragma once
#include "linear/loads.cuh"
#include "linear/ptx.cuh"

template <typename T> __device__ __forceinline__ float low(u32 pair) {
    unsigned short bits = (unsigned short)pair;
    return wide(*reinterpret_cast<T*>(&bits));
}
template <typename T> __device__ __forceinline__ float high(u32 pair) { return low<T>(pair >> 16); }

// A dropout mask, as kernels/src/dropout makes it.
struct Mask {
    u64 seed;
    u32 step, stream, threshold;
    float scale;

    template <typename T> __device__ __forceinline__ u32 two(u32 v, u32 word0, u32 word1) const {
        return pair<T>(word0 < threshold ? 0.0f : low<T>(v) * scale, word1 < threshold ? 0.0f : high<T>(v) * scale);
    }
    // Of the eight elements whose first one is at `position` of the whole tensor, a multiple of 8. The rounds stay a
    // loop: unrolled, the masks of a kernel's many loads would not fit the instruction cache.
    template <typename T> __device__ __forceinline__ uint4 eight(uint4 v, u64 position) const {
        uint4 a = make_uint4((u32)(position / 4), (u32)(position / 4 >> 32), step, stream), b = a;
        b.x += 1; // no carry: position / 4 is even
        u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll 1
        for (int round = 0; round < 10; round++) {
            a = philox_round(a, k0, k1);
            b = philox_round(b, k0, k1);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return make_uint4(two<T>(v.x, a.x, a.y), two<T>(v.y, a.z, a.w), two<T>(v.z, b.x, b.y), two<T>(v.w, b.z, b.w));
    }
};
