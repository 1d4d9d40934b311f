// Products over 4-bit weights on Hopper, decoded on their way: sums [tokens, n] of x · b + x2 · b2, forward with b = Wᵀ of
// W [n, depth] and input gradient with b = W [depth, n]. What follows the sums: codes_follow.cuh.
//
// Method. The weight is the left operand, in registers: a tile of outᵀ is 128 columns of `out` by TOKENS of its rows. Two
// warpgroups have 64 columns each; they decode the weights of the next 64 along the contraction while the tensor cores
// multiply those of the last, which read the tokens' tile from shared memory alone. A third warpgroup keeps a ring of stages
// full: one thread has the TMA bring tokens and codes, two warps make, for each block of 64 weights, the 16 values that its
// codes stand for (value * absmax, rounded once to T: the bits that dequantizing gives).
//
// | stage | bytes | what |
// |---|---|---|
// | tokens | TOKENS rows of 128 | 64 along the contraction, 128-byte swizzle |
// | codes | 128 rows of 32 | forward: 64 codes of each column of `out`; backward: 64 codes of each of 64 rows of W, twice. 32-byte swizzle: chunk c of 16 bytes of row i lies at c ^ (i / 4 % 2) |
// | or a dense tile | 128 rows of 128 | of the second pair (a LoRA adapter): a few more steps along the contraction |
//
// The tables, 32 bytes for each of 128 blocks, lie beside the ring. Rings run by two barriers a stage: `full` and `empty`.
//
// Where there are few tiles, the blocks of a cluster share the contraction of one, leave their sums in shared memory and add
// up a part of the tokens each, always in the same order.
//
// Of two weights W_p [n, depth] on one x (gate and up), forward, a tile has 64 columns each, one of them a warpgroup's; the
// second pairs x2_p, b2_p follow one after the other.
//
// Wants: tokens, n, depth > 0; depth (forward) or n (backward), the row of W, a multiple of 64, and blocks of 64 codes or
// more; n and the rank multiples of 8; 16-byte aligned pointers.
#pragma once
#include "codes.cuh"
#include "linear/codes_follow.cuh"
#include "linear/decode4.cuh"
#include "linear/hopper.cuh"

constexpr int ROW = DEPTH * 2;            // bytes of a row of tokens, and of a dense tile
constexpr int DENSE = COLUMNS * ROW;      // bytes of a dense tile
constexpr int CODES_ROW = DEPTH / 2;      // bytes
constexpr int TABLE = 32;                 // bytes: 16 values
constexpr int TABLES = COLUMNS * TABLE;   // of a stage
constexpr int STRIP = 8;                  // tiles of tokens that are visited together
constexpr int THREADS = 128 * (1 + CONSUMERS), TABLE_WARPS = 2;
// 384 threads start with 168 registers, (56 + 2 * 224) * 128 are as many.
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
constexpr int MAX_STAGES = 5;

template <int TOKENS> constexpr int STAGES = TOKENS == 256 ? 4 : 5;
template <int TOKENS> constexpr int STAGE = TOKENS * ROW + DENSE;

// The weight, and what is made of it.
struct Codes {
    const TensorMap* map; // of bytes, in boxes of CODES_ROW
    Scales scales;
    const float* nested_map;
    const float* values; // of the 16 codes
    u32 row;             // weights in a row of W
};

// What is multiplied: x [tokens, depth], and second pairs x2 [tokens, rank].
template <int WEIGHTS> struct Operands {
    const TensorMap* x;
    Codes weights[WEIGHTS];
    const TensorMap *x2[WEIGHTS], *b2[WEIGHTS];
    u32 depth, rank[WEIGHTS];
};

// The places of shared memory.
template <int TOKENS> struct Places {
    u32 ring, tables, slabs, full, empty;

    __device__ __forceinline__ explicit Places(const u8* shared) {
        const u32 start = shared_address(shared);
        ring = start + (-start & 1023); // swizzle atoms start at multiples of 1024 bytes
        tables = ring + STAGES<TOKENS> * STAGE<TOKENS>;
        slabs = tables + STAGES<TOKENS> * TABLES;
        full = slabs + CONSUMERS * SLAB_BYTES;
        empty = full + MAX_STAGES * 8; // + 8 stage
    }
};

