// The products of LoRA adapters, whose one dimension is a rank r of 1 to 256 and the others are thousands; 16-bit
// types. All are bound by the bytes of the one large matrix, which is read once (Hu et al., arXiv 2106.09685, for the
// formulas; kernels/src/linear/lora.rs for the contracts).
//
//   lora_down           t = s·m(x)·Aᵀ and u = s·g·B: narrow.cuh; A and B in the type of x
//   lora_dropped_add    dx += m(u·A): reads and writes dx once
//   lora_grad           gᵀ·m(x) where one side is the rank: reads the large side once, sums over slices of the tokens
//   lora_sum            adds the slices in order
#include "linear/narrow.cuh"

template <typename T> struct StoreRow {
    static constexpr bool DOWNWARDS = false;
    T* out;
    u32 cols;
    float scale;
    __device__ __forceinline__ void operator()(u32 row, u32 col, float a, float b) const {
        *reinterpret_cast<u32*>(out + (u64)row * cols + col) = pair<T>(a * scale, b * scale);
    }
};

#define DOWN(NAME, T, NT, MT, WT, COLUMNS, DROP)                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        NAME(const T* x, const T* w, T* out, u32 rows, u32 cols, u32 inner, float scale, u64 seed, u32 step,           \
             u32 stream, u32 threshold, float keep) {                                                                  \
        Mask mask{seed, step, stream, threshold, keep};                                                                \
        narrow_product<T, NT, MT, WT, COLUMNS, DROP>(x, w, rows, cols, inner, mask,                                    \
                                                     StoreRow<T>{out, cols, scale});                                   \
    }
