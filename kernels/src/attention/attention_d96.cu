// Attention in 16 bits for heads of 65 to 96 elements. A module of its own, as drivers compile a module whole when it is first
// used.
#define DIM 96
#include "attention/entries.cuh"
