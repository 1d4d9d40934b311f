// Products with few columns: out [rows, cols] = m(x) [rows, inner] · w, where x is large and w is not; reads x once.
//
// Bound by the bytes of x. No shared memory on the way: the order of the inner index within a product does not matter,
// so a lane takes eight neighbours of a row (16 bytes) as its share of two mma steps and reads them straight into
// fragments; the four lanes of a row together read 64 bytes. A warp holds MT tiles of 16 rows by NT tiles of 8 columns.
// A block of 8 warps: WT of them side by side over rows, the others share the inner index and are summed at the end in
// a fixed order. U steps of 32 are loaded at once, so that each lane has 8 loads of 16 bytes under way. In names: g =
// lane / 4 and i = lane % 4, as ptx.cuh's fragments.
#pragma once
#include "linear/eight.cuh"

constexpr int NARROW_WARPS = 8;

// Eight neighbours of x as T: as they are, or from codes of 8 bits.
template <typename T> __device__ __forceinline__ uint4 load_eight(const T* x, bool valid) {
    return load_once(x, valid);
}
template <typename T> __device__ __forceinline__ uint4 load_eight(const signed char* x, bool valid) {
    uint2 v = load_once8(x, valid);
    auto two = [](u32 word, int at) {
        return pair<T>((float)(signed char)(word >> at), (float)(signed char)(word >> (at + 8)));
    };
    return make_uint4(two(v.x, 0), two(v.x, 16), two(v.y, 0), two(v.y, 16));
}

// x is of T or of 8-bit codes. inner is a multiple of 8. COLUMNS: w is [inner, cols], cols even, rather than
// [cols, inner]. `store(row, col, a, b)` gets the sums of columns col and col + 1, the second of which may lie beyond
// the last; neighbouring threads bring neighbouring rows if STORE::DOWNWARDS, else columns.
template <typename T, int NT, int MT, int WT, bool COLUMNS, bool DROP, typename X, typename STORE>
__device__ __forceinline__ void narrow_product(const X* x, const T* w, u32 rows, u32 cols, u32 inner, Mask mask,
                                               STORE store) {
    constexpr int WK = NARROW_WARPS / WT, U = 4 / MT;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, i = lane % 4;
    const int group = warp / WT;
    const u32 row0 = (blockIdx.x * WT + warp % WT) * 16 * MT + g, col0 = blockIdx.y * 8 * NT;

    float sum[MT][NT][4] = {};
#pragma unroll 1
    for (u32 k0 = group * 32 * U; k0 < inner; k0 += WK * 32 * U) {
        uint4 a[U][MT][2];
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u32 row = row0 + 16 * m + 8 * h, at = k0 + 32 * u + 8 * i;
                    a[u][m][h] = load_eight<T>(x + (u64)row * inner + at, row < rows && at < inner);
                }
            }
        }
        if (DROP) {
#pragma unroll
            for (int u = 0; u < U; u++) {
#pragma unroll
                for (int m = 0; m < MT; m++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        u64 position = (u64)(row0 + 16 * m + 8 * h) * inner + k0 + 32 * u + 8 * i;
                        a[u][m][h] = mask.eight<T>(a[u][m][h], position);
                    }
                }
            }
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            u32 k = k0 + 32 * u;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 b;
                if (COLUMNS) {
                    // Row g of each 8×8 matrix to transpose is the inner index that lane g / 2 takes at half g % 2.
                    u32 at = col0 + 8 * n + 2 * i, from = k + 8 * (g / 2) + g % 2;
                    u32 part[4];
#pragma unroll
                    for (int p = 0; p < 4; p++) {
                        u32 row = from + 2 * p;
                        part[p] = transpose8(load_cached4(w + (u64)row * cols + at, row < inner && at < cols));
                    }
                    b = make_uint4(part[0], part[1], part[2], part[3]);
                } else {
                    u32 col = col0 + 8 * n + g, at = k + 8 * i;
                    b = load_cached(w + (u64)col * inner + at, col < cols && at < inner);
                }
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const uint4 &top = a[u][m][0], &low = a[u][m][1];
                    multiply<T>(sum[m][n], {top.x, low.x, top.y, low.y}, b.x, b.y);
                    multiply<T>(sum[m][n], {top.z, low.z, top.w, low.w}, b.z, b.w);
                }
            }
        }
    }

    __shared__ float4 parts[NARROW_WARPS / 2][MT * NT][WARP];
#pragma unroll
    for (int half = WK / 2; half > 0; half /= 2) {
        if (group >= half && group < 2 * half) {
#pragma unroll
            for (int t = 0; t < MT * NT; t++) {
                const float* s = sum[t / NT][t % NT];
                parts[warp - half * WT][t][lane] = make_float4(s[0], s[1], s[2], s[3]);
            }
        }
        __syncthreads();
        if (group < half) {
#pragma unroll
            for (int t = 0; t < MT * NT; t++) {
                float4 other = parts[warp][t][lane];
                float* s = sum[t / NT][t % NT];
                s[0] += other.x, s[1] += other.y, s[2] += other.z, s[3] += other.w;
            }
        }
        __syncthreads();
    }
    if (group == 0) {
#pragma unroll
        for (int t = 0; t < MT * NT; t++) {
            const float* s = sum[t / NT][t % NT];
            parts[warp][t][lane] = make_float4(s[0], s[1], s[2], s[3]);
        }
    }
    __syncthreads();
    constexpr int ROWS = 16 * MT * WT, PAIRS = 4 * NT;
#pragma unroll 1
    for (int e = threadIdx.x; e < ROWS * PAIRS; e += NARROW_WARPS * WARP) {
        int line = STORE::DOWNWARDS ? e % ROWS : e / PAIRS, pair = STORE::DOWNWARDS ? e / ROWS : e % PAIRS;
        const float4* tile = parts[line / (16 * MT)][line / 16 % MT * NT + pair / 4];
        const float* s = reinterpret_cast<const float*>(tile + line % 8 * 4 + pair % 4) + line / 8 % 2 * 2;
        u32 row = blockIdx.x * ROWS + line, col = col0 + 2 * pair;
        if (row < rows && col < cols) store(row, col, s[0], s[1]);
    }
}
