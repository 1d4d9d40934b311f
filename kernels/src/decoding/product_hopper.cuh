// The products of product.cuh on Hopper, whose asynchronous copies keep more bytes of codes on their way than registers hold.
//
// A block has warps of three kinds:
//
// | warps | what they do |
// |---|---|
// | 8, or 16 for more than 8 tokens | decode and multiply. Each has a part of the inner index, the same of all tiles, and keeps x of it in registers as right operands: x is read once |
// | a producer | keeps a ring of tiles full: 16 rows of codes by bulk copies, and their scales, which it computes |
// | a closer | adds up the sums of a tile and does what follows them |
//
// What a launch before has not written does not wait for it: tables, and the first tiles of the ring. Registers hold x of an
// inner index of up to 4096.
//
// Rows of codes lie 32 bytes more than a multiple of 128 apart, so that 4 rows of 32 bytes are in all banks: a lane reads 16
// codes of a block of 64. The scale of block j of line l and half h of a tile is number 16 j + 2 l + h.
//
// Up to 8 tokens take half of a multiprocessor's registers and shared memory: it has two blocks, because what bounds a warp is
// the latency of its look-ups and products. More take all of it; two warps more make the others a warpgroup, which gives
// registers to those that multiply.
//
// Bound by the bytes of the codes. A look-up in the table is a product of bytes, which adds up the address, and a load: 62
// instructions for 64 codes of 16 rows and 8 tokens, 81 for 16.
//
// Wants: k a multiple of 256 and at most 4096, codes at multiples of 16 bytes, bytes of scales at multiples of 4.
#pragma once
#include "decoding/dependent.cuh"
#include "decoding/tile.cuh"
#include "linear/hopper.cuh"

extern __shared__ __align__(128) unsigned char dynamic_shared[];

constexpr u32 MOST_QUADS = 16; // times 256 codes
constexpr int TABLE_PITCH = 128;
constexpr u32 CODES_PITCH = MOST_QUADS * 128 + 32, CODES_BYTES = 16 * CODES_PITCH;
constexpr u32 STAGE = CODES_BYTES + MOST_QUADS * 4 * 16 * sizeof(float); // bytes: codes, then scales
constexpr u32 FRAGMENT = WARP * 16;                                      // bytes: sums of 16 rows and 8 tokens
template <int NT> constexpr u32 CONSUMERS = 8 * NT;
template <int NT> constexpr u32 THREADS = (CONSUMERS<NT> + 2 * NT) * WARP;
// Registers of a thread, where 640 start with 96: 512 · 104 + 128 · 64 are as many.
constexpr int CONSUMER_REGISTERS = 104, OTHER_REGISTERS = 64;
template <int NT> constexpr u32 MOST_GROUPS = 4 * MOST_QUADS / CONSUMERS<NT>; // of 64, of a warp
template <int NT> constexpr u32 STAGES = 2 * NT;

// The places of shared memory: the table, sums of warps, barriers, the ring. Barriers: stages are full, or empty; sums of a tile
// are summed, or taken.
template <int NT> struct Places {
    static constexpr u32 SUMS = 256 * TABLE_PITCH, BARRIERS = SUMS + CONSUMERS<NT> * NT * FRAGMENT;
    static constexpr u32 RING = BARRIERS + 256;
    u32 table, sums, full, empty, summed, taken, ring;

    __device__ __forceinline__ Places() {
        table = shared_address(dynamic_shared);
        sums = table + SUMS;
        full = table + BARRIERS, empty = full + 8 * STAGES<NT>;
        summed = empty + 8 * STAGES<NT>, taken = summed + 8;
        ring = table + RING;
    }
    __device__ __forceinline__ void init_barriers() const {
        for (u32 s = 0; s < STAGES<NT>; s++) {
            barrier_init(full + 8 * s, 2);
            barrier_init(empty + 8 * s, CONSUMERS<NT>);
        }
        barrier_init(summed, CONSUMERS<NT>);
        barrier_init(taken, 1);
        barriers_ready();
    }
};
static_assert(8 * (2 * STAGES<2> + 2) <= 256, "barriers");

