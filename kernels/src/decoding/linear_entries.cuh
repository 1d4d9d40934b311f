// The kernels of a decoding step that multiply.
#include "decoding/low_rank.cuh"
#include "decoding/product.cuh"

#define PRODUCT(NAME, T, NT, KIND)                                                                                     \
    extern "C" __global__ void __launch_bounds__(TEAMS * TEAM, 1) NAME(const __grid_constant__ Product p) {            \
        product<T, NT, KIND>(p);                                                                                       \
    }
#define ENTRIES(T)                                                                                                     \
    PRODUCT(decoding_plain_8_##T, T, 1, PLAIN) PRODUCT(decoding_plain_16_##T, T, 2, PLAIN)                             \
    PRODUCT(decoding_turn_8_##T, T, 1, TURN) PRODUCT(decoding_turn_16_##T, T, 2, TURN)                                 \
    PRODUCT(decoding_gate_8_##T, T, 1, GATE) PRODUCT(decoding_gate_16_##T, T, 2, GATE)                                 \
    extern "C" __global__ void __launch_bounds__(LOW_THREADS)                                                          \
        decoding_low_rank_##T(const __grid_constant__ LowRank p) {                                                     \
        low_rank<T>(p);                                                                                                \
    }
ENTRIES(f16)
ENTRIES(bf16)
