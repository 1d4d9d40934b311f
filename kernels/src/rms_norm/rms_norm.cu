// RMSNorm forward and backward (formulas in mod.rs).
//
// A block takes rows in turn. From the sum over a row to the pass that needs it a thread holds its elements in
// registers: 16, so that 16-bit rows may be 16384 wide and f32 rows 8192. Its columns are the same in each row, so that the forward pass
// holds their weights too; in the backward pass they come from the caches. Each row is read and written once: bound by
// memory. Wider, odd and unaligned rows are read again (from the caches), element by element. Sums have a fixed order:
// thread by thread, then over the block. Rows are taken from the last on: a product has just written what is read here, its last
// rows last, and they are in the second-level cache still; the product that follows begins with the first.
#include "runs.cuh"

// Threads that a row may take; f32 needs more registers.
template <typename T> constexpr int MAX_THREADS = 2048 / sizeof(T);
// Runs of a row that a thread holds: 16 elements.
template <typename T> constexpr int PER = 16 / RUN<T>;

template <typename... Pointers> __device__ __forceinline__ bool fits(u32 width, int run, Pointers... p) {
    return width % run == 0 && width <= 16 * blockDim.x && aligned(p...);
}

// y [rows, width] = x · rstd · weight [width]; rstd [rows] is read where GIVEN, made and written otherwise.
template <typename T, bool GIVEN>
__device__ __forceinline__ void forward(
    const T* x, const void* weight, u32 type, T* y, float* rstd, u32 rows, u32 width, float eps) {
    constexpr int N = RUN<T>;
    auto scale_of = [&](float sum, u32 row) {
        if constexpr (GIVEN) return rstd[row];
        float scale = 1.0f / sqrtf(block_sum(sum) / width + eps);
        if (threadIdx.x == 0) rstd[row] = scale;
        return scale;
    };
    if (fits(width, N, x, weight, y)) {
        // Columns of this thread's first run, and the distance to its next.
        u32 first = threadIdx.x * N, stride = blockDim.x * N;
        float w[PER<T>][N];
#pragma unroll
        for (int p = 0; p < PER<T>; p++)
            if (first + p * stride < width) load_any(weight, type, first + p * stride, w[p]);
        for (u32 left = blockIdx.x; left < rows; left += gridDim.x) {
            const u32 row = rows - 1 - left;
            u64 start = (u64)row * width;
            Pack<T> kept[PER<T>];
            float sum = 0.0f;
#pragma unroll
            for (int p = 0; p < PER<T>; p++)
                if (first + p * stride < width) kept[p] = load_pack(x + start + first + p * stride);
            if constexpr (!GIVEN) {
#pragma unroll
                for (int p = 0; p < PER<T>; p++)
                    if (first + p * stride < width)
#pragma unroll
                        for (int j = 0; j < N; j++) sum += wide(kept[p].at[j]) * wide(kept[p].at[j]);
            }
            float scale = scale_of(sum, row);
#pragma unroll
            for (int p = 0; p < PER<T>; p++) {
                if (first + p * stride >= width) break;
                float out[N];
#pragma unroll
                for (int j = 0; j < N; j++) out[j] = wide(kept[p].at[j]) * scale * w[p][j];
                store(y + start + first + p * stride, out);
            }
        }
    } else {
        for (u32 left = blockIdx.x; left < rows; left += gridDim.x) {
            const u32 row = rows - 1 - left;
            u64 start = (u64)row * width;
            float sum = 0.0f;
            if constexpr (!GIVEN)
                for (u32 i = threadIdx.x; i < width; i += blockDim.x) sum += wide(x[start + i]) * wide(x[start + i]);
            float scale = scale_of(sum, row);
            for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
                float w[1];
                load_any(weight, type, i, w);
                y[start + i] = narrow<T>(wide(x[start + i]) * scale * w[0]);
            }
        }
    }
}

