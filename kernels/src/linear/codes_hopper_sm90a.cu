// Products of few rows ("tokens") with 4-bit weights on Hopper, decoded on their way: out [tokens, n] = scale * (x · b + x2 · b2)
// + in, forward with b = Wᵀ of W [n, depth] and input gradient with b = W [depth, n].
//
// Method. The weight is the left operand, in registers: a tile of outᵀ is 128 columns of `out` by TOKENS of its rows, so that
// up to 256 rows decode every weight once. Two warpgroups have 64 columns each; they decode the weights of the next 64 along
// the contraction while the tensor cores multiply those of the last, which read the tokens' tile from shared memory alone. A
// third warpgroup keeps a ring of stages full: one thread has the TMA bring tokens and codes, and each makes, of a block of
// weights, the 16 values that its codes stand for (value * absmax, rounded once to T: the bits that dequantizing gives).
//
// | stage | bytes | what |
// |---|---|---|
// | tokens | TOKENS rows of 128 | 64 along the contraction, 128-byte swizzle |
// | codes | 128 rows of 32 | forward: 64 codes of each column of `out`; backward: 64 codes of each of 64 rows of W, twice. 32-byte swizzle: chunk c of 16 bytes of row i lies at c ^ (i / 4 % 2) |
// | tables | 128 of 32 | beside the ring |
//
// Rings run by two barriers a stage, `full` and `empty`. The second pair (a LoRA adapter) is a few more steps along the
// contraction, with a dense tile of 128 rows of 128 bytes in place of codes, of which there is one: `dense_read` says when it
// may be written again.
//
// There are fewer tiles than multiprocessors, so the contraction of a tile is shared: each of its blocks leaves its sums where all
// see them, in the order of its threads, waits until all have, and adds up every so many-th slab of 16 tokens, always in the same
// order. Two blocks are a cluster, and read each other's shared memory. More leave them in `parts`, which stays in the second-level
// cache: clusters need multiprocessors that are neighbours, and of those of four an H200 has 30 at once, so that two of 32 would
// come after all others.
//
// Wants: tokens, n, depth > 0; depth (forward) or n (backward), the row of W, a multiple of 64, and blocks of 64 codes or
// more; n and the rank multiples of 8; 16-byte aligned pointers. Where three blocks or more share a
// tile, all blocks run at once; where two do, they are a cluster.
#include "cluster.cuh"
#include "dependent.cuh"
#include "linear/decode4.cuh"
#include "linear/hopper.cuh"
#include "linear/loads.cuh"

constexpr int COLUMNS = 128;            // of a tile
constexpr int DEPTH = 64;               // of a step along the contraction
constexpr int CONSUMERS = 2;            // warpgroups that have the sums of a tile: 64 columns each
constexpr int ROW = DEPTH * 2;          // bytes of a row of tokens, and of a dense tile
constexpr int DENSE = COLUMNS * ROW;    // bytes of a dense tile
constexpr int CODES_ROW = DEPTH / 2;    // bytes
constexpr int TABLE = 32;               // bytes: 16 values
constexpr int TABLES = COLUMNS * TABLE; // of a stage
constexpr int AHEAD = 4;                // steps that scales are fetched ahead
constexpr int MAX_STAGES = 12;
constexpr int SCALES = 256 * 4; // bytes of the table of scales that are quantized
// What a warpgroup writes at a time: 16 tokens of its 64 columns; PITCH: lanes fall into different banks. Two, in turn.
constexpr int SLAB = 16, PITCH = 64 + 4, SLAB_BYTES = SLAB * PITCH * 4;
constexpr u32 CONSUMING = 128 * CONSUMERS;
constexpr int THREADS = 128 + CONSUMING;
// 384 threads start with 168 registers, (56 + 2 * 224) * 128 are as many.
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;

