// Products over 4-bit weights on Hopper with operands of bf16: codes_entries.cuh.
#define TYPE bf16
#include "linear/codes_entries.cuh"
