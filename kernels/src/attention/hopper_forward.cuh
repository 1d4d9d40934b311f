// Attention forward on Hopper: as forward.cuh, for heads of D elements, a multiple of 64, and sequences that attend to their
// own tokens alone, in 16 bits.
//
// Method: Shah et al., "FlashAttention-3" (arXiv 2407.08608). As many blocks as SMs go through tiles of 128 query rows of
// one head, longest first. A thread of the first warpgroup has the TMA bring Q, and tiles of 128 keys and values into two
// stages each; the two other warpgroups have 64 rows each. Scores come from S = Q·Kᵀ with both operands in shared memory,
// become P in registers, and are the left operand of P·V. Products do not make a warpgroup wait: S of the next keys and P·V
// of the last are under way while it takes exponentials. (To let the two warpgroups take turns with the tensor cores, as
// the paper does, was 0 to 8 % slower.)
// Keys are visited from the last to the first, so that only the first tile of the visit has keys to hide.
// Bound by the tensor cores; then by exponentials.
#pragma once
#include "attention/hopper.cuh"
#include "fast.cuh"

constexpr int TILE = 128;       // query rows of a block; keys of a stage
constexpr int STAGES = 2;
constexpr int THREADS = 3 * 128;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr float LN_2 = 0.69314718055994531f;
// A row's reference for exponentials may be exceeded by 2^8 before it is made anew: far from overflow in f16 (2^16).
constexpr float SLACK = 8.0f;

extern __shared__ __align__(1024) u8 dynamic_shared[];

// Item number `round` of this block: the list is dealt to and fro, as it falls in length.
__device__ __forceinline__ u32 deal(u32 round) {
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// tiles: {first query row, query rows (up to 128), first key row of the sequence, keys that the first query sees}. Heads vary
// fastest over items, so that those of a group share K and V in the cache.
template <typename T, int D>
__device__ __forceinline__ void forward(const TensorMap* q, const TensorMap* k, const TensorMap* v, T* o, float* lse,
                                        const int4* tiles, u32 items, u32 heads, u32 group, u32 total,
                                        float scale_log2) {
    constexpr u32 BYTES = TILE * D * 2;
    const u32 q_tile = shared_address(dynamic_shared), k_tiles = q_tile + BYTES, v_tiles = k_tiles + STAGES * BYTES;
    const u32 o_tile = v_tiles + STAGES * BYTES, q_full = o_tile + BYTES, q_empty = q_full + 8;
    const u32 k_full = q_empty + 8, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES;
    const u32 v_empty = v_full + 8 * STAGES;
    const int warpgroup = uniform(threadIdx.x / 128), lane = threadIdx.x % WARP;
    constexpr int WARPS = 8; // that multiply

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        barrier_init(q_empty, WARPS);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(k_full + 8 * s, 1);
            barrier_init(k_empty + 8 * s, WARPS);
            barrier_init(v_full + 8 * s, 1);
            barrier_init(v_empty + 8 * s, WARPS);
        }
        barriers_ready();
    }
    __syncthreads();

    u32 stage = 0, phase = 0, q_phase = 0;
    auto advance = [&] {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    };
    auto load = [&](u32 to, const TensorMap* map, int column, int row, u32 barrier) {
        barrier_expect(barrier, BYTES);
#pragma unroll
        for (int box = 0; box < D / 64; box++) copy_box(to + box * TILE * BOX_ROW, map, column + box * 64, row, barrier);
    };

    if (warpgroup == 0) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x != 0) return;
        prefetch_map(q);
        prefetch_map(k);
        prefetch_map(v);
        for (u32 round = 0, item; (item = deal(round)) < items || round * gridDim.x < items; round++) {
            if (item >= items) continue;
            const int4 tile = tiles[item / heads];
            const int head = item % heads, column = head / group * D;
            barrier_wait(q_empty, q_phase ^ 1);
            load(q_tile, q, head * D, tile.x, q_full);
            q_phase ^= 1;
            for (int block = (tile.w + tile.y - 2) / TILE; block >= 0; block--) {
                barrier_wait(k_empty + 8 * stage, phase ^ 1);
                load(k_tiles + stage * BYTES, k, column, tile.z + block * TILE, k_full + 8 * stage);
                barrier_wait(v_empty + 8 * stage, phase ^ 1);
                load(v_tiles + stage * BYTES, v, column, tile.z + block * TILE, v_full + 8 * stage);
                advance();
            }
        }
        return;
    }

    take_registers<CONSUMER_REGISTERS>();
    const int consumer = warpgroup - 1, warp = threadIdx.x / WARP % 4;
    const int row0 = consumer * 64 + warp * 16; // of this warp
    const ByRows<TILE> own_q(q_tile + consumer * 64 * BOX_ROW), keys(k_tiles);
    const ByColumns<TILE> values(v_tiles);
    float s[TILE / 2], acc[D / 2];
    u32 p[TILE / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) acc[i] = 0.0f;

    auto make_scores = [&](u32 at) {
        products_begin();
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            multiply_shared<T, false, false>(s, own_q.part(step), keys.part(step, at * BYTES), step);
        }
        products_commit();
    };
    auto add_values = [&](u32 at, bool keep) {
        products_begin();
#pragma unroll
        for (int step = 0; step < TILE / 16; step++) {
            multiply_held<T, true>(acc, p[step], values.part(step, at * BYTES), step > 0 || keep);
        }
        products_commit();
    };
    auto done_with = [&](u32 barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };

    for (u32 round = 0, item; (item = deal(round)) < items || round * gridDim.x < items; round++) {
        if (item >= items) continue;
        const int4 tile = tiles[item / heads];
        const u32 head = item % heads;
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, factor[2];
        int block = (tile.w + tile.y - 2) / TILE;
        bool keep = false;

        // Scores to exponentials of them; whether sums made before are to be multiplied by `factor`.
        auto exponentials = [&] {
            float high[2];
            bool grown = false;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x = fmaxf(s[2 * half], s[2 * half + 1]);
#pragma unroll
                for (int n = 1; n < TILE / 8; n++) x = fmaxf(x, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
                high[half] = x * scale_log2;
                grown |= high[half] > top[half] + SLACK;
            }
            grown = __any_sync(~0u, grown);
            if (grown) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float x = fmaxf(high[half], top[half]);
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                    factor[half] = exp2_fast(top[half] - x);
                    top[half] = x;
                    sum[half] *= factor[half];
                }
            }
