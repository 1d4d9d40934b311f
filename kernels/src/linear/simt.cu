// out [m, n] = scale · a · b (+ out) in f32 arithmetic, one fused multiply-add after another over the inner index: the
// products of f32 training, and of types and shapes that no other kernel takes.
//
//   simt_forward      a [m, inner], b [n, inner]     x · Wᵀ
//   simt_input_grad   a [m, inner], b [inner, n]     g · W
//   simt_weight_grad  a [inner, m], b [inner, n]     gᵀ · x
//
// Bound by the f32 units. A block makes 128 × 128 of the result with 256 threads, or 64 × 64 with 64 where there would
// be few blocks; a thread makes 8 × 8, as four 4 × 4 corners, so that its reads of shared memory are 16 bytes wide and
// without conflict. Of the inner index 16 steps at a time lie in shared memory, twice: while one is used, the next is
// read into registers as it is and widened on its way into the other. That is for an f32 `a`, and a `b` of f32, of 16
// bits or of codes, all with rows of whole fours; `_any` kernels take everything else, element by element. A 4-bit
// weight is decoded on its way: table, times scale, rounded to its type, as the CPU does. Where there are few blocks
// still, or the result is not f32, grid z cuts the inner index into slices, whose sums simt_sum adds in order.
#include "codes.cuh"

enum Type : u32 { F32, F16, BF16, CODES };

// A matrix [rows, cols].
struct Operand {
    const void* data;
    u32 rows, cols;
    u32 type;  // of the values; of decoded ones for codes
    Scales scales;
};

// What the codes' decoding needs in shared memory.
struct Tables {
    float values[16], map[256];

    __device__ __forceinline__ void fill(const Scales& scales, u32 quant_type, const float* from) {
        if (threadIdx.x < 16) values[threadIdx.x] = CODE_VALUES[quant_type][threadIdx.x];
        if (scales.nested != nullptr) {
            for (int i = threadIdx.x; i < 256; i += blockDim.x) map[i] = from[i];
        }
    }
};

template <typename T> __device__ __forceinline__ float4 rounded(float4 v) {
    return make_float4(wide(narrow<T>(v.x)), wide(narrow<T>(v.y)), wide(narrow<T>(v.z)), wide(narrow<T>(v.w)));
}

// Four neighbours of a row as they were read, and widened. FULL, HALF, QUARTER: 32, 16 and 4 bits an element.
enum Kind { FULL, HALF, QUARTER };
template <Kind KIND> struct Four;
template <> struct Four<FULL> {
    uint4 raw;
    __device__ __forceinline__ void fetch(const Operand& m, u64 index, bool valid) {
        raw = valid ? __ldg((const uint4*)m.data + index / 4) : make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ float4 widen(const Operand& m, const Tables& tables) const {
        return *reinterpret_cast<const float4*>(&raw);
    }
};
template <> struct Four<HALF> {
    uint2 raw;
    __device__ __forceinline__ void fetch(const Operand& m, u64 index, bool valid) {
        raw = valid ? __ldg((const uint2*)m.data + index / 4) : make_uint2(0, 0);
    }
    __device__ __forceinline__ float4 widen(const Operand& m, const Tables& tables) const {
        if (m.type == BF16) {
            return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xFFFF0000u),
                               __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xFFFF0000u));
        }
        const f16* h = reinterpret_cast<const f16*>(&raw);
        return make_float4(wide(h[0]), wide(h[1]), wide(h[2]), wide(h[3]));
    }
};
template <> struct Four<QUARTER> {
    u32 codes; // bit 16: valid
    uint2 scale;
    __device__ __forceinline__ void fetch(const Operand& m, u64 index, bool valid) {
        codes = 0;
        if (!valid) return;
        codes = 0x10000u | __ldg((const unsigned short*)m.data + index / 4);
        scale = m.scales.fetch(index >> m.scales.block_shift);
    }
    __device__ __forceinline__ float4 widen(const Operand& m, const Tables& tables) const {
        if (codes == 0) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float s = m.scales.value(scale, tables.map);
        const float* values = tables.values;
        float4 v = make_float4(values[codes >> 4 & 15] * s, values[codes & 15] * s, values[codes >> 12 & 15] * s,
                               values[codes >> 8 & 15] * s);
        if (m.type == BF16) v = rounded<bf16>(v);
        else if (m.type == F16) v = rounded<f16>(v);
        return v;
    }
};

