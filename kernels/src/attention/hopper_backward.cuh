// Attention backward on Hopper, for heads of 128 elements: dQ, dK and dV in one kernel, five products a tile, without
// atomics whose order is open.
//
// Method: Shah et al., "FlashAttention-3" (arXiv 2407.08608), section 3 and appendix. A block owns 128 keys of one key/value
// head and walks over tiles of 64 query rows that see them, from the last to the first, for all query heads of the group.
// Everything but dQ is transposed (rows are keys): S = K·Qᵀ, dP = V·dOᵀ; P and dS are left operands from registers of
// dV += P·dO and dK += dS·Q. dS also goes through shared memory, for dQ = dSᵀ·K. Two warpgroups have 64 keys each, and
// half of dQ's columns.
//
// dQ is a sum over blocks. Each adds its part to f32 sums in global memory, blocks of earlier keys first: a counter for each
// part says how many have. As rows are visited downward, the blocks of a sequence follow one another at a distance of about
// a tile and hardly wait. Blocks take their work from a ticket, so that whom one waits for has begun.
//
// | warps | what they do |
// |---|---|
// | 0 | has the TMA bring K and V once, Q and dO into two stages |
// | 1, 2 | wait for their turn and have the TMA add a part of dQ, every other one each: a part takes longer than a tile |
// | 3 | brings the log-sum-exps and deltas of a stage's rows |
// | 4–7, 8–11 | multiply |
// Bound by the tensor cores, and by exponentials between products.
#pragma once
#include "attention/hopper_parts.cuh"

namespace backward {

// What a block works on. `blocks`: {first key row, rows from there to the end of the sequence, number of these 128 rows among
// all, number of them within the sequence}; longest first.
struct Work {
    int first, rows, number, turn;
    u32 kv;
    // Tiles of rows.
    __device__ __forceinline__ int tiles() const { return (rows + ROWS - 1) / ROWS; }
};

// The walk: tiles from the last to the first, each for the heads of the group in turn. (Heads outside would have every
// block wait for the longest, a head's end later than its own.) Calls f(head, tile, buffer, phase); buffers alternate.
template <typename F> __device__ __forceinline__ void walk(const Work& work, u32 group, F f) {
    u32 count = 0;
    for (int tile = work.tiles() - 1; tile >= 0; tile--) {
        for (u32 head = 0; head < group; head++, count++) f(work.kv * group + head, tile, count % 2, count / 2 % 2);
    }
}

// The steps of a tile are spread over two rounds, so that the tensor cores have products in their queue whatever else is
// done: S and the last tile's dQ, beside which exponentials are taken; dP and dV, beside which that dQ is handed over and dS
// is made; dK.
template <typename T>
__device__ __forceinline__ void multiply(u32 shared, const Work& work, u32 group, u32 heads, T* dk, T* dv, float scale,
                                         float scale_log2, const Turn& turn) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, side = uniform(threadIdx.x / 128 - 1);
    const ByRows<KEYS> own_k(shared + K_TILE + side * 64 * BOX_ROW), own_v(shared + V_TILE + side * 64 * BOX_ROW);
    const ByRows<ROWS> q_rows(shared + Q_TILES), grad_rows(shared + GRAD_TILES);
    const ByColumns<ROWS> q_columns(shared + Q_TILES), grad_columns(shared + GRAD_TILES);
    const ByColumns<KEYS> made(shared + DS_TILES), k_columns(shared + K_TILE + side * KEYS * BOX_ROW);
    float dk_sum[D / 2], dv_sum[D / 2], s[ROWS / 2], dp[ROWS / 2], dq[ROWS / 2];
    u32 p[ROWS / 16][4], ds[ROWS / 16][4];
    auto done_with = [&](u32 barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    auto make_dq = [&](u32 buffer) {
        products_begin();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            multiply_shared<T, true, true>(dq, made.part(step, buffer * DS_BYTES), k_columns.part(step), step);
        }
        products_commit();
    };
    // In two parts, so that registers are free for dP after the first.
    auto hand_over_dq = [&](u32 buffer, u32 phase, bool second) {
        if (!second) barrier_wait(shared + DQ_EMPTY + 8 * buffer, phase ^ 1);
        float4* part = reinterpret_cast<float4*>(dynamic_shared + DQ_PARTS + buffer * DQ_BYTES + side * (DQ_BYTES / 2));
        part += threadIdx.x % 128;
#pragma unroll
        for (int j = 0; j < ROWS / 16; j++) {
            const int i = j + (second ? ROWS / 16 : 0);
            part[i * 128] = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
        }
        if (!second) return;
        publish_shared();
        __syncwarp();
        done_with(shared + DQ_FULL + 8 * buffer);
    };
    // Where a lane stores dS: key 16·warp + lane % 16 of the warpgroup's.
    const u32 ds_key = side * 64 + warp * 16 + lane % 16, ds_at = shared + DS_TILES + ds_key * BOX_ROW;

