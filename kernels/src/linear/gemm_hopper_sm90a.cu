// Large matrix products of dense 16-bit operands on Hopper (compute capability 9.0): as gemm.cuh, `out [M, N] =
// scale * (a · b + a2 · b2) + in`, forward with b = Wᵀ of W [N, K] and input gradient with b = W [K, N].
//
// Method. As many blocks as SMs go through the tiles of `out`, 128 x BN each. Of the first warpgroup one thread has the TMA
// copy tiles of 64 along the contraction into a ring in shared memory; the two other warpgroups multiply
// 64 rows each of them, with asynchronous products that read both operands from shared memory. Rings are run by two
// barriers a stage: `full` (its bytes are there) and `empty` (all eight warps are done with it). A second pair (a LoRA adapter)
// is a few more steps along the contraction, from its own maps; so are the products whose sum is wanted (the input gradient of
// linears on one input), `out = Σ g_i · W_i + u_i · A_i`. What lies outside of a matrix the TMA fills with zeros, so there are no
// other tails than those of `out`. A launch may start while the kernel before it ends (dependent.cuh).
//
// At the end of a tile the warps that multiply leave its sums in shared memory, rounded, and go on with the next tile; the three
// other warps of the first warpgroup have the TMA copy them meanwhile, or make results of them first (`staging`). `left` and `taken`
// say for each of the two warpgroups whether they are there. A residual is brought to that place in the middle of a tile (`given`),
// and added to the sums before they are rounded. Only f32 results are made by the warps that have multiplied.
//
// Tiles in shared memory have rows of 128 bytes (64 elements), swizzled: 16-byte chunk c of row i lies at c ^ (i % 8).
// `a` and forward's b: a row is 64 elements along the contraction. The input gradient's b: boxes of 64 columns, a row
// is 64 columns at one place of the contraction; the products read it transposed.
//
// | tile | stage: a, b | stages | sums left | accumulators |
// |---|---|---|---|---|
// | 128 x 256 | 16 KiB, 32 KiB | 3 (144 KiB) | 64 KiB | 128 registers |
// | 128 x 128 | 16 KiB, 16 KiB | 5 (160 KiB) | 32 KiB | 64 |
//
// What bounds it at large shapes is power: the multiprocessors run at 1.45 GHz of 1.98. So what counts is joules, and that the
// tensor cores, which take most of them, are busy: idle cycles want a higher clock for the rest.
//
// Wants: M, N > 0, K > 0; N, K and the rank multiples of 8; 16-byte aligned pointers.
#include "dependent.cuh"
#include "linear/gemm_results.cuh"

constexpr int BM = 128;
constexpr int DEPTH = 64;               // of a tile along the contraction
constexpr int ROW = DEPTH * 2;          // bytes of a row of a tile
constexpr int BOX = 64 * ROW;           // bytes of 64 rows
constexpr int STRIP = 16;               // rows of tiles that are visited together
constexpr int CONSUMERS = BM / 64;      // warpgroups that multiply
constexpr int WRITERS = 3;              // warps that make results
constexpr int MAX_STAGES = 5;
// Registers of a thread: 384 threads start with 168, (120 + 2 * 192) * 128 are as many.
constexpr int THREADS = 128 * (1 + CONSUMERS), WRITER_REGISTERS = 120, CONSUMER_REGISTERS = 192;

// What is made: `scale` times the sums, `[m, n]`.
struct Sizes {
    u32 m, n;
    float scale;
};

// The tiles of the result; a block takes every so many-th of them.
struct Tiles {
    u32 rows, columns, count;

    __device__ __forceinline__ Tiles(const Sizes& sizes, u32 width)
        : rows((sizes.m + BM - 1) / BM), columns((sizes.n + width - 1) / width), count(rows * columns) {}
    template <int BN> __device__ __forceinline__ void place(u32 tile, u32& m0, u32& n0) const {
        const u32 first = tile / (STRIP * columns) * STRIP, at = tile % (STRIP * columns);
        const u32 height = min(rows - first, (u32)STRIP);
        m0 = (first + at % height) * BM;
        n0 = at / height * BN;
    }
};

