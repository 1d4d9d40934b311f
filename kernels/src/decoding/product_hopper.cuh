// The products of product.cuh on Hopper, whose asynchronous copies keep more bytes of codes on their way than registers hold.
//
// The blocks of a cluster share the inner index: each has a part of it, the same of all tiles, and so x is read once by a
// cluster, not by every multiprocessor. (x of 16 tokens is 128 KiB; read by all of them it was more than a small weight.) A
// block has warps of three kinds, and does two tiles (32 rows) a turn:
//
// | warps | what they do |
// |---|---|
// | W | decode and multiply. Each has two times 64 of the inner index and keeps x of it in registers as right operands |
// | a producer | keeps a ring full: 32 rows of codes by bulk copies, and their scales, which it computes |
// | a closer | adds up the sums of the block's warps and sends them to the blocks that own them; what this block owns it adds up in the order of ranks, and does what follows |
//
// What a launch before has not written does not wait for it: tables, and the first turns of the ring.
//
// Eight warps with clusters of four take an inner index of up to 4096 and half of a multiprocessor, so that there are two
// blocks, as one hides little of the latencies; 14 with clusters of eight take up to 14336 and all of it.
//
// Rows of codes lie 32 bytes more than a multiple of 128 apart, so that 4 rows of 32 bytes are in all banks: a lane reads 16
// codes of a block of 64. The scale of block j, line l of tile m and half h is number 32 j + 4 l + 2 m + h.
//
// Bound by the bytes of the codes. A look-up in the table is a product of bytes, which adds up the address, and a load.
//
// Wants: k a multiple of 256, codes at multiples of 16 bytes, bytes of scales at multiples of 4.
#pragma once
#include "decoding/cluster.cuh"
#include "decoding/dependent.cuh"
#include "decoding/tile.cuh"
#include "linear/hopper.cuh"

extern __shared__ __align__(128) unsigned char dynamic_shared[];

constexpr int TABLE_PITCH = 128;
constexpr u32 ROWS = 32;            // of a turn
constexpr u32 FRAGMENT = WARP * 16; // bytes: sums of 16 rows and 8 tokens

template <u32 W> constexpr u32 CLUSTER = W == 8 ? 4 : 8; // blocks
template <u32 W> constexpr u32 THREADS = (W + 2) * WARP;
template <u32 W> constexpr u32 MOST_QUADS = W / 2; // times 256 codes, of a block
template <u32 W> constexpr u32 CODES_PITCH = MOST_QUADS<W> * 128 + 32;
template <u32 W> constexpr u32 CODES_BYTES = ROWS * CODES_PITCH<W>;
template <u32 W> constexpr u32 STAGE = CODES_BYTES<W> + MOST_QUADS<W> * 4 * ROWS * sizeof(float); // codes, then scales
template <u32 W> constexpr u32 STAGES = W == 8 ? 3 : 4;

// The places of shared memory: the table, sums of warps, sums that blocks sent, barriers, the ring. Barriers: stages are full, or
// empty; sums of a turn are summed, or taken; those sent have arrived.
template <int NT, u32 W> struct Places {
    static constexpr u32 FRAGMENTS = 2 * NT; // of a turn
    static constexpr u32 SUMS = 256 * TABLE_PITCH, SENT = SUMS + W * FRAGMENTS * FRAGMENT;
    static constexpr u32 BARRIERS = SENT + 2 * CLUSTER<W> * FRAGMENT, RING = BARRIERS + 128;
    u32 table, sums, sent, full, empty, summed, taken, arrived, ring;

    __device__ __forceinline__ Places() {
        table = shared_address(dynamic_shared);
        sums = table + SUMS, sent = table + SENT;
        full = table + BARRIERS, empty = full + 8 * STAGES<W>;
        summed = empty + 8 * STAGES<W>, taken = summed + 8, arrived = taken + 8;
        ring = table + RING;
    }
    __device__ __forceinline__ void init_barriers() const {
        for (u32 s = 0; s < STAGES<W>; s++) {
            barrier_init(full + 8 * s, 2);
            barrier_init(empty + 8 * s, W);
        }
        barrier_init(summed, W);
        barrier_init(taken, 1);
        barrier_init(arrived, 1), barrier_init(arrived + 8, 1);
        barriers_ready();
    }
};
static_assert(8 * (2 * 4 + 4) <= 128, "barriers");

