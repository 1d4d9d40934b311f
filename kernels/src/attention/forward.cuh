// Attention forward in 16 bits: O = softmax(scale · Q·Kᵀ)·V, causal, packed sequences, grouped queries; and the log-sum-exp.
//
// Method: Dao, "FlashAttention-2" (arXiv 2307.08691): a block holds 128 query rows of one head and walks over tiles of 64
// keys with an online softmax. Each of 4 warps has 32 rows, so that a fragment of K or V serves two products; that keeps
// shared memory below its bandwidth. K and V tiles are double-buffered by cp.async, one barrier a tile. Scores and the
// output stay in registers; the scores are exponentiated in place and become the left operand of P·V.
// A row's reference for exp is its running maximum, or up to 2^SLACK below it: most tiles then need no rescaling.
// Bound by the tensor cores; then by shared-memory reads.
//
// Heads of d <= D elements are padded with zeros in shared memory (d a multiple of 8).
#pragma once
#include "attention/tile.cuh"

// Rows may grow by 2^8 beyond their reference: far from overflow in f16 (2^16), and precise all the same.
constexpr float SLACK = 8.0f;

// tiles: {first query row, query rows (up to 128), first key row of the sequence, keys that the first query sees}.
// One block a tile and head; heads vary fastest, so that those of a group share K and V in the cache.
template <typename T, int D>
__device__ __forceinline__ void forward(
    const T* q, const T* k, const T* v, T* o, float* lse, const int4* tiles, u32 heads, u32 group, u32 d, u32 total,
    float scale_log2) {
    using R = Rows<D>;
    constexpr u32 STAGE = 2 * KEYS * R::BYTES;
    const u32 q_tile = shared_address(dynamic_shared), stages = q_tile + QUERIES * R::BYTES;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int4 tile = tiles[blockIdx.x / heads];
    const u32 kv_width = heads / group * d;
    u64 from = (u64)tile.z * kv_width + blockIdx.x % heads / group * d;

    const int row0 = warp * 32;
    // Keys from the current tile on: all, and those that some row of this warp sees.
    int left = tile.w + tile.y - 1, seen = row0 < tile.y ? tile.w + min(row0 + 31, tile.y - 1) : 0;
    u32 stage = 0;

    auto load_keys = [&](u32 to, int valid) {
        R::template load<KEYS, THREADS>(stages + to, k + from, kv_width, valid, d);
        R::template load<KEYS, THREADS>(stages + to + STAGE / 2, v + from, kv_width, valid, d);
        from += KEYS * kv_width;
    };
    auto first_element = [&] { return ((u64)tile.x * heads + blockIdx.x % heads) * d; };
    R::template load<QUERIES, THREADS>(q_tile, q + first_element(), heads * d, tile.y, d);
    load_keys(0, left);
    commit_copies();

    const u32 q_lane = q_tile + row0 * R::BYTES + R::lane_a(lane);
    const u32 k_lane = stages + R::lane_b(lane), v_lane = stages + STAGE / 2 + R::lane_a(lane);
    float acc[2][D / 8][4], top[2][2], sum[2][2];
    clear(acc);
#pragma unroll
    for (int m = 0; m < 2; m++) {
        top[m][0] = top[m][1] = -INFINITY;
        sum[m][0] = sum[m][1] = 0.0f;
    }

    for (; left > 0; left -= KEYS, seen -= KEYS, stage = STAGE - stage) {
        wait_copies(0);
        __syncthreads();
        if (left > KEYS) load_keys(STAGE - stage, left - KEYS);
        commit_copies();
        if (seen <= 0) continue;

        float s[2][KEYS / 8][4];
        product<T, D>(s, q_lane, k_lane + stage);
        if (seen - 31 < KEYS) {
            // Key 8n + 2(lane % 4) + c % 2 of the tile, row 16m + lane / 4 + 8(c / 2) of the warp. A row sees one key more
            // than the one before, and the tile's last row sees all.
            int rows = __ldcv(&tiles[blockIdx.x / heads].y) - 1 - row0;
            int visible = left - rows + (int)(lane / 4) - (int)(lane % 4 * 2);
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        if (n * 8 + c % 2 >= visible + m * 16 + c / 2 * 8) s[m][n][c] = -INFINITY;
                    }
                }
            }
        }

        float high[2][2];
        bool grown = false;
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
                for (int n = 1; n < KEYS / 8; n++) x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                high[m][half] = x * scale_log2;
                grown |= high[m][half] > top[m][half] + SLACK;
            }
        }
        // The first tile always comes here: every row sees its first key.
        if (__any_sync(~0u, grown)) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float x = fmaxf(high[m][half], top[m][half]);
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                    float factor = exp2_fast(top[m][half] - x);
                    top[m][half] = x;
                    sum[m][half] *= factor;
#pragma unroll
                    for (int n = 0; n < D / 8; n++) {
                        acc[m][n][2 * half] *= factor;
                        acc[m][n][2 * half + 1] *= factor;
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    s[m][n][c] = exp2_fast(fmaf(s[m][n][c], scale_log2, -top[m][c / 2]));
                    sum[m][c / 2] += s[m][n][c];
                }
            }
        }
        u32 p[2][KEYS / 16][4];
        to_fragments<T>(p, s);
        accumulate<T, D>(acc, p, v_lane + stage);
    }

    // Read again rather than kept: the loop above needs every register.
    tile = __ldcv(&tiles[blockIdx.x / heads]);
    if (row0 >= tile.y) return;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = sum[m][half];
            x += __shfl_xor_sync(~0u, x, 1);
            x += __shfl_xor_sync(~0u, x, 2);
            sum[m][half] = 1.0f / x;
            int row = row0 + m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < tile.y) {
                lse[(u64)(blockIdx.x % heads) * total + tile.x + row] = top[m][half] * LN_2 + logf(x);
            }
        }
    }
    u32 width = heads * d;
    T* to = o + first_element() + row0 * width;
    R::template store<T, 2>(acc, sum, q_tile + row0 * R::BYTES, to, width, tile.y - row0, d);
}
