// The products of a decoding step on Hopper.
#include "decoding/product_hopper.cuh"

// Of the inner index that one block takes, or a cluster of four.
#define PRODUCT(NAME, BLOCKS, T, NT, KIND)                                                                             \
    extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)                            \
        NAME(const __grid_constant__ Product p) {                                                                      \
        product<T, NT, BLOCKS, KIND>(p);                                                                               \
    }
#define SIZES(T, NAME, KIND)                                                                                           \
    PRODUCT(decoding_ring1_##NAME##_8_##T, 1, T, 1, KIND) PRODUCT(decoding_ring1_##NAME##_16_##T, 1, T, 2, KIND)       \
    PRODUCT(decoding_ring4_##NAME##_8_##T, 4, T, 1, KIND) PRODUCT(decoding_ring4_##NAME##_16_##T, 4, T, 2, KIND)
#define ENTRIES(T) SIZES(T, plain, PLAIN) SIZES(T, turn, TURN) SIZES(T, gate, GATE)
ENTRIES(f16)
ENTRIES(bf16)