// Where in the ring a warp is. It goes on from tile to tile: producers and consumers count alike.
template <int TOKENS> struct Turn {
    u32 stage = 0, phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES<TOKENS>) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// The tiles of a block, and its steps of each.
struct Work {
    u32 tiles, down, across; // `down`: tiles of tokens
    u32 width;               // columns of a tile
    u32 first, last;         // steps along the contraction: those of codes, then those of the second pairs
    u32 coded, paired;       // where those of codes end, and those of the first pair

    template <int WEIGHTS>
    __device__ __forceinline__ Work(const Operands<WEIGHTS>& operands, u32 tokens, u32 n, u32 tile_tokens) {
        width = COLUMNS / WEIGHTS;
        down = (tokens + tile_tokens - 1) / tile_tokens;
        across = (n + width - 1) / width;
        tiles = down * across;
        coded = (operands.depth + DEPTH - 1) / DEPTH;
        paired = coded + (operands.rank[0] + DEPTH - 1) / DEPTH;
        const u32 steps = WEIGHTS == 1 ? paired : paired + (operands.rank[WEIGHTS - 1] + DEPTH - 1) / DEPTH;
        const u32 share = (steps + cluster_size() - 1) / cluster_size();
        first = min(cluster_rank() * share, steps);
        last = min(first + share, steps);
    }
    // The first token and column of a tile: strips of tiles of tokens, so that what is read together stays in the cache.
    __device__ __forceinline__ void place(u32 tile, u32 tile_tokens, u32& token0, u32& column0) const {
        const u32 strip = tile / (STRIP * across) * STRIP, at = tile % (STRIP * across);
        const u32 height = min(down - strip, (u32)STRIP);
        token0 = (strip + at % height) * tile_tokens;
        column0 = at / height * width;
    }
};

// Has the TMA bring the tiles of every step. One thread.
template <bool FORWARD, int TOKENS, int WEIGHTS>
__device__ __forceinline__ void bring(const Places<TOKENS>& places, const Work& work, const Operands<WEIGHTS>& operands) {
    static_assert(FORWARD || WEIGHTS == 1, "two weights on one input");
    constexpr u32 X_BYTES = TOKENS * ROW;
    Turn<TOKENS> turn;
    prefetch_map(operands.x);
    for (u32 tile = blockIdx.x / cluster_size(); tile < work.tiles; tile += gridDim.x / cluster_size()) {
        u32 token0, column0;
        work.place(tile, TOKENS, token0, column0);
#pragma unroll 1
        for (u32 step = work.first; step < work.last; step++) {
            const u32 to = places.ring + turn.stage * STAGE<TOKENS>, full = places.full + 8 * turn.stage;
            barrier_wait(places.empty + 8 * turn.stage, turn.phase ^ 1); // the first time round: free from the start
            if (step < work.coded) {
                const u32 at = step * DEPTH, codes = to + X_BYTES;
                barrier_expect(full, X_BYTES + COLUMNS * CODES_ROW);
                copy_box(to, operands.x, at, token0, full);
                if (FORWARD) {
#pragma unroll
                    for (int w = 0; w < WEIGHTS; w++) {
                        copy_box(codes + w * 64 * CODES_ROW, operands.weights[w].map, at / 2, column0, full);
                    }
                } else {
                    copy_box(codes, operands.weights[0].map, column0 / 2, at, full);
                    copy_box(codes + 64 * CODES_ROW, operands.weights[0].map, column0 / 2 + CODES_ROW, at, full);
                }
            } else {
                const int w = WEIGHTS == 2 && step >= work.paired;
                const u32 at = (step - (w ? work.paired : work.coded)) * DEPTH, dense = to + X_BYTES + w * 64 * ROW;
                barrier_expect(full, X_BYTES + DENSE / WEIGHTS);
                const TensorMap* b2 = w ? operands.b2[WEIGHTS - 1] : operands.b2[0];
                copy_box(to, w ? operands.x2[WEIGHTS - 1] : operands.x2[0], at, token0, full);
                if (FORWARD) {
                    copy_box(dense, b2, at, column0, full);
                } else {
                    copy_box(dense, b2, column0, at, full);
                    copy_box(dense + 64 * ROW, b2, column0 + 64, at, full);
                }
            }
            turn.advance();
        }
    }
}

