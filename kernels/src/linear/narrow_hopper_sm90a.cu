// The products of LoRA adapters on Hopper (compute capability 9.0), whose one dimension is a rank and the others are
// thousands; 16-bit operands, sums in f32:
//
//   narrow_rows       out_i [M, r_i] = x [M, K] · w_iᵀ, w_i [r_i, K]: t = s·x·Aᵀ of all adapters on one input
//   narrow_columns    out_i [M, r_i] = x [M, K] · w_i, w_i [K, r_i]: u = s·g·B
//   narrow_grads      out_i [M, r_i] or [r_i, M] = xᵀ · w_i, x [K, M], w_i [K, r_i]: dB = gᵀ·t, and dA = uᵀ·x of all
//                     adapters on one input
//   narrow_both       u and dB of one adapter in one pass over g
//   narrow_sum        adds up the slices of the contraction K, where there are several
//   narrow_both_sum   the same of what narrow_both has made
//
// Bound by the bytes of x, which is read once for all w_i. A block makes 64 · (its warpgroups) rows of the outputs from a
// slice of the contraction. One warp has the TMA copy boxes of 64 x 64 into a ring in shared memory: one of x for each
// warpgroup, and one for each group of up to 64 columns of the w_i. Each warpgroup multiplies its box by all groups'. The
// ring holds what DRAM's latency wants to be under way: some 64 KiB of x an SM. What lies outside of a matrix is zeros to the
// TMA: ranks that are no multiple of 64 cost tensor cores time that they have, and no bytes.
#include "attention/hopper.cuh"
#include "dependent.cuh"

constexpr int BOX = 64, BOX_BYTES = BOX * 128;
constexpr int MOST_GROUPS = 3, MOST_WARPGROUPS = 2, MOST_THREADS = MOST_WARPGROUPS * 128 + WARP;

// Up to 64 columns of one of the w_i.
struct Group {
    void* out;  // of the w_i, in 16 bits
    float scale;
    u32 column; // the first, in the w_i
    u32 rank;   // r_i
    u32 before; // the ranks of the w before it, added up
};

struct Sizes {
    u32 rows, inner; // M and K
    u32 ranks;       // all of them, added up
    u32 slice;       // steps of 64 of the contraction that blockIdx.y has
    u32 stages;
    u32 transposed;  // partial sums lie [r_i, M] rather than [M, r_i]
};

// `partial`: null, or f32 [slices] of what all w_i take one after another, which get the sums then and not `out`.
template <typename T, int G, bool X_COLUMNS, bool W_COLUMNS>
__device__ __forceinline__ void narrow_product(const TensorMap* x, const TensorMap* const (&w)[MOST_GROUPS],
                                               const Group (&groups)[MOST_GROUPS], const Sizes& sizes, float* partial) {
    extern __shared__ u8 shared[];
    const u32 ring = shared_address(shared) + (-shared_address(shared) & 1023);
    const u32 warpgroups = blockDim.x / 128, stage_bytes = (warpgroups + G) * BOX_BYTES;
    const u32 full = ring + sizes.stages * stage_bytes, empty = full + 8 * sizes.stages; // + 8 stage
    const u32 warpgroup = threadIdx.x / 128, warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < sizes.stages; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, warpgroups * 4);
        }
        barriers_ready();
    }
    __syncthreads();
    wait_before();

    const u32 first_row = blockIdx.x * warpgroups * BOX;
    const u32 begin = blockIdx.y * sizes.slice, end = min(begin + sizes.slice, (sizes.inner + BOX - 1) / BOX);
    u32 stage = 0, phase = 0;
    auto advance = [&] {
        if (++stage == sizes.stages) {
            stage = 0;
            phase ^= 1;
        }
    };
    if (warpgroup == warpgroups) { // one warp
        if (lane != 0) return;
        prefetch_map(x);
        for (u32 step = begin; step < end; step++) {
            const u32 to = ring + stage * stage_bytes, barrier = full + 8 * stage;
            const int at = step * BOX;
            barrier_wait(empty + 8 * stage, phase ^ 1); // the first time round: free from the start
            barrier_expect(barrier, stage_bytes);
            for (u32 i = 0; i < warpgroups; i++) {
                const int row = first_row + i * BOX;
                copy_box(to + i * BOX_BYTES, x, X_COLUMNS ? row : at, X_COLUMNS ? at : row, barrier);
            }
#pragma unroll
            for (int g = 0; g < G; g++) {
                const int column = groups[g].column;
                copy_box(to + (warpgroups + g) * BOX_BYTES, w[g], W_COLUMNS ? column : at, W_COLUMNS ? at : column, barrier);
            }
            advance();
        }
        return;
    }

    float sums[G][32];
