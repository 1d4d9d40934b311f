// A kernel that starts while the one before it in the stream still runs (programmatic dependent launch, Hopper): what it
// reads before `wait_before` was there before that one started, and what that one writes is there after. Where the launch did
// not ask for it, and on other chips, both do nothing.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 900
#define DEPENDENT(INSTRUCTION) asm volatile(INSTRUCTION ::: "memory")
#else
#define DEPENDENT(INSTRUCTION)
#endif
__device__ __forceinline__ void wait_before() { DEPENDENT("griddepcontrol.wait;"); }
// The next kernel may start once all blocks have come here.
__device__ __forceinline__ void let_next() { DEPENDENT("griddepcontrol.launch_dependents;"); }
