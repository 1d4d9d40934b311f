// Products of f16 matrices with a dense weight.
#include "linear/gemm_entries.cuh"

GEMM_ENTRIES(f16, dense, false)