// Columns at a time, and whether blocks take 64 rows (many tokens) or 16 (few, so that all processors have a block).
#define DOWNS(T, S)                                                                                                    \
    DOWN(lora_down_16_##S, T, 2, 4, 1, false, false)                                                                   \
    DOWN(lora_down_64_##S, T, 8, 1, 4, false, false)                                                                   \
    DOWN(lora_down_few_16_##S, T, 2, 1, 1, false, false)                                                               \
    DOWN(lora_down_drop_16_##S, T, 2, 4, 1, false, true)                                                               \
    DOWN(lora_down_drop_64_##S, T, 8, 1, 4, false, true)                                                               \
    DOWN(lora_down_drop_few_16_##S, T, 2, 1, 1, false, true)                                                           \
    DOWN(lora_down_columns_16_##S, T, 2, 4, 1, true, false)                                                            \
    DOWN(lora_down_columns_64_##S, T, 8, 1, 4, true, false)                                                            \
    DOWN(lora_down_columns_few_16_##S, T, 2, 1, 1, true, false)
DOWNS(f16, f16)
DOWNS(bf16, bf16)

template <typename T> __device__ __forceinline__ u32 plus(u32 a, u32 b) {
    return pair<T>(low<T>(a) + low<T>(b), high<T>(a) + high<T>(b));
}

// out [rows, cols] += m(u [rows, rank] · a [rank, cols]). A warp makes 32 rows by 32 columns; column 8i + 2j + e is
// column 2i + e of its mma tile j, so that a lane has eight neighbours of a row of out. The product, what dropout
// leaves of it and the sum are each rounded, as on the CPU.
template <typename T>
__device__ __forceinline__ void dropped_add(const T* u, const T* a, T* out, u32 rows, u32 cols, u32 rank, Mask mask) {
    constexpr int MT = 2;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, i = lane % 4;
    const u32 col0 = (blockIdx.x * 8 + warp) * 32, at = col0 + 8 * i, row0 = blockIdx.y * 16 * MT + g;
    if (col0 >= cols) return;

    // Under way while the product is made.
    uint4 old[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = row0 + 16 * m + 8 * h;
            if (row < rows && at < cols) old[m][h] = *reinterpret_cast<const uint4*>(out + (u64)row * cols + at);
        }
    }
    float sum[MT][4][4] = {};
#pragma unroll 1
    for (u32 k = 0; k < rank; k += 16) {
        u32 b[4][2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = k + 8 * h + g;
            uint4 v = load_cached(a + (u64)row * cols + at, row < rank && at < cols);
            b[0][h] = transpose8(v.x), b[1][h] = transpose8(v.y), b[2][h] = transpose8(v.z), b[3][h] = transpose8(v.w);
        }
#pragma unroll
        for (int m = 0; m < MT; m++) {
            u32 left[4];
#pragma unroll
            for (int q = 0; q < 4; q++) {
                u32 row = row0 + 16 * m + 8 * (q % 2), r = k + 8 * (q / 2) + 2 * i;
                left[q] = load_cached4(u + (u64)row * rank + r, row < rows && r < rank);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) multiply<T>(sum[m][j], left, b[j][0], b[j][1]);
        }
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = row0 + 16 * m + 8 * h;
            if (row >= rows || at >= cols) continue;
            const float(*s)[4] = sum[m];
            uint4 p = make_uint4(pair<T>(s[0][2 * h], s[0][2 * h + 1]), pair<T>(s[1][2 * h], s[1][2 * h + 1]),
                                 pair<T>(s[2][2 * h], s[2][2 * h + 1]), pair<T>(s[3][2 * h], s[3][2 * h + 1]));
            p = mask.eight<T>(p, (u64)row * cols + at);
            uint4 v = old[m][h];
            *reinterpret_cast<uint4*>(out + (u64)row * cols + at) =
                make_uint4(plus<T>(v.x, p.x), plus<T>(v.y, p.y), plus<T>(v.z, p.z), plus<T>(v.w, p.w));
        }
    }
}
#define DROPPED_ADD(T, S)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        lora_dropped_add_##S(const T* u, const T* a, T* out, u32 rows, u32 cols, u32 rank, u64 seed, u32 step,         \
                             u32 stream, u32 threshold, float keep) {                                                  \
        dropped_add<T>(u, a, out, rows, cols, rank, Mask{seed, step, stream, threshold, keep});                        \
    }
DROPPED_ADD(f16, f16)
DROPPED_ADD(bf16, bf16)

// partial [slice, few, many] = sᵀ·m(x) over the slice's tokens, s [tokens, few], x [tokens, many], few <= 16·MT in a
// block row. A warp makes 64 columns: of 16 tokens at a time it reads 128 bytes a row, each lane eight neighbours of
// the four tokens 2i, 2i + 1, 2i + 8, 2i + 9 of its fragment of b; column 8g + j is column g of its mma tile j. Of 8
// warps four are side by side and two share the tokens.
template <typename T, int MT, bool DROP>
__device__ __forceinline__ void grad(const T* s, const T* x, float* partial, u32 tokens, u32 few, u32 many, u32 slice,
                                     Mask mask) {
    constexpr int ACROSS = 4, SHARE = 2, STEP = 16;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, i = lane % 4;
    const u32 at = (blockIdx.x * ACROSS + warp % ACROSS) * 64 + 8 * g, few0 = blockIdx.z * 16 * MT;
    const u32 end = min(tokens, (blockIdx.y + 1) * slice);

    float sum[MT][8][4] = {};
#pragma unroll 1
    for (u32 first = blockIdx.y * slice + warp / ACROSS * STEP; first < end; first += SHARE * STEP) {
        uint4 v[4];
#pragma unroll
        for (int q = 0; q < 4; q++) {
            u32 token = first + 2 * i + q % 2 + 8 * (q / 2);
            v[q] = load_once(x + (u64)token * many + at, token < end && at < many);
        }
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int q = 0; q < 4; q++) {
                u32 token = first + g + 8 * (q / 2), column = few0 + 16 * m + 8 * (q % 2) + 2 * i;
                a[m][q] = transpose8(load_cached4(s + (u64)token * few + column, token < end && column < few));
            }
        }
        if (DROP) {
#pragma unroll
            for (int q = 0; q < 4; q++) {
                v[q] = mask.eight<T>(v[q], (u64)(first + 2 * i + q % 2 + 8 * (q / 2)) * many + at);
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 r[4] = {(&v[0].x)[j / 2], (&v[1].x)[j / 2], (&v[2].x)[j / 2], (&v[3].x)[j / 2]};
            const u32 order = j % 2 == 0 ? 0x5410 : 0x7632; // the low or the high halves of two registers
            u32 b0 = __byte_perm(r[0], r[1], order), b1 = __byte_perm(r[2], r[3], order);
#pragma unroll
            for (int m = 0; m < MT; m++) multiply<T>(sum[m][j], a[m], b0, b1);
        }
    }

    __shared__ float4 parts[ACROSS][MT * 8][WARP];
    if (warp >= ACROSS) {
#pragma unroll
        for (int t = 0; t < MT * 8; t++) {
            const float* c = sum[t / 8][t % 8];
            parts[warp - ACROSS][t][lane] = make_float4(c[0], c[1], c[2], c[3]);
        }
    }
    __syncthreads();
    if (warp >= ACROSS) return;
    // Columns 2i and 2i + 1 of tiles 0 to 8 are 16i..16i + 16 of the warp's 64.
    const u32 col0 = at - 8 * g + 16 * i;
    float* out = partial + (u64)blockIdx.y * few * many;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float4 other = parts[warp][m * 8 + j][lane];
            float* c = sum[m][j];
            c[0] += other.x, c[1] += other.y, c[2] += other.z, c[3] += other.w;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = few0 + 16 * m + 8 * h + g;
            if (row >= few) continue;
            float* line = out + (u64)row * many;
#pragma unroll
            for (int q = 0; q < 4; q++) {
                // Four neighbours: e = q / 2 of the tiles' columns 2i + e, tiles 4(q % 2)..
                int e = 2 * h + q / 2, j = 4 * (q % 2);
                u32 col = col0 + 4 * q;
                float c[4] = {sum[m][j][e], sum[m][j + 1][e], sum[m][j + 2][e], sum[m][j + 3][e]};
                if (col < many) *reinterpret_cast<float4*>(line + col) = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
    }
}
#define GRAD(NAME, T, MT, DROP)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        NAME(const T* s, const T* x, float* partial, u32 tokens, u32 few, u32 many, u32 slice, u64 seed, u32 step,     \
             u32 stream, u32 threshold, float keep) {                                                                  \
        grad<T, MT, DROP>(s, x, partial, tokens, few, many, slice, Mask{seed, step, stream, threshold, keep});         \
    }
#define GRADS(T, S)                                                                                                    \
    GRAD(lora_grad_16_##S, T, 1, false) GRAD(lora_grad_32_##S, T, 2, false)                                            \
    GRAD(lora_grad_drop_16_##S, T, 1, true) GRAD(lora_grad_drop_32_##S, T, 2, true)
GRADS(f16, f16)
GRADS(bf16, bf16)

// out = scale · Σ over slices of partial [slices, few, many]; out is [few, many], or [many, few] if `transposed`.
extern "C" __global__ void __launch_bounds__(256)
    lora_sum(const float* partial, float* out, u32 slices, u32 few, u32 many, float scale, u32 transposed) {
    u32 col = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
    if (col >= many) return;
    const float* p = partial + (u64)row * many + col;
    float sum = 0.0f;
    for (u32 slice = 0; slice < slices; slice++) sum += p[(u64)slice * few * many];
    out[transposed ? (u64)col * few + row : (u64)row * many + col] = sum * scale;
}
