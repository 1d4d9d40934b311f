// The products of product.cuh on Hopper, whose asynchronous copies keep more bytes of codes on their way than registers hold.
//
// A block has a multiprocessor, and warps of three kinds:
//
// | warps | what they do |
// |---|---|
// | 16 | decode and multiply. Each has a part of the inner index, the same of all tiles, and keeps x of it in registers as right operands: x is read once |
// | 2 producers | keep a ring of tiles full: 16 rows of codes by bulk copies, and their scales, which they compute |
// | 2 closers | add up the sums of a tile and do what follows them |
//
// Producers and closers have every other tile, because what they read for one takes longer to come than a tile takes to be
// multiplied.
//
// What a launch before has not written does not wait for it: tables, and the first tiles of the ring. Registers hold x of an
// inner index of up to 4096. Up to four times as much is shared by the blocks of a cluster: one closer sends the sums of its
// block to the block that owns them, whose other closer adds them up in the order of ranks.
//
// Rows of codes lie 32 bytes more than a multiple of 128 apart, so that 4 rows of 32 bytes are in all banks: a lane reads 16
// codes of a block of 64. The scale of block j of line l and half h of a tile is number 16 j + 2 l + h.
//
// For more than 8 tokens x takes more registers than there are for each; four warps that do not multiply are a warpgroup, which
// gives some of its own.
//
// Bound by the bytes of the codes. A look-up in the table is a product of bytes, which adds up the address, and a load: 62
// instructions for 64 codes of 16 rows and 8 tokens, 81 for 16.
//
// Wants: k a multiple of 256, codes at multiples of 16 bytes, bytes of scales at multiples of 4.
#pragma once
#include "cluster.cuh"
#include "dependent.cuh"
#include "decoding/tile.cuh"
#include "linear/hopper.cuh"

extern __shared__ __align__(128) unsigned char dynamic_shared[];

constexpr u32 MOST_QUADS = 16; // times 256 codes, of a block
constexpr int TABLE_PITCH = 128;
constexpr u32 CODES_PITCH = MOST_QUADS * 128 + 32, CODES_BYTES = 16 * CODES_PITCH;
constexpr u32 STAGE = CODES_BYTES + MOST_QUADS * 4 * 16 * sizeof(float); // bytes: codes, then scales
constexpr u32 FRAGMENT = WARP * 16;                                      // bytes: sums of 16 rows and 8 tokens
constexpr u32 CONSUMERS = 16, PRODUCERS = 2, CLOSERS = 2, THREADS = (CONSUMERS + PRODUCERS + CLOSERS) * WARP;
// Registers of a thread, where 640 start with 96: 512 · 104 + 128 · 64 are as many.
constexpr int CONSUMER_REGISTERS = 104, OTHER_REGISTERS = 64;
constexpr u32 MOST_GROUPS = 4 * MOST_QUADS / CONSUMERS; // of 64, of a warp
// As few as keep memory busy: what they leave of 256 KiB is the first-level cache, through which x comes (128 KiB for 16
// tokens).
constexpr u32 STAGES = 3;
// Stages whose codes are asked for at once; the others a little later, so that x does not come behind all of them.
constexpr u32 FIRST = 1;

// The places of shared memory: the table, sums of warps of two tiles, sums that blocks sent, barriers, the ring. Barriers:
// stages are full, or empty; sums of a tile are summed, or taken; those sent have arrived, or (of each block) been read.
template <int NT> struct Places {
    static constexpr u32 SUMS_BYTES = CONSUMERS * NT * FRAGMENT;
    static constexpr u32 SUMS = 256 * TABLE_PITCH, SENT = SUMS + 2 * SUMS_BYTES, BARRIERS = SENT + 2 * 4 * FRAGMENT;
    static constexpr u32 RING = BARRIERS + 256;
    u32 table, sums, sent, full, empty, summed, taken, arrived, read, ring;

    __device__ __forceinline__ Places() {
        table = shared_address(dynamic_shared);
        sums = table + SUMS, sent = table + SENT;
        full = table + BARRIERS, empty = full + 8 * STAGES;
        summed = empty + 8 * STAGES, taken = summed + 16, arrived = taken + 16, read = arrived + 16;
        ring = table + RING;
    }
    __device__ __forceinline__ void init_barriers() const {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 2);
            barrier_init(empty + 8 * s, CONSUMERS);
        }
        for (u32 s = 0; s < 2; s++) {
            barrier_init(summed + 8 * s, CONSUMERS);
            barrier_init(taken + 8 * s, 1);
            barrier_init(arrived + 8 * s, 1);
        }
        for (u32 s = 0; s < 2 * 4; s++) barrier_init(read + 8 * s, 1);
        barriers_ready();
    }
};
static_assert(8 * (2 * STAGES + 14) <= 256, "barriers");


