// Large matrix products of dense 16-bit operands on Hopper (compute capability 9.0): as gemm.cuh, `out [M, N] =
// scale * (a · b + a2 · b2) + in`, forward with b = Wᵀ of W [N, K] and input gradient with b = W [K, N].
//
// Method. As many blocks as SMs go through the tiles of `out`, 128 x BN each. One thread of the first warpgroup
// has the TMA copy tiles of 64 along the contraction into a ring in shared memory; the two other warpgroups multiply
// 64 rows each of them, with asynchronous products that read both operands from shared memory. Rings are run by two
// barriers a stage: `full` (its bytes are there) and `empty` (all eight warps are done with it). The copies of the next
// tile go on while the sums of the last one are written. A second pair (a LoRA adapter) is a few more steps along the
// contraction, from its own maps; so are the products whose sum is wanted (the input gradient of linears on one input),
// `out = Σ g_i · W_i + u_i · A_i`. A weight of 4-bit codes is dequantized ahead by three warps of the first warpgroup
// (ahead.cuh). Where there are few tiles, the blocks of a cluster share the contraction of one, leave their sums in shared
// memory and add up some rows each, always in the same order. What lies outside of a matrix the TMA fills with zeros, so there are no other tails than
// those of `out`.
//
// Tiles in shared memory have rows of 128 bytes (64 elements), swizzled: 16-byte chunk c of row i lies at c ^ (i % 8).
// `a` and forward's b: a row is 64 elements along the contraction. The input gradient's b: boxes of 64 columns, a row
// is 64 columns at one place of the contraction; the products read it transposed.
//
// | tile | stage: a, b | stages | accumulators |
// |---|---|---|---|
// | 128 x 256 | 16 KiB, 32 KiB | 4 (192 KiB) | 128 registers |
// | 128 x 128 | 16 KiB, 16 KiB | 6 (192 KiB) | 64 |
//
// Wants: M, N > 0, K > 0; N, K and the rank multiples of 8; 16-byte aligned pointers.
#include "linear/ahead.cuh"

constexpr int BM = 128;
constexpr int DEPTH = 64;               // of a tile along the contraction
constexpr int ROW = DEPTH * 2;          // bytes of a row of a tile
constexpr int BOX = 64 * ROW;           // bytes of 64 rows
constexpr int RING = 192 << 10;         // bytes
constexpr int STRIP = 16;               // rows of tiles that are visited together
constexpr int CONSUMERS = BM / 64;      // warpgroups that multiply
constexpr int SLAB = 32, PITCH = SLAB + 8; // columns that a warp writes at a time; PITCH: lanes fall into different banks
constexpr int SLAB_BYTES = 16 * PITCH * 4;
constexpr int MAX_STAGES = 6;
// Registers of a thread: 384 threads start with 168, (72 + 2 * 216) * 128 are as many.
constexpr int THREADS = 128 * (1 + CONSUMERS), PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216;
constexpr int MAKERS = 3;     // warps that dequantize
constexpr int LOOK_AHEAD = 8; // steps whose parts are waited for together

struct Result {
    void* out;      // [M, N]
    const void* in; // [M, N] in the type of out, or null; may be `out`
    u32 m, n;
    float scale;
};

// Adds `in` to the sums of a warp, 16 rows of BN columns from (row0, column0) on, rounds once and writes them. `slab`:
// 16 rows of PITCH floats in shared memory that are the warp's own.
template <int BN, typename O>
__device__ __forceinline__ void write_sums(const Result& result, const float (&sums)[BN / 2], float* slab, u32 row0,
                                           u32 column0) {
    constexpr int SIZE = Pack<O>::SIZE, PARTS = 8 / SIZE;
    const int lane = threadIdx.x % WARP, row = lane / 4, odd = row & 1;
    const O* in = static_cast<const O*>(result.in);
    O* out = static_cast<O*>(result.out);
    const u32 column = column0 + lane % 4 * 8; // of this lane in the first slab
    const bool inside[2] = {row0 + row < result.m, row0 + row + 8 < result.m};
    const u64 first = (u64)(row0 + row) * result.n + column, eight_rows = (u64)8 * result.n;
    float* to = slab + row * PITCH + lane % 4 * 2;
    const float4* from = reinterpret_cast<const float4*>(slab + row * PITCH + lane % 4 * 8);

    Pack<O> added[2][PARTS]; // of the slab to come: loads are long under way
    auto load = [&](int s) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                if (in && inside[half] && column + s * SLAB < result.n)
                    added[half][part] = load_pack(in + first + half * eight_rows + s * SLAB + part * SIZE);
    };
    load(0);
