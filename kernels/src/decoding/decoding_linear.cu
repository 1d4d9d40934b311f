#include "decoding/linear_entries.cuh"