// Has the codes of a tile brought. A whole warp, a lane a row; rows beyond the last are the last, and not stored.
template <int NT, Kind KIND>
__device__ __forceinline__ void bring(const Product& p, const Places<NT>& places, u32 tile, u32 stage) {
    const u32 lane = threadIdx.x % WARP, bytes = p.k / 2, full = places.full + 8 * stage;
    if (lane == 0) barrier_expect(full, 16 * bytes);
    __syncwarp();
    if (lane >= 16) return;
    const Tile at = locate<KIND>(p, tile);
    const Part& part = p.parts[lane < 8 ? at.part[0] : at.part[1]];
    const u32 row = min((lane < 8 ? at.row[0] : at.row[1]) + lane % 8, part.n - 1);
    const u8* from = part.codes + row * p.k / 2;
    copy_bulk(places.ring + stage * STAGE + lane * CODES_PITCH, from, bytes, full);
}

// What scales of a tile are made of, on its way: of lane l, every other quad of the row that scales l % 16 are of.
struct RawScales {
    u32 part, absmax[MOST_QUADS / 2];
    float nested[MOST_QUADS / 2];

    __device__ __forceinline__ void fetch(const Product& p, const Tile& at) {
        const u32 lane = threadIdx.x % WARP, h = lane % 2;
        part = h ? at.part[1] : at.part[0];
        const Part& of = p.parts[part];
        const u32 row = min((h ? at.row[1] : at.row[0]) + lane % 16 / 2, of.n - 1);
        const u32 block = row * (p.k / 64) + lane / 16 * 4, quads = p.k / 256;
#pragma unroll
        for (u32 j = 0; j < MOST_QUADS / 2; j++) {
            if (2 * j + lane / 16 >= quads) continue;
            absmax[j] = __ldg((const u32*)(of.absmax + block + 8 * j));
            nested[j] = __ldg(of.nested + (block + 8 * j) / 256);
        }
    }
    __device__ __forceinline__ void make(u32 to, u32 quads, const float (*maps)[256], const float* offsets) const {
        const u32 lane = threadIdx.x % WARP;
        to += (lane / 16 * 4 * 16 + lane % 16) * 4;
#pragma unroll
        for (u32 j = 0; j < MOST_QUADS / 2; j++) {
            if (2 * j + lane / 16 >= quads) continue;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                // Two roundings, as the reference: no fused multiply-add.
                const float v = __fmul_rn(maps[part][absmax[j] >> 8 * i & 255], nested[j]);
                store_float(to + (8 * j + i) * 64, __fadd_rn(v, offsets[part]));
            }
        }
    }
};

