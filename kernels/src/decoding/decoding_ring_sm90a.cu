// The products of a decoding step on Hopper.
#include "decoding/product_hopper.cuh"

// W warps that multiply: 8, two blocks a multiprocessor, or 14.
#define PRODUCT(NAME, T, NT, W, KIND)                                                                                  \
    extern "C" __global__ void __cluster_dims__(CLUSTER<W>, 1, 1) __launch_bounds__(THREADS<W>, W == 8 ? 2 : 1)        \
        NAME(const __grid_constant__ Product p) {                                                                      \
        product<T, NT, W, KIND>(p);                                                                                    \
    }
#define SIZES(T, NAME, KIND)                                                                                           \
    PRODUCT(decoding_ring4_##NAME##_8_##T, T, 1, 8, KIND) PRODUCT(decoding_ring4_##NAME##_16_##T, T, 2, 8, KIND)       \
    PRODUCT(decoding_ring8_##NAME##_8_##T, T, 1, 14, KIND) PRODUCT(decoding_ring8_##NAME##_16_##T, T, 2, 14, KIND)
#define ENTRIES(T) SIZES(T, plain, PLAIN) SIZES(T, turn, TURN) SIZES(T, gate, GATE)
ENTRIES(f16)
ENTRIES(bf16)