#pragma unroll
    for (int s = 0; s < BN / SLAB; s++) {
        __syncwarp(); // the last slab has been read
#pragma unroll
        for (int j = 0; j < SLAB / 8; j++) {
            const float* x = sums + (s * (SLAB / 8) + j) * 4;
            *reinterpret_cast<float2*>(to + j * 8) = make_float2(x[0] * result.scale, x[1] * result.scale);
            *reinterpret_cast<float2*>(to + 8 * PITCH + j * 8) = make_float2(x[2] * result.scale, x[3] * result.scale);
        }
        __syncwarp();
        Pack<O> rounded[2][PARTS];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Odd rows begin with their second half, so that eight lanes read from all banks.
            const float4 a = from[half * (8 * PITCH / 4) + odd], b = from[half * (8 * PITCH / 4) + (odd ^ 1)];
            const float4 low = odd ? b : a, high = odd ? a : b;
            const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float y = in ? wide(added[half][i / SIZE].at[i % SIZE]) : 0.0f;
                rounded[half][i / SIZE].at[i % SIZE] = narrow<O>(x[i] + y);
            }
        }
        if (s + 1 < BN / SLAB) load(s + 1);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                if (inside[half] && column + s * SLAB < result.n)
                    store_pack(out + first + half * eight_rows + s * SLAB + part * SIZE, rounded[half][part]);
    }
}

// Leaves the sums of a warp, 16 rows of BN columns, at `rows` in shared memory.
constexpr int GAP = 4; // floats between rows, against bank conflicts
template <int BN> __device__ __forceinline__ void leave_sums(const float (&sums)[BN / 2], u32 rows) {
    const u32 lane = threadIdx.x % WARP, to = rows + (lane / 4 * (BN + GAP) + lane % 4 * 2) * 4;
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        store_float2(to + j * 32, sums[4 * j], sums[4 * j + 1]);
        store_float2(to + j * 32 + 8 * (BN + GAP) * 4, sums[4 * j + 2], sums[4 * j + 3]);
    }
}
// Adds up what the blocks of a cluster have left at `all` of a tile, some rows each, and `in`, rounds once and writes them.
template <int BN, typename O> __device__ __forceinline__ void add_up(const Result& result, u32 all, u32 m0, u32 n0) {
    constexpr int SIZE = Pack<O>::SIZE;
    const u32 blocks = cluster_size(), rows = BM / blocks;
    for (u32 i = threadIdx.x - 128; i < rows * (BN / SIZE); i += 128 * CONSUMERS) {
        const u32 row = cluster_rank() * rows + i / (BN / SIZE), column = i % (BN / SIZE) * SIZE;
        if (m0 + row >= result.m || n0 + column >= result.n) continue;
        float x[SIZE] = {};
        for (u32 block = 0; block < blocks; block++) {
            const u32 there = in_block(all + (row * (BN + GAP) + column) * 4, block);
#pragma unroll
            for (int j = 0; j < SIZE / 4; j++) {
                const float4 v = load_float4_there(there + 16 * j);
                x[4 * j] += v.x, x[4 * j + 1] += v.y, x[4 * j + 2] += v.z, x[4 * j + 3] += v.w;
            }
        }
        const u64 at = (u64)(m0 + row) * result.n + n0 + column;
        Pack<O> rounded;
        if (result.in) rounded = load_pack(static_cast<const O*>(result.in) + at);
#pragma unroll
        for (int j = 0; j < SIZE; j++)
            rounded.at[j] = narrow<O>(x[j] * result.scale + (result.in ? wide(rounded.at[j]) : 0.0f));
        store_pack(static_cast<O*>(result.out) + at, rounded);
    }
}