// What a block does: turns `first`, `first + step`, ..; of the inner index `quads` times 256 from the `quad`-th on.
struct Share {
    u32 rank, first, step, turns, quad, quads;
};
template <u32 W> __device__ __forceinline__ Share find_share(const Product& p) {
    const u32 rank = cluster_rank(), all = p.k / 256, quad = rank * all / CLUSTER<W>;
    const u32 quads = (rank + 1) * all / CLUSTER<W> - quad;
    return {rank, blockIdx.x / CLUSTER<W>, gridDim.x / CLUSTER<W>, (p.tiles + 1) / 2, quad, quads};
}

// The part and the row of it that a lane has of a turn; rows beyond the last are the last, and not stored.
template <Kind KIND> __device__ __forceinline__ void row_of(const Product& p, u32 turn, u32& part, u32& row) {
    const u32 lane = threadIdx.x % WARP;
    const Tile at = locate<KIND>(p, min(2 * turn + lane / 16, p.tiles - 1));
    const bool lower = lane & 8;
    part = lower ? at.part[1] : at.part[0];
    row = min((lower ? at.row[1] : at.row[0]) + lane % 8, p.parts[part].n - 1);
}

// Has the codes of a turn brought. A whole warp, a lane a row.
template <int NT, u32 W, Kind KIND>
__device__ __forceinline__ void bring(const Product& p, const Places<NT, W>& places, const Share& share, u32 turn, u32 stage) {
    const u32 lane = threadIdx.x % WARP, bytes = share.quads * 128, full = places.full + 8 * stage;
    u32 part, row;
    row_of<KIND>(p, turn, part, row);
    if (lane == 0) barrier_expect(full, ROWS * bytes);
    __syncwarp();
    if (bytes == 0) return;
    const u8* from = p.parts[part].codes + (row * (p.k / 2) + share.quad * 128);
    copy_bulk(places.ring + stage * STAGE<W> + lane * CODES_PITCH<W>, from, bytes, full);
}

// What the scales of a lane's row of a turn are made of, on its way.
template <u32 W> struct RawScales {
    u32 part, absmax[MOST_QUADS<W>];
    float nested[MOST_QUADS<W>];

    template <Kind KIND> __device__ __forceinline__ void fetch(const Product& p, const Share& share, u32 turn) {
        u32 row;
        row_of<KIND>(p, turn, part, row);
        const Part& of = p.parts[part];
        const u32 block = row * (p.k / 64) + share.quad * 4;
#pragma unroll
        for (u32 q = 0; q < MOST_QUADS<W>; q++) {
            if (q >= share.quads) continue;
            absmax[q] = __ldg((const u32*)(of.absmax + block + 4 * q));
            nested[q] = __ldg(of.nested + (block + 4 * q) / 256);
        }
    }
    __device__ __forceinline__ void make(u32 to, u32 quads, const float (*maps)[256], const float* offsets) const {
        const u32 lane = threadIdx.x % WARP;
        to += (lane % 8 * 4 + lane / 8) * 4;
#pragma unroll
        for (u32 q = 0; q < MOST_QUADS<W>; q++) {
            if (q >= quads) continue;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                // Two roundings, as the reference: no fused multiply-add.
                const float v = __fmul_rn(maps[part][absmax[q] >> 8 * i & 255], nested[q]);
                store_float(to + (4 * q + i) * 128, __fadd_rn(v, offsets[part]));
            }
        }
    }
};

// The producer, after it has brought the first turns. `scales`: of the first two, then of every other.
template <int NT, u32 W, Kind KIND>
__device__ __forceinline__ void produce(const Product& p, const Places<NT, W>& places, const Share& share,
                                        RawScales<W> (&scales)[2], const float (*maps)[256], const float* offsets) {
    u32 stage = 0, parity = 1;
#pragma unroll 1
    for (u32 turn = share.first, count = 0; turn < share.turns; count += 2) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            if (turn >= share.turns) break;
            if (count + i >= STAGES<W>) {
                barrier_wait(places.empty + 8 * stage, parity);
                bring<NT, W, KIND>(p, places, share, turn, stage);
            }
            scales[i].make(places.ring + stage * STAGE<W> + CODES_BYTES<W>, share.quads, maps, offsets);
            __syncwarp();
            if (threadIdx.x % WARP == 0) barrier_arrive(places.full + 8 * stage);
            const u32 later = turn + 2 * share.step;
            if (later < share.turns) scales[i].template fetch<KIND>(p, share, later);
            turn += share.step;
            if (++stage == STAGES<W>) stage = 0, parity ^= 1;
        }
    }
}

