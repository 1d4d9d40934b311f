// Copies between any two addresses, also of pinned host memory (runtime/src/cuda/copy.rs, which launches it).
#include "common.cuh"

// A word a thread, and a byte a thread of what is left; both addresses are multiples of 4.
extern "C" __global__ void __launch_bounds__(256) copy_bytes(u32* to, const u32* from, u32 bytes) {
    u32 i = blockIdx.x * 256 + threadIdx.x, words = bytes / 4;
    if (i < words) to[i] = from[i];
    else if (i - words < bytes % 4) ((u8*)(to + words))[i - words] = ((const u8*)(from + words))[i - words];
}