// `depths`: the contraction of each pair, or 0. `coded`: what every second pair, from the first on, has its `b` from.
template <typename T, bool FORWARD, int BN, int PAIRS>
__device__ __forceinline__ void gemm(const TensorMap* const (&a)[PAIRS], const TensorMap* const (&b)[PAIRS],
                                     const u32 (&depths)[PAIRS], const Coded (&coded)[PAIRS / 2], u32 quant_type,
                                     const Result& result, bool wide_out) {
    constexpr int PARTS = BN / PART; // of a tile of b
    constexpr int A_BYTES = BM * ROW, B_BYTES = BN * ROW, STAGE = A_BYTES + B_BYTES, STAGES = RING / STAGE;
    static_assert(STAGES <= MAX_STAGES && STAGES * STAGE == RING, "stages");
    extern __shared__ u8 shared[];
    // Swizzle atoms start at multiples of 1024 bytes, and the table of values behind them at one of its size.
    u8* ring = shared + (-shared_address(shared) & (VALUES_BYTES - 1));
    const u32 ring_address = shared_address(ring), values = ring_address + RING;
    float* slabs = reinterpret_cast<float*>(ring + RING + VALUES_BYTES);
    const u32 full = values + VALUES_BYTES + CONSUMERS * 4 * SLAB_BYTES, empty = full + MAX_STAGES * 8; // + 8 stage
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS * 4);
        }
        barriers_ready();
    }
    bool makes = false;