#pragma unroll
    for (int g = 0; g < G; g++) {
#pragma unroll
        for (int i = 0; i < 32; i++) sums[g][i] = 0.0f;
        pin(sums[g]);
    }
    u32 last = 0; // the stage of the step before
    for (u32 step = begin; step < end; step++) {
        const u32 at = ring + stage * stage_bytes;
        const Operand<BOX, X_COLUMNS> left(at + warpgroup * BOX_BYTES);
        const Operand<BOX, W_COLUMNS> right(at + warpgroups * BOX_BYTES);
        barrier_wait(full + 8 * stage, phase);
        products_begin();
#pragma unroll
        for (int part = 0; part < BOX / 16; part++) {
#pragma unroll
            for (int g = 0; g < G; g++)
                multiply_shared<T, X_COLUMNS, W_COLUMNS>(sums[g], left.part(part), right.part(part, g * BOX_BYTES), 1);
        }
        products_commit();
        products_wait<1>();
        if (step > begin && lane == 0) barrier_arrive(empty + 8 * last);
        last = stage;
        advance();
    }
    products_wait<0>();
#pragma unroll
    for (int g = 0; g < G; g++) pin(sums[g]);

    constexpr bool GRADS = X_COLUMNS; // always in partial sums
    const u32 row0 = first_row + warpgroup * BOX + warp * 16 + lane / 4;
    if (partial) partial += (u64)blockIdx.y * sizes.rows * sizes.ranks;
#pragma unroll
    for (int g = 0; g < G; g++) {
        const Group& group = groups[g];
        float* sum = partial + (u64)group.before * sizes.rows;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 column = group.column + 8 * j + 2 * (lane % 4);
            if (column >= group.rank) continue; // ranks are even
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 row = row0 + 8 * half;
                if (row >= sizes.rows) continue;
                const float a = sums[g][4 * j + 2 * half], b = sums[g][4 * j + 2 * half + 1];
                const u64 place = (u64)row * group.rank + column;
                if (!GRADS && !partial) {
                    T* out = static_cast<T*>(group.out);
                    *reinterpret_cast<u32*>(out + place) = pair<T>(a * group.scale, b * group.scale);
                } else if (GRADS && sizes.transposed) {
                    sum[(u64)column * sizes.rows + row] = a;
                    sum[(u64)(column + 1) * sizes.rows + row] = b;
                } else {
                    *reinterpret_cast<float2*>(sum + place) = make_float2(a, b);
                }
            }
        }
    }
}

#define GROUP(I) void *out##I, float scale##I, u32 column##I, u32 rank##I, u32 before##I
#define PRODUCT(KIND, X_COLUMNS, W_COLUMNS, G, T)                                                                      \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS, G == 1 ? 2 : 1) narrow_##KIND##_##G##_##T(              \
        const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1, \
        const __grid_constant__ TensorMap w2, GROUP(0), GROUP(1), GROUP(2),                                            \
        float* partial, u32 rows, u32 inner, u32 ranks, u32 slice, u32 stages, u32 transposed) {                       \
        const TensorMap* const w[MOST_GROUPS] = {&w0, &w1, &w2};                                                  \
        const Group groups[MOST_GROUPS] = {{out0, scale0, column0, rank0, before0}, {out1, scale1, column1, rank1, before1}, \
                                           {out2, scale2, column2, rank2, before2}};                                   \
        const Sizes sizes{rows, inner, ranks, slice, stages, transposed};                                              \
        narrow_product<T, G, X_COLUMNS, W_COLUMNS>(&x, w, groups, sizes, partial);                                     \
    }
#define PRODUCTS(G, T)                                                                                                 \
    PRODUCT(rows, false, false, G, T) PRODUCT(columns, false, true, G, T) PRODUCT(grads, true, true, G, T)
PRODUCTS(1, bf16) PRODUCTS(2, bf16) PRODUCTS(3, bf16)
PRODUCTS(1, f16) PRODUCTS(2, f16) PRODUCTS(3, f16)

