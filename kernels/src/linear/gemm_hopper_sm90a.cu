// Large matrix products of dense 16-bit operands on Hopper (compute capability 9.0): as gemm.cuh, `out [M, N] =
// scale * (a · b + a2 · b2) + in`, forward with b = Wᵀ of W [N, K] and input gradient with b = W [K, N].
//
// Method. As many blocks as SMs go through the tiles of `out`, 128 x BN each. Of the first warpgroup one thread has the TMA
// copy tiles of 64 along the contraction into a ring in shared memory; the two other warpgroups multiply
// 64 rows each of them, with asynchronous products that read both operands from shared memory. Rings are run by two
// barriers a stage: `full` (its bytes are there) and `empty` (all eight warps are done with it). A second pair (a LoRA adapter)
// is a few more steps along the contraction, from its own maps; so are the products whose sum is wanted (the input gradient of
// linears on one input), `out = Σ g_i · W_i + u_i · A_i`. What lies outside of a matrix the TMA fills with zeros, so there are no
// other tails than those of `out`.
//
// At the end of a tile the warps that multiply leave its sums in shared memory, rounded, and go on with the next tile; the three
// other warps of the first warpgroup make results of them meanwhile. `left` and `taken` say for each of the two warpgroups
// whether they are there. Only f32 results, and those that something is added to, which take the sums as they are, are made by
// the warps that have multiplied.
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
#include "linear/gemm_results.cuh"

constexpr int BM = 128;
constexpr int DEPTH = 64;               // of a tile along the contraction
constexpr int ROW = DEPTH * 2;          // bytes of a row of a tile
constexpr int BOX = 64 * ROW;           // bytes of 64 rows
constexpr int STRIP = 16;               // rows of tiles that are visited together
constexpr int CONSUMERS = BM / 64;      // warpgroups that multiply
constexpr int WRITERS = 3;              // warps that make results
constexpr int MAX_STAGES = 5;
template <int BN> constexpr int STAGES = BN == 256 ? 3 : 5;
// Registers of a thread: 384 threads start with 168, (104 + 2 * 200) * 128 are as many.
constexpr int THREADS = 128 * (1 + CONSUMERS), WRITER_REGISTERS = 104, CONSUMER_REGISTERS = 200;

// What is made: `scale` times the sums, `[m, n]`.
struct Sizes {
    u32 m, n;
    float scale;
};

// How the last tiles, of which there are fewer than blocks, are shared out: the last steps of the contraction of each go to
// `helpers` blocks that have none of these tiles, `steps` to each, which leave their sums in `sums`.
struct Share {
    u32 helpers, steps;
    float4* sums;
};
constexpr u32 MAX_PARTS = 256;
__device__ u32 parts_left[MAX_PARTS * CONSUMERS]; // whether a warpgroup has left its sums of a part; 0 between launches

// Steps of a tile's contraction, of the sums of all pairs.
struct Work {
    u32 m0, n0;
    u32 first, last; // steps
    u32 part;        // of the part that others wait for, and of the first that this one waits for
    bool helps;
    u32 awaited; // parts
};

// What a block does, in turn: as many tiles as all others, and then one of the last or parts of those.
template <int BN> struct Works {
    u32 rows, columns, steps, blocks, rounds, rest, count;
    Share share;

    __device__ __forceinline__ Works(const Sizes& sizes, u32 steps, const Share& share) : steps(steps), share(share) {
        rows = (sizes.m + BM - 1) / BM, columns = (sizes.n + BN - 1) / BN;
        blocks = gridDim.x, rounds = rows * columns / blocks, rest = rows * columns % blocks;
        count = rounds + (blockIdx.x < rest);
        const u32 idle = blocks - rest, parts = rest * share.helpers;
        if (blockIdx.x >= rest && blockIdx.x - rest < parts) count += (parts - (blockIdx.x - rest) + idle - 1) / idle;
    }
    // Of those that come first, how many have results that others make while the block goes on.
    __device__ __forceinline__ u32 followed() const { return min(rounds, max(count, 1u) - 1); }
    __device__ __forceinline__ Work at(u32 turn) const {
        Work work{0, 0, 0, steps, 0, false, 0};
        u32 tile = turn * blocks + blockIdx.x;
        if (turn == rounds && blockIdx.x < rest) {
            work.last = steps - share.helpers * share.steps;
            work.part = blockIdx.x;
            work.awaited = share.helpers;
        } else if (turn >= rounds) {
            work.part = blockIdx.x - rest + (turn - rounds) * (blocks - rest);
            work.helps = true;
            tile = rounds * blocks + work.part % rest;
            work.last = steps - work.part / rest * share.steps;
            work.first = work.last - share.steps;
        }
        const u32 strip = tile / (STRIP * columns) * STRIP, place = tile % (STRIP * columns);
        const u32 height = min(rows - strip, (u32)STRIP);
        work.m0 = (strip + place % height) * BM;
        work.n0 = place / height * BN;
        return work;
    }
};