    // Compilers before CUDA 13 let products whose sums begin undefined run one by one.
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk_sum[i] = dv_sum[i] = 0.0f;
    pin(dk_sum);
    pin(dv_sum);

    barrier_wait(shared + KEYS_FULL, 0);
    u32 count = 0;
    for (int tile = work.tiles() - 1; tile >= 0; tile--) {
#pragma unroll 1
        for (u32 head = 0; head < group; head++, count++) {
            const u32 buffer = count % 2, phase = count / 2 % 2, last = buffer ^ 1, at = buffer * ROW_BYTES;
            barrier_wait(shared + Q_FULL + 8 * buffer, phase);
            products_begin();
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                multiply_shared<T, false, false>(s, own_k.part(step), q_rows.part(step, at), step);
            }
            products_commit();
            // Both halves of the last dS are there. (The first time nobody has made one, and nobody reads this dQ.)
            meet<256>(1);
            make_dq(last);
            products_wait<1>();
            pin(s);
            if (count > 0) done_with(shared + Q_EMPTY + 8 * last);

            // Column 8n + 2(lane % 4) + c % 2 of the tile's rows; key 16·warp + lane / 4 + 8(c / 2).
            const float2* numbers =
                reinterpret_cast<const float2*>(dynamic_shared + NUMBER_TILES + buffer * NUMBERS) + lane % 4;
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
                const float2 x = numbers[n * 4];
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    s[4 * n + c] = exp2_fast(fmaf(s[4 * n + c], scale_log2, -(c % 2 ? x.y : x.x)));
                }
            }
            if (tile < KEYS / ROWS) {
                const int ahead = side * 64 + warp * 16 + lane / 4 - tile * ROWS - lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < ROWS / 2; i++) {
                    if (i / 4 * 8 + i % 2 < ahead + i / 2 % 2 * 8) s[i] = 0.0f;
                }
            }
            to_operands<T>(p, s);
            products_wait<0>();
            pin(dq);
            if (count > 0) hand_over_dq(last, (count - 1) / 2 % 2, false);
            barrier_wait(shared + GRAD_FULL + 8 * buffer, phase);
            products_begin();
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                multiply_shared<T, false, false>(dp, own_v.part(step), grad_rows.part(step, at), step);
            }
            products_commit();
#pragma unroll
            for (int step = 0; step < ROWS / 16; step++) {
                multiply_held<T, true>(dv_sum, p[step], grad_columns.part(step, at), step + count);
            }
            products_commit();
            if (count > 0) hand_over_dq(last, (count - 1) / 2 % 2, true);
            products_wait<1>();
            pin(dp);
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
                const float2 x = numbers[ROWS / 2 + n * 4];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // As many bits of P as dV was made from.
                    const float2 e = both<T>(p[n / 2][n % 2 * 2 + half]);
                    const float* from = dp + 4 * n + 2 * half;
                    ds[n / 2][n % 2 * 2 + half] = pair<T>(e.x * (from[0] - x.x), e.y * (from[1] - x.y));
                }
            }