#pragma unroll
    for (int i = 0; i < PAIRS / 2; i++) makes |= coded[i].codes != nullptr;
    u32 turn = 0;
    if (makes && warpgroup == 0) {
        turn = hear(&progress.turn) + 1; // it goes on when all blocks have been here
        for (u32 i = threadIdx.x; i < 16 * WARP; i += 128) store_float(values + 4 * i, CODE_VALUES[quant_type][i / WARP]);
    }
    __syncthreads();

    const u32 rows = (result.m + BM - 1) / BM, columns = (result.n + BN - 1) / BN, tiles = rows * columns;
    const u32 clusters = gridDim.x / cluster_size(), first_tile = blockIdx.x / cluster_size();
    u32 steps = 0;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) steps += (depths[pair] + DEPTH - 1) / DEPTH;
    // Those of this block: all, but in a cluster.
    const u32 share = (steps + cluster_size() - 1) / cluster_size();
    const u32 first = min(cluster_rank() * share, steps), last = min(first + share, steps);
    auto place = [&](u32 tile, u32& m0, u32& n0) {
        u32 strip = tile / (STRIP * columns) * STRIP, at = tile % (STRIP * columns);
        u32 height = min(rows - strip, (u32)STRIP);
        m0 = (strip + at % height) * BM;
        n0 = at / height * BN;
    };

    // The ring goes on from tile to tile: the producer and the consumers count stages alike.
    u32 stage = 0, phase = 0;
    auto advance = [&] {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    };
    u32 m0, n0;
    if (warpgroup == 0) {
        give_registers<PRODUCER_REGISTERS>();
        const u32 height = min(rows, (u32)STRIP), together = min(columns, (clusters + height - 1) / height);
        const Order order{columns, steps, together, cluster_size(), share};
        if (warp > 0) {
            auto find = [&](u32 tile, u32 step, u32 part, Place& to) {
                u32 base = 0;
#pragma unroll
                for (int pair = 0; pair < PAIRS; pair++) {
                    const u32 end = base + (depths[pair] + DEPTH - 1) / DEPTH;
                    if (pair % 2 == 0 && step >= base && step < end && coded[pair / 2].codes) {
                        to.weight = coded[pair / 2];
                        const u32 along = (step - base) * DEPTH, across = tile * BN + part * PART;
                        const u32 row = FORWARD ? across : along, column = FORWARD ? along : across;
                        to.first = row * to.weight.row + column;
                        to.rows = row < to.weight.rows && column < to.weight.row ? min(to.weight.rows - row, (u32)PART) : 0;
                    }
                    base = end;
                }
            };
            if (makes) make_ahead<T, PARTS>(order, turn, MAKERS * gridDim.x, values + lane * 4, find);
            return;
        }
        if (lane == 0) {
            prefetch_map(a[0]);
            prefetch_map(b[0]);
        }
        bool all = !makes; // there is nothing to wait for any more
        for (u32 tile = first_tile; tile < tiles; tile += clusters) {
            place(tile, m0, n0);
            if (!all) all = __shfl_sync(~0u, hear(&progress.all) == turn, 0);
            u32 base = 0;
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                const u32 end = base + (depths[pair] + DEPTH - 1) / DEPTH, to_come = min(end, last);
                const bool waits = !all && pair % 2 == 0 && coded[pair / 2].codes;
#pragma unroll 1
                for (u32 step = max(first, base); step < to_come; step++) {
                    if (waits && (step - max(first, base)) % LOOK_AHEAD == 0) {
                        if (step + lane < to_come && lane < LOOK_AHEAD)
                            await_words<PARTS>(progress.made + order.index<PARTS>(n0 / BN, step + lane), turn);
                        __syncwarp();
                        copies_see_memory();
                    }
                    if (lane == 0) {
                        const u32 to = ring_address + stage * STAGE, barrier = full + 8 * stage, k0 = (step - base) * DEPTH;
                        barrier_wait(empty + 8 * stage, phase ^ 1); // the first time round: free from the start
                        barrier_expect(barrier, STAGE);
                        copy_box(to, a[pair], k0, m0, barrier);
                        if (FORWARD) {
                            copy_box(to + A_BYTES, b[pair], k0, n0, barrier);
                        } else {
#pragma unroll
                            for (int box = 0; box < BN / 64; box++)
                                copy_box(to + A_BYTES + box * BOX, b[pair], n0 + box * 64, k0, barrier);
                        }
                    }
                    advance();
                }
                base = end;
            }
        }
        if (makes && lane == 0 && is_last(&progress.ended, gridDim.x)) progress.turn = turn;
        return;
    }

    take_registers<CONSUMER_REGISTERS>();
    const int consumer = warpgroup - 1;
    float* slab = slabs + (consumer * 4 + warp) * (SLAB_BYTES / 4);
    float sums[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) sums[i] = 0.0f;
    for (u32 tile = first_tile; tile < tiles; tile += clusters) {
        place(tile, m0, n0);
        u32 before = 0; // the stage of the step before
        pin(sums);
#pragma unroll 1
        for (u32 step = first; step < last; step++) {
            const u32 at = ring_address + stage * STAGE;
            const u64 a_tile = describe(at + consumer * BOX, 16, 8 * ROW);
            const u64 b_tile = describe(at + A_BYTES, FORWARD ? 16 : BOX, 8 * ROW);
            barrier_wait(full + 8 * stage, phase);
            products_begin();
#pragma unroll
            for (int part = 0; part < DEPTH / 16; part++) {
                // 16 elements of a row, or 16 rows; in units of 16 bytes.
                constexpr int A_PART = 16 * 2 / 16, B_PART = FORWARD ? A_PART : 16 * ROW / 16;
                multiply_shared<T, false, !FORWARD>(sums, a_tile + part * A_PART, b_tile + part * B_PART, step - first + part);
            }
            products_commit();
            // The products of the step before are done; those of this one go on.
            products_wait<1>();
            if (step > first && lane == 0) barrier_arrive(empty + 8 * before);
            before = stage;
            advance();
        }
        products_wait<0>();
        pin(sums);
        if (cluster_size() > 1) break; // the only tile of these blocks
        if (lane == 0) barrier_arrive(empty + 8 * before);
        const u32 row0 = m0 + consumer * 64 + warp * 16;
        if (wide_out) write_sums<BN, float>(result, sums, slab, row0, n0);
        else write_sums<BN, T>(result, sums, slab, row0, n0);
    }
    if (cluster_size() == 1) return;
    meet<128 * CONSUMERS>(1); // nobody reads the ring any more
    leave_sums<BN>(sums, ring_address + (consumer * 64 + warp * 16) * (BN + GAP) * 4);
    cluster_meet();
    if (wide_out) add_up<BN, float>(result, ring_address, m0, n0);
    else add_up<BN, T>(result, ring_address, m0, n0);
    cluster_meet(); // a block's memory is there until all have read it
}