// What a block does: tiles `first`, `first + step`, ..; of the inner index `quads` times 256 from the `quad`-th on.
struct Share {
    u32 rank, first, step, quad, quads;
};
template <u32 BLOCKS> __device__ __forceinline__ Share find_share(const Product& p) {
    const u32 rank = BLOCKS > 1 ? cluster_rank() : 0, all = p.k / 256, quad = rank * all / BLOCKS;
    return {rank, blockIdx.x / BLOCKS, gridDim.x / BLOCKS, quad, (rank + 1) * all / BLOCKS - quad};
}

// Has the codes of a tile brought. A whole warp, a lane a row; rows beyond the last are the last, and not stored.
template <int NT, Kind KIND>
__device__ __forceinline__ void bring(const Product& p, const Places<NT>& places, const Share& share, u32 tile, u32 stage) {
    const u32 lane = threadIdx.x % WARP, bytes = share.quads * 128, full = places.full + 8 * stage;
    if (lane == 0) barrier_expect(full, 16 * bytes);
    __syncwarp();
    if (lane >= 16) return;
    const Tile at = locate<KIND>(p, tile);
    const Part& part = p.parts[lane < 8 ? at.part[0] : at.part[1]];
    const u32 row = min((lane < 8 ? at.row[0] : at.row[1]) + lane % 8, part.n - 1);
    const u8* from = part.codes + (row * (p.k / 2) + share.quad * 128);
    copy_bulk(places.ring + stage * STAGE + lane * CODES_PITCH, from, bytes, full);
}

// What scales of a tile are made of, on its way: of lane l, every other quad of the row that scales l % 16 are of.
struct RawScales {
    u32 part, absmax[MOST_QUADS / 2];
    float nested[MOST_QUADS / 2];

    __device__ __forceinline__ void fetch(const Product& p, const Share& share, const Tile& at) {
        const u32 lane = threadIdx.x % WARP, h = lane % 2;
        part = h ? at.part[1] : at.part[0];
        const Part& of = p.parts[part];
        const u32 row = min((h ? at.row[1] : at.row[0]) + lane % 16 / 2, of.n - 1);
        const u32 block = row * (p.k / 64) + share.quad * 4 + lane / 16 * 4;
#pragma unroll
        for (u32 j = 0; j < MOST_QUADS / 2; j++) {
            absmax[j] = 0, nested[j] = 0.0f;
            if (2 * j + lane / 16 >= share.quads) continue;
            absmax[j] = __ldg((const u32*)(of.absmax + block + 8 * j));
            nested[j] = __ldg(of.nested + (block + 8 * j) / 256);
        }
    }
    __device__ __forceinline__ void make(u32 to, u32 quads, const float (*maps)[256], const float* offsets) const {
        const u32 lane = threadIdx.x % WARP;
        to += (lane / 16 * 4 * 16 + lane % 16) * 4;
        // 16 look-ups under way at once: a store after each would keep the next one waiting.
#pragma unroll
        for (u32 first = 0; first < MOST_QUADS / 2; first += 4) {
            float v[4][4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
#pragma unroll
                // Two roundings, as the reference: no fused multiply-add.
                for (u32 i = 0; i < 4; i++)
                    v[j][i] = __fadd_rn(__fmul_rn(maps[part][absmax[first + j] >> 8 * i & 255], nested[first + j]), offsets[part]);
            }
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                if (2 * (first + j) + lane / 16 >= quads) continue;
#pragma unroll
                for (u32 i = 0; i < 4; i++) store_float(to + (8 * (first + j) + i) * 64, v[j][i]);
            }
        }
    }
};

