// Attention in 16 bits for heads of 97 to 128 elements. A module of its own, as drivers compile a module whole when it is first
// used.
#define DIM 128
#include "attention/entries.cuh"