// Both products with g [tokens, columns]: parts of u [tokens, rank] = g · b from 256 columns each, and of dB [columns, rank] =
// gᵀ · t from a slice of the tokens; b [columns, rank], t [tokens, rank], rank <= 64. A block has 256 columns and a slice. The
// ring has 64 tokens a stage: four boxes of g and one of t; the block's part of b stays. Each of the four warpgroups multiplies
// its box of columns for dB, and for u, in turn, all four boxes of every fourth stage. u has a part for each block along the
// columns: 4 rank / 256 bytes are written for each 2 of g, which is less than reading g once more if ranks are few.
constexpr int BOTH_WARPGROUPS = 4, BOTH_STAGES = 4, BOTH_STAGE_BYTES = (BOTH_WARPGROUPS + 1) * BOX_BYTES;
constexpr int BOTH_THREADS = BOTH_WARPGROUPS * 128 + WARP;

template <typename T>
__device__ __forceinline__ void both(const TensorMap* g, const TensorMap* b, const TensorMap* t, float* u, float* db, u32 tokens,
                                     u32 columns, u32 rank, u32 slice) {
    extern __shared__ u8 shared[];
    const u32 b_tiles = shared_address(shared) + (-shared_address(shared) & 1023);
    const u32 ring = b_tiles + BOTH_WARPGROUPS * BOX_BYTES, b_full = ring + BOTH_STAGES * BOTH_STAGE_BYTES;
    const u32 full = b_full + 8, empty = full + 8 * BOTH_STAGES; // + 8 stage
    const u32 warpgroup = uniform(threadIdx.x / 128), warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) {
        barrier_init(b_full, 1);
        for (u32 s = 0; s < BOTH_STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, BOTH_WARPGROUPS * 4);
        }
        barriers_ready();
    }
    __syncthreads();
    wait_before();

    const u32 column0 = blockIdx.x * BOTH_WARPGROUPS * BOX;
    const u32 begin = blockIdx.y * slice, end = min(begin + slice, (tokens + BOX - 1) / BOX);
    u32 stage = 0, phase = 0;
    auto advance = [&] {
        if (++stage == BOTH_STAGES) {
            stage = 0;
            phase ^= 1;
        }
    };
    if (warpgroup == BOTH_WARPGROUPS) { // one warp
        if (lane != 0) return;
        barrier_expect(b_full, BOTH_WARPGROUPS * BOX_BYTES);
        for (int i = 0; i < BOTH_WARPGROUPS; i++) copy_box(b_tiles + i * BOX_BYTES, b, 0, column0 + i * BOX, b_full);
        for (u32 step = begin; step < end; step++) {
            const u32 to = ring + stage * BOTH_STAGE_BYTES, barrier = full + 8 * stage;
            barrier_wait(empty + 8 * stage, phase ^ 1); // the first time round: free from the start
            barrier_expect(barrier, BOTH_STAGE_BYTES);
            for (int i = 0; i < BOTH_WARPGROUPS; i++) copy_box(to + i * BOX_BYTES, g, column0 + i * BOX, step * BOX, barrier);
            copy_box(to + BOTH_WARPGROUPS * BOX_BYTES, t, 0, step * BOX, barrier);
            advance();
        }
        return;
    }

    // The rows of a warp's sums that are of this lane, and their numbers of columns: to `to`, whose rows have `rank` floats.
    auto store = [&](const float (&sums)[32], float* to, u32 first_row, u32 rows) {
        const u32 row0 = first_row + warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 column = 8 * j + 2 * (lane % 4);
            if (column >= rank) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 row = row0 + 8 * half;
                if (row < rows)
                    *reinterpret_cast<float2*>(to + (u64)row * rank + column) =
                        make_float2(sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]);
            }
        }
    };
    u += (u64)blockIdx.x * tokens * rank;
    db += (u64)blockIdx.y * columns * rank;
    float of_b[32], of_u[32];