// Makes the tables of every step. Two warps, two tables a thread: forward table t is that of column t of the tile, its
// values' low and high bytes apart, as decode4.cuh looks them up; its halves are swizzled as rows of codes are. Backward it is
// that of row t % 64 of the step and columns 64 (t / 64) on, plain, in an order in which four rows 2 q, for q from 0 to 3, lie
// side by side in all banks, and so do rows 2 q + 1.
template <typename T, bool FORWARD, int TOKENS, int WEIGHTS>
__device__ __forceinline__ void make_tables(const Places<TOKENS>& places, const Work& work,
                                            const Operands<WEIGHTS>& operands, u32 n) {
    const u32 t = threadIdx.x % (TABLE_WARPS * WARP);
    Turn<TOKENS> turn;
    for (u32 tile = blockIdx.x / cluster_size(); tile < work.tiles; tile += gridDim.x / cluster_size()) {
        u32 token0, column0;
        work.place(tile, TOKENS, token0, column0);
        auto fetch = [&](u32 step, u32 half) {
            const Codes& codes = operands.weights[WEIGHTS == 2 ? half : 0];
            const u32 across = column0 + (WEIGHTS == 2 ? 0 : half * 64); // the half's first column
            const u32 row = FORWARD ? across + t : step * DEPTH + t, column = FORWARD ? step * DEPTH : across;
            const bool inside = step < work.coded && (FORWARD ? row < n : row < operands.depth && column < n);
            if (!inside) return make_uint2(OUTSIDE, 0);
            return codes.scales.fetch(((u64)row * codes.row + column) >> codes.scales.block_shift);
        };
        uint2 next[2] = {fetch(work.first, 0), fetch(work.first, 1)};
#pragma unroll 1
        for (u32 step = work.first; step < work.last; step++) {
            const uint2 now[2] = {next[0], next[1]};
            next[0] = fetch(step + 1, 0);
            next[1] = fetch(step + 1, 1);
            barrier_wait(places.empty + 8 * turn.stage, turn.phase ^ 1);
            if (step < work.coded) {
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    const Codes& codes = operands.weights[WEIGHTS == 2 ? half : 0];
                    const float scale = now[half].x == OUTSIDE ? 0.0f : codes.scales.value(now[half], codes.nested_map);
                    u32 v[8]; // pairs of values
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        v[i] = pair<T>(__fmul_rn(codes.values[2 * i], scale), __fmul_rn(codes.values[2 * i + 1], scale));
                    }
                    u32 to = places.tables + turn.stage * TABLES + half * 64 * TABLE;
                    if (FORWARD) {
                        to += t * TABLE;
                        const u32 odd = t / 4 % 2 * 16;
                        store16(to + odd, __byte_perm(v[0], v[1], 0x6420), __byte_perm(v[2], v[3], 0x6420),
                                __byte_perm(v[4], v[5], 0x6420), __byte_perm(v[6], v[7], 0x6420));
                        store16(to + (odd ^ 16), __byte_perm(v[0], v[1], 0x7531), __byte_perm(v[2], v[3], 0x7531),
                                __byte_perm(v[4], v[5], 0x7531), __byte_perm(v[6], v[7], 0x7531));
                    } else {
                        to += (t / 8 * 8 + t % 2 * 4 + t / 2 % 4) * TABLE;
                        store16(to, v[0], v[1], v[2], v[3]);
                        store16(to + 16, v[4], v[5], v[6], v[7]);
                    }
                }
            }
            __syncwarp();
            if (threadIdx.x % WARP == 0) barrier_arrive(places.full + 8 * turn.stage);
            turn.advance();
        }
    }
}

