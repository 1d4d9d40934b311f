// SwiGLU of an element, and its gradients (formulas in mod.rs).
#pragma once
#include "common.cuh"

// The sigmoid of 16-bit types uses the hardware's exponential and reciprocal (1e-5 relative at worst): exact division would
// make the instruction count rival the traffic. f32 uses the accurate ones.
template <typename T> __device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(T) == 4) {
        return 1.0f / (1.0f + expf(-x));
    } else {
        // The fast division returns 0 for divisors from 2^126 on, which exp(87) is below.
        return __fdividef(1.0f, 1.0f + __expf(fminf(-x, 87.0f)));
    }
}

template <typename T> __device__ __forceinline__ float gated(float gate, float up) {
    return gate * sigmoid<T>(gate) * up;
}

// Turns a gate and its up into their gradients, and the output's gradient into the output.
template <typename T> __device__ __forceinline__ void differentiate(float& gate, float& up, float& grad) {
    float sigma = sigmoid<T>(gate), silu = gate * sigma, output = silu * up, of_up = grad * silu;
    gate = grad * up * sigma * (1.0f + gate * (1.0f - sigma));
    up = of_up;
    grad = output;
}
