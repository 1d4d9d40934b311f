// RMSNorm forward and backward (formulas in mod.rs).
//
// A block takes a row: blocks that begin while others end keep memory busy over the sums in between. All that it reads is under
// way before the sum over the row, and held in registers until behind it: 16 elements of each array a thread, so that 16-bit
// rows may be 16384 wide and f32 rows 8192; weights come from the caches. Each row is read and written once: bound by memory.
// Wider, odd and unaligned rows are read again (from the caches), element by element. Sums have a fixed order: thread by thread,
// then over the block. Rows are taken from the last on: a product has just written what is read here, its last rows last, and
// they are in the second-level cache still; the product that follows begins with the first.
#include "runs.cuh"

// Threads that a row may take; f32 needs more registers.
template <typename T> constexpr int MAX_THREADS = 2048 / sizeof(T);
// Runs of a row that a thread holds: 16 elements.
template <typename T> constexpr int PER = 16 / RUN<T>;

template <typename... Pointers> __device__ __forceinline__ bool fits(u32 width, int run, Pointers... p) {
    return width % run == 0 && width <= 16 * blockDim.x && aligned(p...);
}

// y [gridDim.x, width] = x · rstd · weight [width]; rstd [gridDim.x] is read where GIVEN, made and written otherwise.
template <typename T, bool GIVEN>
__device__ __forceinline__ void forward(
    const T* x, const void* weight, u32 type, T* y, float* rstd, u32 width, float eps) {
    constexpr int N = RUN<T>;
    const u32 row = gridDim.x - 1 - blockIdx.x;
    x += (u64)row * width, y += (u64)row * width;
    auto scale_of = [&](float sum) {
        if constexpr (GIVEN) return rstd[row];
        float scale = 1.0f / sqrtf(block_sum(sum) / width + eps);
        if (threadIdx.x == 0) rstd[row] = scale;
        return scale;
    };
    float sum = 0.0f;
    if (fits(width, N, x, weight, y)) {
        // Columns of this thread's first run, and the distance to its next.
        const u32 first = threadIdx.x * N, stride = blockDim.x * N;
        Pack<T> kept[PER<T>];
#pragma unroll
        for (int p = 0; p < PER<T>; p++)
            if (first + p * stride < width) kept[p] = load_pack(x + first + p * stride);
        if constexpr (!GIVEN) {
#pragma unroll
            for (int p = 0; p < PER<T>; p++) {
                if (first + p * stride >= width) break;
                float xs[N];
                open(kept[p], xs);
#pragma unroll
                for (int j = 0; j < N; j++) sum += xs[j] * xs[j];
            }
        }
        const float scale = scale_of(sum);
#pragma unroll
        for (int p = 0; p < PER<T>; p++) {
            if (first + p * stride >= width) break;
            float out[N], w[N];
            open(kept[p], out);
            load_any(weight, type, first + p * stride, w);
#pragma unroll
            for (int j = 0; j < N; j++) out[j] = out[j] * scale * w[j];
            store(y + first + p * stride, out);
        }
    } else {
        if constexpr (!GIVEN)
            for (u32 i = threadIdx.x; i < width; i += blockDim.x) sum += wide(x[i]) * wide(x[i]);
        const float scale = scale_of(sum);
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            float w[1];
            load_any(weight, type, i, w);
            y[i] = narrow<T>(wide(x[i]) * scale * w[0]);
        }
    }
}