// The left operands of a step: for each 16 along the contraction four registers, as `mma.sync` takes them.
typedef u32 Step[DEPTH / 16][4];

// Forward: row r of the 64 of a warpgroup is column r of its tile. A lane has rows g and g + 8 of the warp's, at bytes q + 4 j
// of the 32 of each.
__device__ __forceinline__ void decode_forward(Step& to, u32 codes, u32 tables) {
    const u32 warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP, q = lane % 4;
    const u32 row = warp * 16 + lane / 4, pick = q | (q + 4) << 4;
    u32 at = row * CODES_ROW + row / 4 % 2 * 16;
#pragma unroll
    for (int h = 0; h < 2; h++, at += 8 * CODES_ROW) {
        const uint4 low = load_shared_uint4(tables + at), high = load_shared_uint4(tables + (at ^ 16));
        const Table table{{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 c = load_shared_uint4(codes + (at ^ half * 16));
            Eight eight;
            eight.start(__byte_perm(__byte_perm(c.x, c.y, pick), __byte_perm(c.z, c.w, pick), 0x5410));
            eight.look_up(0, table);
            eight.look_up(1, table);
            to[2 * half][h] = eight.to[0];
            to[2 * half][h + 2] = eight.to[1];
            to[2 * half + 1][h] = eight.to[2];
            to[2 * half + 1][h + 2] = eight.to[3];
        }
    }
}

// Backward: rows of the left operand are columns of W, two of a byte to a lane.
__device__ __forceinline__ void decode_backward(Step& to, u32 codes, u32 tables) {
    const u32 warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
    // Row `lane` of 32: this warp's half of its 32 bytes.
    const u32 from = codes + lane * CODES_ROW + (warp / 2 ^ lane / 4 % 2) * 16;
    const u32 table = tables + lane % 4 * TABLE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Four codes of rows 2 q (low 16 bits) and 2 q + 1 of each eight.
        u32 four[4];
        load_matrices_transposed(four, from + half * 32 * CODES_ROW);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 two = four[j] >> warp % 2 * 8;
            const u32 even = table + (half * 4 + j) * 8 * TABLE, odd = even + 4 * TABLE;
            u32(&a)[4] = to[half * 2 + j / 2];
            a[j % 2 * 2] = __byte_perm(load_element(even | two >> 3 & 0x1E), load_element(odd | two >> 19 & 0x1E), 0x5410);
            a[j % 2 * 2 + 1] = __byte_perm(load_element(even | two << 1 & 0x1E), load_element(odd | two >> 15 & 0x1E), 0x5410);
        }
    }
}

// The same of a dense tile, or zeros if it is not the warpgroup's own. Forward: rows of 64 along the contraction. Backward: rows
// are places of the contraction, of 64 columns.
template <bool FORWARD> __device__ __forceinline__ void take_dense(Step& to, u32 tile, bool own) {
    const u32 warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
    if (!own) {
#pragma unroll
        for (int i = 0; i < DEPTH / 4; i++) to[i / 4][i % 4] = 0;
    } else if (FORWARD) {
        const u32 row = warp * 16 + lane % 16;
#pragma unroll
        for (int s = 0; s < DEPTH / 16; s++) load_matrices(to[s], tile + row * ROW + ((2 * s + lane / 16) ^ row % 8) * 16);
    } else {
        const u32 column = backward_column(warp, lane / 4), q = lane % 4;
        auto both = [&](u32 row) { return load_pair(tile + row * ROW + ((column / 8) ^ row % 8) * 16 + column % 8 * 2); };
#pragma unroll
        for (int s = 0; s < DEPTH / 16; s++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 a = both(16 * s + 8 * h + 2 * q), b = both(16 * s + 8 * h + 2 * q + 1);
                to[s][2 * h] = __byte_perm(a, b, 0x5410);
                to[s][2 * h + 1] = __byte_perm(a, b, 0x7632);
            }
        }
    }
}

