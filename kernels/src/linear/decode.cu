// y [tokens, n] = scale · (x · Wᵀ + t · Bᵀ) + residual for 1 to 16 tokens: what generating text takes, bound by the
// bytes of W.
//
// The weight is the large operand: its rows are rows of mma fragments, the tokens the columns, padded to 8 or 16. W is
// read once, straight into registers, its inner index shared out over the 8 warps of a block and summed in a fixed
// order. Dense: narrow.cuh. Codes: below.
#include "codes.cuh"
#include "linear/narrow.cuh"

// What is added to a sum, and where it goes; y is [tokens, n], of f32 if `full`.
template <typename T> struct Finish {
    static constexpr bool DOWNWARDS = true;
    void* y;
    const T *t, *b;       // [tokens, rank], [n, rank]; null where there is none
    const void* residual; // like y; y itself where the product is added to what it holds; null where there is none
    u32 n, tokens, rank;
    float scale;
    u32 full;

    __device__ __forceinline__ void one(u32 row, u32 token, float sum) const {
        if (b != nullptr) {
            const T *u = t + (u64)token * rank, *v = b + (u64)row * rank;
            float branch = 0.0f;
#pragma unroll 4
            for (u32 r = 0; r < rank; r++) branch = fmaf(wide(u[r]), wide(v[r]), branch);
            sum += branch;
        }
        u64 at = (u64)token * n + row;
        float old = 0.0f;
        if (residual != nullptr) old = full ? ((const float*)residual)[at] : wide(((const T*)residual)[at]);
        sum = fmaf(scale, sum, old);
        if (full) ((float*)y)[at] = sum;
        else ((T*)y)[at] = narrow<T>(sum);
    }
    __device__ __forceinline__ void operator()(u32 row, u32 token, float a, float c) const {
        one(row, token, a);
        if (token + 1 < tokens) one(row, token + 1, c);
    }
};

// W dense [n, k], k a multiple of 8; NT tiles of 8 tokens, MT of 16 rows of W.
#define DENSE(NAME, T, NT, MT)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        NAME(const T* x, const T* w, void* y, const T* t, const T* b, const void* residual, u32 n, u32 k, u32 tokens,  \
             u32 rank, float scale, u32 add, u32 full) {                                                               \
        Finish<T> finish{y, t, b, add ? y : residual, n, tokens, rank, scale, full};                                   \
        narrow_product<T, NT, MT, 1, false, false>(w, x, n, tokens, k, Mask{},                                         \
                                                   finish);                                                            \
    }

// The two values of each byte of codes, as T in one register, 32 times over: lane l reads bank l, whatever its byte.
template <typename T> __device__ __forceinline__ void fill_pairs(u32 (&pairs)[256][WARP], u32 quant_type) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // A warp writes 32 bytes' rows: lane l knows the pair of the l-th, rows go out four at a time, 16 bytes a lane.
    u32 byte = warp * 32 + lane;
    u32 mine = pair<T>(CODE_VALUES[quant_type][byte >> 4], CODE_VALUES[quant_type][byte & 15]);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int of = 4 * j + lane / 8;
        u32 v = __shfl_sync(~0u, mine, of);
        *reinterpret_cast<uint4*>(&pairs[warp * 32 + of][4 * (lane % 8)]) = make_uint4(v, v, v, v);
    }
}

// W of codes [n, k], k a multiple of 64, blocks of 64 codes or more. A warp takes 16 rows and, of each 256 of the inner
// index, all: four groups of 64, lane i of a row 16 codes (8 bytes) of each group. The sum over a group is made of the
// table's values in T, exact products, and multiplied by the group's scale in f32: the rounding of each weight to the
// quantized tensor's type, which the CPU does, is left out.
constexpr int GROUPS = 4, CHUNK = 64 * GROUPS, CODE_WARPS = 8;

// What a warp reads of 256 of the inner index.
struct Chunk {
    uint2 codes[GROUPS][2], scale[2];

    __device__ __forceinline__ void load(const u8* w, const Scales& scales, u32 row0, u32 k0, u32 n, u32 k) {
        const int i = threadIdx.x % 4;
#pragma unroll
        for (int u = 0; u < GROUPS; u++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 row = row0 + 8 * h, at = k0 + 64 * u + 16 * i;
                codes[u][h] = load_once8(w + ((u64)row * k + at) / 2, row < n && at < k);
            }
        }
        // Lane i fetches the scales of group i of its two rows.
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = row0 + 8 * h, at = k0 + 64 * i;
            scale[h] = make_uint2(0, 0);
            if (row < n && at < k) scale[h] = scales.fetch(((u64)row * k + at) >> scales.block_shift);
        }
    }
};

