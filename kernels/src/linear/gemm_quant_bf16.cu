// Products of bf16 matrices with a 4-bit weight.
#include "linear/gemm_entries.cuh"

GEMM_ENTRIES(bf16, quant, true)
