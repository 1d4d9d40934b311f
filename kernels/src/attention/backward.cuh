// Attention backward in 16 bits, without atomics: two kernels that both make P again from the log-sum-exp.
//
// Method: Dao, "FlashAttention-2" (arXiv 2307.08691), section 3.1.2, but split in two so that every sum has one owner:
//   keys:     a block owns 64 keys of one key/value head and walks over the query rows that see them, for all query heads
//             of the group: dV = Pᵀ·dO, dK = scale · dSᵀ·Q. Everything is transposed (rows are keys), so that Pᵀ and dSᵀ
//             come out of the tensor cores in the layout that they go back in.
//             dK and dV of 32 keys do not fit one warp's registers, so that warps work in pairs on the same 32 keys: one
//             holds K, makes P and sums dV; the other holds V, makes dS from dP and its partner's P, and sums dK.
//   queries:  a block owns 128 query rows of one head and walks over tiles of keys: dQ = scale · dS·K. As the forward.
// That is 7 products of a tile where one kernel with atomics does 5. Bound by the tensor cores.
//
// Heads of d <= D elements are padded with zeros in shared memory (d a multiple of 8).
#pragma once
#include "attention/tile.cuh"

// Rows of a tile on the walk: 32 where the registers are full of accumulators.
template <int D> constexpr int WALK_ROWS = D > 64 ? 32 : 64;