template <typename T, int NT>
__device__ __forceinline__ void decode_codes(const T* x, const u8* w, Scales scales, const float* map, u32 quant_type,
                                             u32 n, u32 k, u32 tokens, Finish<T> finish) {
    __shared__ __align__(16) u32 pairs[256][WARP];
    __shared__ float map_values[256];
    __shared__ float4 parts[CODE_WARPS][NT][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, i = lane % 4;
    const u32 tiles = (n + 15) / 16;
    Chunk next;
    next.load(w, scales, blockIdx.x * 16 + g, warp * CHUNK, n, k);
    fill_pairs<T>(pairs, quant_type);
    if (scales.nested != nullptr) map_values[threadIdx.x] = map[threadIdx.x];
    __syncthreads();

    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sum[NT][4] = {};
#pragma unroll 1
        for (u32 k0 = warp * CHUNK; k0 < k; k0 += CODE_WARPS * CHUNK) {
            const Chunk now = next;
            // The next chunk of these rows, or the first of the next tile's.
            if (k0 + CODE_WARPS * CHUNK < k) next.load(w, scales, tile * 16 + g, k0 + CODE_WARPS * CHUNK, n, k);
            else next.load(w, scales, (tile + gridDim.x) * 16 + g, warp * CHUNK, n, k);
            float scale[2] = {scales.value(now.scale[0], map_values), scales.value(now.scale[1], map_values)};
#pragma unroll
            for (int u = 0; u < GROUPS; u++) {
                uint4 b[NT][2];
#pragma unroll
                for (int t = 0; t < NT; t++) {
                    u32 token = 8 * t + g, at = k0 + 64 * u + 16 * i;
                    bool valid = token < tokens && at < k;
                    b[t][0] = load_cached(x + (u64)token * k + at, valid);
                    b[t][1] = load_cached(x + (u64)token * k + at + 8, valid);
                }
                float group[NT][4] = {};
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    // Codes 4s..4s + 4 of the lane's 16: bytes 2s and 2s + 1.
                    u32 top = s < 2 ? now.codes[u][0].x : now.codes[u][0].y;
                    u32 low = s < 2 ? now.codes[u][1].x : now.codes[u][1].y;
                    int bits = s % 2 * 16;
                    const u32 a[4] = {pairs[top >> bits & 255][lane], pairs[low >> bits & 255][lane],
                                      pairs[top >> (bits + 8) & 255][lane], pairs[low >> (bits + 8) & 255][lane]};
#pragma unroll
                    for (int t = 0; t < NT; t++) {
                        const uint4& v = b[t][s / 2];
                        multiply<T>(group[t], a, s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
                    }
                }
                float top_scale = __shfl_sync(~0u, scale[0], lane - i + u);
                float low_scale = __shfl_sync(~0u, scale[1], lane - i + u);
#pragma unroll
                for (int t = 0; t < NT; t++) {
                    sum[t][0] = fmaf(top_scale, group[t][0], sum[t][0]);
                    sum[t][1] = fmaf(top_scale, group[t][1], sum[t][1]);
                    sum[t][2] = fmaf(low_scale, group[t][2], sum[t][2]);
                    sum[t][3] = fmaf(low_scale, group[t][3], sum[t][3]);
                }
            }
        }
        __syncthreads(); // the last tile's sums have been read
#pragma unroll
        for (int t = 0; t < NT; t++) parts[warp][t][lane] = make_float4(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
        __syncthreads();
        // A thread for each element: 16 rows, then tokens.
        for (u32 e = threadIdx.x; e < 16 * tokens; e += CODE_WARPS * WARP) {
            u32 row = e % 16, token = e / 16;
            int holder = row % 8 * 4 + token % 8 / 2, part = row / 8 * 2 + token % 2;
            float total = 0.0f;
#pragma unroll
            for (int from = 0; from < CODE_WARPS; from++) {
                total += reinterpret_cast<const float*>(&parts[from][token / 8][holder])[part];
            }
            if (tile * 16 + row < n) finish.one(tile * 16 + row, token, total);
        }
    }
}
#define CODED(NAME, T, NT)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 4 - NT)                                                          \
        NAME(const T* x, const u8* w, void* y, const T* t, const T* b, const void* residual, const void* absmax,       \
             const float* nested, const float* map, u32 n, u32 k, u32 tokens, u32 rank, float scale, u32 add,          \
             u32 full, u32 quant_type, u32 block_shift, u32 nested_shift, const float* offset) {                       \
        Scales scales{absmax, nested, nested ? *offset : 0.0f, block_shift, nested_shift};                             \
        decode_codes<T, NT>(x, w, scales, map, quant_type, n, k, tokens,                                               \
                            Finish<T>{y, t, b, add ? y : residual, n, tokens, rank, scale, full});                     \
    }
#define DECODES(T, S)                                                                                                  \
    DENSE(decode_dense_8_##S, T, 1, 4) DENSE(decode_dense_16_##S, T, 2, 4)                                             \
    DENSE(decode_dense_few_8_##S, T, 1, 1) DENSE(decode_dense_few_16_##S, T, 2, 1)                                     \
    CODED(decode_codes_8_##S, T, 1) CODED(decode_codes_16_##S, T, 2)
DECODES(f16, f16)
DECODES(bf16, bf16)
