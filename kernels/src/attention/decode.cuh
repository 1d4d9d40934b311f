// Attention forward in 16 bits of few queries against many keys, as in decoding. ("Flash-decoding", Dao et al. 2023.)
//
// The keys are cut into chunks, and each chunk makes a part of the output, normalized, with its log-sum-exp; `combine` sums
// the parts in the order of the keys. A row is a query and a head of the group, 16 rows a block, so that K and V are read
// once for the heads that share them. Each of 4 warps walks over its own 16 of every 64 keys.
// Bound by reading K and V.
#pragma once
#include "attention/tile.cuh"

// chunks: two each, {first query row, queries, first key row of the chunk, keys of the chunk},
// {keys that the first query sees, counted from the chunk's first; may be 0 or less; then unused}.
// Parts: o f32 [chunks, most queries, heads, d], log2 of the sum of exponentials f32 [chunks, most queries, heads].
constexpr int DECODE_ROWS = 16, PARTS = THREADS / WARP;
template <typename T, int D>
__device__ __forceinline__ void decode_chunk(
    const T* q, const T* k, const T* v, float* part_o, float* part_lse, u32 part_number, int4 chunk, int first_visible,
    u32 heads, u32 group, u32 d, u32 most, float scale_log2) {
    using R = Rows<D>;
    constexpr u32 STAGE = 2 * KEYS * R::BYTES;
    const u32 q_tile = shared_address(dynamic_shared), stages = q_tile + DECODE_ROWS * R::BYTES;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 kv = blockIdx.y, width = heads * d, kv_width = heads / group * d;
    const u32 row0 = blockIdx.z * DECODE_ROWS, rows = chunk.y * group;
    if (row0 >= rows) return;
    k += (u64)chunk.z * kv_width + kv * d;
    v += (u64)chunk.z * kv_width + kv * d;

    auto load_keys = [&](int j) {
        u32 to = stages + j % 2 * STAGE;
        u64 from = (u64)(j * KEYS) * kv_width;
        R::template load<KEYS, THREADS>(to, k + from, kv_width, chunk.w - j * KEYS, d);
        R::template load<KEYS, THREADS>(to + STAGE / 2, v + from, kv_width, chunk.w - j * KEYS, d);
    };
    for (u32 i = threadIdx.x; i < DECODE_ROWS * R::PIECES; i += THREADS) {
        u32 row = i / R::PIECES, piece = i % R::PIECES, query = (row0 + row) / group, member = (row0 + row) % group;
        bool copy = row0 + row < rows && piece * 8 < d;
        const T* from = q + (u64)(chunk.x + query) * width + (kv * group + member) * d + piece * 8;
        copy_async16(q_tile + R::at(row, piece), copy ? from : q, copy);
    }
    load_keys(0);
    commit_copies();

    const u32 q_lane = q_tile + R::lane_a(lane);
    const u32 k_lane = stages + warp * 16 * R::BYTES + R::lane_b(lane);
    const u32 v_lane = stages + STAGE / 2 + warp * 16 * R::BYTES + R::lane_a(lane);
    const int visible[2] = {first_visible + (int)((row0 + lane / 4) / group),
                            first_visible + (int)((row0 + lane / 4 + 8) / group)};
    float acc[1][D / 8][4], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    clear(acc);
    const int count = (chunk.w + KEYS - 1) / KEYS;
    for (int j = 0; j < count; j++) {
        wait_copies(0);
        __syncthreads();
        if (j + 1 < count) load_keys(j + 1);
        commit_copies();
        const u32 stage = j % 2 * STAGE;
        float s[1][2][4];
        product<T, D>(s, q_lane, k_lane + stage);
        float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int key = j * KEYS + (int)warp * 16 + n * 8 + (int)(lane % 4) * 2 + c % 2;
                s[0][n][c] = key < min(visible[c / 2], chunk.w) ? s[0][n][c] * scale_log2 : -INFINITY;
                high[c / 2] = fmaxf(high[c / 2], s[0][n][c]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = fmaxf(high[half], top[half]);
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
            // A row that sees no key yet has no maximum: any finite reference will do.
            high[half] = x == -INFINITY ? 0.0f : x;
            float factor = exp2_fast(top[half] - high[half]);
            top[half] = x;
            sum[half] *= factor;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                acc[0][n][2 * half] *= factor;
                acc[0][n][2 * half + 1] *= factor;
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                s[0][n][c] = exp2_fast(s[0][n][c] - high[c / 2]);
                sum[c / 2] += s[0][n][c];
            }
        }
        u32 p[1][1][4];
        to_fragments<T>(p, s);
        accumulate<T, D>(acc, p, v_lane + stage);
    }

    // The warps' parts go through shared memory: acc [4, 16, D] over the stages, then top and sum [4, 16].
    __syncthreads();
    float* shared_acc = reinterpret_cast<float*>(dynamic_shared + DECODE_ROWS * R::BYTES);
    float* shared_top = shared_acc + PARTS * DECODE_ROWS * D;
    float* shared_sum = shared_top + PARTS * DECODE_ROWS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float x = sum[half];
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        u32 row = warp * DECODE_ROWS + half * 8 + lane / 4;
        if (lane % 4 == 0) {
            shared_top[row] = top[half];
            shared_sum[row] = x;
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float* to = shared_acc + row * D + n * 8 + lane % 4 * 2;
            to[0] = acc[0][n][2 * half];
            to[1] = acc[0][n][2 * half + 1];
        }
    }
    __syncthreads();
    for (u32 row = warp; row < DECODE_ROWS && row0 + row < rows; row += PARTS) {
        float high = -INFINITY, total = 0.0f, weight[PARTS];
        for (int part = 0; part < PARTS; part++) high = fmaxf(high, shared_top[part * DECODE_ROWS + row]);
        for (int part = 0; part < PARTS; part++) {
            float x = shared_top[part * DECODE_ROWS + row];
            weight[part] = x == -INFINITY ? 0.0f : exp2_fast(x - high);
            total += weight[part] * shared_sum[part * DECODE_ROWS + row];
        }
        u32 query = (row0 + row) / group, head = kv * group + (row0 + row) % group;
        u64 at = ((u64)part_number * most + query) * heads + head;
        float inverse = total > 0.0f ? 1.0f / total : 0.0f;
        if (lane == 0) part_lse[at] = total > 0.0f ? high + log2f(total) : -INFINITY;
        for (u32 e = lane; e < d; e += WARP) {
            float x = 0.0f;
            for (int part = 0; part < PARTS; part++) x += weight[part] * shared_acc[(part * DECODE_ROWS + row) * D + e];
            part_o[at * d + e] = x * inverse;
        }
    }
}