// A warpgroup leaves its sums of a part for the block that has the tile.
template <int SUMS>
__device__ __forceinline__ void leave_part(const Share& share, const float (&sums)[SUMS], u32 part, u32 consumer) {
    float4* to = share.sums + (u64)(part * CONSUMERS + consumer) * (SUMS / 4 * 128) + threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < SUMS / 4; i++) to[i * 128] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    meet<128>(1 + consumer);
    if (threadIdx.x % 128 == 0) arrive_at(parts_left + part * CONSUMERS + consumer);
}
// Adds what others have left.
template <int SUMS>
__device__ __forceinline__ void add_parts(const Share& share, float (&sums)[SUMS], const Work& work, u32 rest, u32 consumer) {
#pragma unroll 1
    for (u32 i = 0; i < work.awaited; i++) {
        const u32 part = (work.part + i * rest) * CONSUMERS + consumer;
        if (threadIdx.x % 128 == 0) {
            wait_at(parts_left + part, 1);
            parts_left[part] = 0;
        }
        meet<128>(1 + consumer);
        const float4* from = share.sums + (u64)part * (SUMS / 4 * 128) + threadIdx.x % 128;
#pragma unroll
        for (int j = 0; j < SUMS / 4; j++) {
            const float4 x = __ldcg(from + j * 128);
            sums[4 * j] += x.x, sums[4 * j + 1] += x.y, sums[4 * j + 2] += x.z, sums[4 * j + 3] += x.w;
        }
    }
}

// What a writer's warp does: makes results of the sums that both warpgroups leave in their slabs.
template <int BN, typename T, typename RESULT>
__device__ __forceinline__ void write_tiles(const RESULT& result, const Sizes& sizes, const Works<BN>& works, u32 writer, u32 slabs,
                                            u32 left, u32 taken) {
    u32 phase = 0;
    for (u32 turn = 0; turn < works.followed(); turn++) {
        const Work work = works.at(turn);
#pragma unroll 1
        for (u32 consumer = 0; consumer < CONSUMERS; consumer++) {
            Writer<BN, T, RESULT> parts(result, sizes.m, sizes.n, work.m0 + consumer * 64, work.n0, writer, 16 * (BN / SLAB), WRITERS);
            barrier_wait(left + 8 * consumer, phase);
            parts.write(slabs + consumer * (BN / SLAB * SLAB_BYTES));
            __syncwarp();
            if (threadIdx.x % WARP == 0) barrier_arrive(taken + 8 * consumer);
        }
        phase ^= 1;
    }
}

// What a warp that has multiplied does at the end: makes the result of its own rows of the last tile, since all warps are free.
template <int BN, typename T, typename RESULT>
__device__ __forceinline__ void write_own(const RESULT& result, const Sizes& sizes, u32 row0, u32 column0, u32 slabs) {
    constexpr u32 OWN = 4 * (BN / SLAB);
    const u32 begin = threadIdx.x / WARP % 4 * OWN;
    Writer<BN, T, RESULT> parts(result, sizes.m, sizes.n, row0, column0, begin, begin + OWN, 1);
    parts.write(slabs);
}

// Waits for the last products of a work, whose stage is free then.
template <int SUMS> __device__ __forceinline__ void end_products(float (&sums)[SUMS], u32 stage_empty) {
    products_wait<0>();
    pin(sums);
    if (threadIdx.x % WARP == 0) barrier_arrive(stage_empty);
}
// Makes a warp's part of the result of its sums as they are.
template <int BN, typename RESULT, typename End>
__device__ __forceinline__ void finish_wide(const RESULT& result, const Sizes& sizes, u32 row0, u32 column0,
                                            const float (&sums)[BN / 2], u8* exchange, End end) {
    WideWriter<BN, RESULT> writer(result, sizes.m, sizes.n, row0, column0);
    end();
    writer.write(sums, sizes.scale, exchange);
}