#pragma unroll
            for (int i = 0; i < ROWS / 16; i++) {
                const u32 to = ds_at + buffer * DS_BYTES + ((2 * i + lane / 16) ^ ds_key % 8) * 16;
                store_matrices(to, ds[i][0], ds[i][1], ds[i][2], ds[i][3]);
            }
            publish_shared();
            products_wait<0>();
            pin(dv_sum);
            done_with(shared + GRAD_EMPTY + 8 * buffer);
            products_begin();
#pragma unroll
            for (int step = 0; step < ROWS / 16; step++) {
                multiply_held<T, true>(dk_sum, ds[step], q_columns.part(step, at), step + count);
            }
            products_commit();
        }
    }
    meet<256>(1);
    make_dq((count - 1) % 2);
    products_wait<0>();
    pin(dk_sum);
    pin(dv_sum);
    pin(dq);
    hand_over_dq((count - 1) % 2, (count - 1) / 2 % 2, false);
    hand_over_dq((count - 1) % 2, (count - 1) / 2 % 2, true);

    meet<256>(1);
    // K and V are read no more, and make room.
    const u32 kv_width = heads / group * D;
    const int row0 = side * 64 + warp * 16, valid = min(work.rows, KEYS) - row0;
    const u64 first = (u64)(work.first + row0) * kv_width + work.kv * D;
    write_rows<T, D>(dv_sum, 1.0f, 1.0f, shared + V_TILE + row0 * D * 2, dv + first, kv_width, valid);
    if (valid > 0) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int row = work.first + row0 + min((int)lane / 4 + 8 * j, valid - 1);
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                float *low = dk_sum + 4 * i + 2 * j, *high = low + D / 4;
                Angles(turn, row, 8 * i + lane % 4 * 2, D / 2).back(low[0], low[1], high[0], high[1]);
            }
        }
    }
    write_rows<T, D>(dk_sum, scale, scale, shared + K_TILE + row0 * D * 2, dk + first, kv_width, valid);
}