template <int TOKENS> constexpr int STAGES = TOKENS == 256 ? 5 : TOKENS == 128 ? 8 : 12;
template <int TOKENS> constexpr int STAGE = TOKENS * ROW + COLUMNS * CODES_ROW;
template <int TOKENS> constexpr int SLABS = TOKENS / SLAB;

// Blocks that have come to where they add up a tile, by tile and warpgroup. 0 between launches.
constexpr int MAX_SHARED_TILES = 128;
__device__ u32 arrived[MAX_SHARED_TILES * CONSUMERS];

struct Codes {
    const TensorMap* map; // of bytes, in boxes of CODES_ROW
    Scales scales; // but for the offset, which is read once the kernel before has ended
    const float *offset, *nested_map;
    const float* values; // of the 16 codes
};

// What is multiplied: x [tokens, depth] and W, and the second pair: x2 [tokens, rank].
struct Operands {
    const TensorMap* x;
    Codes weight;
    const TensorMap *x2, *b2;
    u32 depth, rank;
};

struct Result {
    void* out;      // [tokens, n]
    const void* in; // the same, or null; may be `out`
    u32 tokens, n;
    float scale;
    bool full;     // `out` is of f32
    float4* parts; // sums of the blocks of all tiles, if they are shared
};

// The places of shared memory.
template <int TOKENS> struct Places {
    u32 ring, tables, full, empty, dense_read;
    u32 slabs;  // or before that a dense tile
    float* map; // of scales that are quantized: 256 values

    __device__ __forceinline__ explicit Places(u8* shared) {
        const u32 start = shared_address(shared), skipped = -start & 1023; // swizzle atoms start at multiples of 1024 bytes
        ring = start + skipped;
        slabs = ring + STAGES<TOKENS> * STAGE<TOKENS>;
        tables = slabs + 2 * CONSUMERS * SLAB_BYTES;
        const u32 scales = tables + STAGES<TOKENS> * TABLES;
        full = scales + SCALES;
        empty = full + MAX_STAGES * 8; // + 8 stage
        dense_read = empty + MAX_STAGES * 8;
        map = reinterpret_cast<float*>(shared + skipped + (scales - ring));
    }
};

template <int TOKENS> struct Turn {
    u32 stage = 0, phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES<TOKENS>) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// What a block does: the sums of a tile over its share of the steps.
struct Work {
    u32 tile, token0, column0;
    u32 share, shares;
    u32 first, last; // steps along the contraction: those of codes, then those of the second pair
    u32 coded;       // where those of codes end
    u32 dense;       // the first of the second pair in this share, if there are any

    __device__ __forceinline__ Work(const Operands& operands, const Result& result, u32 tile_tokens, u32 shares) : shares(shares) {
        tile = blockIdx.x / shares;
        share = blockIdx.x % shares;
        const u32 down = (result.tokens + tile_tokens - 1) / tile_tokens; // tiles that want the same weights are neighbours
        token0 = tile % down * tile_tokens;
        column0 = tile / down * COLUMNS;
        coded = (operands.depth + DEPTH - 1) / DEPTH;
        const u32 steps = coded + (operands.rank + DEPTH - 1) / DEPTH;
        first = steps * share / shares;
        last = steps * (share + 1) / shares;
        dense = max(first, coded);
    }
};

// Has the TMA bring the tiles of a step. One thread.
template <bool FORWARD, int TOKENS>
__device__ __forceinline__ void bring(const Places<TOKENS>& places, const Work& work, const Operands& operands, u32 step,
                                      u32 stage) {
    constexpr u32 X_BYTES = TOKENS * ROW;
    const u32 to = places.ring + stage * STAGE<TOKENS>, right = to + X_BYTES, full = places.full + 8 * stage;
    if (step < work.coded) {
        const u32 at = step * DEPTH;
        barrier_expect(full, X_BYTES + COLUMNS * CODES_ROW);
        if (FORWARD) {
            copy_box(right, operands.weight.map, at / 2, work.column0, full);
        } else {
            copy_box(right, operands.weight.map, work.column0 / 2, at, full);
            copy_box(right + 64 * CODES_ROW, operands.weight.map, work.column0 / 2 + CODES_ROW, at, full);
        }
        copy_box(to, operands.x, at, work.token0, full);
    } else {
        const u32 at = (step - work.coded) * DEPTH;
        barrier_expect(full, X_BYTES + DENSE);
        copy_box(to, operands.x2, at, work.token0, full);
        if (FORWARD) {
            copy_box(places.slabs, operands.b2, at, work.column0, full);
        } else {
            copy_box(places.slabs, operands.b2, work.column0, at, full);
            copy_box(places.slabs + 64 * ROW, operands.b2, work.column0 + 64, at, full);
        }
    }
}

