// Products of 16-bit matrices of any shape: what gemm.cuh does, for rows that are not whole 16-byte chunks.
//
// 64 x 64 tiles of `out`, 256 threads with 4 x 4 sums each, tiles of 16 along the contraction in shared memory as f32,
// loaded element by element. Products and sums in f32; 4-bit weights are rounded to the operands' type first, as there.
// Odd shapes only occur in tests and tiny models: this is simple, not fast (bound by loads and index arithmetic).
#include "codes.cuh"

constexpr int TILE = 64, DEPTH = 16, THREADS = 256;

// W, dense or in 4 bits.
template <typename T> struct Weight {
    const void* w;
    bool quantized;
    Scales scales;
    const float* map;    // [256], of a doubly quantized W
    const float* values; // the code book

    __device__ float at(u64 i) const {
        if (!quantized) return wide(static_cast<const T*>(w)[i]);
        u32 byte = static_cast<const u8*>(w)[i / 2];
        float scale = scales.value(scales.fetch(i >> scales.block_shift), map);
        return wide(narrow<T>(__fmul_rn(values[i % 2 ? byte & 15 : byte >> 4], scale)));
    }
};

template <typename T, bool FORWARD, typename O>
__device__ void general(O* out, const O* in, const T* a, const Weight<T>& weight, const T* a2, const T* b2, u32 m,
                        u32 n, u32 k, u32 rank, float scale) {
    __shared__ float a_tile[DEPTH][TILE + 1], b_tile[DEPTH][TILE + 1];
    const u32 columns = (n + TILE - 1) / TILE;
    const u32 m0 = blockIdx.x / columns * TILE, n0 = blockIdx.x % columns * TILE;
    const int tid = threadIdx.x, row = tid / 16, column = tid % 16;
    float sums[4][4] = {};
    for (int part = 0; part < 2; part++) { // the weight, then the second pair
        const u32 inner = part ? rank : k;
        const T* left = part ? a2 : a;
        for (u32 k0 = 0; k0 < inner; k0 += DEPTH) {
#pragma unroll 1
            for (int i = tid; i < TILE * DEPTH; i += THREADS) {
                u32 r = i / DEPTH, l = i % DEPTH; // of a; and of b where rows of W run along the contraction
                bool inside = m0 + r < m && k0 + l < inner;
                a_tile[l][r] = inside ? wide(left[(u64)(m0 + r) * inner + k0 + l]) : 0.0f;
                u32 c = FORWARD ? r : i % TILE, d = FORWARD ? l : i / TILE;
                u64 at = FORWARD ? (u64)(n0 + c) * inner + k0 + d : (u64)(k0 + d) * n + n0 + c;
                bool there = n0 + c < n && k0 + d < inner;
                b_tile[d][c] = there ? (part ? wide(b2[at]) : weight.at(at)) : 0.0f;
            }
            __syncthreads();
#pragma unroll 2
            for (int l = 0; l < DEPTH; l++)
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sums[i][j] += a_tile[l][row + 16 * i] * b_tile[l][column + 16 * j];
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 r = m0 + row + 16 * i, c = n0 + column + 16 * j;
            if (r >= m || c >= n) continue;
            u64 at = (u64)r * n + c;
            out[at] = narrow<O>(sums[i][j] * scale + (in ? wide(in[at]) : 0.0f));
        }
}

#define GENERAL_ENTRY(TYPE, DIRECTION, FORWARD)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) gemm_general_##DIRECTION##_##TYPE(                           \
        void* out, const void* in, const TYPE* a, const void* b, const void* absmax, const float* absmax2,             \
        const float* map, const TYPE* a2, const TYPE* b2, u32 m, u32 n, u32 k, u32 rank, float scale,                  \
        const float* offset, u32 block_shift, u32 nested_shift, u32 book, u32 add, u32 wide_out) {                     \
        Scales scales = {absmax, absmax2, absmax2 ? *offset : 0.0f, block_shift, nested_shift};                        \
        Weight<TYPE> weight = {b, absmax != nullptr, scales, map, CODE_VALUES[book]};                                  \
        const void* from = add ? out : in;                                                                             \
        if (wide_out)                                                                                                  \
            general<TYPE, FORWARD>(static_cast<float*>(out), static_cast<const float*>(from), a, weight, a2, b2, m, n, \
                                   k, rank, scale);                                                                    \
        else                                                                                                           \
            general<TYPE, FORWARD>(static_cast<TYPE*>(out), static_cast<const TYPE*>(from), a, weight, a2, b2, m, n,   \
                                   k, rank, scale);                                                                    \
    }

GENERAL_ENTRY(bf16, forward, true)
GENERAL_ENTRY(bf16, input_grad, false)
GENERAL_ENTRY(f16, forward, true)
GENERAL_ENTRY(f16, input_grad, false)