// Any element of any matrix, 0 beyond it.
__device__ __forceinline__ float element(const Operand& m, bool codes, u32 row, u32 col, const Tables& tables) {
    if (row >= m.rows || col >= m.cols) return 0.0f;
    u64 index = (u64)row * m.cols + col;
    if (codes) {
        float s = m.scales.value(m.scales.fetch(index >> m.scales.block_shift), tables.map);
        u32 byte = ((const u8*)m.data)[index / 2];
        float x = tables.values[index % 2 == 0 ? byte >> 4 : byte & 15] * s;
        return m.type == F32 ? x : m.type == F16 ? wide(narrow<f16>(x)) : wide(narrow<bf16>(x));
    }
    if (m.type == F32) return ((const float*)m.data)[index];
    return m.type == F16 ? wide(((const f16*)m.data)[index]) : wide(((const bf16*)m.data)[index]);
}

constexpr int DEPTH = 16;

// A strip of an operand, SIDE wide and DEPTH of the inner index deep, on its way to shared memory, where the inner
// index is the outer one. INNER: the operand's rows run along the inner index, else across it.
template <Kind KIND, int SIDE, bool INNER> struct Strip {
    static constexpr int THREADS = SIDE * SIDE / 64, FOURS = SIDE * DEPTH / 4 / THREADS;
    Four<KIND> fours[FOURS];

    __device__ __forceinline__ void fetch(const Operand& m, u32 first, u32 inner) {
#pragma unroll
        for (int f = 0; f < FOURS; f++) {
            u32 four = f * THREADS + threadIdx.x;
            u32 row = INNER ? first + four / (DEPTH / 4) : inner + four / (SIDE / 4);
            u32 col = INNER ? inner + four % (DEPTH / 4) * 4 : first + four % (SIDE / 4) * 4;
            fours[f].fetch(m, (u64)row * m.cols + col, row < m.rows && col < m.cols);
        }
    }
    __device__ __forceinline__ void put(const Operand& m, const Tables& tables, float (&to)[DEPTH][SIDE + 4]) const {
#pragma unroll
        for (int f = 0; f < FOURS; f++) {
            u32 four = f * THREADS + threadIdx.x;
            float4 v = fours[f].widen(m, tables);
            if (INNER) {
                u32 at = four / (DEPTH / 4), depth = four % (DEPTH / 4) * 4;
                to[depth][at] = v.x, to[depth + 1][at] = v.y, to[depth + 2][at] = v.z, to[depth + 3][at] = v.w;
            } else {
                *reinterpret_cast<float4*>(&to[four / (SIDE / 4)][four % (SIDE / 4) * 4]) = v;
            }
        }
    }
};

// The part of the result that a thread makes: rows ty + {0..4, HALF..HALF + 4}, columns likewise.
template <int SIDE> struct Corner {
    static constexpr int HALF = SIDE / 2, SPAN = SIDE / 8;
    float sum[8][8];
    int ty, tx;

    __device__ __forceinline__ Corner() : ty(threadIdx.x / SPAN * 4), tx(threadIdx.x % SPAN * 4) {
#pragma unroll
        for (int i = 0; i < 64; i++) sum[i / 8][i % 8] = 0.0f;
    }
    __device__ __forceinline__ void add(const float (&a_tile)[DEPTH][SIDE + 4],
                                        const float (&b_tile)[DEPTH][SIDE + 4]) {
#pragma unroll 2
        for (int depth = 0; depth < DEPTH; depth++) {
            float a[8], b[8];
            *reinterpret_cast<float4*>(a) = *reinterpret_cast<const float4*>(&a_tile[depth][ty]);
            *reinterpret_cast<float4*>(a + 4) = *reinterpret_cast<const float4*>(&a_tile[depth][ty + HALF]);
            *reinterpret_cast<float4*>(b) = *reinterpret_cast<const float4*>(&b_tile[depth][tx]);
            *reinterpret_cast<float4*>(b + 4) = *reinterpret_cast<const float4*>(&b_tile[depth][tx + HALF]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int j = 0; j < 8; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
            }
        }
    }
    template <bool WHOLE>
    __device__ __forceinline__ void store(float* out, u32 row0, u32 col0, u32 m, u32 n, float scale, u32 add) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 row = row0 + ty + i % 4 + i / 4 * HALF;
            if (row >= m) continue;
            float* line = out + (u64)row * n;
#pragma unroll
            for (int j = 0; j < 8; j += WHOLE ? 4 : 1) {
                u32 col = col0 + tx + j % 4 + j / 4 * HALF;
                if (col >= n) continue;
                if (WHOLE) {
                    float4* to = reinterpret_cast<float4*>(line + col);
                    float4 old = add ? *to : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    const float* s = &sum[i][j];
                    *to = make_float4(fmaf(scale, s[0], old.x), fmaf(scale, s[1], old.y), fmaf(scale, s[2], old.z),
                                      fmaf(scale, s[3], old.w));
                } else {
                    line[col] = fmaf(scale, sum[i][j], add ? line[col] : 0.0f);
                }
            }
        }
    }
};