// dx [gridDim.x, width] += the gradient of the input. y, null or [gridDim.x, width], gets x · rstd · weight again; it may be
// `grad`.
template <typename T>
__device__ __forceinline__ void backward(
    const T* x, const void* weight, u32 type, const float* rstd, T* dx, const T* grad, T* y, u32 width) {
    constexpr int N = RUN<T>;
    const u32 row = gridDim.x - 1 - blockIdx.x;
    const u64 start = (u64)row * width;
    x += start, grad += start, dx += start;
    if (y) y += start;
    float sum = 0.0f;
    if (fits(width, N, x, weight, grad, dx, y)) {
        const u32 first = threadIdx.x * N, stride = blockDim.x * N;
        Pack<T> xs[PER<T>], grads[PER<T>], sums[PER<T>];
#pragma unroll
        for (int p = 0; p < PER<T>; p++) {
            if (first + p * stride >= width) break;
            xs[p] = load_pack(x + first + p * stride);
            grads[p] = load_pack(grad + first + p * stride);
            sums[p] = load_pack(dx + first + p * stride);
        }
        const float scale = rstd[row];
        // The weights, the row's elements and ŵ = grad · weight of run p.
        auto run = [&](int p, float (&w)[N], float (&x)[N], float (&products)[N]) {
            load_any(weight, type, first + p * stride, w);
            open(xs[p], x);
            open(grads[p], products);
#pragma unroll
            for (int j = 0; j < N; j++) products[j] = __fmul_rn(w[j], products[j]);
        };
#pragma unroll
        for (int p = 0; p < PER<T>; p++) {
            if (first + p * stride >= width) break;
            float w[N], x[N], products[N];
            run(p, w, x, products);
#pragma unroll
            for (int j = 0; j < N; j++) sum += products[j] * x[j];
        }
        const float mean = block_sum(sum) * scale * scale / width;
#pragma unroll
        for (int p = 0; p < PER<T>; p++) {
            if (first + p * stride >= width) break;
            float w[N], x[N], products[N], out[N];
            run(p, w, x, products);
            open(sums[p], out);
#pragma unroll
            for (int j = 0; j < N; j++) out[j] += scale * (products[j] - x[j] * mean);
            store(dx + first + p * stride, out);
            if (!y) continue;
#pragma unroll
            for (int j = 0; j < N; j++) out[j] = x[j] * scale * w[j];
            store(y + first + p * stride, out);
        }
    } else {
        float w[1];
        const float scale = rstd[row];
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            load_any(weight, type, i, w);
            sum += wide(grad[i]) * w[0] * wide(x[i]);
        }
        const float mean = block_sum(sum) * scale * scale / width;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            load_any(weight, type, i, w);
            const float x_i = wide(x[i]), term = scale * (wide(grad[i]) * w[0] - x_i * mean);
            dx[i] = narrow<T>(wide(dx[i]) + term);
            if (y) y[i] = narrow<T>(x_i * scale * w[0]);
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
    extern "C" __global__ __launch_bounds__(MAX_THREADS<T>, 2) void rms_norm_forward_##NAME( \
        const T* x, const void* weight, u32 type, T* y, float* rstd, u32 width, float eps) { \
        forward<T, false>(x, weight, type, y, rstd, width, eps); \
    } \
    extern "C" __global__ __launch_bounds__(MAX_THREADS<T>, 2) void rms_norm_apply_##NAME( \
        const T* x, const void* weight, u32 type, const float* rstd, T* y, u32 width) { \
        forward<T, true>(x, weight, type, y, const_cast<float*>(rstd), width, 0.0f); \
    } \
    extern "C" __global__ __launch_bounds__(MAX_THREADS<T>) void rms_norm_backward_##NAME( \
        const T* x, const void* weight, u32 type, const float* rstd, T* dx, const T* grad, T* y, u32 width) { \
        backward(x, weight, type, rstd, dx, grad, y, width); \
    } \
    extern "C" __global__ __launch_bounds__(COLUMN_THREADS) void rms_norm_weight_partial_##NAME( \
        const T* x, const float* rstd, const T* grad, float* partial, u32 rows, u32 width, u32 group_rows) { \
        if (width % RUN<T> == 0 && aligned(x, grad)) \
            weight_partial<T, RUN<T>>(x, rstd, grad, partial, rows, width, group_rows); \
        else \
            weight_partial<T, 1>(x, rstd, grad, partial, rows, width, group_rows); \
    }
FOR_FLOATS(RMS_NORM)