// A weight of 4-bit codes, as `codes.rs` gives it, and the place of what is made of it; null where `b` is there.
#define CODED(I)                                                                                                       \
    const u8 *codes##I, const void *absmax##I, const float *nested##I, const float *map##I, const float *offset##I, void *made##I
#define SHIFTS u32 block_shift, u32 nested_shift, u32 quant_type
#define MAKE(I, ROWS, ROW)                                                                                             \
    Coded{codes##I, Scales{absmax##I, nested##I, nested##I ? *offset##I : 0.0f, block_shift, nested_shift}, map##I, made##I, ROWS, ROW}
#define PAIR(I) const __grid_constant__ TensorMap a##I, const __grid_constant__ TensorMap b##I

#define ENTRY(TYPE, DIRECTION, FORWARD, BN)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_hopper_##DIRECTION##_##BN##_##TYPE(                  \
        PAIR(0), PAIR(1), CODED(0), SHIFTS, void* out, const void* in, u32 m, u32 n, u32 k, u32 rank, float scale,     \
        u32 add, u32 wide) {                                                                                           \
        const Result result{out, add ? out : in, m, n, scale};                                                         \
        const TensorMap *const left[2] = {&a0, &a1}, *const right[2] = {&b0, &b1};                                     \
        const u32 depths[2] = {k, rank};                                                                               \
        const Coded coded[1] = {MAKE(0, FORWARD ? n : k, FORWARD ? k : n)};                                            \
        gemm<TYPE, FORWARD, BN, 2>(left, right, depths, coded, quant_type, result, wide);                              \
    }
#define JOINED(TYPE, BN)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_hopper_input_grads_##BN##_##TYPE(                    \
        PAIR(0), PAIR(1), PAIR(2), PAIR(3), PAIR(4), PAIR(5), CODED(0), CODED(1), CODED(2), SHIFTS, void* out, u32 m,  \
        u32 n, u32 depth0, u32 depth1, u32 depth2, u32 depth3, u32 depth4, u32 depth5, u32 wide) {                     \
        const Result result{out, nullptr, m, n, 1.0f};                                                                 \
        const TensorMap *const left[6] = {&a0, &a1, &a2, &a3, &a4, &a5}, *const right[6] = {&b0, &b1, &b2, &b3, &b4, &b5}; \
        const u32 depths[6] = {depth0, depth1, depth2, depth3, depth4, depth5};                                        \
        const Coded coded[3] = {MAKE(0, depth0, n), MAKE(1, depth2, n), MAKE(2, depth4, n)};                           \
        gemm<TYPE, false, BN, 6>(left, right, depths, coded, quant_type, result, wide);                                \
    }
#define ENTRIES(TYPE)                                                                                                  \
    ENTRY(TYPE, forward, true, 256)                                                                                    \
    ENTRY(TYPE, forward, true, 128)                                                                                    \
    ENTRY(TYPE, input_grad, false, 256)                                                                                \
    ENTRY(TYPE, input_grad, false, 128)                                                                                \
    JOINED(TYPE, 256)                                                                                                  \
    JOINED(TYPE, 128)

ENTRIES(bf16)
ENTRIES(f16)