// Producer `which`, after the first tiles have been brought. `scales`: of its first tile.
template <int NT, Kind KIND>
__device__ __forceinline__ void produce(const Product& p, const Places<NT>& places, const Share& share, u32 which,
                                        RawScales& scales, const float (*maps)[256], const float* offsets) {
    u32 tile = share.first + which * share.step;
#pragma unroll 1
    for (u32 turn = which; tile < p.tiles; turn += PRODUCERS) {
        const u32 stage = turn % STAGES;
        if (turn >= STAGES) barrier_wait(places.empty + 8 * stage, turn / STAGES % 2 ^ 1);
        if (turn >= FIRST) bring<NT, KIND>(p, places, share, tile, stage);
        scales.make(places.ring + stage * STAGE + CODES_BYTES, share.quads, maps, offsets);
        __syncwarp();
        if (threadIdx.x % WARP == 0) barrier_arrive(places.full + 8 * stage);
        tile += PRODUCERS * share.step;
        if (tile < p.tiles) scales.fetch(p, share, locate<KIND>(p, tile));
    }
}

// The two values of a byte of codes, which `which` has 128 for. `bank`: the table's address and 4 · lane.
__device__ __forceinline__ u32 look_up(u32 codes, u32 which, u32 bank) {
    u32 value;
    asm("{.reg .u32 at; dp4a.u32.u32 at, %1, %2, %3; ld.shared.u32 %0, [at];}" : "=r"(value) : "r"(codes), "r"(which), "r"(bank));
    return value;
}

// sum += the products of 64 codes a row with x, each row's times its scale, or times 0 if they are not `there`.
template <typename T, int NT>
__device__ __forceinline__ void multiply_group(u32 codes, u32 scales, bool there, const uint4 (&x)[NT][2], u32 bank,
                                               float (&sum)[NT][4]) {
    const uint2 upper = load_shared_uint2(codes), lower = load_shared_uint2(codes + 8 * CODES_PITCH);
    float group[NT][4] = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
        // Codes 4s..4s + 4 of the lane's 16: bytes 2s and 2s + 1.
        const u32 top = s < 2 ? upper.x : upper.y, low = s < 2 ? lower.x : lower.y, byte = s % 2 ? 128u << 16 : 128u;
        const u32 a[4] = {look_up(top, byte, bank), look_up(low, byte, bank), look_up(top, byte << 8, bank),
                          look_up(low, byte << 8, bank)};
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint4& v = x[n][s / 2];
            multiply<T>(group[n], a, s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
        }
    }
    const uint2 scale = load_shared_uint2(scales);
    const float top_scale = there ? __uint_as_float(scale.x) : 0.0f, low_scale = there ? __uint_as_float(scale.y) : 0.0f;
    add_scaled(sum, group, top_scale, low_scale);
}

// A warp that decodes and multiplies.
template <typename T, int NT>
__device__ __forceinline__ void consume(const Product& p, const Places<NT>& places, const Share& share) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, i = lane % 4;
    const u32 groups = share.quads * 4, begin = warp * groups / CONSUMERS, count = (warp + 1) * groups / CONSUMERS - begin;
    fill_table<T, TABLE_PITCH>(places.table, p.quant_type);
    wait_before();
    // Zeros beyond the last group and token.
    uint4 x[MOST_GROUPS][NT][2];
#pragma unroll
    for (u32 u = 0; u < MOST_GROUPS; u++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const T* from = (const T*)p.x + (u64)(8 * n + g) * p.k + share.quad * 256 + (begin + u) * 64 + 16 * i;
            const bool there = u < count && 8 * n + g < p.tokens;
            x[u][n][0] = load_now(from, there), x[u][n][1] = load_now(from + 8, there);
        }
    }
    meet<CONSUMERS * WARP>(1); // the table is there, while x is on its way
    const u32 bank = places.table + 4 * lane, sums = places.sums + warp * NT * FRAGMENT + lane * 16;
    const u32 first = places.ring + g * CODES_PITCH + begin * 32 + i * 8;
    const u32 first_scale = places.ring + CODES_BYTES + begin * 64 + g * 8;