// `depths`: the contraction of each pair, or 0.
template <typename T, bool FORWARD, int BN, int PAIRS, typename RESULT>
__device__ __forceinline__ void gemm(const TensorMap* const (&a)[PAIRS], const TensorMap* const (&b)[PAIRS],
                                     const u32 (&depths)[PAIRS], const Sizes& sizes, const Share& share, const RESULT& result) {
    constexpr int A_BYTES = BM * ROW, B_BYTES = BN * ROW, STAGE = A_BYTES + B_BYTES, STAGES = ::STAGES<BN>, RING = STAGES * STAGE;
    constexpr int SLABS = BN / SLAB * SLAB_BYTES; // of a warpgroup
    extern __shared__ u8 shared[];
    // Swizzle atoms start at multiples of 1024 bytes.
    u8* ring = shared + (-shared_address(shared) & 1023);
    const u32 ring_address = shared_address(ring);
    const u32 slabs = ring_address + RING, full = slabs + CONSUMERS * SLABS, empty = full + MAX_STAGES * 8; // + 8 stage
    const u32 left = empty + MAX_STAGES * 8, taken = left + CONSUMERS * 8; // + 8 consumer
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS * 4);
        }
        for (int i = 0; i < CONSUMERS; i++) {
            barrier_init(left + 8 * i, 4);
            barrier_init(taken + 8 * i, WRITERS);
        }
        barriers_ready();
    }
    __syncthreads();

    u32 steps = 0;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) steps += (depths[pair] + DEPTH - 1) / DEPTH;
    const Works<BN> works(sizes, steps, share);

    // The ring goes on from work to work: the producer and the consumers count stages alike.
    u32 stage = 0, phase = 0;
    auto advance = [&] {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    };
    if (warpgroup == 0) {
        give_registers<WRITER_REGISTERS>();
        if (warp > 0) {
            if constexpr (RESULT::EITHER) {
                if (!result.wide && !result.in) write_tiles<BN, T>(result.plain(), sizes, works, warp - 1, slabs, left, taken);
            } else {
                write_tiles<BN, T>(result, sizes, works, warp - 1, slabs, left, taken);
            }
            return;
        }
        if (threadIdx.x != 0) return;
        prefetch_map(a[0]);
        prefetch_map(b[0]);
        for (u32 turn = 0; turn < works.count; turn++) {
            const Work work = works.at(turn);
            const u32 m0 = work.m0, n0 = work.n0;
            u32 begin = 0; // of a pair's steps
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                const u32 end = begin + (depths[pair] + DEPTH - 1) / DEPTH;
#pragma unroll 1
                for (u32 step = max(work.first, begin); step < min(work.last, end); step++) {
                    const u32 k0 = (step - begin) * DEPTH;
                    const u32 to = ring_address + stage * STAGE, barrier = full + 8 * stage;
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
                    advance();
                }
                begin = end;
            }
            if (!work.helps) result.prefetch(m0, n0, BN);
        }
        return;
    }

    take_registers<CONSUMER_REGISTERS>();
    const int consumer = warpgroup - 1;
    u8* const exchange = ring + RING + (consumer * 4 + warp) * EXCHANGE_BYTES; // the slabs', which are not used then
    // The operands of the first stage.
    const u64 a_ring = describe(ring_address + consumer * BOX, 16, 8 * ROW);
    const u64 b_ring = describe(ring_address + A_BYTES, FORWARD ? 16 : BOX, 8 * ROW);
    float sums[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) sums[i] = 0.0f;
    const u32 own_slabs = slabs + consumer * SLABS;
    u32 slabs_phase = 0;
    Work work;
    for (u32 turn = 0; turn < works.count; turn++) {
        work = works.at(turn);
        u32 last = 0; // the stage of the step before
        pin(sums);
#pragma unroll 1
        for (u32 step = work.first; step < work.last; step++) {
            const u64 a_tile = a_ring + stage * (STAGE / 16), b_tile = b_ring + stage * (STAGE / 16);
            barrier_wait(full + 8 * stage, phase);
            products_begin();
#pragma unroll
            for (int part = 0; part < DEPTH / 16; part++) {
                // 16 elements of a row, or 16 rows; in units of 16 bytes.
                constexpr int A_PART = 16 * 2 / 16, B_PART = FORWARD ? A_PART : 16 * ROW / 16;
                multiply_shared<T, false, !FORWARD>(sums, a_tile + part * A_PART, b_tile + part * B_PART, part == 0 ? step - work.first : 1);
            }
            products_commit();
            // The products of the step before are done; those of this one go on.
            products_wait<1>();
            if (step > work.first && lane == 0) barrier_arrive(empty + 8 * last);
            last = stage;
            advance();
        }
        auto end = [&] {
            end_products(sums, empty + 8 * last);
            add_parts(share, sums, work, works.rest, consumer);
        };
        if (work.helps) {
            end();
            leave_part(share, sums, work.part, consumer);
            continue;
        }
        if constexpr (RESULT::EITHER) {
            const u32 row0 = work.m0 + consumer * 64 + warp * 16;
            if (result.wide) {
                finish_wide<BN>(result.template plus<float>(), sizes, row0, work.n0, sums, exchange, end);
                continue;
            } else if (result.in) {
                finish_wide<BN>(result.template plus<T>(), sizes, row0, work.n0, sums, exchange, end);
                continue;
            }
        }
        end();
        barrier_wait(taken + 8 * consumer, slabs_phase ^ 1); // the first time: free from the start
        leave_sums<BN, T>(sums, sizes.scale, own_slabs);
        __syncwarp();
        if (turn == works.followed()) break; // the last
        if (lane == 0) barrier_arrive(left + 8 * consumer);
        slabs_phase ^= 1;
    }
    if (works.count == 0 || work.helps) return;
    if constexpr (RESULT::EITHER) {
        if (!result.wide && !result.in) write_own<BN, T>(result.plain(), sizes, work.m0 + consumer * 64, work.n0, own_slabs);
    } else {
        write_own<BN, T>(result, sizes, work.m0 + consumer * 64, work.n0, own_slabs);
    }
}