// Keeps the ring full: one warpgroup, a table a thread and step. Forward table t is that of column t of the tile, its values' low
// and high bytes apart, as decode4.cuh looks them up; its halves are swizzled as rows of codes are. Backward it is that of row
// t % 64 of the step and columns 64 (t / 64) on, plain, in an order in which four rows 2 q, for q from 0 to 3, lie side by side in
// all banks, and so do rows 2 q + 1.
template <typename T, bool FORWARD, int TOKENS>
__device__ __forceinline__ void produce(const Places<TOKENS>& places, const Work& work, const Operands& operands, u32 n) {
    const u32 t = threadIdx.x;
    const Codes& codes = operands.weight;
    alignas(16) float values[16];
#pragma unroll
    for (int i = 0; i < 16; i++) values[i] = codes.values[i];
    wait_before();
    Scales scales = codes.scales;
    if (scales.nested) scales.offset = *codes.offset;
    const u32 across = work.column0 + (FORWARD ? t : t / 64 * 64); // the column, or the first of 64
    const bool inside = across < n;
    // Where the table's 64 codes are, in units of them.
    const u32 chunk = FORWARD ? across * (operands.depth / 64) : t % 64 * (n / 64) + across / 64, stride = FORWARD ? 1 : n;
    auto fetch = [&](u32 step) {
        const bool valid = inside && step < min(work.last, work.coded) && (FORWARD || step * DEPTH + t % 64 < operands.depth);
        return valid ? scales.fetch((chunk + step * stride) >> (scales.block_shift - 6)) : make_uint2(OUTSIDE, 0);
    };
    uint2 raw[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) raw[i] = fetch(work.first + i);
    if (scales.nested) {
        for (u32 i = t; i < 256; i += 128) places.map[i] = codes.nested_map[i];
    }
    meet<128>(1 + CONSUMERS);
    u32 to = t * TABLE;
    if (!FORWARD) to = t / 64 * 64 * TABLE + (t % 64 / 8 * 8 + t % 2 * 4 + t / 2 % 4) * TABLE;
    Turn<TOKENS> turn;
    auto produce_step = [&](u32 step, uint2& fetched) {
        // In this order, so that a register takes what is fetched once it has been read: to move it later would be to wait for it.
        float scale = fetched.x == OUTSIDE ? 0.0f : scales.value(fetched, places.map);
        pin(scale);
        fetched = fetch(step + AHEAD);
        const bool reused = step >= work.first + STAGES<TOKENS>, second = step > work.dense;
        if (reused) barrier_wait(places.empty + 8 * turn.stage, turn.phase ^ 1);
        // There is one place for a dense tile.
        if (second) barrier_wait(places.dense_read, (step - work.dense - 1) % 2);
        if (t == 0 && (reused || second)) bring<FORWARD>(places, work, operands, step, turn.stage);
        if (step < work.coded) {
            const u32 at = places.tables + turn.stage * TABLES + to;
            if (FORWARD) {
                Table table{};
#pragma unroll
                for (int i = 0; i < 4; i++) table.make<T>(i, values, scale);
                const u32 odd = t / 4 % 2 * 16;
                store16(at + odd, table.low[0], table.low[1], table.low[2], table.low[3]);
                store16(at + (odd ^ 16), table.high[0], table.high[1], table.high[2], table.high[3]);
            } else {
                u32 v[8]; // pairs of values
#pragma unroll
                for (int i = 0; i < 8; i++) v[i] = pair<T>(__fmul_rn(values[2 * i], scale), __fmul_rn(values[2 * i + 1], scale));
                // Of eight lanes every other one writes its second half first: into all banks at a time.
                const bool odd = t % 2;
                const u32 half = odd * 16;
                store16(at + half, odd ? v[4] : v[0], odd ? v[5] : v[1], odd ? v[6] : v[2], odd ? v[7] : v[3]);
                store16(at + (half ^ 16), odd ? v[0] : v[4], odd ? v[1] : v[5], odd ? v[2] : v[6], odd ? v[3] : v[7]);
            }
        }
        __syncwarp();
        if (t % WARP == 0) barrier_arrive(places.full + 8 * turn.stage);
        turn.advance();
    };
#pragma unroll 1
    for (u32 step = work.first; step < work.last; step += AHEAD) {
        // Unrolled, so that what is fetched stays in its registers.
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++)
            if (step + i < work.last) produce_step(step + i, raw[i]);
    }
}

