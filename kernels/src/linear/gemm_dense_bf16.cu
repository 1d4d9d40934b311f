// Products of bf16 matrices with a dense weight.
#include "linear/gemm_entries.cuh"

GEMM_ENTRIES(bf16, dense, false)
