// Attention in f32 arithmetic without tensor cores: for f32, and for heads that the 16-bit kernels do not take (not a
// multiple of 8 elements, or more than 128).
//
// The same methods as forward.cuh and backward.cuh, with tiles in shared memory as f32. 256 threads stand in a
// square: thread (x, y) of 16 x 16 has the scores of rows y, y + 16, … and keys x, x + 16, …, and of an output row four
// elements in every 64. Rows in shared memory are 4 longer than D, so that 16-byte reads of 8 rows hit all banks.
// D >= d is 64, 128 or 256. Bound by shared-memory reads.
#include "attention/delta.cuh"

constexpr int THREADS = 256, SIDE = 16, TILE = 128;
typedef float f32;

extern __shared__ __align__(16) float dynamic_shared[];

// Rows and keys of a tile: as many as 99 KB hold.
template <int D> constexpr int FORWARD_ROWS = D > 128 ? 32 : 64;
template <int D> constexpr int SMALL = D > 128 ? 16 : 32;
template <int D> constexpr int LARGE = D > 64 ? SMALL<D> : 64;

template <int D> struct Tile {
    static constexpr int STRIDE = D + 4;

    // `count` rows of d elements, `stride` apart, as f32; zeros from row `valid` on and up to a multiple of 4 elements.
    template <typename T>
    static __device__ __forceinline__ void load(float* tile, const T* from, u64 stride, int count, int valid, u32 d) {
        u32 padded = (d + 3) / 4 * 4;
        for (int row = threadIdx.x / WARP; row < count; row += THREADS / WARP) {
            for (u32 e = threadIdx.x % WARP; e < padded; e += WARP) {
                tile[row * STRIDE + e] = row < valid && e < d ? wide(from[row * stride + e]) : 0.0f;
            }
        }
    }

    // s[i][j] = row y + 16i of a · row x + 16j of b.
    template <int ROWS, int KEYS>
    static __device__ __forceinline__ void product(float (&s)[ROWS][KEYS], const float* a, const float* b, u32 d) {
        u32 x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < KEYS; j++) s[i][j] = 0.0f;
        }
#pragma unroll 2
        for (u32 e = 0; e < d; e += 4) {
            float4 fa[ROWS], fb[KEYS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) fa[i] = *reinterpret_cast<const float4*>(a + (y + i * SIDE) * STRIDE + e);
#pragma unroll
            for (int j = 0; j < KEYS; j++) fb[j] = *reinterpret_cast<const float4*>(b + (x + j * SIDE) * STRIDE + e);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
#pragma unroll
                for (int j = 0; j < KEYS; j++) {
                    s[i][j] = fmaf(fa[i].x, fb[j].x, s[i][j]);
                    s[i][j] = fmaf(fa[i].y, fb[j].y, s[i][j]);
                    s[i][j] = fmaf(fa[i].z, fb[j].z, s[i][j]);
                    s[i][j] = fmaf(fa[i].w, fb[j].w, s[i][j]);
                }
            }
        }
    }

    // acc[i][c] += sum over `count` of p[row y + 16i][·] · b[·][4x + 64c ..], where p is stored as [count][columns]
    // if BY_COLUMN, else as [rows][count]; `pitch` is the length of its rows.
    template <bool BY_COLUMN, int ROWS>
    static __device__ __forceinline__ void accumulate(
        float (&acc)[ROWS][D / 64][4], const float* p, int pitch, const float* b, int count, u32 d) {
        u32 x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
#pragma unroll 4
        for (int key = 0; key < count; key++) {
            float weight[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                int row = y + i * SIDE;
                weight[i] = BY_COLUMN ? p[key * pitch + row] : p[row * pitch + key];
            }
#pragma unroll
            for (int c = 0; c < D / 64; c++) {
                if (4 * x + 64 * c >= d) break;
                float4 value = *reinterpret_cast<const float4*>(b + key * STRIDE + 4 * x + 64 * c);
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    acc[i][c][0] = fmaf(weight[i], value.x, acc[i][c][0]);
                    acc[i][c][1] = fmaf(weight[i], value.y, acc[i][c][1]);
                    acc[i][c][2] = fmaf(weight[i], value.z, acc[i][c][2]);
                    acc[i][c][3] = fmaf(weight[i], value.w, acc[i][c][3]);
                }
            }
        }
    }

    template <int ROWS> static __device__ __forceinline__ void clear(float (&acc)[ROWS][D / 64][4]) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int c = 0; c < D / 64; c++) acc[i][c][0] = acc[i][c][1] = acc[i][c][2] = acc[i][c][3] = 0.0f;
        }
    }

    // Writes acc, times scale[i], to `valid` rows of d elements.
    template <typename T, int ROWS>
    static __device__ __forceinline__ void store(
        const float (&acc)[ROWS][D / 64][4], const float (&scale)[ROWS], T* to, u64 stride, int valid, u32 d) {
        u32 x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int row = y + i * SIDE;
#pragma unroll
            for (int c = 0; c < D / 64; c++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    u32 element = 4 * x + 64 * c + e;
                    if (row < valid && element < d) to[row * stride + element] = narrow<T>(acc[i][c][e] * scale[i]);
                }
            }
        }
    }
};