// The left operands of a step: for each 16 along the contraction four registers, as `mma.sync` takes them.
typedef u32 Step[DEPTH / 16][4];

// Row g of a warp's sums of an input gradient is this column of the warpgroup's 64, row g + 8 is the next one.
__device__ __forceinline__ u32 backward_column(u32 warp, u32 g) { return warp / 2 * 32 + g * 4 + warp % 2 * 2; }

// Where a lane reads codes and tables of a step, which the compiler would make again each time.
struct Lane {
    u32 codes[2], table[2]; // bytes from where those of the stage begin
    u32 pick;

    // `column`: the first of the warpgroup's.
    template <bool FORWARD> __device__ __forceinline__ static Lane of(u32 column, u32 warp, u32 lane) {
        static_assert(2 * CONSUMERS * SLAB_BYTES >= DENSE, "a dense tile is where slabs are later");
        static_assert(CODES_ROW == TABLE, "rows of codes and tables lie alike");
        const u32 row = warp * 16 + lane / 4, at = (column + row) * CODES_ROW + row / 4 % 2 * 16, q = lane % 4;
        // Backward: of row `lane` of 32 this warp's half of its 32 bytes.
        const u32 half = (column + lane) * CODES_ROW + (warp / 2 ^ lane / 4 % 2) * 16;
        Lane x = FORWARD ? Lane{{at, at ^ 16}, {at, at ^ 16}, q | (q + 4) << 4}
                         : Lane{{half, half + 32 * CODES_ROW}, {(column + q) * TABLE, 0}, warp % 2 * 8};
        pin(x.codes[0]), pin(x.codes[1]), pin(x.table[0]), pin(x.table[1]), pin(x.pick);
        return x;
    }
};

// Looks up the four codes in the low half of `codes`, two of a byte to a register. As Eight of decode4.cuh, but what chooses
// between the halves of the table takes fewer instructions of those that all of this waits for, the integer ones.
__device__ __forceinline__ void look_up(u32& first, u32& second, const Table& table, u32 codes) {
    const u32 in_half = codes & 0x7777, upper = spread_tops(codes, codes << 4);
    auto bytes = [&](const u32(&t)[4]) {
        return (__byte_perm(t[2], t[3], in_half) & upper) | (__byte_perm(t[0], t[1], in_half) & ~upper);
    };
    const u32 low = bytes(table.low), high = bytes(table.high);
    // The even element is the high nibble of its byte.
    first = __byte_perm(low, high, 0x4051);
    second = __byte_perm(low, high, 0x6273);
}

