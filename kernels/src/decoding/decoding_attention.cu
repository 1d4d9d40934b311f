// The kernels of a decoding step that attend, for heads of up to 64, 96 and 128 elements.
#include "decoding/attend.cuh"

#define ATTEND(T, D)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) decoding_attend_d##D##_##T(                               \
        const __grid_constant__ Attend p) {                                                                            \
        attend<T, D>(p);                                                                                               \
    }
#define ENTRIES(T) ATTEND(T, 64) ATTEND(T, 96) ATTEND(T, 128)
ENTRIES(f16)
ENTRIES(bf16)
