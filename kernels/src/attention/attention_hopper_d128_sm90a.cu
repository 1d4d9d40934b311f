// Attention on Hopper for heads of 128 elements. A module of its own, as drivers compile a module whole when it is first
// used.
#include "attention/hopper_backward.cuh"
#include "attention/hopper_forward.cuh"
FORWARD_ENTRY(f16, 128)
FORWARD_ENTRY(bf16, 128)
BACKWARD_ENTRY(f16)
BACKWARD_ENTRY(bf16)