// Sum and maximum over the 16 threads of a row.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int lanes = SIDE / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int lanes = SIDE / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
}

// tiles: {first query row, query rows (up to 128), first key row of the sequence, keys that the first query sees}.
// One block a part of a tile (B rows) and head; heads vary fastest.
template <typename T, int D>
__device__ __forceinline__ void forward(
    const T* q, const T* k, const T* v, T* o, float* lse, const int4* tiles, u32 heads, u32 group, u32 d, u32 total,
    float scale) {
    constexpr int B = FORWARD_ROWS<D>, N = B / SIDE, PITCH = B + 4;
    using Rows = Tile<D>;
    float *q_tile = dynamic_shared, *key_tile = q_tile + B * Rows::STRIDE, *p = key_tile + B * Rows::STRIDE;
    const u32 x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    const u32 head = blockIdx.x % heads, width = heads * d, kv_width = heads / group * d;
    const int4 tile = tiles[blockIdx.x / heads / (TILE / B)];
    const int row0 = blockIdx.x / heads % (TILE / B) * B, rows = min(tile.y - row0, B);
    if (rows <= 0) return;
    const u64 first_row = (u64)(tile.x + row0) * width + head * d;
    const u64 first_key = (u64)tile.z * kv_width + head / group * d;
    const int first_visible = tile.w + row0, keys = first_visible + rows - 1;

    float acc[N][D / 64][4], top[N], sum[N];
    Rows::clear(acc);
#pragma unroll
    for (int i = 0; i < N; i++) {
        top[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    Rows::load(q_tile, q + first_row, width, B, rows, d);
    for (int key0 = 0; key0 < keys; key0 += B) {
        __syncthreads();
        Rows::load(key_tile, k + first_key + (u64)key0 * kv_width, kv_width, B, keys - key0, d);
        __syncthreads();
        float s[N][N];
        Rows::product(s, q_tile, key_tile, d);
#pragma unroll
        for (int i = 0; i < N; i++) {
            float high = top[i];
#pragma unroll
            for (int j = 0; j < N; j++) {
                // A row beyond the tile sees the zeros that stand for keys beyond it.
                bool sees = key0 + (int)x + j * SIDE < first_visible + (int)y + i * SIDE;
                s[i][j] = sees ? s[i][j] * scale : -INFINITY;
                high = fmaxf(high, s[i][j]);
            }
            high = row_max(high); // finite from the first tile on: every row sees its first key
            float factor = expf(top[i] - high), added = 0.0f;
            top[i] = high;
#pragma unroll
            for (int j = 0; j < N; j++) {
                float e = expf(s[i][j] - high);
                added += e;
                p[(y + i * SIDE) * PITCH + x + j * SIDE] = e;
            }
            sum[i] = sum[i] * factor + row_sum(added);
#pragma unroll
            for (int c = 0; c < D / 64; c++) {
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][c][e] *= factor;
            }
        }
        __syncthreads();
        Rows::load(key_tile, v + first_key + (u64)key0 * kv_width, kv_width, B, keys - key0, d);
        __syncthreads();
        Rows::template accumulate<false>(acc, p, PITCH, key_tile, B, d);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        int row = y + i * SIDE;
        if (x == 0 && row < rows) lse[(u64)head * total + tile.x + row0 + row] = top[i] + logf(sum[i]);
        sum[i] = 1.0f / sum[i];
    }
    Rows::store(acc, sum, o + first_row, width, rows, d);
}

// P and dS of a tile of query rows and one of keys, into shared memory. Row r of the tile sees keys before visible + r.
template <int D, int ROWS, int KEYS>
__device__ __forceinline__ void make_ds(
    const float* q, const float* k, const float* grad, const float* v, float* p, float* ds, const float* lse,
    const float* delta, int rows, int visible, u32 d, float scale) {
    constexpr int M = ROWS / SIDE, N = KEYS / SIDE, PITCH = KEYS + 4;
    const u32 x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    float s[M][N], dp[M][N];
    Tile<D>::product(s, q, k, d);
    Tile<D>::product(dp, grad, v, d);
#pragma unroll
    for (int i = 0; i < M; i++) {
        int row = y + i * SIDE;
        float log_sum = row < rows ? lse[row] : 0.0f, offset = row < rows ? delta[row] : 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) {
            int key = x + j * SIDE;
            float e = row < rows && key < visible + row ? expf(s[i][j] * scale - log_sum) : 0.0f;
            if (p) p[row * PITCH + key] = e;
            ds[row * PITCH + key] = e * (dp[i][j] - offset);
        }
    }
}