// The two values of a byte of codes, which `which` has 128 for. `bank`: the table's address and 4 · lane.
__device__ __forceinline__ u32 look_up(u32 codes, u32 which, u32 bank) {
    u32 value;
    asm("{.reg .u32 at; dp4a.u32.u32 at, %1, %2, %3; ld.shared.u32 %0, [at];}" : "=r"(value) : "r"(codes), "r"(which), "r"(bank));
    return value;
}

// sum += the products of 64 codes of each row with x, times the rows' scales, or times 0 if they are not `there`. Both tiles at
// once: two chains of products for each 8 tokens.
template <typename T, int NT, u32 W>
__device__ __forceinline__ void multiply_group(u32 codes, u32 scales, bool there, const uint4 (&x)[NT][2], u32 bank,
                                               float (&sum)[2][NT][4]) {
    uint2 upper[2], lower[2];
#pragma unroll
    for (u32 m = 0; m < 2; m++) {
        upper[m] = load_shared_uint2(codes + 16 * m * CODES_PITCH<W>);
        lower[m] = load_shared_uint2(codes + (16 * m + 8) * CODES_PITCH<W>);
    }
    float group[2][NT][4] = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
        // Codes 4s..4s + 4 of the lane's 16: bytes 2s and 2s + 1.
        const u32 byte = s % 2 ? 128u << 16 : 128u;
#pragma unroll
        for (u32 m = 0; m < 2; m++) {
            const u32 top = s < 2 ? upper[m].x : upper[m].y, low = s < 2 ? lower[m].x : lower[m].y;
            const u32 a[4] = {look_up(top, byte, bank), look_up(low, byte, bank), look_up(top, byte << 8, bank),
                              look_up(low, byte << 8, bank)};
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint4& v = x[n][s / 2];
                multiply<T>(group[m][n], a, s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
            }
        }
    }
    const float4 scale = load_float4(scales);
    add_scaled(sum[0], group[0], there ? scale.x : 0.0f, there ? scale.y : 0.0f);
    add_scaled(sum[1], group[1], there ? scale.z : 0.0f, there ? scale.w : 0.0f);
}

// A warp that decodes and multiplies.
template <typename T, int NT, u32 W>
__device__ __forceinline__ void consume(const Product& p, const Places<NT, W>& places, const Share& share) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, i = lane % 4;
    const u32 groups = share.quads * 4, begin = warp * groups / W, count = (warp + 1) * groups / W - begin;
    wait_before();
    // Zeros beyond the last group and token.
    uint4 x[2][NT][2];
#pragma unroll
    for (u32 u = 0; u < 2; u++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const T* from = (const T*)p.x + (u64)(8 * n + g) * p.k + share.quad * 256 + (begin + u) * 64 + 16 * i;
            const bool there = u < count && 8 * n + g < p.tokens;
            x[u][n][0] = load_now(from, there), x[u][n][1] = load_now(from + 8, there);
        }
    }
    const u32 bank = places.table + 4 * lane, sums = places.sums + warp * 2 * NT * FRAGMENT + lane * 16;
    const u32 codes = places.ring + g * CODES_PITCH<W> + begin * 32 + i * 8;
    const u32 scales = places.ring + CODES_BYTES<W> + begin * 128 + g * 16;
    u32 stage = 0, parity = 0, taken = 1;