#define PAIR(I) const __grid_constant__ TensorMap a##I, const __grid_constant__ TensorMap b##I
#define TWO_PAIRS                                                                                                      \
    const TensorMap *const left[2] = {&a0, &a1}, *const right[2] = {&b0, &b1};                                         \
    const u32 depths[2] = {k, rank};
#define GEMM(NAME) extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_hopper_##NAME

#define SHARE float4 *parts, u32 helpers, u32 part_steps

#define ENTRY(TYPE, DIRECTION, FORWARD, BN)                                                                            \
    GEMM(DIRECTION##_##BN##_##TYPE)(PAIR(0), PAIR(1), void* out, const void* in, float scale, u32 add, u32 wide, u32 m, \
                                    u32 n, u32 k, u32 rank, SHARE) {                                                   \
        TWO_PAIRS                                                                                                      \
        gemm<TYPE, FORWARD, BN, 2>(left, right, depths, Sizes{m, n, scale}, Share{helpers, part_steps, parts},         \
                                   PlusAny<TYPE>{out, add ? out : in, wide != 0});                                    \
    }
#define JOINED(TYPE, BN)                                                                                               \
    GEMM(input_grads_##BN##_##TYPE)(PAIR(0), PAIR(1), PAIR(2), PAIR(3), PAIR(4), PAIR(5), void* out, u32 m, u32 n,    \
                                      u32 depth0, u32 depth1, u32 depth2, u32 depth3, u32 depth4, u32 depth5, u32 wide, SHARE) { \
        const TensorMap *const left[6] = {&a0, &a1, &a2, &a3, &a4, &a5}, *const right[6] = {&b0, &b1, &b2, &b3, &b4, &b5}; \
        const u32 depths[6] = {depth0, depth1, depth2, depth3, depth4, depth5};                                        \
        gemm<TYPE, false, BN, 6>(left, right, depths, Sizes{m, n, 1.0f}, Share{helpers, part_steps, parts},            \
                                 PlusAny<TYPE>{out, nullptr, wide != 0});                                              \
    }
#define SWIGLU(TYPE)                                                                                                   \
    GEMM(gated_##TYPE)(PAIR(0), PAIR(1), const __grid_constant__ TensorMap gates, const void* gate, void* up,           \
                       void* output, u32 m, u32 n, u32 k, u32 rank, SHARE) {                                           \
        TWO_PAIRS                                                                                                      \
        const Gated<TYPE> result{&gates, (const TYPE*)gate, (TYPE*)up, (TYPE*)output};                                 \
        gemm<TYPE, true, 256, 2>(left, right, depths, Sizes{m, n, 1.0f}, Share{helpers, part_steps, parts}, result);   \
    }                                                                                                                  \
    GEMM(differentiated_##TYPE)(PAIR(0), PAIR(1), const __grid_constant__ TensorMap gates,                             \
                                const __grid_constant__ TensorMap ups, void* gate, void* up, void* output, u32 m,       \
                                u32 n, u32 k, u32 rank, SHARE) {                                                       \
        TWO_PAIRS                                                                                                      \
        const Differentiated<TYPE> result{&gates, &ups, (TYPE*)gate, (TYPE*)up, (TYPE*)output};                        \
        gemm<TYPE, false, 256, 2>(left, right, depths, Sizes{m, n, 1.0f}, Share{helpers, part_steps, parts}, result);  \
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
