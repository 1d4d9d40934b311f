// Products of f16 matrices with a 4-bit weight.
#include "linear/gemm_entries.cuh"

GEMM_ENTRIES(f16, quant, true)
