// Products over 4-bit weights on Hopper with operands of f16: codes_entries.cuh.
#define TYPE f16
#include "linear/codes_entries.cuh"