// tiles: {first key row, rows from there to the end of the sequence}, 128 keys each. One block a part of a tile
// (KEYS keys) and key/value head; heads vary fastest.
template <typename T, int D>
__device__ __forceinline__ void keys_backward(
    const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* dk, T* dv,
    const int4* tiles, u32 heads, u32 group, u32 d, u32 total, float scale) {
    constexpr int ROWS = SMALL<D>, KEYS = LARGE<D>, N = KEYS / SIDE, PITCH = KEYS + 4;
    using Rows = Tile<D>;
    float *k_tile = dynamic_shared, *v_tile = k_tile + KEYS * Rows::STRIDE, *q_tile = v_tile + KEYS * Rows::STRIDE;
    float *grad_tile = q_tile + ROWS * Rows::STRIDE, *p = grad_tile + ROWS * Rows::STRIDE, *ds = p + ROWS * PITCH;
    const u32 kv_heads = heads / group, width = heads * d, kv_width = kv_heads * d;
    const u32 kv = blockIdx.x % kv_heads;
    const int4 tile = tiles[blockIdx.x / kv_heads / (TILE / KEYS)];
    const int part = blockIdx.x / kv_heads % (TILE / KEYS) * KEYS;
    const int first = tile.x + part, all_rows = tile.y - part, keys = min(all_rows, KEYS);
    if (keys <= 0) return;
    const u64 first_key = (u64)first * kv_width + kv * d;

    Rows::load(k_tile, k + first_key, kv_width, KEYS, keys, d);
    Rows::load(v_tile, v + first_key, kv_width, KEYS, keys, d);
    float dk_acc[N][D / 64][4], dv_acc[N][D / 64][4];
    Rows::clear(dk_acc);
    Rows::clear(dv_acc);
    for (u32 head = kv * group; head < (kv + 1) * group; head++) {
        for (int row0 = 0; row0 < all_rows; row0 += ROWS) {
            int rows = min(all_rows - row0, ROWS);
            u64 from = (u64)(first + row0) * width + head * d, numbers = (u64)head * total + first + row0;
            __syncthreads();
            Rows::load(q_tile, q + from, width, ROWS, rows, d);
            Rows::load(grad_tile, grad + from, width, ROWS, rows, d);
            __syncthreads();
            make_ds<D, ROWS, KEYS>(
                q_tile, k_tile, grad_tile, v_tile, p, ds, lse + numbers, delta + numbers, rows, row0 + 1, d, scale);
            __syncthreads();
            Rows::template accumulate<true>(dv_acc, p, PITCH, grad_tile, ROWS, d);
            Rows::template accumulate<true>(dk_acc, ds, PITCH, q_tile, ROWS, d);
        }
    }
    float one[N], scales[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        one[i] = 1.0f;
        scales[i] = scale;
    }
    Rows::store(dv_acc, one, dv + first_key, kv_width, keys, d);
    Rows::store(dk_acc, scales, dk + first_key, kv_width, keys, d);
}