// tiles: {first key row, rows from there to the end of the sequence}, 128 keys each. A block takes one of two halves of a
// tile, and one key/value head, which varies fastest. Query rows are those of the keys.
template <typename T, int D>
__device__ __forceinline__ void keys_backward(
    const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* dk, T* dv,
    const int4* tiles, u32 heads, u32 group, u32 d, u32 total, float scale, float scale_log2) {
    using R = Rows<D>;
    constexpr int WALK = WALK_ROWS<D>, N = WALK / 8;
    // Stage: Q [WALK, D], dO [WALK, D]. K, then V, pass through a stage each on their way to registers.
    constexpr u32 STAGE = 2 * WALK * R::BYTES, NUMBERS = 2 * WALK * 4, EXCHANGE = WALK * 32 * 2;
    static_assert(KEYS * R::BYTES <= STAGE, "K and V fit the stages");
    const u32 stages = shared_address(dynamic_shared), numbers = stages + 2 * STAGE;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own_pair = warp % 2;
    // Which of a pair this is alternates, as a processor's four schedulers each serve one warp of a block.
    const bool sums_dv = (warp / 2 + blockIdx.x / 2) % 2 == 0;
    const u32 exchange = numbers + 2 * NUMBERS + own_pair * EXCHANGE + lane * 16;

    const u32 kv_heads = heads / group, width = heads * d, kv_width = kv_heads * d;
    const u32 kv = blockIdx.x % kv_heads, half = blockIdx.x / kv_heads % 2;
    int4 tile = tiles[blockIdx.x / kv_heads / 2];
    const int row0 = tile.x + half * KEYS, rows = tile.y - (int)half * KEYS, keys = min(rows, KEYS);
    if (keys <= 0) return;
    const u64 first_key = (u64)row0 * kv_width + kv * d;

    R::template load<KEYS, THREADS>(stages, k + first_key, kv_width, keys, d);
    R::template load<KEYS, THREADS>(stages + STAGE, v + first_key, kv_width, keys, d);
    commit_copies();
    wait_copies(0);
    __syncthreads();
    u32 fixed[2][D / 16][4]; // K or V
    load_fragments<D>(fixed, stages + (sums_dv ? 0 : STAGE) + own_pair * 32 * R::BYTES + R::lane_a(lane));
    __syncthreads();

    const int count = (rows + WALK - 1) / WALK;
    // The walk: tiles of rows, for each head of the group. `next` is what to load.
    int next = 0;
    u32 next_head = kv * group, next_stage = 0;
    auto load_rows = [&] {
        u32 to = stages + next_stage * STAGE;
        int first = next * WALK;
        u64 from = (u64)(row0 + first) * width + next_head * d;
        R::template load<WALK, THREADS>(to, q + from, width, rows - first, d);
        R::template load<WALK, THREADS>(to + STAGE / 2, grad + from, width, rows - first, d);
        if (threadIdx.x < 2 * WALK) {
            int row = first + threadIdx.x % WALK;
            const float* number = (threadIdx.x < WALK ? lse : delta) + (u64)next_head * total + row0 + row;
            copy_async4(numbers + next_stage * NUMBERS + threadIdx.x * 4, number, row < rows);
        }
        next_stage ^= 1;
        if (++next == count) {
            next = 0;
            next_head++;
        }
    };
    load_rows();
    commit_copies();

    const u32 b_lane = stages + (sums_dv ? 0 : STAGE / 2) + R::lane_b(lane);
    const u32 a_lane = stages + (sums_dv ? STAGE / 2 : 0) + R::lane_a(lane);
    const u32 number_lane = numbers + (sums_dv ? 0 : WALK * 4) + lane % 4 * 8;
    float acc[2][D / 8][4];
    clear(acc);
    int first = 0; // row of the tile, counted from row0
    // Every warp meets two barriers a tile: before it, and between P's making and its use. The second could be the
    // pair's alone; the block's is one that race checkers follow.
    for (int left = count * (int)group; left > 0; left--) {
        wait_copies(0);
        __syncthreads();
        const u32 stage = next_stage ^ 1;
        if (left > 1) load_rows();
        commit_copies();
        const int first_now = first;
        first = first + WALK < count * WALK ? first + WALK : 0;
        const int first_pair_key = own_pair * 32;
        if (first_now + WALK <= first_pair_key) { // all of its rows come before these keys
            __syncthreads();                      // the other pair's barrier below
            continue;
        }

        float s[2][N][4];
        product<T, D>(s, fixed, b_lane + stage * STAGE);
        u32 p[2][N / 2][4];
        if (sums_dv) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 x = load_shared_float2(number_lane + stage * NUMBERS + n * 32);
                x.x *= LOG2_E;
                x.y *= LOG2_E;
#pragma unroll
                for (int m = 0; m < 2; m++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        s[m][n][c] = exp2_fast(fmaf(s[m][n][c], scale_log2, -(c % 2 ? x.y : x.x)));
                    }
                }
            }
            if (first_now < first_pair_key + 31) {
                // Key 16m + lane / 4 + 8(c / 2) of the pair, row 8n + 2(lane % 4) + c % 2 of the tile.
                int ahead = first_pair_key + (int)(lane / 4) - first_now - (int)(lane % 4 * 2);
#pragma unroll
                for (int m = 0; m < 2; m++) {
#pragma unroll
                    for (int n = 0; n < N; n++) {
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            if (n * 8 + c % 2 < ahead + m * 16 + c / 2 * 8) s[m][n][c] = 0.0f;
                        }
                    }
                }
            }
            to_fragments<T>(p, s);
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int i = 0; i < N / 2; i++) {
                    uint4 x = make_uint4(p[m][i][0], p[m][i][1], p[m][i][2], p[m][i][3]);
                    store_shared(exchange + (m * (N / 2) + i) * WARP * 16, x);
                }
            }
            __syncthreads();
        } else {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                float2 x[2];
                x[0] = load_shared_float2(number_lane + stage * NUMBERS + (2 * i) * 32);
                x[1] = load_shared_float2(number_lane + stage * NUMBERS + (2 * i + 1) * 32);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    uint4 all = load_shared_uint4(exchange + (m * (N / 2) + i) * WARP * 16);
                    u32 pairs[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
                    for (int c = 0; c < 4; c++) { // elements 2(c % 2) and the next of accumulator 2i + c / 2
                        float2 probability = both<T>(pairs[c]);
                        const float* dp = &s[m][2 * i + c / 2][c % 2 * 2];
                        float low = probability.x * (dp[0] - x[c / 2].x), high = probability.y * (dp[1] - x[c / 2].y);
                        p[m][i][c] = pair<T>(low, high);
                    }
                }
            }
        }
        accumulate<T, D>(acc, p, a_lane + stage * STAGE);
    }

    __syncthreads();
    float factor = sums_dv ? 1.0f : scale;
    float factors[2][2] = {{factor, factor}, {factor, factor}};
    u32 own = stages + warp * 32 * R::BYTES;
    T* to = (sums_dv ? dv : dk) + first_key + (u64)(own_pair * 32) * kv_width;
    R::template store<T, 2>(acc, factors, own, to, kv_width, keys - (int)own_pair * 32, d);
}