// The places of shared memory, and the ring's turn, which goes on from tile to tile: the producer and those that multiply count
// stages alike.
template <int BN> struct Ring {
    static constexpr u32 A_BYTES = BM * ROW, B_BYTES = BN * ROW, STAGE = A_BYTES + B_BYTES, STAGES = BN == 256 ? 3 : MAX_STAGES;
    static constexpr u32 SLABS = BN / SLAB * SLAB_BYTES; // of a warpgroup
    u8* start;
    u32 address, slabs, staging;
    u32 full, empty;        // barriers, + 8 stage
    u32 left, taken, given; // + 8 consumer
    u32 stage = 0, phase = 0;

    __device__ __forceinline__ explicit Ring(u8* shared) {
        start = shared + (-shared_address(shared) & 1023); // swizzle atoms start at multiples of 1024 bytes
        address = shared_address(start);
        slabs = address + STAGES * STAGE;
        staging = slabs + CONSUMERS * SLABS;
        full = staging + WRITERS * STAGING_BYTES;
        empty = full + MAX_STAGES * 8;
        left = empty + MAX_STAGES * 8;
        taken = left + CONSUMERS * 8;
        given = taken + CONSUMERS * 8;
    }
    // One thread.
    __device__ __forceinline__ void init() const {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS * 4);
        }
        for (u32 i = 0; i < CONSUMERS; i++) {
            barrier_init(left + 8 * i, 4);
            barrier_init(taken + 8 * i, WRITERS);
            barrier_init(given + 8 * i, 1);
        }
        barriers_ready();
    }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// What the producer's thread does: has the TMA bring the tiles' operands, and what is added to them.
template <bool FORWARD, int BN, int PAIRS, typename RESULT>
__device__ __forceinline__ void produce(Ring<BN>& ring, const TensorMap* const (&a)[PAIRS], const TensorMap* const (&b)[PAIRS],
                                        const u32 (&depths)[PAIRS], u32 steps, const Tiles& tiles, const RESULT& result) {
    prefetch_map(a[0]);
    prefetch_map(b[0]);
    u32 m0, n0, slabs_phase = 0;
    for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        tiles.place<BN>(tile, m0, n0);
        u32 until = steps / 2 + 1; // the middle of the tile, when the results of the last one have long been made
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
#pragma unroll 1
            for (u32 k0 = 0; k0 < depths[pair]; k0 += DEPTH) {
                const u32 to = ring.address + ring.stage * ring.STAGE, barrier = ring.full + 8 * ring.stage;
                barrier_wait(ring.empty + 8 * ring.stage, ring.phase ^ 1); // the first time round: free from the start
                barrier_expect(barrier, ring.STAGE);
                copy_box(to, a[pair], k0, m0, barrier);
                if (FORWARD) {
                    copy_box(to + ring.A_BYTES, b[pair], k0, n0, barrier);
                } else {
#pragma unroll
                    for (int box = 0; box < BN / 64; box++)
                        copy_box(to + ring.A_BYTES + box * BOX, b[pair], n0 + box * 64, k0, barrier);
                }
                ring.advance();
                if (--until > 0 || result.added == nullptr) continue;
                for (int consumer = 0; consumer < CONSUMERS; consumer++) {
                    const u32 slabs = ring.slabs + consumer * ring.SLABS, given = ring.given + 8 * consumer;
                    barrier_wait(ring.taken + 8 * consumer, slabs_phase ^ 1); // the first time: free from the start
                    barrier_expect(given, ring.SLABS);
                    for (int s = 0; s < BN / SLAB; s++)
                        copy_box(slabs + s * SLAB_BYTES, result.added, n0 + s * SLAB, m0 + consumer * 64, given);
                }
                slabs_phase ^= 1;
            }
        }
        result.prefetch(m0, n0, BN);
    }
}

// What a writer's warp does: makes results of the sums that both warpgroups leave in their slabs, but for the last tile's.
template <int BN, typename T, typename RESULT>
__device__ __forceinline__ void write_tiles(const RESULT& result, const Sizes& sizes, const Tiles& tiles, u32 writer,
                                            const Ring<BN>& ring) {
    u32 m0, n0, phase = 0;
    for (u32 tile = blockIdx.x; tile + gridDim.x < tiles.count; tile += gridDim.x) {
        tiles.place<BN>(tile, m0, n0);
#pragma unroll 1
        for (u32 consumer = 0; consumer < CONSUMERS; consumer++) {
            Writer<BN, T, RESULT> parts(result, sizes.m, sizes.n, m0 + consumer * 64, n0, writer, WRITERS);
            barrier_wait(ring.left + 8 * consumer, phase);
            parts.write(ring.slabs + consumer * ring.SLABS, ring.staging + writer * STAGING_BYTES);
            __syncwarp();
            if (threadIdx.x % WARP == 0) barrier_arrive(ring.taken + 8 * consumer);
        }
        phase ^= 1;
    }
}

