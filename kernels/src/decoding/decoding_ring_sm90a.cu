// The products of a decoding step on Hopper.
#include "decoding/product_hopper.cuh"

#define PRODUCT(NAME, T, NT, KIND)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS<NT>, 3 - NT) NAME(const __grid_constant__ Product p) {        \
        product<T, NT, KIND>(p);                                                                                       \
    }
#define ENTRIES(T)                                                                                                     \
    PRODUCT(decoding_ring_plain_8_##T, T, 1, PLAIN) PRODUCT(decoding_ring_plain_16_##T, T, 2, PLAIN)                   \
    PRODUCT(decoding_ring_turn_8_##T, T, 1, TURN) PRODUCT(decoding_ring_turn_16_##T, T, 2, TURN)                       \
    PRODUCT(decoding_ring_gate_8_##T, T, 1, GATE) PRODUCT(decoding_ring_gate_16_##T, T, 2, GATE)
ENTRIES(f16)
ENTRIES(bf16)