#pragma unroll 1
    for (u32 turn = 0, tile = share.first; tile < p.tiles; turn++, tile += share.step) {
        float sum[NT][4] = {};
        const u32 stage = turn % STAGES, codes = first + stage * STAGE, scales = first_scale + stage * STAGE;
        barrier_wait(places.full + 8 * stage, turn / STAGES % 2);
        // Two at a time; the second may be beyond the last, where what lies there is multiplied by zeros.
#pragma unroll
        for (u32 u = 0; u < MOST_GROUPS; u += 2) {
            if (u >= count) break;
            multiply_group<T, NT>(codes + u * 32, scales + u * 64, true, x[u], bank, sum);
            multiply_group<T, NT>(codes + (u + 1) * 32, scales + (u + 1) * 64, u + 1 < count, x[u + 1], bank, sum);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(places.empty + 8 * stage);
        barrier_wait(places.taken + turn % 2 * 8, turn / 2 % 2 ^ 1);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            store16(sums + turn % 2 * Places<NT>::SUMS_BYTES + n * FRAGMENT, __float_as_uint(sum[n][0]), __float_as_uint(sum[n][1]),
                    __float_as_uint(sum[n][2]), __float_as_uint(sum[n][3]));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(places.summed + turn % 2 * 8);
    }
}

__device__ __forceinline__ void add(float (&to)[4], const float4& v) { to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w; }

// Eight tokens from `first` on of a tile to where they go.
template <typename T, Kind KIND>
__device__ __forceinline__ void finish_fragment(const Product& p, const Tile& at, u32 first, const float (&sum)[4]) {
    const u32 line = threadIdx.x % WARP / 4, token = first + threadIdx.x % 4 * 2;
    if (token < p.tokens) finish<T, KIND>(p, at, line, token, sum[0], sum[2]);
    if (token + 1 < p.tokens) finish<T, KIND>(p, at, line, token + 1, sum[1], sum[3]);
}

// The sums of all warps of 16 rows and 8 tokens.
template <int NT> __device__ __forceinline__ void add_warps(float (&sum)[4], const Places<NT>& places, u32 turn, int n) {
    const u32 sums = places.sums + turn % 2 * Places<NT>::SUMS_BYTES + threadIdx.x % WARP * 16;
#pragma unroll
    for (u32 warp = 0; warp < CONSUMERS; warp++) add(sum, load_float4(sums + (warp * NT + n) * FRAGMENT));
}

// A closer: of every other tile.
template <typename T, int NT, Kind KIND>
__device__ __forceinline__ void close(const Product& p, const Places<NT>& places, const Share& share, u32 which) {
    wait_before();
#pragma unroll 1
    for (u32 turn = which; share.first + turn * share.step < p.tiles; turn += 2) {
        const Tile at = locate<KIND>(p, share.first + turn * share.step);
        float sum[NT][4] = {};
        add_branch<T, NT, KIND, 4 / NT>(p, at, 0, 0, 1, sum);
        barrier_wait(places.summed + 8 * which, turn / 2 % 2);
#pragma unroll
        for (int n = 0; n < NT; n++) add_warps(sum[n], places, turn, n);
        __syncwarp();
        if (threadIdx.x % WARP == 0) barrier_arrive(places.taken + 8 * which);
#pragma unroll
        for (int n = 0; n < NT; n++) finish_fragment<T, KIND>(p, at, 8 * n, sum[n]);
        __syncwarp();
    }
}

// Where a cluster shares the inner index its blocks own a tile's fragments (16 rows, 8 tokens) in turn: each has one in PERIOD
// tiles, and places for those of two times as many. One closer sends the block's sums to the owners, when these have read what
// was in their place; the other adds up what the block owns, in the order of ranks.
template <int NT, u32 BLOCKS> struct Turns {
    static constexpr u32 PERIOD = BLOCKS / NT;
    static __device__ __forceinline__ u32 owner(u32 turn, u32 n) { return (n + turn * NT) % BLOCKS; }
    // The fragment of a tile that a block owns, if there is such a one.
    static __device__ __forceinline__ u32 owned(u32 turn, u32 rank) { return (rank - turn * NT) % BLOCKS; }
    static __device__ __forceinline__ u32 slot(u32 turn) { return turn / PERIOD % 2; }
    static __device__ __forceinline__ u32 parity(u32 turn) { return turn / PERIOD / 2 % 2; }
};