#pragma unroll
    for (int i = 0; i < 32; i++) of_b[i] = of_u[i] = 0.0f;
    pin(of_b);
    barrier_wait(b_full, 0);
    for (u32 step = begin; step < end; step++) {
        const u32 at = ring + stage * BOTH_STAGE_BYTES;
        barrier_wait(full + 8 * stage, phase);
        const bool turn = step % BOTH_WARPGROUPS == warpgroup;
        products_begin();
        const ByColumns<BOX> own(at + warpgroup * BOX_BYTES), of_t(at + BOTH_WARPGROUPS * BOX_BYTES);
#pragma unroll
        for (int part = 0; part < BOX / 16; part++)
            multiply_shared<T, true, true>(of_b, own.part(part), of_t.part(part), 1);
        if (turn) {
            pin(of_u);
            products_begin();
            const ByRows<BOX> left(at);
            const ByColumns<BOX> right(b_tiles);
#pragma unroll
            for (int part = 0; part < BOTH_WARPGROUPS * BOX / 16; part++) {
                const u32 box = part / 4 * BOX_BYTES;
                multiply_shared<T, false, true>(of_u, left.part(part % 4, box), right.part(part % 4, box), part);
            }
        }
        products_commit();
        products_wait<0>();
        pin(of_b);
        if (lane == 0) barrier_arrive(empty + 8 * stage);
        advance();
        if (turn) {
            pin(of_u);
            store(of_u, u, step * BOX, tokens);
        }
    }
    store(of_b, db, column0 + warpgroup * BOX, columns);
}

#define BOTH(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(BOTH_THREADS, 1) narrow_both_##T(                                     \
        const __grid_constant__ TensorMap g, const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap t, \
        float* u, float* db, u32 tokens, u32 columns, u32 rank, u32 slice) {                                           \
        both<T>(&g, &b, &t, u, db, tokens, columns, rank, slice);                                                      \
    }
BOTH(bf16)
BOTH(f16)

// An output that partial sums belong to.
struct Output {
    void* out;
    float scale;
    u32 end; // of its elements in a slice, where those of the next begin
};

// Four elements from `at` on of Σ partial [slices, total] over the slices, in their order.
__device__ __forceinline__ float4 sum_slices(const float* partial, u32 at, u32 slices, u32 total) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (u32 slice = 0; slice < slices; slice++) {
        const float4 x = __ldcs(reinterpret_cast<const float4*>(partial + (u64)slice * total + at));
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    return sum;
}
template <typename O> __device__ __forceinline__ void store_four(O* to, float4 x, float scale) {
    to[0] = narrow<O>(x.x * scale), to[1] = narrow<O>(x.y * scale);
    to[2] = narrow<O>(x.z * scale), to[3] = narrow<O>(x.w * scale);
}

// out_i = scale_i · the sums of a part of `total`. All ends are multiples of 4.
template <typename O>
__device__ __forceinline__ void narrow_sum(const float* partial, const Output (&outputs)[MOST_GROUPS], u32 slices, u32 total) {
    const u32 at = 4 * (blockIdx.x * 256 + threadIdx.x);
    if (at >= total) return;
    wait_before();
    const float4 sum = sum_slices(partial, at, slices, total);
    u32 begin = 0;
#pragma unroll
    for (int i = 0; i < MOST_GROUPS; i++) {
        if (at >= begin && at < outputs[i].end)
            store_four(static_cast<O*>(outputs[i].out) + (at - begin), sum, outputs[i].scale);
        begin = outputs[i].end;
    }
}
#define OUTPUT(I) void *out##I, float scale##I, u32 end##I
#define SUM(NAME, O)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) narrow_sum_##NAME(                                               \
        const float* partial, OUTPUT(0), OUTPUT(1), OUTPUT(2), u32 slices, u32 total) {                     \
        const Output outputs[MOST_GROUPS] = {{out0, scale0, end0}, {out1, scale1, end1}, {out2, scale2, end2}};        \
        narrow_sum<O>(partial, outputs, slices, total);                                                                \
    }
SUM(f32, float) SUM(bf16, bf16) SUM(f16, f16)

// u = scale · the sums of u_parts [blocks, u_total], by the blocks of row 0; db = those of db_parts [slices, db_total], by row 1.
#define BOTH_SUM(T)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) narrow_both_sum_##T(                                             \
        const float* u_parts, void* u, float scale, u32 u_total, u32 blocks, const float* db_parts, float* db, u32 db_total, \
        u32 slices) {                                                                                                  \
        const u32 at = 4 * (blockIdx.x * 256 + threadIdx.x);                                                           \
        wait_before();                                                                                                 \
        if (blockIdx.y == 0 && at < u_total) store_four((T*)u + at, sum_slices(u_parts, at, blocks, u_total), scale);     \
        if (blockIdx.y == 1 && at < db_total) store_four(db + at, sum_slices(db_parts, at, slices, db_total), 1.0f);   \
    }
BOTH_SUM(bf16)
BOTH_SUM(f16)