#pragma unroll 1
    for (u32 turn = share.first; turn < share.turns; turn += share.step) {
        float sum[2][NT][4] = {};
        const u32 at = stage * STAGE<W>;
        barrier_wait(places.full + 8 * stage, parity);
        // The second 64 may be beyond the last, where what lies there is multiplied by zeros.
        if (count > 0) {
            multiply_group<T, NT, W>(codes + at, scales + at, true, x[0], bank, sum);
            multiply_group<T, NT, W>(codes + at + 32, scales + at + 128, count > 1, x[1], bank, sum);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(places.empty + 8 * stage);
        if (++stage == STAGES<W>) stage = 0, parity ^= 1;
        barrier_wait(places.taken, taken);
        taken ^= 1;
#pragma unroll
        for (u32 f = 0; f < 2 * NT; f++) {
            const float(&v)[4] = sum[f / NT][f % NT];
            store16(sums + f * FRAGMENT, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(places.summed);
    }
}

__device__ __forceinline__ void add(float (&to)[4], const float4& v) { to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w; }

// The closer. A turn's fragments, 16 rows and 8 tokens, go round among the blocks, so that every block owns one in `PERIOD` turns,
// and has places for those of two: who sends to the one has had sums of its own from all blocks since they were read.
template <typename T, int NT, u32 W, Kind KIND>
__device__ __forceinline__ void close(const Product& p, const Places<NT, W>& places, const Share& share) {
    constexpr u32 BLOCKS = CLUSTER<W>, FRAGMENTS = 2 * NT, PERIOD = BLOCKS / FRAGMENTS;
    const u32 lane = threadIdx.x % WARP;
    wait_before();
#pragma unroll 1
    for (u32 turn = share.first, count = 0; turn < share.turns; turn += share.step, count++) {
        const u32 shift = count * FRAGMENTS, slot = count / PERIOD % 2;
        const u32 own = (share.rank - shift) % BLOCKS, tile = 2 * turn + own / NT, first = own % NT * 8;
        const u32 arrived = places.arrived + 8 * slot, sent = places.sent + slot * BLOCKS * FRAGMENT + lane * 16;
        const bool owner = own < FRAGMENTS;
        const Tile at = locate<KIND>(p, min(tile, p.tiles - 1));
        float sum[1][4] = {};
        if (owner) {
            if (lane == 0) barrier_expect(arrived, BLOCKS * FRAGMENT);
            add_branch<T, 1, KIND, 4>(p, at, first, 0, 1, sum);
        }
        barrier_wait(places.summed, count % 2);
#pragma unroll
        for (u32 f = 0; f < FRAGMENTS; f++) {
            float total[4] = {};
#pragma unroll
            for (u32 warp = 0; warp < W; warp++)
                add(total, load_float4(places.sums + (warp * FRAGMENTS + f) * FRAGMENT + lane * 16));
            const u32 to = (f + shift) % BLOCKS;
            send(of_block(sent + share.rank * FRAGMENT, to), total, of_block(arrived, to));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(places.taken);
        if (!owner) continue;
        wait_sent(arrived, count / PERIOD / 2 % 2);
#pragma unroll
        for (u32 from = 0; from < BLOCKS; from++) add(sum[0], load_float4(sent + from * FRAGMENT));
        const u32 token = first + lane % 4 * 2;
        if (tile < p.tiles && token < p.tokens) finish<T, KIND>(p, at, lane / 4, token, sum[0][0], sum[0][2]);
        if (tile < p.tiles && token + 1 < p.tokens) finish<T, KIND>(p, at, lane / 4, token + 1, sum[0][1], sum[0][3]);
        __syncwarp();
    }
}

template <typename T, int NT, u32 W, Kind KIND> __device__ __forceinline__ void product(const Product& p) {
    constexpr u32 PARTS = KIND == PLAIN ? 1 : KIND == TURN ? 3 : 2;
    __shared__ float maps[PARTS][256], offsets[PARTS];
    const u32 warp = threadIdx.x / WARP;
    const Places<NT, W> places;
    const Share share = find_share<W>(p);
    RawScales<W> scales[2]; // the producer's
    if (warp == W) {
        if (threadIdx.x % WARP == 0) places.init_barriers();
        __syncwarp();
        u32 turn = share.first;
        for (u32 stage = 0; stage < STAGES<W> && turn < share.turns; stage++, turn += share.step)
            bring<NT, W, KIND>(p, places, share, turn, stage);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            if (share.first + i * share.step < share.turns) scales[i].template fetch<KIND>(p, share, share.first + i * share.step);
        }
        let_next();
    }
    fill_table<T, TABLE_PITCH>(places.table, p.quant_type);
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        if (threadIdx.x < 256) maps[part][threadIdx.x] = p.parts[part].map[threadIdx.x];
        if (threadIdx.x == 0) offsets[part] = *p.parts[part].offset;
    }
    __syncwarp();
    cluster_sync();
    if (warp < W) consume<T, NT, W>(p, places, share);
    else if (warp == W) produce<NT, W, KIND>(p, places, share, scales, maps, offsets);
    else close<T, NT, W, KIND>(p, places, share);
}