// dx [rows, width] += the gradient of the input. Held are x and ŵ = grad · weight. y, null or [rows, width], gets x · rstd ·
// weight again; it may be `grad`.
template <typename T>
__device__ __forceinline__ void backward(
    const T* x, const void* weight, u32 type, const float* rstd, T* dx, const T* grad, T* y, u32 rows, u32 width) {
    constexpr int N = RUN<T>;
    if (fits(width, N, x, weight, grad, dx, y)) {
        u32 first = threadIdx.x * N, stride = blockDim.x * N;
        for (u32 left = blockIdx.x; left < rows; left += gridDim.x) {
            const u32 row = rows - 1 - left;
            u64 start = (u64)row * width;
            Pack<T> xs[PER<T>], grads[PER<T>];
            float products[PER<T>][N];
#pragma unroll
            for (int p = 0; p < PER<T>; p++) {
                if (first + p * stride >= width) break;
                xs[p] = load_pack(x + start + first + p * stride);
                grads[p] = load_pack(grad + start + first + p * stride);
            }
            float sum = 0.0f;
#pragma unroll
            for (int p = 0; p < PER<T>; p++) {
                if (first + p * stride >= width) break;
                load_any(weight, type, first + p * stride, products[p]);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    products[p][j] *= wide(grads[p].at[j]);
                    sum += products[p][j] * wide(xs[p].at[j]);
                }
            }
            sum = block_sum(sum);
            float scale = rstd[row], mean = sum * scale * scale / width;
#pragma unroll
            for (int p = 0; p < PER<T>; p++) {
                if (first + p * stride >= width) break;
                T* target = dx + start + first + p * stride;
                float out[N], w[N];
                load(target, out);
#pragma unroll
                for (int j = 0; j < N; j++) out[j] += scale * (products[p][j] - wide(xs[p].at[j]) * mean);
                store(target, out);
                if (!y) continue;
                load_any(weight, type, first + p * stride, w);
#pragma unroll
                for (int j = 0; j < N; j++) out[j] = wide(xs[p].at[j]) * scale * w[j];
                store(y + start + first + p * stride, out);
            }
        }
    } else {
        for (u32 left = blockIdx.x; left < rows; left += gridDim.x) {
            const u32 row = rows - 1 - left;
            u64 start = (u64)row * width;
            float sum = 0.0f, w[1], scale = rstd[row];
            for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
                load_any(weight, type, i, w);
                sum += wide(grad[start + i]) * w[0] * wide(x[start + i]);
            }
            float mean = block_sum(sum) * scale * scale / width;
            for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
                load_any(weight, type, i, w);
                float term = scale * (wide(grad[start + i]) * w[0] - wide(x[start + i]) * mean);
                dx[start + i] = narrow<T>(wide(dx[start + i]) + term);
                if (y) y[start + i] = narrow<T>(wide(x[start + i]) * scale * w[0]);
            }
        }
    }
}

// First stage of the weight's gradient: sums over groups of rows, partial [groups, width]. A thread takes one run of
// columns (or one column) of the group blockIdx.y.
constexpr int COLUMN_THREADS = 128;
template <typename T, int N>
__device__ __forceinline__ void weight_partial(
    const T* x, const float* rstd, const T* grad, float* partial, u32 rows, u32 width, u32 group_rows) {
    u32 row = blockIdx.y * group_rows, end = min(row + group_rows, rows);
    u32 stride = gridDim.x * COLUMN_THREADS * N;
    for (u32 at = (blockIdx.x * COLUMN_THREADS + threadIdx.x) * N; at < width; at += stride) {
        float sums[N] = {};
#pragma unroll 4
        for (u32 r = row; r < end; r++) {
            float xs[N], grads[N], scale = rstd[r];
            load(x + (u64)r * width + at, xs);
            load(grad + (u64)r * width + at, grads);
#pragma unroll
            for (int j = 0; j < N; j++) sums[j] += grads[j] * xs[j] * scale;
        }
#pragma unroll
        for (int j = 0; j < N; j++) partial[(u64)blockIdx.y * width + at + j] = sums[j];
    }
}

// Second stage: dw [width] = Σ partial [groups, width]. A warp of columns a block, eight groups at a time.
extern "C" __global__ __launch_bounds__(256) void rms_norm_weight_sum(
    const float* partial, float* dw, u32 groups, u32 width) {
    __shared__ float parts[8][WARP];
    u32 column = blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
        for (u32 group = threadIdx.y; group < groups; group += 8) sum += partial[(u64)group * width + column];
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= width) return;
    for (int i = 1; i < 8; i++) sum += parts[i][threadIdx.x];
    dw[column] = sum;
}

#define RMS_NORM(NAME, T) \
    extern "C" __global__ __launch_bounds__(MAX_THREADS<T>) void rms_norm_forward_##NAME( \
        const T* x, const void* weight, u32 type, T* y, float* rstd, u32 rows, u32 width, float eps) { \
        forward<T, false>(x, weight, type, y, rstd, rows, width, eps); \
    } \
    extern "C" __global__ __launch_bounds__(MAX_THREADS<T>) void rms_norm_apply_##NAME( \
        const T* x, const void* weight, u32 type, const float* rstd, T* y, u32 rows, u32 width) { \
        forward<T, true>(x, weight, type, y, const_cast<float*>(rstd), rows, width, 0.0f); \
    } \
    extern "C" __global__ __launch_bounds__(MAX_THREADS<T>) void rms_norm_backward_##NAME( \
        const T* x, const void* weight, u32 type, const float* rstd, T* dx, const T* grad, T* y, u32 rows, u32 width) { \
        backward(x, weight, type, rstd, dx, grad, y, rows, width); \
    } \
    extern "C" __global__ __launch_bounds__(COLUMN_THREADS) void rms_norm_weight_partial_##NAME( \
        const T* x, const float* rstd, const T* grad, float* partial, u32 rows, u32 width, u32 group_rows) { \
        if (width % RUN<T> == 0 && aligned(x, grad)) \
            weight_partial<T, RUN<T>>(x, rstd, grad, partial, rows, width, group_rows); \
        else \
            weight_partial<T, 1>(x, rstd, grad, partial, rows, width, group_rows); \
    }
FOR_FLOATS(RMS_NORM)