template <int SIDE, Kind KIND, bool A_INNER, bool B_INNER>
__device__ __forceinline__ void product(const Operand& a, const Operand& b, u32 quant_type, const float* map,
                                        float* out, u32 m, u32 n, u32 inner, u32 slice, float scale, u32 add) {
    __shared__ __align__(16) float a_tile[2][DEPTH][SIDE + 4], b_tile[2][DEPTH][SIDE + 4];
    __shared__ Tables tables;
    if (KIND == QUARTER) {
        tables.fill(b.scales, quant_type, map);
        __syncthreads();
    }
    const u32 row0 = blockIdx.y * SIDE, col0 = blockIdx.x * SIDE;
    const u32 begin = blockIdx.z * slice, end = min(inner, begin + slice);
    Corner<SIDE> corner;
    Strip<FULL, SIDE, A_INNER> a_strip;
    Strip<KIND, SIDE, B_INNER> b_strip;
    a_strip.fetch(a, row0, begin);
    b_strip.fetch(b, col0, begin);
    a_strip.put(a, tables, a_tile[0]);
    b_strip.put(b, tables, b_tile[0]);
    __syncthreads();
    int now = 0;
#pragma unroll 1
    for (u32 at = begin; at < end; at += DEPTH, now ^= 1) {
        const bool more = at + DEPTH < end;
        if (more) {
            a_strip.fetch(a, row0, at + DEPTH);
            b_strip.fetch(b, col0, at + DEPTH);
        }
        corner.add(a_tile[now], b_tile[now]);
        if (more) {
            a_strip.put(a, tables, a_tile[now ^ 1]);
            b_strip.put(b, tables, b_tile[now ^ 1]);
        }
        __syncthreads();
    }
    corner.template store<true>(out + (u64)blockIdx.z * m * n, row0, col0, m, n, scale, add);
}

template <bool A_INNER, bool B_INNER>
__device__ __forceinline__ void product_of_any(const Operand& a, const Operand& b, bool codes, u32 quant_type,
                                               const float* map, float* out, u32 m, u32 n, u32 inner, u32 slice,
                                               float scale, u32 add) {
    constexpr int SIDE = 64;
    __shared__ __align__(16) float a_tile[DEPTH][SIDE + 4], b_tile[DEPTH][SIDE + 4];
    __shared__ Tables tables;
    if (codes) tables.fill(b.scales, quant_type, map);
    const u32 row0 = blockIdx.y * SIDE, col0 = blockIdx.x * SIDE;
    const u32 begin = blockIdx.z * slice, end = min(inner, begin + slice);
    Corner<SIDE> corner;
#pragma unroll 1
    for (u32 at = begin; at < end; at += DEPTH) {
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < SIDE * DEPTH; i += SIDE * SIDE / 64) {
            // Neighbouring threads read neighbours of a row.
            int a_side = A_INNER ? i / DEPTH : i % SIDE, a_depth = A_INNER ? i % DEPTH : i / SIDE;
            int b_side = B_INNER ? i / DEPTH : i % SIDE, b_depth = B_INNER ? i % DEPTH : i / SIDE;
            a_tile[a_depth][a_side] = A_INNER ? element(a, false, row0 + a_side, at + a_depth, tables)
                                              : element(a, false, at + a_depth, row0 + a_side, tables);
            b_tile[b_depth][b_side] = B_INNER ? element(b, codes, col0 + b_side, at + b_depth, tables)
                                              : element(b, codes, at + b_depth, col0 + b_side, tables);
        }
        __syncthreads();
        corner.add(a_tile, b_tile);
    }
    corner.template store<false>(out + (u64)blockIdx.z * m * n, row0, col0, m, n, scale, add);
}

