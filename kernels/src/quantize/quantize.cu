// NF4 and FP4 codes and scales of a matrix, and double quantization of the scales.
//
// Bound by memory: a bf16 weight is read as 2 bytes and written as half a byte. So a code has to take few instructions:
// the scaled value is rounded to one of 33 cells of width 1/16 by an addition (of a number so large that its unit in the
// last place is 1), no cell holds more than one of the code book's decision points, and one comparison settles the code.
#include "codes.cuh"
#include "dynamic8/dynamic8.cuh"

constexpr int THREADS = 128;
constexpr int PACK = 8;                         // elements that a thread codes at a time: 4 bytes of codes
constexpr int PACKS = 4;                        // packs of a thread
constexpr int TILE = THREADS * PACK * PACKS;    // elements of a block: the largest block of a scale
constexpr int SPAN = WARP * PACK;               // elements that a warp codes at a time
constexpr int CELLS = 64;                       // 33 are used; NaN ends up in the last one

// For each cell: its decision point, and the codes below (low bits) and above it (from bit 4 on).
struct Cells {
    float point[CELLS];
    u32 codes[CELLS];
};

// The decision points of kernels/src/quantize/codes.rs, with the digits of the f32 numbers that those are.
constexpr double NF4_POINTS[15] = {
    -0.84809643030166626, -0.61063289642333984, -0.45999526977539062, -0.33967941999435425, -0.23460739850997925,
    -0.13791173696517944, -0.045525018125772476, 0.03979014977812767, 0.1202552542090416, 0.2035212516784668,
    0.29201376438140869, 0.38931253552436829, 0.50166338682174683, 0.64278692007064819, 0.86147838830947876};
constexpr double FP4_POINTS[7] = {
    0.0026041700039058924, 0.0859375, 0.2083333283662796, 0.2916666567325592, 0.41666668653488159, 0.58333301544189453,
    0.83333331346511841};
constexpr u32 FP4_BY_RANK[8] = {0, 1, 6, 7, 4, 5, 2, 3};

// NF4 looks at x in [-1, 1], whose cells are counted from -1; FP4 at |x|.
constexpr Cells make_cells(bool nf4) {
    Cells cells = {};
    int points = nf4 ? 15 : 7;
    for (int cell = 0; cell < CELLS; cell++) {
        u32 below = 0;
        bool inside = false;
        for (int i = 0; i < points; i++) {
            double point = nf4 ? NF4_POINTS[i] : FP4_POINTS[i];
            int of_point = (int)(16 * point + (nf4 ? 16.5 : 0.5));
            if (of_point < cell) below++;
            if (of_point == cell) {
                inside = true;
                cells.point[cell] = (float)point;
            }
        }
        u32 above = inside ? below + 1 : below;
        if (cell > 32) below = above = 0;
        cells.codes[cell] = nf4 ? below | above << 4 : FP4_BY_RANK[below] | FP4_BY_RANK[above] << 4;
    }
    return cells;
}
__device__ const Cells NF4_CELLS = make_cells(true);
__device__ const Cells FP4_CELLS = make_cells(false);

// Code of a scaled value, which lies in [-1, 1] but for rounding or is NaN; of NaN 0.
template <bool NF4> __device__ __forceinline__ u32 encode(const Cells& cells, float x) {
    constexpr float LARGE = 12582912.0f; // 1.5 * 2^23
    float value = NF4 ? x : fabsf(x);
    u32 cell = __float_as_uint(fmaf(value, 16.0f, NF4 ? LARGE + 16.0f : LARGE)) % CELLS;
    u32 codes = cells.codes[cell];
    u32 code = (value > cells.point[cell] ? codes >> 4 : codes) & 15;
    return NF4 ? code : code | (x < 0.0f ? 8 : 0);
}

template <typename T> struct Raw {
    T at[PACK];
};

// Elements `first` to `first + 8` of x, zeros beyond the end.
template <typename T> __device__ __forceinline__ Raw<T> load(const T* x, u64 first, u64 numel, bool aligned) {
    Raw<T> raw;
    if (aligned && first + PACK <= numel) {
#pragma unroll
        for (int i = 0; i < PACK; i += Pack<T>::SIZE) {
            *reinterpret_cast<Pack<T>*>(raw.at + i) = load_pack(x + first + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < PACK; i++) raw.at[i] = first + i < numel ? x[first + i] : narrow<T>(0.0f);
    }
    return raw;
}

// Block b codes the elements from b * TILE on. Writes packed [ceil(numel / 2)] and absmax [ceil(numel / block)].
template <bool NF4, typename T>
__device__ __forceinline__ void quantize(const T* x, u8* packed, float* absmax, u64 numel, u32 block_shift, u32 aligned) {
    __shared__ Cells cells;
    __shared__ u32 largest[TILE / SPAN];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 start = (u64)blockIdx.x * TILE;
    Raw<T> raw[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) raw[p] = load(x, start + (p * THREADS + threadIdx.x) * PACK, numel, aligned);
    for (int i = threadIdx.x; i < CELLS; i += THREADS) {
        cells.point[i] = NF4 ? NF4_CELLS.point[i] : FP4_CELLS.point[i];
        cells.codes[i] = NF4 ? NF4_CELLS.codes[i] : FP4_CELLS.codes[i];
    }

    // Magnitudes order like their bits; NaN and infinity come last.
    u32 most[PACKS];
    u32 lanes = min(1u << block_shift, SPAN) / PACK; // that share a block
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        most[p] = 0;
#pragma unroll
        for (int i = 0; i < PACK; i++) most[p] = max(most[p], __float_as_uint(wide(raw[p].at[i])) & 0x7FFFFFFF);
    }
    for (u32 apart = lanes / 2; apart > 0; apart /= 2) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) most[p] = max(most[p], __shfl_xor_sync(~0u, most[p], apart));
    }
    if ((1u << block_shift) > SPAN) {
        // A block is several spans, which follow each other over the warps and then over the packs.
        if (lane == 0) {
#pragma unroll
            for (int p = 0; p < PACKS; p++) largest[p * (THREADS / WARP) + warp] = most[p];
        }
        __syncthreads();
        u32 spans = (1u << block_shift) / SPAN;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            u32 first = (p * (THREADS / WARP) + warp) & ~(spans - 1);
            for (u32 i = 0; i < spans; i++) most[p] = max(most[p], largest[first + i]);
        }
    }
    __syncthreads();

