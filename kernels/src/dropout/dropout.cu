// Dropout with a mask made from Philox counters: element i takes word i % 4 of block i / 4, as on the CPU.
//
// One read and one write; ten Philox rounds for four elements are about as much work as their traffic in a 16-bit type,
// and overlap with it. Runs are 4 or 8 elements, so that each starts at a block.
#include "runs.cuh"

constexpr int THREADS = 256;

struct Mask {
    u64 seed;
    u32 step, purpose_layer;
    // Dropped where the random word is below this.
    u32 threshold;
    // Of what is kept.
    float scale;

    __device__ __forceinline__ float operator()(float x, u32 word) const { return word < threshold ? 0.0f : x * scale; }
    __device__ __forceinline__ uint4 words(u64 block) const { return philox(seed, step, purpose_layer, block); }
};

template <typename T> __device__ __forceinline__ void dropout(const T* x, T* out, u64 n, Mask mask) {
    constexpr int N = RUN<T>, BLOCK = THREADS * N;
    u64 begin = (u64)blockIdx.x * BLOCK;
    if (begin + BLOCK <= n && aligned(x, out)) {
        float values[N];
        u64 i = begin + threadIdx.x * N;
        load(x + i, values);
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            uint4 words = mask.words((i + j) / 4);
            values[j] = mask(values[j], words.x);
            values[j + 1] = mask(values[j + 1], words.y);
            values[j + 2] = mask(values[j + 2], words.z);
            values[j + 3] = mask(values[j + 3], words.w);
        }
        store(out + i, values);
    } else {
        for (u64 i = begin + threadIdx.x; i < min(begin + BLOCK, n); i += THREADS) {
            uint4 words = mask.words(i / 4);
            u32 word = i % 4 == 0 ? words.x : i % 4 == 1 ? words.y : i % 4 == 2 ? words.z : words.w;
            out[i] = narrow<T>(mask(wide(x[i]), word));
        }
    }
}

// out [n] from x [n].
#define DROPOUT(NAME, T) \
    extern "C" __global__ __launch_bounds__(THREADS) void dropout_apply_##NAME( \
        const T* x, T* out, u64 n, u64 seed, u32 step, u32 purpose_layer, u32 threshold, float scale) { \
        dropout(x, out, n, Mask{seed, step, purpose_layer, threshold, scale}); \
    }
FOR_FLOATS(DROPOUT)
