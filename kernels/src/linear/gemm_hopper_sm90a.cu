// Large matrix products of dense 16-bit operands on Hopper (compute capability 9.0): as gemm.cuh, `out [M, N] =
// scale * (a · b + a2 · b2) + in`, forward with b = Wᵀ of W [N, K] and input gradient with b = W [K, N].
//
// Method. As many blocks as SMs go through the tiles of `out`, 128 x BN each. One thread of the first warpgroup
// has the TMA copy tiles of 64 along the contraction into a ring in shared memory; the two other warpgroups multiply
// 64 rows each of them, with asynchronous products that read both operands from shared memory. Rings are run by two
// barriers a stage: `full` (its bytes are there) and `empty` (all eight warps are done with it). The copies of the next
// tile go on while the sums of the last one are written. A second pair (a LoRA adapter) is a few more steps along the
// contraction, from its own maps; so are the products whose sum is wanted (the input gradient of linears on one input),
// `out = Σ g_i · W_i + u_i · A_i`. What lies outside of a matrix the TMA fills with zeros, so there are no other tails than
// those of `out`.
//
// Two blocks can be a cluster: their tiles are one above the other, each brings half of the tile of b, to both. That is a
// third less to read from the second-level cache, whose rate and energy otherwise count.
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
#include "linear/hopper.cuh"

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
// Registers of a thread: 384 threads start with 168, (40 + 2 * 232) * 128 are at most 64 Ki.
constexpr int THREADS = 128 * (1 + CONSUMERS), PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

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

// `depths`: the contraction of each pair, or 0.
template <typename T, bool FORWARD, int BN, int PAIRS>
__device__ __forceinline__ void gemm(const TensorMap* const (&a)[PAIRS], const TensorMap* const (&b)[PAIRS],
                                     const u32 (&depths)[PAIRS], const Result& result, bool wide_out) {
    constexpr int A_BYTES = BM * ROW, B_BYTES = BN * ROW, STAGE = A_BYTES + B_BYTES, STAGES = RING / STAGE;
    static_assert(STAGES <= MAX_STAGES && STAGES * STAGE == RING, "stages");
    extern __shared__ u8 shared[];
    // Swizzle atoms start at multiples of 1024 bytes.
    u8* ring = shared + (-shared_address(shared) & 1023);
    const u32 ring_address = shared_address(ring);
    float* slabs = reinterpret_cast<float*>(ring + RING);
    const u32 full = ring_address + RING + CONSUMERS * 4 * SLAB_BYTES, empty = full + MAX_STAGES * 8; // + 8 stage
    const u32 blocks = cluster_size(), rank = blocks > 1 ? cluster_rank() : 0;
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / WARP % 4;
    const u32 lane = threadIdx.x % WARP;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS * 4 * blocks);
        }
        barriers_ready();
    }
    __syncthreads();
    if (blocks > 1) cluster_meet(); // the other block's barriers are there, too

    // Tiles of a cluster: `blocks` rows of tiles.
    const u32 rows = (result.m + BM * blocks - 1) / (BM * blocks), columns = (result.n + BN - 1) / BN, tiles = rows * columns;
    const u32 first_tile = blockIdx.x / blocks, clusters = gridDim.x / blocks, strip = STRIP / blocks;
    u32 steps = 0;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) steps += (depths[pair] + DEPTH - 1) / DEPTH;
    auto place = [&](u32 tile, u32& m0, u32& n0) {
        u32 first = tile / (strip * columns) * strip, at = tile % (strip * columns);
        u32 height = min(rows - first, strip);
        m0 = ((first + at % height) * blocks + rank) * BM;
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
        if (threadIdx.x != 0) return;
        prefetch_map(a[0]);
        prefetch_map(b[0]);
        for (u32 tile = first_tile; tile < tiles; tile += clusters) {
            place(tile, m0, n0);
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
#pragma unroll 1
                for (u32 k0 = 0; k0 < depths[pair]; k0 += DEPTH) {
                    const u32 to = ring_address + stage * STAGE, barrier = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, phase ^ 1); // the first time round: free from the start
                    barrier_expect(barrier, STAGE);
                    copy_box(to, a[pair], k0, m0, barrier);
                    if (FORWARD && blocks == 1) {
                        copy_box(to + A_BYTES, b[pair], k0, n0, barrier);
                    } else if (FORWARD) {
                        copy_box_to_both(to + A_BYTES + rank * (B_BYTES / 2), b[pair], k0, n0 + rank * (BN / 2), barrier);
                    } else if (blocks == 1) {
#pragma unroll
                        for (int box = 0; box < BN / 64; box++)
                            copy_box(to + A_BYTES + box * BOX, b[pair], n0 + box * 64, k0, barrier);
                    } else {
                        for (u32 box = rank * (BN / 128); box < (rank + 1) * (BN / 128); box++)
                            copy_box_to_both(to + A_BYTES + box * BOX, b[pair], n0 + box * 64, k0, barrier);
                    }
                    advance();
                }
            }
        }
        return;
    }

    take_registers<CONSUMER_REGISTERS>();
    const int consumer = warpgroup - 1;
    float* slab = slabs + (consumer * 4 + warp) * (SLAB_BYTES / 4);
    float sums[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) sums[i] = 0.0f;
    // Tells the producers of all blocks of the cluster that this warp is done with a stage.
    auto release = [&](u32 stage) {
        if (lane < blocks) barrier_arrive_there(in_block(empty + 8 * stage, lane));
    };
    for (u32 tile = first_tile; tile < tiles; tile += clusters) {
        place(tile, m0, n0);
        u32 last = 0; // the stage of the step before
        pin(sums);
#pragma unroll 1
        for (u32 step = 0; step < steps; step++) {
            const u32 at = ring_address + stage * STAGE;
            const u64 a_tile = describe(at + consumer * BOX, 16, 8 * ROW);
            const u64 b_tile = describe(at + A_BYTES, FORWARD ? 16 : BOX, 8 * ROW);
            barrier_wait(full + 8 * stage, phase);
            products_begin();
#pragma unroll
            for (int part = 0; part < DEPTH / 16; part++) {
                // 16 elements of a row, or 16 rows; in units of 16 bytes.
                constexpr int A_PART = 16 * 2 / 16, B_PART = FORWARD ? A_PART : 16 * ROW / 16;
                multiply_shared<T, false, !FORWARD>(sums, a_tile + part * A_PART, b_tile + part * B_PART, step + part);
            }
            products_commit();
            // The products of the step before are done; those of this one go on.
            products_wait<1>();
            if (step > 0) release(last);
            last = stage;
            advance();
        }
        products_wait<0>();
        pin(sums);
        release(last);
        const u32 row0 = m0 + consumer * 64 + warp * 16;
        if (wide_out) write_sums<BN, float>(result, sums, slab, row0, n0);
        else write_sums<BN, T>(result, sums, slab, row0, n0);
    }
    if (blocks > 1) cluster_meet(); // a block's memory and barriers are there until the other one is done
}

