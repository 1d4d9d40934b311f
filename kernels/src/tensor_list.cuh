// Work over many tensors in one launch: a table of them, cut into pieces of one size that blocks take in turn.
#pragma once
#include "common.cuh"

// The tensor that piece `piece` belongs to: the last whose first piece is not behind it. First pieces must ascend. Whole
// warps ask for one piece: each lane looks at another entry, so that a thousand tensors take two turns.
template <typename Entry> __device__ __forceinline__ const Entry& tensor_of_piece(const Entry* table, u32 count, u32 piece) {
    u32 low = 0, span = count;
    while (span > 1) {
        u32 step = (span + WARP - 1) / WARP, at = threadIdx.x % WARP * step;
        u32 begun = __popc(__ballot_sync(~0u, at < span && table[low + at].first_piece <= piece));
        u32 skipped = (begun - 1) * step; // the first entry has begun
        low += skipped;
        span = min(step, span - skipped);
    }
    return table[low];
}