// The producer, after it has brought the first tiles. `scales`: the first tile's.
template <int NT, Kind KIND>
__device__ __forceinline__ void produce(const Product& p, const Places<NT>& places,
                                        RawScales& scales, const float (*maps)[256], const float* offsets) {
    u32 tile = blockIdx.x;
#pragma unroll 1
    for (u32 turn = 0; tile < p.tiles; turn++) {
        const u32 stage = turn % STAGES<NT>;
        if (turn >= STAGES<NT>) {
            barrier_wait(places.empty + 8 * stage, turn / STAGES<NT> % 2 ^ 1);
            bring<NT, KIND>(p, places, tile, stage);
        }
        scales.make(places.ring + stage * STAGE + CODES_BYTES, p.k / 256, maps, offsets);
        __syncwarp();
        if (threadIdx.x % WARP == 0) barrier_arrive(places.full + 8 * stage);
        tile += gridDim.x;
        if (tile < p.tiles) scales.fetch(p, locate<KIND>(p, tile));
    }
    let_next();
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
__device__ __forceinline__ void consume(const Product& p, const Places<NT>& places) {
    constexpr u32 MOST = MOST_GROUPS<NT>;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, i = lane % 4;
    const u32 groups = p.k / 64, begin = warp * groups / CONSUMERS<NT>, count = (warp + 1) * groups / CONSUMERS<NT> - begin;
    wait_before();
    // Zeros beyond the last group and token.
    uint4 x[MOST][NT][2];
#pragma unroll
    for (u32 u = 0; u < MOST; u++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const T* from = (const T*)p.x + (u64)(8 * n + g) * p.k + (begin + u) * 64 + 16 * i;
            const bool there = u < count && 8 * n + g < p.tokens;
            x[u][n][0] = load_now(from, there), x[u][n][1] = load_now(from + 8, there);
        }
    }
    const u32 bank = places.table + 4 * lane, sums = places.sums + warp * NT * FRAGMENT + lane * 16;
    const u32 first = places.ring + g * CODES_PITCH + begin * 32 + i * 8;
    const u32 first_scale = places.ring + CODES_BYTES + begin * 64 + g * 8;
#pragma unroll 1
    for (u32 turn = 0, tile = blockIdx.x; tile < p.tiles; turn++, tile += gridDim.x) {
        float sum[NT][4] = {};
        const u32 stage = turn % STAGES<NT>, codes = first + stage * STAGE, scales = first_scale + stage * STAGE;
        barrier_wait(places.full + 8 * stage, turn / STAGES<NT> % 2);
        // Two at a time; the second may be beyond the last, where what lies there is multiplied by zeros.
#pragma unroll
        for (u32 u = 0; u < MOST; u += 2) {
            if (u >= count) break;
            multiply_group<T, NT>(codes + u * 32, scales + u * 64, true, x[u], bank, sum);
            multiply_group<T, NT>(codes + (u + 1) * 32, scales + (u + 1) * 64, u + 1 < count, x[u + 1], bank, sum);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(places.empty + 8 * stage);
        barrier_wait(places.taken, turn % 2 ^ 1);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            store16(sums + n * FRAGMENT, __float_as_uint(sum[n][0]), __float_as_uint(sum[n][1]), __float_as_uint(sum[n][2]),
                    __float_as_uint(sum[n][3]));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(places.summed);
    }
}

__device__ __forceinline__ void add(float (&to)[4], const float4& v) { to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w; }

// The closer.
template <typename T, int NT, Kind KIND>
__device__ __forceinline__ void close(const Product& p, const Places<NT>& places) {
    const u32 lane = threadIdx.x % WARP;
    wait_before();
#pragma unroll 1
    for (u32 turn = 0, tile = blockIdx.x; tile < p.tiles; turn++, tile += gridDim.x) {
        const Tile at = locate<KIND>(p, tile);
        float sum[NT][4] = {};
        add_branch<T, NT, KIND, 4 / NT>(p, at, 0, 1, sum);
        barrier_wait(places.summed, turn % 2);
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (u32 warp = 0; warp < CONSUMERS<NT>; warp++)
                add(sum[n], load_float4(places.sums + (warp * NT + n) * FRAGMENT + lane * 16));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(places.taken);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const u32 token = 8 * n + lane % 4 * 2;
            if (token < p.tokens) finish<T, KIND>(p, at, lane / 4, token, sum[n][0], sum[n][2]);
            if (token + 1 < p.tokens) finish<T, KIND>(p, at, lane / 4, token + 1, sum[n][1], sum[n][3]);
        }
        __syncwarp();
    }
}

template <typename T, int NT, Kind KIND> __device__ __forceinline__ void product(const Product& p) {
    constexpr u32 PRODUCER = CONSUMERS<NT>, PARTS = KIND == PLAIN ? 1 : KIND == TURN ? 3 : 2;
    __shared__ float maps[PARTS][256], offsets[PARTS];
    const u32 warp = threadIdx.x / WARP;
    const Places<NT> places;
    RawScales scales; // the producer's
    if (warp == PRODUCER) {
        if (threadIdx.x % WARP == 0) places.init_barriers();
        __syncwarp();
        for (u32 stage = 0, tile = blockIdx.x; stage < STAGES<NT> && tile < p.tiles; stage++, tile += gridDim.x)
            bring<NT, KIND>(p, places, tile, stage);
        if (blockIdx.x < p.tiles) scales.fetch(p, locate<KIND>(p, blockIdx.x));
    }
    fill_table<T, TABLE_PITCH>(places.table, p.quant_type);
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        if (threadIdx.x < 256) maps[part][threadIdx.x] = p.parts[part].map[threadIdx.x];
        if (threadIdx.x == 0) offsets[part] = *p.parts[part].offset;
    }
    __syncthreads();
    if (warp < PRODUCER) {
        if constexpr (NT == 2) take_registers<CONSUMER_REGISTERS>();
        consume<T, NT>(p, places);
    } else {
        if constexpr (NT == 2) give_registers<OTHER_REGISTERS>();
        if (warp == PRODUCER) produce<NT, KIND>(p, places, scales, maps, offsets);
        else if (warp == PRODUCER + 1) close<T, NT, KIND>(p, places);
    }
}