// The parameters from absmax on describe a b of codes. Block z sums `slice` (a multiple of 16) of the inner index and
// writes to out [slices, m, n].
#define PARAMS                                                                                                         \
    const void *a, const void *b, float *out, const void *absmax, const float *nested, const float *map, u32 m, u32 n, \
        u32 inner, u32 slice, float scale, u32 add, u32 a_type, u32 b_type, u32 codes, u32 quant_type,                 \
        u32 block_shift, u32 nested_shift, const float *offset
#define OPERANDS(A_INNER, B_INNER)                                                                                     \
    Operand left{a, A_INNER ? m : inner, A_INNER ? inner : m, a_type, Scales{}};                                       \
    Operand right{b, B_INNER ? n : inner, B_INNER ? inner : n, b_type,                                                 \
                  Scales{absmax, nested, nested ? *offset : 0.0f, block_shift, nested_shift}};
#define SIMT(NAME, SIDE, KIND, A_INNER, B_INNER, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(SIDE * SIDE / 64, BLOCKS) NAME(PARAMS) {                              \
        OPERANDS(A_INNER, B_INNER)                                                                                     \
        product<SIDE, KIND, A_INNER, B_INNER>(left, right, quant_type, map, out, m, n, inner, slice, scale, add);      \
    }
#define SIMT_ANY(NAME, A_INNER, B_INNER)                                                                               \
    extern "C" __global__ void __launch_bounds__(64) NAME(PARAMS) {                                                    \
        OPERANDS(A_INNER, B_INNER)                                                                                     \
        product_of_any<A_INNER, B_INNER>(left, right, codes != 0, quant_type, map, out, m, n, inner, slice, scale,     \
                                         add);                                                                         \
    }
SIMT(simt_forward_full_128, 128, FULL, true, true, 2)
SIMT(simt_forward_half_128, 128, HALF, true, true, 2)
SIMT(simt_forward_codes_128, 128, QUARTER, true, true, 2)
SIMT(simt_forward_full_64, 64, FULL, true, true, 6)
SIMT(simt_forward_half_64, 64, HALF, true, true, 6)
SIMT(simt_forward_codes_64, 64, QUARTER, true, true, 6)
SIMT(simt_input_grad_full_128, 128, FULL, true, false, 2)
SIMT(simt_input_grad_half_128, 128, HALF, true, false, 2)
SIMT(simt_input_grad_codes_128, 128, QUARTER, true, false, 2)
SIMT(simt_input_grad_full_64, 64, FULL, true, false, 6)
SIMT(simt_input_grad_half_64, 64, HALF, true, false, 6)
SIMT(simt_input_grad_codes_64, 64, QUARTER, true, false, 6)
SIMT(simt_weight_grad_full_128, 128, FULL, false, false, 2)
SIMT(simt_weight_grad_full_64, 64, FULL, false, false, 6)
SIMT_ANY(simt_forward_any, true, true)
SIMT_ANY(simt_input_grad_any, true, false)
SIMT_ANY(simt_weight_grad_any, false, false)

template <typename T>
__device__ __forceinline__ void sum_slices(const float* partial, T* out, u64 numel, u32 slices, float scale, u32 add) {
    u64 index = (u64)blockIdx.x * 256 + threadIdx.x;
    if (index >= numel) return;
    float sum = 0.0f;
    for (u32 slice = 0; slice < slices; slice++) sum += partial[slice * numel + index];
    out[index] = narrow<T>(fmaf(scale, sum, add ? wide(out[index]) : 0.0f));
}
// out = scale · Σ over slices of partial [slices, numel] (+ out).
#define SUM(T, S)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        simt_sum_##S(const float* partial, T* out, u64 numel, u32 slices, float scale, u32 add) {                      \
        sum_slices(partial, out, numel, slices, scale, add);                                                           \
    }
SUM(float, f32)
SUM(f16, f16)
SUM(bf16, bf16)
