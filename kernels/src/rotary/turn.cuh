// Rotary's gradient where attention's gradients are still sums: pairs of columns half a head apart turn back by their token's
// angle (see rotary.cu).
#pragma once
#include "common.cuh"

// The angles of tokens. `positions`, null where nothing turns: of each token, a row of cos and sin f32 [length, half].
struct Turn {
    const int* positions;
    const float *cos, *sin;
    u32 length;
};

// Cosines and sines of two neighbouring columns of a row.
struct Angles {
    float2 cos, sin;

    // Of columns `column` and the next, in the first half of a head with `half` of them.
    __device__ __forceinline__ Angles(const Turn& turn, u32 token, u32 column, u32 half)
        : cos(make_float2(1.0f, 1.0f)), sin(make_float2(0.0f, 0.0f)) {
        if (!turn.positions) return;
        // The host has checked positions that it made; a wrong one must not read outside of the table all the same.
        const u32 position = min((u32)max(turn.positions[token], 0), turn.length - 1);
        cos = *reinterpret_cast<const float2*>(turn.cos + (u64)position * half + column);
        sin = *reinterpret_cast<const float2*>(turn.sin + (u64)position * half + column);
    }
    Angles() = default;

    // Two columns of the first half of a head, and those of the second.
    __device__ __forceinline__ void back(float& low0, float& low1, float& high0, float& high1) const {
        const float2 low = make_float2(low0, low1);
        low0 = low.x * cos.x + high0 * sin.x, low1 = low.y * cos.y + high1 * sin.y;
        high0 = high0 * cos.x - low.x * sin.x, high1 = high1 * cos.y - low.y * sin.y;
    }
};