// Waits for the last products of a tile, whose stage is free then.
template <int SUMS> __device__ __forceinline__ void end_products(float (&sums)[SUMS], u32 stage_empty) {
    products_wait<0>();
    pin(sums);
    if (threadIdx.x % WARP == 0) barrier_arrive(stage_empty);
}
// What a warpgroup does that multiplies: 64 rows of each tile.
template <typename T, bool FORWARD, int BN, typename RESULT>
__device__ __forceinline__ void consume(Ring<BN>& ring, u32 steps, const Sizes& sizes, const Tiles& tiles, int consumer,
                                        const RESULT& result) {
    const int warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
    const u32 slabs = ring.slabs + consumer * ring.SLABS;
    // The operands of the first stage.
    const u64 a_ring = describe(ring.address + consumer * BOX, 16, 8 * ROW);
    const u64 b_ring = describe(ring.address + ring.A_BYTES, FORWARD ? 16 : BOX, 8 * ROW);
    float sums[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) sums[i] = 0.0f;
    u32 m0, n0, slabs_phase = 0;
    for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        tiles.place<BN>(tile, m0, n0);
        u32 last = 0; // the stage of the step before
        pin(sums);
#pragma unroll 1
        for (u32 step = 0; step < steps; step++) {
            const u64 a_tile = a_ring + ring.stage * (ring.STAGE / 16), b_tile = b_ring + ring.stage * (ring.STAGE / 16);
            barrier_wait(ring.full + 8 * ring.stage, ring.phase);
            products_begin();
#pragma unroll
            for (int part = 0; part < DEPTH / 16; part++) {
                // 16 elements of a row, or 16 rows; in units of 16 bytes.
                constexpr int A_PART = 16 * 2 / 16, B_PART = FORWARD ? A_PART : 16 * ROW / 16;
                multiply_shared<T, false, !FORWARD>(sums, a_tile + part * A_PART, b_tile + part * B_PART, part == 0 ? step : 1);
            }
            products_commit();
            // The products of the step before are done; those of this one go on.
            products_wait<1>();
            if (step > 0 && lane == 0) barrier_arrive(ring.empty + 8 * last);
            last = ring.stage;
            ring.advance();
        }
        const u32 stage_empty = ring.empty + 8 * last;
        end_products(sums, stage_empty);
        if constexpr (RESULT::MAY_BE_F32) {
            if (result.wide) {
                write_wide<BN>(result, sizes.m, sizes.n, m0 + consumer * 64 + warp * 16, n0, sums, sizes.scale);
                continue;
            }
        }
        // The first time they are free from the start.
        if (result.added) barrier_wait(ring.given + 8 * consumer, slabs_phase);
        else barrier_wait(ring.taken + 8 * consumer, slabs_phase ^ 1);
        leave_sums<BN, T>(sums, sizes.scale, slabs, result.added != nullptr);
        publish_shared(); // the TMA reads them, and writes there again
        __syncwarp();
        if (tile + gridDim.x >= tiles.count) break;
        if (lane == 0) barrier_arrive(ring.left + 8 * consumer);
        slabs_phase ^= 1;
    }
    if (blockIdx.x >= tiles.count) return;
    if (result.wide) return;
    // The last tile's results the warps make that have multiplied, since they are free, and so is the ring.
    Writer<BN, T, RESULT> parts(result, sizes.m, sizes.n, m0 + consumer * 64, n0, warp, 4);
    meet<CONSUMERS * 128>(1);
    parts.write(slabs, ring.address + (consumer * 4 + warp) * STAGING_BYTES);
}

