// SwiGLU of one element, and its gradients (formulas in mod.rs).
#pragma once
#include "fast.cuh"

// Of 16-bit types by the hardware's exponential and reciprocal (1e-5 relative at worst): exact division would make the
// instruction count rival the traffic. Of f32 by the accurate ones.
template <typename T> __device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(T) == 4) {
        return 1.0f / (1.0f + expf(-x));
    } else {
        return reciprocal_fast(1.0f + exp2_fast(-LOG2_E * x));
    }
}

template <typename T> __device__ __forceinline__ float gated(float gate, float up) {
    return gate * sigmoid<T>(gate) * up;
}

// Turns a gate and its up into their gradients, and the output's gradient into the output.
template <typename T> __device__ __forceinline__ void differentiate(float& gate, float& up, float& grad) {
    float sigma = sigmoid<T>(gate), silu = gate * sigma, output = silu * up, of_up = grad * silu;
    gate = grad * up * (sigma + silu - silu * sigma); // σ (1 + gate (1 - σ))
    up = of_up;
    grad = output;
}