template <typename T, int D>
__device__ __forceinline__ void decode(
    const T* q, const T* k, const T* v, float* part_o, float* part_lse, const int4* chunks, u32 heads, u32 group, u32 d,
    u32 most, float scale_log2) {
    const int4 chunk = chunks[2 * blockIdx.x];
    const int first_visible = chunks[2 * blockIdx.x + 1].x;
    decode_chunk<T, D>(q, k, v, part_o, part_lse, blockIdx.x, chunk, first_visible, heads, group, d, most, scale_log2);
}

// Sums the parts of one query row and head (a block), in the order of the keys. rows: {first chunk, chunks, query}.
template <typename T>
__device__ __forceinline__ void combine(
    const float* part_o, const float* part_lse, T* o, float* lse, const int4* rows, u32 heads, u32 d, u32 most,
    u32 total) {
    const u32 row = blockIdx.x / heads, head = blockIdx.x % heads;
    const int4 parts = rows[row];
    const u64 first = ((u64)parts.x * most + parts.z) * heads + head, step = (u64)most * heads;
    float high = -INFINITY, sum = 0.0f, x = 0.0f;
    for (int i = 0; i < parts.y; i++) high = fmaxf(high, part_lse[first + i * step]);
#pragma unroll 4
    for (int i = 0; i < parts.y; i++) {
        float weight = exp2_fast(part_lse[first + i * step] - high);
        sum += weight;
        if (threadIdx.x < d) x += weight * part_o[(first + i * step) * d + threadIdx.x];
    }
    if (threadIdx.x < d) o[((u64)row * heads + head) * d + threadIdx.x] = narrow<T>(x / sum);
    if (threadIdx.x == 0) lse[(u64)head * total + row] = high * LN_2 + logf(sum);
}