#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        u64 first = start + (p * THREADS + threadIdx.x) * PACK;
        if (first >= numel) continue;
        // Subnormal scales count as zero; what is not finite makes the scale NaN. Either way all codes are 0.
        float scale = __uint_as_float(most[p]), inverse = __fdiv_rn(1.0f, scale);
        if (most[p] < 0x00800000) scale = 0.0f, inverse = __uint_as_float(0x7FFFFFFF);
        if (most[p] >= 0x7F800000) scale = inverse = __uint_as_float(0x7FFFFFFF);
        if ((first & ((1ull << block_shift) - 1)) == 0) absmax[first >> block_shift] = scale;
        u32 word = 0;
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            u32 code = encode<NF4>(cells, __fmul_rn(wide(raw[p].at[i]), inverse));
            word |= code << (i / 2 * 8 + (i % 2 == 0 ? 4 : 0)); // the even element takes the high half of its byte
        }
        if (first + PACK <= numel) {
            *reinterpret_cast<u32*>(packed + first / 2) = word;
        } else {
            for (u64 i = 0; 2 * i < numel - first; i++) packed[first / 2 + i] = word >> (8 * i);
        }
    }
}

#define QUANTIZE(NAME, IS_NF4, T, TYPE)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                      \
        NAME##_##TYPE(const T* x, u8* packed, float* absmax, u64 numel, u32 block_shift, u32 aligned) {                        \
        quantize<IS_NF4, T>(x, packed, absmax, numel, block_shift, aligned);                                                   \
    }
QUANTIZE(quantize_nf4, true, float, f32)
QUANTIZE(quantize_nf4, true, f16, f16)
QUANTIZE(quantize_nf4, true, bf16, bf16)
QUANTIZE(quantize_fp4, false, float, f32)
QUANTIZE(quantize_fp4, false, f16, f16)
QUANTIZE(quantize_fp4, false, bf16, bf16)

// Sums in the order of kernels/src/quantize/scales.rs: each of 256 threads has added up every 256th number, and the upper
// half of the threads is added to the lower until one is left. Every thread gets the sum.
constexpr int LANES = 256;
constexpr int MEAN_PIECE = 4096;
__device__ __forceinline__ double sum_lanes(double mine) {
    __shared__ double lanes[LANES];
    lanes[threadIdx.x] = mine;
#pragma unroll
    for (int width = LANES / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) lanes[threadIdx.x] += lanes[threadIdx.x + width];
    }
    __syncthreads();
    return lanes[0];
}

// sums[b] of the scales from b * 4096 on.
extern "C" __global__ void __launch_bounds__(LANES) quantize_sums(const float* absmax, double* sums, u64 count) {
    u64 start = (u64)blockIdx.x * MEAN_PIECE;
    double mine = 0.0;
#pragma unroll
    for (int i = 0; i < MEAN_PIECE; i += LANES) {
        u64 at = start + i + threadIdx.x;
        if (at < count) mine += (double)absmax[at];
    }
    double sum = sum_lanes(mine);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Double quantization: a warp codes 256 scales. `sums` are those of quantize_sums; each block takes the mean again, which
// costs less than another launch.
extern "C" __global__ void __launch_bounds__(LANES) quantize_scales(
    const float* absmax, const double* sums, const float* map, u8* codes, float* absmax2, float* offset, u64 count,
    u32 stepped) {
    __shared__ float entries[256];
    dynamic8_load(entries, map);
    u32 pieces = (u32)((count + MEAN_PIECE - 1) / MEAN_PIECE);
    double mine = 0.0;
    for (u32 i = threadIdx.x; i < pieces; i += LANES) mine += sums[i];
    float mean = (float)__ddiv_rn(sum_lanes(mine), (double)count); // its barriers come before the first use of `entries`
    if (blockIdx.x == 0 && threadIdx.x == 0) *offset = mean;

    u64 block = (u64)blockIdx.x * (LANES / WARP) + threadIdx.x / WARP, start = block * 256;
    if (start >= count) return;
    float centred[8];
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u64 at = start + i * WARP + threadIdx.x % WARP;
        centred[i] = at < count ? __fsub_rn(absmax[at], mean) : 0.0f;
        most = fmaxf(most, fabsf(centred[i]));
    }
    most = warp_max(most);
    float inverse = __fdiv_rn(1.0f, most);
    if (threadIdx.x % WARP == 0) absmax2[block] = most;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u64 at = start + i * WARP + threadIdx.x % WARP;
        float x = __fmul_rn(centred[i], inverse);
        u32 code = stepped ? dynamic8_encode_stepped(entries, x) : dynamic8_encode<true>(entries, x);
        if (at < count) codes[at] = code;
    }
}