// tiles as in the forward kernel. One block a tile and head; heads vary fastest.
template <typename T, int D>
__device__ __forceinline__ void queries_backward(
    const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* dq, const int4* tiles,
    u32 heads, u32 group, u32 d, u32 total, float scale, float scale_log2) {
    using R = Rows<D>;
    constexpr int WALK = WALK_ROWS<D>, N = WALK / 8;
    constexpr u32 STAGE = 2 * WALK * R::BYTES;
    const u32 q_tile = shared_address(dynamic_shared), grad_tile = q_tile + QUERIES * R::BYTES;
    const u32 stages = grad_tile + QUERIES * R::BYTES;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 kv_width = heads / group * d;
    int4 tile = tiles[blockIdx.x / heads];
    u64 from = (u64)tile.z * kv_width + blockIdx.x % heads / group * d;

    const int row0 = warp * 32;
    // Keys from the current tile on: all, and those that some row of this warp sees.
    int left = tile.w + tile.y - 1, seen = row0 < tile.y ? tile.w + min(row0 + 31, tile.y - 1) : 0;
    u32 stage = 0;

    auto load_keys = [&](u32 to, int valid) {
        R::template load<WALK, THREADS>(stages + to, k + from, kv_width, valid, d);
        R::template load<WALK, THREADS>(stages + to + STAGE / 2, v + from, kv_width, valid, d);
        from += WALK * kv_width;
    };
    auto first_element = [&] { return ((u64)tile.x * heads + blockIdx.x % heads) * d; };
    R::template load<QUERIES, THREADS>(q_tile, q + first_element(), heads * d, tile.y, d);
    R::template load<QUERIES, THREADS>(grad_tile, grad + first_element(), heads * d, tile.y, d);
    load_keys(0, left);
    commit_copies();

    const u32 q_lane = q_tile + row0 * R::BYTES + R::lane_a(lane), grad_lane = q_lane + QUERIES * R::BYTES;
    const u32 k_lane = stages + R::lane_b(lane), v_lane = k_lane + STAGE / 2, sum_lane = stages + R::lane_a(lane);
    float acc[2][D / 8][4], log_sum[2][2], offset[2][2];
    clear(acc);
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = row0 + m * 16 + half * 8 + lane / 4;
            u64 at = (u64)(blockIdx.x % heads) * total + tile.x + row;
            // Rows beyond the tile are zeros and take no part.
            log_sum[m][half] = row < tile.y ? lse[at] * LOG2_E : 0.0f;
            offset[m][half] = row < tile.y ? delta[at] : 0.0f;
        }
    }

    for (; left > 0; left -= WALK, seen -= WALK, stage = STAGE - stage) {
        wait_copies(0);
        __syncthreads();
        if (left > WALK) load_keys(STAGE - stage, left - WALK);
        commit_copies();
        if (seen <= 0) continue;

        float s[2][N][4], ds[2][N][4];
        product<T, D>(s, q_lane, k_lane + stage);
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    s[m][n][c] = exp2_fast(fmaf(s[m][n][c], scale_log2, -log_sum[m][c / 2]));
                }
            }
        }
        if (seen - 31 < WALK) {
            int rows = __ldcv(&tiles[blockIdx.x / heads].y) - 1 - row0;
            int visible = left - rows + (int)(lane / 4) - (int)(lane % 4 * 2);
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        if (n * 8 + c % 2 >= visible + m * 16 + c / 2 * 8) s[m][n][c] = 0.0f;
                    }
                }
            }
        }
        product<T, D>(ds, grad_lane, v_lane + stage);
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++) ds[m][n][c] = s[m][n][c] * (ds[m][n][c] - offset[m][c / 2]);
            }
        }
        u32 p[2][N / 2][4];
        to_fragments<T>(p, ds);
        accumulate<T, D>(acc, p, sum_lane + stage);
    }

    // Read again rather than kept: the loop above needs every register.
    tile = __ldcv(&tiles[blockIdx.x / heads]);
    if (row0 >= tile.y) return;
    float factors[2][2] = {{scale, scale}, {scale, scale}};
    u32 width = heads * d;
    T* to = dq + first_element() + row0 * width;
    R::template store<T, 2>(acc, factors, q_tile + row0 * R::BYTES, to, width, tile.y - row0, d);
}