// Forward: row r of the 64 of a warpgroup is column r of its tile. A lane has rows g and g + 8 of the warp's, at bytes q + 4 j
// of the 32 of each.
__device__ __forceinline__ void decode_forward(Step& to, u32 codes, u32 tables, const Lane& lane) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = h * 8 * CODES_ROW;
        const uint4 low = load_shared_uint4(tables + lane.table[0] + row), high = load_shared_uint4(tables + lane.table[1] + row);
        const Table table{{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 c = load_shared_uint4(codes + lane.codes[half] + row);
            look_up(to[2 * half][h], to[2 * half][h + 2], table, __byte_perm(c.x, c.y, lane.pick));
            look_up(to[2 * half + 1][h], to[2 * half + 1][h + 2], table, __byte_perm(c.z, c.w, lane.pick));
        }
    }
}

// Backward: rows of the left operand are columns of W, two of a byte to a lane.
__device__ __forceinline__ void decode_backward(Step& to, u32 codes, u32 tables, const Lane& lane) {
    const u32 table = tables + lane.table[0];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Four codes of rows 2 q (low 16 bits) and 2 q + 1 of each eight.
        u32 four[4];
        load_matrices_transposed(four, codes + lane.codes[half]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 two = four[j] >> lane.pick;
            const u32 even = (half * 4 + j) * 8 * TABLE, odd = even + 4 * TABLE;
            auto value = [&](u32 code, u32 row) { return load_element((table | (code & 0x1E)) + row); };
            u32(&a)[4] = to[half * 2 + j / 2];
            a[j % 2 * 2] = __byte_perm(value(two >> 3, even), value(two >> 19, odd), 0x5410);
            a[j % 2 * 2 + 1] = __byte_perm(value(two << 1, even), value(two >> 15, odd), 0x5410);
        }
    }
}

