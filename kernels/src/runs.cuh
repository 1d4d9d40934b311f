// What the memory-bound kernels share. A thread moves runs of 16 bytes of its main type where all addresses allow; a
// block that meets an end or an odd address works element by element, in a loop that stays coalesced. Keeping the two
// apart keeps the code small, and the driver compiles it in no time.
#pragma once
#include "common.cuh"

// Elements of T in a run.
template <typename T> constexpr int RUN = Pack<T>::SIZE;

// Whether every address allows 16-byte accesses.
template <typename... Pointers> __device__ __forceinline__ bool aligned(Pointers... p) {
    return (((u64)p | ...) & 15) == 0;
}

// N consecutive elements as f32, in accesses as wide as possible: p is a multiple of 16 bytes, or of N elements if
// those are fewer bytes.
template <int N, typename T> __device__ __forceinline__ void load(const T* p, float (&out)[N]) {
    constexpr int BYTES = N * sizeof(T);
    alignas(16) T at[N];
    if constexpr (BYTES % 16 == 0) {
#pragma unroll
        for (int j = 0; j < BYTES / 16; j++) reinterpret_cast<uint4*>(at)[j] = reinterpret_cast<const uint4*>(p)[j];
    } else if constexpr (BYTES == 8) {
        *reinterpret_cast<uint2*>(at) = *reinterpret_cast<const uint2*>(p);
    } else {
        static_assert(N == 1);
        at[0] = *p;
    }
#pragma unroll
    for (int j = 0; j < N; j++) out[j] = wide(at[j]);
}

// The elements of a pack as f32.
template <typename T> __device__ __forceinline__ void open(const Pack<T>& pack, float (&out)[RUN<T>]) {
    const uint4 words = *reinterpret_cast<const uint4*>(&pack);
    if constexpr (sizeof(T) == 2) {
        const u32 at[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 two = both<T>(at[i]);
            out[2 * i] = two.x, out[2 * i + 1] = two.y;
        }
    } else {
        out[0] = pack.at[0], out[1] = pack.at[1], out[2] = pack.at[2], out[3] = pack.at[3];
    }
}

// And back, rounded to nearest even. N is 1 or a multiple of RUN<T>.
template <int N, typename T> __device__ __forceinline__ void store(T* p, const float (&values)[N]) {
    if constexpr (N == 1) {
        *p = narrow<T>(values[0]);
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < N; i += RUN<T>)
            *reinterpret_cast<uint4*>(p + i) =
                make_uint4(pair<T>(values[i], values[i + 1]), pair<T>(values[i + 2], values[i + 3]),
                           pair<T>(values[i + 4], values[i + 5]), pair<T>(values[i + 6], values[i + 7]));
    } else {
#pragma unroll
        for (int start = 0; start < N; start += RUN<T>) {
            Pack<T> pack;
#pragma unroll
            for (int j = 0; j < RUN<T>; j++) pack.at[j] = narrow<T>(values[start + j]);
            store_pack(p + start, pack);
        }
    }
}

// The float types by the numbers that the host gives them (`cast::cuda::code`).
enum FloatType : u32 { F32 = 0, F16 = 1, BF16 = 2 };

// As `load`, from element `at` on of an array whose type is known when the kernel runs.
template <int N> __device__ __forceinline__ void load_any(const void* p, u32 type, u64 at, float (&out)[N]) {
    if (type == BF16) load<N>((const bf16*)p + at, out);
    else if (type == F16) load<N>((const f16*)p + at, out);
    else load<N>((const float*)p + at, out);
}

// Instantiates a kernel for the three float types.
#define FOR_FLOATS(INSTANTIATE) INSTANTIATE(f32, float) INSTANTIATE(f16, f16) INSTANTIATE(bf16, bf16)
