// Attention in 16 bits for heads of up to 64 elements. A module of its own, as drivers compile a module whole when it is first
// used.
#define DIM 64
#include "attention/entries.cuh"
