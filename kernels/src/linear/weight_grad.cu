// out [n, k] = scale · gᵀ · x for 16-bit g [tokens, n] and x [tokens, k], result f32: the gradient of a trained weight.
//
// Bound by the tensor cores. A block makes 128 × 128 of the result from 32 tokens at a time, three such steps in shared
// memory (48 KiB); 8 warps as 2 × 4, each 64 × 32. Both operands lie with the tokens as rows, so both are transposed on
// the way into fragments (ldmatrix.trans). A row of 256 bytes in shared memory holds its sixteen 16-byte pieces in the
// order piece ^ (token % 8), so that the eight rows of a matrix lie in different banks. Where there are few blocks,
// grid z cuts the tokens into slices, whose sums go to `partial` [slices, n, k] and are added by lora_sum.
#include "linear/ptx.cuh"

constexpr int TILE = 128, STEP = 32, STAGES = 3, PIECES = TILE / 8;

template <typename T> struct Step {
    uint4 g[STEP][PIECES], x[STEP][PIECES];
};

template <typename T>
__device__ __forceinline__ void stage(uint4 (&to)[STEP][PIECES], const T* from, u32 width, u32 first, u32 column,
                                      u32 end) {
#pragma unroll
    for (int part = 0; part < STEP * PIECES / 256; part++) {
        int index = part * 256 + threadIdx.x, row = index / PIECES, piece = index % PIECES;
        u32 token = first + row, at = column + 8 * piece;
        bool valid = token < end && at < width;
        copy16(shared_address(&to[row][piece ^ row % 8]), valid ? from + (u64)token * width + at : from, valid);
    }
}

template <typename T>
__device__ __forceinline__ void weight_grad(const T* g, const T* x, float* out, u32 tokens, u32 n, u32 k, u32 slice,
                                            float scale) {
    __shared__ Step<T> steps[STAGES];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 row0 = blockIdx.y * TILE, col0 = blockIdx.x * TILE;
    const u32 begin = blockIdx.z * slice, end = min(tokens, begin + slice);
    const u32 count = begin < end ? (end - begin + STEP - 1) / STEP : 0;
    const int m0 = warp / 4 * 64, n0 = warp % 4 * 32;

    float sum[4][4][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        stage(steps[s].g, g, n, begin + s * STEP, row0, end);
        stage(steps[s].x, x, k, begin + s * STEP, col0, end);
        commit_copies();
    }
    for (u32 step = 0; step < count; step++) {
        wait_copies(STAGES - 2);
        __syncthreads();
        // Into the buffer that all have left behind.
        Step<T>& next = steps[(step + STAGES - 1) % STAGES];
        stage(next.g, g, n, begin + (step + STAGES - 1) * STEP, row0, end);
        stage(next.x, x, k, begin + (step + STAGES - 1) * STEP, col0, end);
        commit_copies();
        const Step<T>& now = steps[step % STAGES];
#pragma unroll
        for (int t = 0; t < STEP; t += 16) {
            // Matrix lane / 8 of the four: tokens +8 for the upper two, columns +8 for the odd ones; b the other way.
            int row = lane % 8, matrix = lane / 8;
            u32 b[4][2];
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                int token = t + row + 8 * (matrix % 2), piece = (n0 + 8 * j) / 8 + matrix / 2;
                u32 r[4];
                load_matrices_transposed(r, shared_address(&now.x[token][piece ^ token % 8]));
                b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
                int token = t + row + 8 * (matrix / 2), piece = (m0 + 16 * m) / 8 + matrix % 2;
                u32 a[4];
                load_matrices_transposed(a, shared_address(&now.g[token][piece ^ token % 8]));
#pragma unroll
                for (int j = 0; j < 4; j++) multiply<T>(sum[m][j], a, b[j][0], b[j][1]);
            }
        }
    }
    wait_copies(0);

    out += (u64)blockIdx.z * n * k;
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 row = row0 + m0 + 16 * m + 8 * h + lane / 4, col = col0 + n0 + 8 * j + 2 * (lane % 4);
                if (row >= n || col >= k) continue;
                *reinterpret_cast<float2*>(out + (u64)row * k + col) =
                    make_float2(sum[m][j][2 * h] * scale, sum[m][j][2 * h + 1] * scale);
            }
        }
    }
}

// n and k are multiples of 8, slice of 32.
#define WEIGHT_GRAD(T, S)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        weight_grad_##S(const T* g, const T* x, float* out, u32 tokens, u32 n, u32 k, u32 slice, float scale) {        \
        weight_grad<T>(g, x, out, tokens, n, k, slice, scale);                                                         \
    }
WEIGHT_GRAD(f16, f16)
WEIGHT_GRAD(bf16, bf16)