#pragma unroll
            for (int i = 0; i < TILE / 2; i++) {
                s[i] = exp2_fast(fmaf(s[i], scale_log2, -top[i / 2 % 2]));
                sum[i / 2 % 2] += s[i];
            }
            return grown;
        };

        barrier_wait(q_full, q_phase);
        q_phase ^= 1;
        barrier_wait(k_full + 8 * stage, phase);
        make_scores(stage);
        products_wait<0>();
        pin(s);
        done_with(k_empty + 8 * stage);
        if (block == 0) done_with(q_empty);
        {
            // Key 8n + 2(lane % 4) + c % 2 of the tile, row row0 + lane / 4 + 8(c / 2). A row sees one key more than the one
            // before it, the first `tile.w` of all.
            const int visible = tile.w - block * TILE + row0 + lane / 4 - lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < TILE / 2; i++) {
                if (i / 4 * 8 + i % 2 >= visible + i / 2 % 2 * 8) s[i] = -INFINITY;
            }
        }
        exponentials();
        to_operands<T>(p, s);
        while (block-- > 0) {
            const u32 v_stage = stage, v_phase = phase;
            advance();
            barrier_wait(k_full + 8 * stage, phase);
            make_scores(stage);
            barrier_wait(v_full + 8 * v_stage, v_phase);
            add_values(v_stage, keep);
            keep = true;
            products_wait<1>();
            pin(s);
            done_with(k_empty + 8 * stage);
            if (block == 0) done_with(q_empty);
            const bool grown = exponentials();
            products_wait<0>();
            pin(acc);
            done_with(v_empty + 8 * v_stage);
            if (grown) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) acc[i] *= factor[i / 2 % 2];
            }
            to_operands<T>(p, s);
        }
        barrier_wait(v_full + 8 * stage, phase);
        add_values(stage, keep);
        products_wait<0>();
        pin(acc);
        done_with(v_empty + 8 * stage);
        advance();

#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = sum[half];
            x += __shfl_xor_sync(~0u, x, 1);
            x += __shfl_xor_sync(~0u, x, 2);
            sum[half] = 1.0f / x;
            const int row = row0 + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < tile.y) lse[(u64)head * total + tile.x + row] = top[half] * LN_2 + logf(x);
        }
        T* to = o + ((u64)(tile.x + row0) * heads + head) * D;
        write_rows<T, D>(acc, sum[0], sum[1], o_tile + row0 * D * 2, to, heads * D, tile.y - row0);
    }
}

#define FORWARD_ENTRY(T, D)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_forward_##T(                             \
        const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
        T* o, float* lse, const int4* tiles, u32 items, u32 heads, u32 group, u32 total, float scale_log2) {           \
        wait_before();                                                                                                 \
        forward<T, D>(&q, &k, &v, o, lse, tiles, items, heads, group, total, scale_log2);                              \
    }