// The same of a dense tile. Forward: rows of 64 along the contraction. Backward: rows are places of the contraction, of 64
// columns.
template <bool FORWARD> __device__ __forceinline__ void take_dense(Step& to, u32 tile) {
    const u32 warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
    if (FORWARD) {
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

// Leaves a thread's sums of 16 tokens, of a warpgroup's 64 columns, as rows of columns in shared memory.
template <bool FORWARD> __device__ __forceinline__ void leave_sums(const float* x, u32 slab) {
    const u32 warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP, g = lane / 4;
#pragma unroll
    for (int j = 0; j < SLAB / 8; j++, x += 4) {
        const u32 row = slab + (8 * j + lane % 4 * 2) * PITCH * 4;
        if (FORWARD) {
            const u32 to = row + (warp * 16 + g) * 4;
            store_float(to, x[0]);
            store_float(to + PITCH * 4, x[1]);
            store_float(to + 8 * 4, x[2]);
            store_float(to + PITCH * 4 + 8 * 4, x[3]);
        } else {
            const u32 to = row + backward_column(warp, g) * 4;
            store_float2(to, x[0], x[2]);
            store_float2(to + PITCH * 4, x[1], x[3]);
        }
    }
}

// Scales eight sums, adds to them what was loaded (or zeros), rounds once to O and writes them.
template <typename O>
__device__ __forceinline__ void write_eight(void* out, u64 at, const float (&x)[8], float scale, const uint4 (&added)[2]) {
    constexpr int SIZE = Pack<O>::SIZE;
#pragma unroll
    for (int part = 0; part < 8 / SIZE; part++) {
        Pack<O> y = reinterpret_cast<const Pack<O>&>(added[part]);
#pragma unroll
        for (int i = 0; i < SIZE; i++) y.at[i] = narrow<O>(x[part * SIZE + i] * scale + wide(y.at[i]));
        store_pack(static_cast<O*>(out) + at + part * SIZE, y);
    }
}

// Writes the slabs of a warpgroup's tile that are this block's, by way of shared memory.
template <typename T, bool FORWARD, int TOKENS> struct Writer {
    const Result& result;
    u32 shares;
    u32 slab, other; // the next one's place, and that of the one after
    int barrier;
    u32 token, column; // of a slab a thread writes eight columns of a token
    uint4 added[2];    // to the next slab: loads are long under way

    __device__ __forceinline__ Writer(const Result& result, const Work& work, u32 slabs, u32 consumer)
        : result(result), shares(work.shares), slab(slabs + consumer * 2 * SLAB_BYTES), other(slab + SLAB_BYTES),
          barrier(1 + consumer), token(work.token0 + threadIdx.x % 128 / 8),
          column(work.column0 + consumer * 64 + threadIdx.x % 8 * 8) {
        load(work.share);
    }
    __device__ __forceinline__ bool inside(u32 s) const {
        return s < SLABS<TOKENS> && token + s * SLAB < result.tokens && column < result.n;
    }
    __device__ __forceinline__ u64 at(u32 s) const { return (u64)(token + s * SLAB) * result.n + column; }
    __device__ __forceinline__ void load(u32 s) {
        const bool wanted = result.in && inside(s);
        const u8* from = static_cast<const u8*>(result.in) + at(s) * (result.full ? 4 : 2);
        added[0] = load_now(from, wanted);
        added[1] = load_now(from + 16, wanted && result.full);
    }
    // Slab `s` of the tile, of which this thread has x. From slab to slab it is `shares` further.
    __device__ __forceinline__ void write(u32 s, const float* x) {
        leave_sums<FORWARD>(x, slab);
        meet<128>(barrier); // the slab is whole, and the one before has been read
        const u32 from = slab + (threadIdx.x % 128 / 8 * PITCH + threadIdx.x % 8 * 8) * 4;
        const float4 a = load_float4(from), b = load_float4(from + 16);
        const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        const uint4 now[2] = {added[0], added[1]};
        load(s + shares);
        if (inside(s)) {
            if (result.full) write_eight<float>(result.out, at(s), y, result.scale, now);
            else write_eight<T>(result.out, at(s), y, result.scale, now);
        }
        const u32 swapped = slab;
        slab = other;
        other = swapped;
    }
};

template <int TOKENS> constexpr u32 PART = SLABS<TOKENS> * 2 * CONSUMING; // of four sums of each thread; of a block

// Adds up what the blocks of a tile have left of this block's slabs, BLOCKS of them and AT_ONCE slabs under way at a time.
// `load(block, i, valid)`: this thread's i-th four sums, two of a slab, or zeros.
template <int TOKENS, int BLOCKS, int AT_ONCE, typename Load, typename Write>
__device__ __forceinline__ void add_up(const Work& work, Load load, Write& writer) {
#pragma unroll 1
    for (u32 s0 = work.share; s0 < SLABS<TOKENS>; s0 += AT_ONCE * work.shares) {
        float x[AT_ONCE][8] = {};
#pragma unroll 1
        for (u32 block = 0; block < work.shares; block += BLOCKS) {
            uint4 v[BLOCKS][AT_ONCE][2];
#pragma unroll
            for (int i = 0; i < BLOCKS * AT_ONCE * 2; i++) {
                const int b = i / 2 / AT_ONCE, j = i / 2 % AT_ONCE;
                const u32 s = s0 + j * work.shares;
                v[b][j][i % 2] = load(block + b, s * 2 + i % 2, block + b < work.shares && s < SLABS<TOKENS>);
            }
#pragma unroll
            for (int i = 0; i < BLOCKS * AT_ONCE * 2; i++) {
                const int b = i / 2 / AT_ONCE, j = i / 2 % AT_ONCE;
                const uint4& y = v[b][j][i % 2];
                float* to = x[j] + i % 2 * 4;
                to[0] += __uint_as_float(y.x), to[1] += __uint_as_float(y.y);
                to[2] += __uint_as_float(y.z), to[3] += __uint_as_float(y.w);
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const u32 s = s0 + j * work.shares;
            if (s < SLABS<TOKENS>) writer.write(s, x[j]);
        }
    }
}

// Two blocks, a cluster, leave their sums in shared memory and read each other's.
template <int TOKENS, typename Write>
__device__ __forceinline__ void share_in_cluster(const Work& work, const float (&sums)[TOKENS / 2], u32 ring, u32 thread,
                                                 Write& writer) {
    const u32 own = ring + thread * 16;
    meet<CONSUMING>(2 + CONSUMERS); // the ring is no longer read
#pragma unroll
    for (int i = 0; i < SLABS<TOKENS> * 2; i++) {
        store_float4(own + i * CONSUMING * 16, sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    }
    cluster_sync();
    const u32 parts[2] = {of_block(own, 0), of_block(own, 1)};
    auto load = [&](u32 block, u32 i, bool valid) { return load_there(parts[block % 2] + i * CONSUMING * 16, valid); };
    add_up<TOKENS, 2, 4>(work, load, writer);
    cluster_sync(); // nobody reads this block's shared memory any more
}

// More leave them in global memory.
template <int TOKENS, typename Write>
__device__ __forceinline__ void share_in_memory(float4* parts, const Work& work, const float (&sums)[TOKENS / 2],
                                                u32 thread, Write& writer) {
    const u32 consumer = thread / 128;
    parts += (u64)(work.tile * work.shares) * PART<TOKENS> + thread;
    float4* own = parts + work.share * PART<TOKENS>;
#pragma unroll
    for (int i = 0; i < SLABS<TOKENS> * 2; i++) {
        own[i * CONSUMING] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    }
    u32* counter = arrived + work.tile * CONSUMERS + consumer;
    meet<128>(1 + consumer);
    if (thread % 128 == 0) {
        arrive_at(counter);
        wait_at(counter, work.shares);
    }
    meet<128>(1 + consumer);
    auto load = [&](u32 block, u32 i, bool valid) { return load_now(parts + block * PART<TOKENS> + i * CONSUMING, valid); };
    if (work.shares <= 4) add_up<TOKENS, 4, 4>(work, load, writer);
    else add_up<TOKENS, 8, 2>(work, load, writer);
    if (thread % 128 == 0) leave(counter, work.shares);
}

// Writes the sums of a warpgroup, or if the tile is shared its slabs of the sums of all.
template <typename T, bool FORWARD, int TOKENS>
__device__ __forceinline__ void finish(const Result& result, const Work& work, const float (&sums)[TOKENS / 2],
                                       const Places<TOKENS>& places) {
    const u32 thread = threadIdx.x - 128;
    Writer<T, FORWARD, TOKENS> writer(result, work, places.slabs, thread / 128);
    if (work.shares == 1) {
#pragma unroll
        for (int s = 0; s < SLABS<TOKENS>; s++) writer.write(s, sums + s * 8);
    } else if (work.shares == 2) {
        share_in_cluster<TOKENS>(work, sums, places.ring, thread, writer);
    } else {
        share_in_memory<TOKENS>(result.parts, work, sums, thread, writer);
    }
}

template <typename T, bool FORWARD, int TOKENS>
__device__ __forceinline__ void product(const Operands& operands, const Result& result, u32 shares) {
    constexpr int X_BYTES = TOKENS * ROW;
    extern __shared__ u8 shared[];
    const Places<TOKENS> places(shared);
    const Work work(operands, result, TOKENS, shares);
    // The same in every lane, which the compiler does not see by itself.
    const u32 warp = __shfl_sync(~0u, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;

    if (threadIdx.x == 0) {
        prefetch_map(operands.x);
        prefetch_map(operands.weight.map);
        for (int s = 0; s < STAGES<TOKENS>; s++) {
            barrier_init(places.full + 8 * s, 1 + 4);
            barrier_init(places.empty + 8 * s, CONSUMERS * 4);
        }
        barrier_init(places.dense_read, CONSUMERS * 4);
        barriers_ready();
    }
    __syncthreads();
    let_next();

    if (warp < 4) {
        give_registers<PRODUCER_REGISTERS>();
        produce<T, FORWARD>(places, work, operands, result.n);
        return;
    }

    take_registers<CONSUMER_REGISTERS>();
    const u32 column = (warp / 4 - 1) * 64;
    const Lane own = Lane::of<FORWARD>(column, warp % 4, lane);
    u32 first_lane = lane == 0;
    pin(first_lane);
    Turn<TOKENS> turn;
    u32 before = 0; // the stage of the step before
    Step a, b;
    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0.0f;

    // Waits for a stage, and decodes the left operands of its step.
    auto take = [&](u32 step, Step& to) {
        barrier_wait(places.full + 8 * turn.stage, turn.phase);
        const u32 codes = places.ring + turn.stage * STAGE<TOKENS> + X_BYTES;
        const u32 tables = places.tables + turn.stage * TABLES;
        if (step >= work.coded) {
            take_dense<FORWARD>(to, places.slabs + column * ROW);
            __syncwarp();
            if (first_lane) barrier_arrive(places.dense_read);
        } else if (FORWARD) decode_forward(to, codes, tables, own);
        else decode_backward(to, codes, tables, own);
    };
    // Has a step multiplied, gives the stage of the one before back once that is done, and takes the next one: the tensor cores
    // always have one that waits.
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
        products_wait<1>();
        pin(next);
        if (first_lane && step > work.first) barrier_arrive(places.empty + 8 * before);
        before = stage;
        if (step + 1 < work.last) take(step + 1, next);
    };

    wait_before();
    // While the others fetch their first scales.
    if (threadIdx.x == 128) {
#pragma unroll 1
        for (u32 step = work.first; step < min(work.first + STAGES<TOKENS>, min(work.last, work.dense + 1)); step++) {
            bring<FORWARD>(places, work, operands, step, step - work.first);
        }
    }
    __syncwarp();
    pin(sums);
    if (work.first < work.last) take(work.first, a);
#pragma unroll 1
    for (u32 step = work.first; step < work.last; step += 2) {
        multiply_step(step, a, b);
        if (step + 1 == work.last) break;
        multiply_step(step + 1, b, a);
    }
    products_wait<0>();
    pin(sums);
    if (work.dense < work.last) meet<CONSUMING>(2 + CONSUMERS); // the dense tile is no longer read
    finish<T, FORWARD, TOKENS>(result, work, sums, places);
}

#define MAP(NAME) const __grid_constant__ TensorMap NAME
#define ENTRY(TYPE, NAME, FORWARD, TOKENS)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) codes_hopper_##NAME##_##TOKENS##_##TYPE(                  \
        MAP(x), MAP(codes), MAP(x2), MAP(b2), const void* absmax, const float* nested, const float* map,               \
        const float* offset, u32 block_shift, u32 nested_shift, u32 quant_type, void* out, const void* in,             \
        float4* parts, u32 tokens, u32 n, u32 depth, u32 rank, float scale, u32 add, u32 full, u32 shares) {           \
        const Scales scales{absmax, nested, 0.0f, block_shift, nested_shift};                                          \
        const Operands operands{&x, {&codes, scales, offset, map, CODE_VALUES[quant_type]}, &x2, &b2, depth, rank};    \
        const Result result{out, add ? out : in, tokens, n, scale, full != 0, parts};                                  \
        product<TYPE, FORWARD, TOKENS>(operands, result, shares);                                                      \
    }
#define ENTRIES(TYPE)                                                                                                  \
    ENTRY(TYPE, forward, true, 256)                                                                                    \
    ENTRY(TYPE, forward, true, 128)                                                                                    \
    ENTRY(TYPE, forward, true, 64)                                                                                     \
    ENTRY(TYPE, input_grad, false, 256)                                                                                \
    ENTRY(TYPE, input_grad, false, 128)                                                                                \
    ENTRY(TYPE, input_grad, false, 64)

ENTRIES(bf16)
ENTRIES(f16)