#define ENTRY(TYPE, DIRECTION, FORWARD, BN)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_hopper_##DIRECTION##_##BN##_##TYPE(                  \
        const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap a2, \
        const __grid_constant__ TensorMap b2, void* out, const void* in, u32 m, u32 n, u32 k, u32 rank, float scale,   \
        u32 add, u32 wide) {                                                                                           \
        const Result result{out, add ? out : in, m, n, scale};                                                         \
        const TensorMap *const left[2] = {&a, &a2}, *const right[2] = {&b, &b2};                                       \
        const u32 depths[2] = {k, rank};                                                                               \
        gemm<TYPE, FORWARD, BN, 2>(left, right, depths, result, wide);                                                 \
    }
#define PAIR(I) const __grid_constant__ TensorMap a##I, const __grid_constant__ TensorMap b##I
#define JOINED(TYPE, BN)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_hopper_input_grads_##BN##_##TYPE(                    \
        PAIR(0), PAIR(1), PAIR(2), PAIR(3), PAIR(4), PAIR(5), void* out, u32 m, u32 n, u32 depth0, u32 depth1,         \
        u32 depth2, u32 depth3, u32 depth4, u32 depth5, u32 wide) {                                                    \
        const Result result{out, nullptr, m, n, 1.0f};                                                                 \
        const TensorMap *const left[6] = {&a0, &a1, &a2, &a3, &a4, &a5}, *const right[6] = {&b0, &b1, &b2, &b3, &b4, &b5}; \
        const u32 depths[6] = {depth0, depth1, depth2, depth3, depth4, depth5};                                        \
        gemm<TYPE, false, BN, 6>(left, right, depths, result, wide);                                                   \
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