// dq_sums f32 [number of 64 rows, head, warpgroup, 8, 128, 4]: sums of dQ as the threads hold them. counters: the ticket, then
// u32 [number of 64 rows, head]; zeros before the launch.
template <typename T>
__device__ __forceinline__ void backward(const TensorMap* q, const TensorMap* k, const TensorMap* v, const TensorMap* grad,
                                         const float* lse, const float* delta, float* dq_sums, T* dk, T* dv, u32* counters,
                                         const int4* blocks, u32 heads, u32 group, u32 total, float scale,
                                         float scale_log2, const Turn& turn) {
    const u32 shared = shared_address(dynamic_shared), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32* mine = reinterpret_cast<u32*>(dynamic_shared + TICKET);
    if (threadIdx.x == 0) {
        *mine = atomicAdd(counters, 1);
        barrier_init(shared + KEYS_FULL, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared + Q_FULL + 8 * i, 2); // the TMA's, and the numbers'
            barrier_init(shared + GRAD_FULL + 8 * i, 1);
            barrier_init(shared + Q_EMPTY + 8 * i, 8);
            barrier_init(shared + GRAD_EMPTY + 8 * i, 8);
            barrier_init(shared + DQ_FULL + 8 * i, 8);
            barrier_init(shared + DQ_EMPTY + 8 * i, 1);
        }
        barriers_ready();
    }
    __syncthreads();
    const u32 kv_heads = heads / group, item = *mine;
    const int4 block = blocks[item / kv_heads];
    const Work work{block.x, block.y, block.z, block.w, item % kv_heads};

    if (threadIdx.x >= 128) {
        take_registers<CONSUMER_REGISTERS>();
        multiply<T>(shared, work, group, heads, dk, dv, scale, scale_log2, turn);
    } else {
        give_registers<PRODUCER_REGISTERS>();
        if (warp == 0 && lane == 0) {
            auto load = [&](u32 to, u32 rows, const TensorMap* map, int column, int row, u32 barrier) {
                for (int box = 0; box < D / 64; box++) {
                    copy_box(to + box * rows * BOX_ROW, map, column + box * 64, row, barrier);
                }
            };
            const u32 keys_full = shared + KEYS_FULL;
            barrier_expect(keys_full, 2 * KEY_BYTES);
            load(shared + K_TILE, KEYS, k, work.kv * D, work.first, keys_full);
            load(shared + V_TILE, KEYS, v, work.kv * D, work.first, keys_full);
            walk(work, group, [&](u32 head, int tile, u32 buffer, u32 phase) {
                const u32 q_full = shared + Q_FULL + 8 * buffer, grad_full = shared + GRAD_FULL + 8 * buffer;
                const int row = work.first + tile * ROWS;
                barrier_wait(shared + Q_EMPTY + 8 * buffer, phase ^ 1);
                barrier_expect(q_full, ROW_BYTES);
                load(shared + Q_TILES + buffer * ROW_BYTES, ROWS, q, head * D, row, q_full);
                barrier_wait(shared + GRAD_EMPTY + 8 * buffer, phase ^ 1);
                barrier_expect(grad_full, ROW_BYTES);
                load(shared + GRAD_TILES + buffer * ROW_BYTES, ROWS, grad, head * D, row, grad_full);
            });
        } else if ((warp == 1 || warp == 2) && lane == 0) {
            walk(work, group, [&](u32 head, int tile, u32 buffer, u32 phase) {
                if (buffer != warp - 1) return;
                const u64 part = (u64)(work.number * (KEYS / ROWS) + tile) * heads + head;
                barrier_wait(shared + DQ_FULL + 8 * buffer, phase);
                if (work.turn > 0) wait_for_turn(counters + 1 + part, work.turn);
                add_part(dq_sums + part * (DQ_BYTES / 4), shared + DQ_PARTS + buffer * DQ_BYTES, work.turn == 0);
                stores_read<0>();
                barrier_arrive(shared + DQ_EMPTY + 8 * buffer);
                part_added();
                end_turn(counters + 1 + part, work.turn);
            });
        } else if (warp == 3) {
            float* numbers = reinterpret_cast<float*>(dynamic_shared + NUMBER_TILES);
            walk(work, group, [&](u32 head, int tile, u32 buffer, u32 phase) {
                float log_sum[2], offset[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = tile * ROWS + i * WARP + lane;
                    const u64 at = (u64)head * total + work.first + row;
                    // Rows beyond the sequence take no part: exponentials of -infinity.
                    log_sum[i] = row < work.rows ? lse[at] * LOG2_E : INFINITY;
                    offset[i] = row < work.rows ? delta[at] : 0.0f;
                }
                barrier_wait(shared + Q_EMPTY + 8 * buffer, phase ^ 1);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    numbers[buffer * 2 * ROWS + i * WARP + lane] = log_sum[i];
                    numbers[buffer * 2 * ROWS + ROWS + i * WARP + lane] = offset[i];
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(shared + Q_FULL + 8 * buffer);
            });
        }
    }
}

} // namespace backward

#define TURN const int *positions, const float *cos, const float *sin, u32 length
#define BACKWARD_ENTRY(T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(backward::THREADS, 1) attention_hopper_backward_##T(                  \
        const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
        const __grid_constant__ TensorMap grad, const float* lse, const float* delta, float* dq_sums, T* dk, T* dv,    \
        u32* counters, const int4* blocks, u32 heads, u32 group, u32 total, float scale, float scale_log2, TURN) {     \
        wait_before();                                                                                                 \
        backward::backward<T>(&q, &k, &v, &grad, lse, delta, dq_sums, dk, dv, counters, blocks, heads, group, total,   \
                              scale, scale_log2, Turn{positions, cos, sin, length});                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) attention_hopper_finish_##T(                                     \
        const float* dq_sums, T* dq, const int4* tiles, u32 heads, float scale, TURN) {                                \
        wait_before();                                                                                                 \
        backward::finish<T>(dq_sums, dq, tiles, heads, scale, Turn{positions, cos, sin, length});                      \
    }