// The sums of every tile of a result [tokens, n] of `follow`, which says what becomes of them.
template <typename T, bool FORWARD, int TOKENS, int WEIGHTS, typename Follow>
__device__ __forceinline__ void product(const Operands<WEIGHTS>& operands, const Follow& follow) {
    constexpr int X_BYTES = TOKENS * ROW;
    extern __shared__ u8 shared[];
    const Places<TOKENS> places(shared);
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Work work(operands, follow.tokens, follow.n, TOKENS);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES<TOKENS>; s++) {
            barrier_init(places.full + 8 * s, 1 + TABLE_WARPS);
            barrier_init(places.empty + 8 * s, CONSUMERS * 4);
        }
        barriers_ready();
    }
    __syncthreads();

    if (warp < 4) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) bring<FORWARD>(places, work, operands);
        if (warp >= 4 - TABLE_WARPS) make_tables<T, FORWARD>(places, work, operands, follow.n);
        return;
    }

    take_registers<CONSUMER_REGISTERS>();
    const u32 consumer = warp / 4 - 1, column = consumer * 64; // or its weight, if there are two
    Turn<TOKENS> turn;
    Step a, b;
    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0.0f;

    // Waits for a stage, and decodes the left operands of its step.
    auto take = [&](u32 step, Step& to) {
        barrier_wait(places.full + 8 * turn.stage, turn.phase);
        const u32 weights = places.ring + turn.stage * STAGE<TOKENS> + X_BYTES;
        const u32 tables = places.tables + turn.stage * TABLES + column * TABLE;
        if (step >= work.coded) take_dense<FORWARD>(to, weights + column * ROW, WEIGHTS == 1 || (step >= work.paired) == consumer);
        else if (FORWARD) decode_forward(to, weights + column * CODES_ROW, tables);
        else decode_backward(to, weights + column * CODES_ROW, tables);
    };
    // Multiplies a step, and takes the next one meanwhile.
    auto multiply_step = [&](u32 step, Step& now, Step& next) {
        const u32 stage = turn.stage;
        const u64 tokens = describe(places.ring + stage * STAGE<TOKENS>, 16, 8 * ROW);
        turn.advance();
        products_begin();
#pragma unroll
        for (int part = 0; part < DEPTH / 16; part++) {
            // 16 elements of a row, in units of 16 bytes.
            multiply_held<T, false>(sums, now[part], tokens + part * (16 * 2 / 16), step - work.first + part);
        }
        products_commit();
        if (step + 1 < work.last) take(step + 1, next);
        products_wait<0>();
        pin(now);
        if (lane == 0) barrier_arrive(places.empty + 8 * stage);
    };

    const u32 blocks = gridDim.x / cluster_size();
    for (u32 tile = blockIdx.x / cluster_size(); tile < work.tiles; tile += blocks) {
        u32 token0, column0;
        work.place(tile, TOKENS, token0, column0);
        pin(sums);
        if (work.first < work.last) take(work.first, a);
#pragma unroll 1
        for (u32 step = work.first; step < work.last; step += 2) {
            multiply_step(step, a, b);
            if (step + 1 == work.last) break;
            multiply_step(step + 1, b, a);
        }
        pin(sums);
        if (cluster_size() == 1) {
            follow.template write<FORWARD, TOKENS>(sums, places.slabs, consumer, token0, column0);
            continue;
        }
        // The only tile of these blocks. Nobody reads the ring any more.
        meet<128 * CONSUMERS>(1);
#pragma unroll
        for (int s = 0; s < TOKENS / SLAB; s++) {
            leave_sums<FORWARD, SHARED_PITCH>(sums + s * SLAB / 2, places.ring + (s * SLAB * SHARED_PITCH + column) * 4);
        }
        cluster_meet();
        follow.template add_up<TOKENS>(places.ring, token0, column0);
        cluster_meet(); // a block's memory is there until all have read it
    }
}