// `depths`: the contraction of each pair, or 0.
template <typename T, bool FORWARD, int BN, int PAIRS, typename RESULT>
__device__ __forceinline__ void gemm(const TensorMap* const (&a)[PAIRS], const TensorMap* const (&b)[PAIRS],
                                     const u32 (&depths)[PAIRS], const Sizes& sizes, const RESULT& result) {
    extern __shared__ u8 shared[];
    Ring<BN> ring(shared);
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / WARP % 4;
    if (threadIdx.x == 0) ring.init();
    __syncthreads();
    wait_before();

    const Tiles tiles(sizes, BN);
    u32 steps = 0;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) steps += (depths[pair] + DEPTH - 1) / DEPTH;
    if (warpgroup > 0) {
        take_registers<CONSUMER_REGISTERS>();
        consume<T, FORWARD, BN>(ring, steps, sizes, tiles, warpgroup - 1, result);
        return;
    }
    give_registers<WRITER_REGISTERS>();
    if (threadIdx.x == 0) {
        produce<FORWARD, BN>(ring, a, b, depths, steps, tiles, result);
    } else if (warp > 0) {
        if (result.wide) return;
        write_tiles<BN, T>(result, sizes, tiles, warp - 1, ring);
    }
}

#define MAP(NAME) const __grid_constant__ TensorMap NAME
#define PAIR(I) MAP(a##I), MAP(b##I)
#define TWO_PAIRS                                                                                                      \
    const TensorMap *const left[2] = {&a0, &a1}, *const right[2] = {&b0, &b1};                                         \
    const u32 depths[2] = {k, rank};
#define GEMM(NAME) extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_hopper_##NAME

#define ENTRY(TYPE, DIRECTION, FORWARD, BN)                                                                            \
    GEMM(DIRECTION##_##BN##_##TYPE)(PAIR(0), PAIR(1), float* wide, const float* in, MAP(out), MAP(added), u32 adds,    \
                                    float scale, u32 m, u32 n, u32 k, u32 rank) {                                      \
        TWO_PAIRS                                                                                                      \
        const Plus result{wide, in, &out, adds ? &added : nullptr};                                                    \
        gemm<TYPE, FORWARD, BN, 2>(left, right, depths, Sizes{m, n, scale}, result);                                   \
    }
#define JOINED(TYPE, BN)                                                                                               \
    GEMM(input_grads_##BN##_##TYPE)(PAIR(0), PAIR(1), PAIR(2), PAIR(3), PAIR(4), PAIR(5), float* wide, MAP(out), u32 m, \
                                    u32 n, u32 depth0, u32 depth1, u32 depth2, u32 depth3, u32 depth4, u32 depth5) {   \
        const TensorMap *const left[6] = {&a0, &a1, &a2, &a3, &a4, &a5}, *const right[6] = {&b0, &b1, &b2, &b3, &b4, &b5}; \
        const u32 depths[6] = {depth0, depth1, depth2, depth3, depth4, depth5};                                        \
        gemm<TYPE, false, BN, 6>(left, right, depths, Sizes{m, n, 1.0f}, Plus{wide, nullptr, &out, nullptr});          \
    }
#define SWIGLU(TYPE)                                                                                                   \
    GEMM(gated_##TYPE)(PAIR(0), PAIR(1), MAP(gates), const void* gate, MAP(up), MAP(output), u32 m, u32 n, u32 k, u32 rank) { \
        TWO_PAIRS                                                                                                      \
        const Gated<TYPE> result{&gates, (const TYPE*)gate, &up, &output};                                             \
        gemm<TYPE, true, 256, 2>(left, right, depths, Sizes{m, n, 1.0f}, result);                                      \
    }                                                                                                                  \
    GEMM(differentiated_##TYPE)(PAIR(0), PAIR(1), MAP(gates), MAP(ups), const void* gate, const void* up, MAP(of_gate), \
                                MAP(of_up), MAP(output), u32 m, u32 n, u32 k, u32 rank) {                              \
        TWO_PAIRS                                                                                                      \
        const Differentiated<TYPE> result{&gates, &ups, (const TYPE*)gate, (const TYPE*)up, &of_gate, &of_up, &output};  \
        gemm<TYPE, false, 256, 2>(left, right, depths, Sizes{m, n, 1.0f}, result);                                     \
    }
#define ENTRIES(TYPE)                                                                                                  \
    ENTRY(TYPE, forward, true, 256)                                                                                    \
    ENTRY(TYPE, forward, true, 128)                                                                                    \
    ENTRY(TYPE, input_grad, false, 256)                                                                                \
    ENTRY(TYPE, input_grad, false, 128)                                                                                \
    JOINED(TYPE, 256)                                                                                                  \
    JOINED(TYPE, 128)                                                                                                  \
    SWIGLU(TYPE)

ENTRIES(bf16)
ENTRIES(f16)