template <int NT, u32 BLOCKS>
__device__ __forceinline__ void send_sums(const Product& p, const Places<NT>& places, const Share& share) {
    typedef Turns<NT, BLOCKS> At;
    const u32 lane = threadIdx.x % WARP;
#pragma unroll 1
    for (u32 turn = 0; share.first + turn * share.step < p.tiles; turn++) {
        const u32 slot = At::slot(turn);
        float sum[NT][4] = {};
        barrier_wait(places.summed + turn % 2 * 8, turn / 2 % 2);
#pragma unroll
        for (int n = 0; n < NT; n++) add_warps(sum[n], places, turn, n);
        __syncwarp();
        if (lane == 0) barrier_arrive(places.taken + turn % 2 * 8);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const u32 to = At::owner(turn, n), place = places.sent + (slot * BLOCKS + share.rank) * FRAGMENT + lane * 16;
            wait_sent(places.read + (slot * BLOCKS + to) * 8, At::parity(turn) ^ 1);
            send(of_block(place, to), sum[n], of_block(places.arrived + 8 * slot, to));
        }
    }
}

template <typename T, int NT, u32 BLOCKS, Kind KIND>
__device__ __forceinline__ void close_owned(const Product& p, const Places<NT>& places, const Share& share) {
    typedef Turns<NT, BLOCKS> At;
    const u32 lane = threadIdx.x % WARP, turns = (p.tiles - share.first + share.step - 1) / share.step;
    wait_before();
#pragma unroll 1
    for (u32 turn = 0; turn < turns; turn++) {
        const u32 own = At::owned(turn, share.rank), slot = At::slot(turn), arrived = places.arrived + 8 * slot;
        if (own >= NT) continue;
        if (lane == 0) barrier_expect(arrived, BLOCKS * FRAGMENT);
        const Tile at = locate<KIND>(p, share.first + turn * share.step);
        float sum[1][4] = {};
        add_branch<T, 1, KIND, 4>(p, at, 8 * own, 0, 1, sum);
        wait_sent(arrived, At::parity(turn));
#pragma unroll
        for (u32 from = 0; from < BLOCKS; from++)
            add(sum[0], load_float4(places.sent + (slot * BLOCKS + from) * FRAGMENT + lane * 16));
        __syncwarp();
        // A block that has nothing to send there any more may have ended.
        if (lane < BLOCKS && turn + 2 * At::PERIOD < turns)
            arrive_at(of_block(places.read + (slot * BLOCKS + share.rank) * 8, lane));
        finish_fragment<T, KIND>(p, at, 8 * own, sum[0]);
        __syncwarp();
    }
}

template <typename T, int NT, u32 BLOCKS, Kind KIND> __device__ __forceinline__ void product(const Product& p) {
    constexpr u32 PARTS = KIND == PLAIN ? 1 : KIND == TURN ? 3 : 2;
    __shared__ float maps[PARTS][256], offsets[PARTS];
    const u32 warp = threadIdx.x / WARP;
    const Places<NT> places;
    const Share share = find_share<BLOCKS>(p);
    if (threadIdx.x == CONSUMERS * WARP) places.init_barriers();
    if constexpr (BLOCKS == 1) __syncthreads();
    else cluster_sync();
    if (warp < CONSUMERS) {
        if constexpr (NT == 2) take_registers<CONSUMER_REGISTERS>();
        consume<T, NT>(p, places, share);
        return;
    }
    if constexpr (NT == 2) give_registers<OTHER_REGISTERS>();
    const u32 which = (warp - CONSUMERS) % 2;
    if (warp < CONSUMERS + PRODUCERS) {
        RawScales scales;
        const u32 tile = share.first + which * share.step;
        if (tile < p.tiles) scales.fetch(p, share, locate<KIND>(p, tile));
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            for (u32 i = threadIdx.x - CONSUMERS * WARP; i < 256; i += PRODUCERS * WARP) maps[part][i] = p.parts[part].map[i];
            if (threadIdx.x == CONSUMERS * WARP) offsets[part] = *p.parts[part].offset;
        }
        meet<PRODUCERS * WARP>(2);
        produce<NT, KIND>(p, places, share, which, scales, maps, offsets);
        return;
    }
    // A closer has nothing to do yet.
    if (which == 0) {
        for (u32 stage = 0, tile = share.first; stage < FIRST && tile < p.tiles; stage++, tile += share.step)
            bring<NT, KIND>(p, places, share, tile, stage);
        let_next();
    }
    if constexpr (BLOCKS == 1) close<T, NT, KIND>(p, places, share, which);
    else if (which == 0) send_sums<NT, BLOCKS>(p, places, share);
    else close_owned<T, NT, BLOCKS, KIND>(p, places, share);
}
