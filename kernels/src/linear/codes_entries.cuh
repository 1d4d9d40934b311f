// Entries of codes_hopper.cuh for TYPE, which the file that includes this one has defined.
#include "linear/codes_hopper.cuh"

#define MAP(NAME) const __grid_constant__ TensorMap NAME
// A weight of codes, as `codes.rs` gives it.
#define WEIGHT(I) const void *absmax##I, const float *nested##I, const float *map##I, const float *offset##I
#define SHIFTS u32 block_shift, u32 nested_shift, u32 quant_type
#define CODES(I, ROW) \
    Codes{&codes##I, Scales{absmax##I, nested##I, nested##I ? *offset##I : 0.0f, block_shift, nested_shift}, map##I, CODE_VALUES[quant_type], ROW}
#define NAMED_AS(NAME, TYPE) codes_hopper_##NAME##_##TYPE
#define NAMED(NAME, TYPE) NAMED_AS(NAME, TYPE)
#define KERNEL(NAME) extern "C" __global__ void __launch_bounds__(THREADS, 1) NAMED(NAME, TYPE)

// out = scale * (x · b + x2 · b2) + in.
#define PRODUCT(NAME, FORWARD, TOKENS)                                                                                 \
    KERNEL(NAME##_##TOKENS)(MAP(x), MAP(codes0), MAP(x2), MAP(b2), WEIGHT(0), SHIFTS, u32 tokens, u32 n, u32 depth,    \
                            u32 rank, void* out, const void* in, float scale, u32 add, u32 full) {                     \
        const Operands<1> operands{&x, {CODES(0, FORWARD ? depth : n)}, {&x2}, {&b2}, depth, {rank}};                  \
        product<TYPE, FORWARD, TOKENS>(operands, ToRows<TYPE>{tokens, n, out, add ? out : in, scale, full != 0});      \
    }
PRODUCT(forward, true, 256)
PRODUCT(forward, true, 128)
PRODUCT(input_grad, false, 256)
PRODUCT(input_grad, false, 128)

// SwiGLU of x · b0 + x2 · b2 and x · b1 + x3 · b3, which are kept where `gate` and `up` are not null.
KERNEL(gated)(MAP(x), MAP(codes0), MAP(x2), MAP(b2), WEIGHT(0), SHIFTS, u32 tokens, u32 n, u32 depth, u32 rank,
              MAP(codes1), MAP(x3), MAP(b3), WEIGHT(1), u32 rank1, void* gate, void* up, void* out) {
    const Operands<2> operands{&x, {CODES(0, depth), CODES(1, depth)}, {&x2, &x3}, {&b2, &b3}, depth, {rank, rank1}};
    product<TYPE, true, 256>(operands, Gated<TYPE>{tokens, n, gate, up, out});
}

// The sums x · b + x2 · b2 are the gradient of SwiGLU's output.
KERNEL(swiglu_grad)(MAP(x), MAP(codes0), MAP(x2), MAP(b2), WEIGHT(0), SHIFTS, u32 tokens, u32 n, u32 depth, u32 rank,
                    const void* gate, const void* up, void* of_gate, void* of_up, void* out) {
    const Operands<1> operands{&x, {CODES(0, n)}, {&x2}, {&b2}, depth, {rank}};
    product<TYPE, false, 256>(operands, ToGradients<TYPE>{tokens, n, {gate, up, of_gate, of_up, out, n}});
}