// tiles as in the forward kernel. One block a part of a tile (ROWS rows) and head; heads vary fastest.
template <typename T, int D>
__device__ __forceinline__ void queries_backward(
    const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* dq, const int4* tiles,
    u32 heads, u32 group, u32 d, u32 total, float scale) {
    constexpr int ROWS = LARGE<D>, KEYS = SMALL<D>, M = ROWS / SIDE, PITCH = KEYS + 4;
    using Rows = Tile<D>;
    float *q_tile = dynamic_shared, *grad_tile = q_tile + ROWS * Rows::STRIDE;
    float *k_tile = grad_tile + ROWS * Rows::STRIDE, *v_tile = k_tile + KEYS * Rows::STRIDE;
    float* ds = v_tile + KEYS * Rows::STRIDE;
    const u32 head = blockIdx.x % heads, width = heads * d, kv_width = heads / group * d;
    const int4 tile = tiles[blockIdx.x / heads / (TILE / ROWS)];
    const int row0 = blockIdx.x / heads % (TILE / ROWS) * ROWS, rows = min(tile.y - row0, ROWS);
    if (rows <= 0) return;
    const u64 first_row = (u64)(tile.x + row0) * width + head * d, numbers = (u64)head * total + tile.x + row0;
    const u64 first_key = (u64)tile.z * kv_width + head / group * d;
    const int first_visible = tile.w + row0, keys = first_visible + rows - 1;

    Rows::load(q_tile, q + first_row, width, ROWS, rows, d);
    Rows::load(grad_tile, grad + first_row, width, ROWS, rows, d);
    float acc[M][D / 64][4], scales[M];
    Rows::clear(acc);
#pragma unroll
    for (int i = 0; i < M; i++) scales[i] = scale;
    for (int key0 = 0; key0 < keys; key0 += KEYS) {
        u64 from = first_key + (u64)key0 * kv_width;
        __syncthreads();
        Rows::load(k_tile, k + from, kv_width, KEYS, keys - key0, d);
        Rows::load(v_tile, v + from, kv_width, KEYS, keys - key0, d);
        __syncthreads();
        make_ds<D, ROWS, KEYS>(
            q_tile, k_tile, grad_tile, v_tile, nullptr, ds, lse + numbers, delta + numbers, rows,
            first_visible - key0, d, scale);
        __syncthreads();
        Rows::template accumulate<false>(acc, ds, PITCH, k_tile, KEYS, d);
    }
    Rows::store(acc, scales, dq + first_row, width, rows, d);
}

#define ENTRIES(T, D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_simple_forward_d##D##_##T(                         \
        const T* q, const T* k, const T* v, T* o, float* lse, const int4* tiles, u32 heads, u32 group, u32 d,          \
        u32 total, float scale) {                                                                                      \
        forward<T, D>(q, k, v, o, lse, tiles, heads, group, d, total, scale);                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_simple_keys_d##D##_##T(                            \
        const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* dk, T* dv,         \
        const int4* tiles, u32 heads, u32 group, u32 d, u32 total, float scale) {                                      \
        keys_backward<T, D>(q, k, v, grad, lse, delta, dk, dv, tiles, heads, group, d, total, scale);                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_simple_queries_d##D##_##T(                         \
        const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* dq,                \
        const int4* tiles, u32 heads, u32 group, u32 d, u32 total, float scale) {                                      \
        queries_backward<T, D>(q, k, v, grad, lse, delta, dq, tiles, heads, group, d, total, scale);                   \
    }
#define DELTA(T)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(DELTA_THREADS) attention_delta_##T(                                   \
        const T* o, const T* grad, float* delta, u32 heads, u32 d, u32 total) {                                        \
        make_delta<T>(o, grad, delta, heads, d, total);                                                                \
    }
DELTA(f32)
DELTA(f16)
DELTA(bf16)
ENTRIES(f32, 64)
ENTRIES(f32, 128)
ENTRIES(f32, 256)
ENTRIES(f16, 256)
ENTRIES(bf16, 256)
