// Work over many tensors in one launch: a table of them, cut into pieces of one size that blocks take in turn.
#pragma once
#include "common.cuh"

// The tensor that piece `piece` belongs to: the last whose first piece is not behind it. `first[i]` must ascend.
template <typename Entry> __device__ __forceinline__ const Entry& tensor_of_piece(const Entry* table, u32 count, u32 piece) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (table[middle].first_piece <= piece) low = middle;
        else high = middle;
    }
    return table[low];
}
