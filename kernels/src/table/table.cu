// Tables in 8 bits: a code of -127 to 127 an element and one scale a row (mod.rs has the contract).
//
//   table_quantize    codes and scales of rows
//   table_rows        rows as floats, those of ids or a range of them
//   table_columns     a range of columns out of one matrix and into another
//   table_decode      y = scales · (x · codesᵀ) for 1 to 16 rows of x, which reads the codes once
//
// All are bound by memory. A block has a row of the result in the first three; the last is narrow.cuh's.
#include "linear/narrow.cuh"
#include "runs.cuh"

constexpr int THREADS = 128;
// Codes that a thread takes at a time.
constexpr int CODES = 8;

// What a row's scale is made of: the bits of the largest magnitude, by which a NaN is more than all.
template <typename T, int N> __device__ __forceinline__ u32 largest(const T* row, u32 width) {
    u32 top = 0;
    for (u32 at = threadIdx.x * N; at < width; at += THREADS * N) {
        float x[N];
        load(row + at, x);
#pragma unroll
        for (int j = 0; j < N; j++) top = max(top, __float_as_uint(x[j]) & 0x7fffffffu);
    }
    __shared__ u32 parts[THREADS / WARP];
    top = __reduce_max_sync(~0u, top);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = top;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / WARP; i++) top = max(top, parts[i]);
    return top;
}

// Rounds to nearest even. Scale and quotient are IEEE divisions, as the CPU's are.
template <typename T, int N>
__device__ __forceinline__ void quantize(const T* row, signed char* codes, float* scale, u32 width) {
    u32 top = largest<T, N>(row, width);
    float s = __fdiv_rn(__uint_as_float(top), 127.0f);
    bool number = top < 0x7f800000u, coded = number && s >= 1.17549435e-38f;
    if (threadIdx.x == 0) *scale = coded ? s : number ? 0.0f : __uint_as_float(0x7fc00000u);
    for (u32 at = threadIdx.x * N; at < width; at += THREADS * N) {
        float x[N];
        load(row + at, x);
        alignas(8) signed char c[N];
#pragma unroll
        for (int j = 0; j < N; j++) c[j] = coded ? (signed char)__float2int_rn(__fdiv_rn(x[j], s)) : 0;
        if constexpr (N == CODES) *reinterpret_cast<uint2*>(codes + at) = *reinterpret_cast<const uint2*>(c);
        else codes[at] = c[0];
    }
}

template <typename T, int N>
__device__ __forceinline__ void dequantize(const signed char* codes, float scale, T* out, u32 width) {
    for (u32 at = threadIdx.x * N; at < width; at += THREADS * N) {
        alignas(8) signed char c[N];
        if constexpr (N == CODES) *reinterpret_cast<uint2*>(c) = *reinterpret_cast<const uint2*>(codes + at);
        else c[0] = codes[at];
        float x[N];
#pragma unroll
        for (int j = 0; j < N; j++) x[j] = __fmul_rn((float)c[j], scale);
        store(out + at, x);
    }
}

// quantize: row gridDim.x of x [., width]. rows: out [gridDim.x, width], rows `ids` of the table, or those from `first`
// on; an id outside of [0, vocab) gives a row of NaN. columns: `width` columns of gridDim.x rows, `from` and `to` being
// the first of them in rows of from_width and to_width; gridDim.y shares out the columns.
#define TABLE(NAME, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        table_quantize_##NAME(const T* x, signed char* codes, float* scales, u32 width) {                              \
        x += (u64)blockIdx.x * width, codes += (u64)blockIdx.x * width;                                                \
        if (width % CODES == 0 && aligned(x) && ((u64)codes & 7) == 0)                                                 \
            quantize<T, CODES>(x, codes, scales + blockIdx.x, width);                                                  \
        else quantize<T, 1>(x, codes, scales + blockIdx.x, width);                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        table_rows_##NAME(const int* ids, u32 first, const signed char* codes, const float* scales, T* out, u32 vocab, \
                          u32 width) {                                                                                 \
        int row = ids != nullptr ? ids[blockIdx.x] : (int)(first + blockIdx.x);                                        \
        out += (u64)blockIdx.x * width;                                                                                \
        if (row < 0 || row >= (int)vocab) {                                                                            \
            for (u32 at = threadIdx.x; at < width; at += THREADS) out[at] = narrow<T>(__int_as_float(0x7fc00000));     \
            return;                                                                                                    \
        }                                                                                                              \
        codes += (u64)row * width;                                                                                     \
        if (width % CODES == 0 && aligned(out) && ((u64)codes & 7) == 0)                                               \
            dequantize<T, CODES>(codes, scales[row], out, width);                                                      \
        else dequantize<T, 1>(codes, scales[row], out, width);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        table_columns_##NAME(const T* from, T* to, u32 from_first, u32 from_width, u32 to_first, u32 to_width,         \
                             u32 width) {                                                                              \
        from += (u64)blockIdx.x * from_width + from_first, to += (u64)blockIdx.x * to_width + to_first;                \
        const u32 thread = blockIdx.y * THREADS + threadIdx.x, threads = gridDim.y * THREADS;                          \
        if (width % RUN<T> == 0 && aligned(from, to))                                                                  \
            for (u32 at = thread * RUN<T>; at < width; at += threads * RUN<T>)                                         \
                store_pack(to + at, load_pack(from + at));                                                             \
        else                                                                                                           \
            for (u32 at = thread; at < width; at += threads) to[at] = from[at];                                        \
    }
FOR_FLOATS(TABLE)

// y [tokens, vocab] in f32.
struct StoreScaled {
    static constexpr bool DOWNWARDS = true;
    float* y;
    const float* scales;
    u32 vocab, tokens;
    __device__ __forceinline__ void operator()(u32 row, u32 token, float a, float b) const {
        float scale = scales[row];
        y[(u64)token * vocab + row] = a * scale;
        if (token + 1 < tokens) y[(u64)(token + 1) * vocab + row] = b * scale;
    }
};

// x [tokens, width], width a multiple of 8. Codes are exact in T; sums take their scale in f32.
#define DECODE(NAME, T, NT)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        NAME(const T* x, const signed char* codes, const float* scales, float* y, u32 vocab, u32 width, u32 tokens) {  \
        narrow_product<T, NT, 4, 1, false, false>(codes, x, vocab, tokens, width, Mask{},                              \
                                                  StoreScaled{y, scales, vocab, tokens});                              \
    }
DECODE(table_decode_8_f16, f16, 1)
DECODE(table_decode_16_f16, f16, 2)
DECODE(table_decode_8_bf16, bf16, 1)
DECODE(table_decode_16_bf16, bf16, 2)
