// Dequantizing ahead of a product: warps that have nothing else to do in a kernel of products (gemm_hopper_sm90a.cu) make the
// 16-bit matrix of a weight of 4-bit codes in device memory while the others multiply what there is of it already.
//
// A part is 64 rows of W by 64 columns, 64 blocks' worth of codes or less. Warps claim parts one after another, in the order in
// which the products want them, and say of each that it is made. Whoever has the TMA read some waits for that. So nobody waits
// for a part that has not been claimed by a warp that runs, and it does not matter which blocks run at the same time.
//
// The values are those of quantize/dequantize.cu: value * scale in f32, rounded once.
#pragma once
#include "codes.cuh"
#include "linear/hopper.cuh"
#include "linear/loads.cuh"

constexpr int PART = 64;
constexpr u32 MOST_PARTS = 1 << 16;
constexpr int VALUES_BYTES = 16 * 32 * 4; // of each code, once in every bank

// A weight [rows, row] of codes, `row` a multiple of 64 and blocks of 64 or more, and the matrix of T that is made of it.
struct Coded {
    const u8* codes; // null: there is nothing to make
    Scales scales;
    const float* map;
    void* to;
    u32 rows, row;
};

// What the blocks of a launch tell each other. Launches follow one another; each leaves all but `turn` as it wants to find it.
struct Progress {
    u32 turn;             // launches so far
    u32 claimed;          // parts
    u32 idle, ended;      // warps that found no part left; blocks that wait for none any more
    u32 all;              // the turn in which all parts have been made, at last
    u32 unused[3];
    u32 made[MOST_PARTS]; // the turn in which it was made
};
__device__ __align__(16) Progress progress;

// What is to be made: for each of `across` columns of tiles parts for each of `steps` along the contraction, PARTS of them.
// Those of `together` columns of tiles are wanted at the same time, by `blocks` that begin at multiples of `share`.
struct Order {
    u32 across, steps, together, blocks, share;

    template <int PARTS> __device__ __forceinline__ u32 count() const { return across * share * blocks * PARTS; }
    // Of the i-th: the column of tiles, the step and the part. The step can be one that there is not.
    template <int PARTS> __device__ __forceinline__ void find(u32 i, u32& tile, u32& step, u32& part) const {
        const u32 of_group = together * share * blocks * PARTS, group = i / of_group;
        const u32 width = min(together, across - group * together), at = i % of_group;
        part = at % PARTS;
        tile = group * together + at / PARTS % width;
        const u32 order = at / (PARTS * width);
        step = order % blocks * share + order / blocks;
    }
    template <int PARTS> __device__ __forceinline__ u32 index(u32 tile, u32 step) const { return (tile * steps + step) * PARTS; }
};

// Where a part lies: the weight, its first element and the rows that there are of it, none if there is nothing to make.
struct Place {
    Coded weight;
    u32 first, rows, index; // index: in `made`, or NOWHERE
};
constexpr u32 NOWHERE = ~0u;

// Codes of a part on their way: eight lanes have the 32 bytes of a row, the others those of the next rows. Lane l has what
// the scales of rows l and l + 32 are made of.
template <typename T> struct Part {
    u32 codes[PART / 4];
    uint2 raw[2];

    // Makes the part at `now` of what was loaded, and loads that at `next`. `values`: the address of this lane's bank of the
    // table of values.
    __device__ __forceinline__ void turn_over(const Place& now, const Place& next, u32 values) {
        const u32 lane = threadIdx.x % WARP, row = lane / 8;
        float scale[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            scale[h] = h * 32 + lane < now.rows ? now.weight.scales.value(raw[h], now.weight.map) : 0.0f;
            if (h * 32 + lane < next.rows)
                raw[h] = next.weight.scales.fetch((next.first + (h * 32 + lane) * next.weight.row) >> next.weight.scales.block_shift);
        }
        const u32 to = now.first + row * now.weight.row + lane % 8 * 8, from = next.first + row * next.weight.row + lane % 8 * 8;
#pragma unroll
        for (int i = 0; i < PART / 4; i++) {
            const float s = __shfl_sync(~0u, scale[i / 8], i % 8 * 4 + row);
            auto value = [&](int code) { // the first of a byte is its high half
                const int bit = code / 2 * 8 + (code % 2 ? 0 : 4);
                const u32 at = (bit < 7 ? codes[i] << (7 - bit) : codes[i] >> (bit - 7)) & 15 << 7;
                return __fmul_rn(load_float(values | at), s);
            };
            const uint4 eight = make_uint4(pair<T>(value(0), value(1)), pair<T>(value(2), value(3)),
                                           pair<T>(value(4), value(5)), pair<T>(value(6), value(7)));
            if (4 * i + row < now.rows)
                *reinterpret_cast<uint4*>(static_cast<T*>(now.weight.to) + (to + 4 * i * now.weight.row)) = eight;
            codes[i] = load_once4(next.weight.codes + (from + 4 * i * next.weight.row) / 2, 4 * i + row < next.rows);
        }
    }
};

// Makes parts until there are none left. One warp of `warps`; `place` says where the part of a tile and a step lies.
template <typename T, int PARTS, typename Find>
__device__ __forceinline__ void make_ahead(const Order& order, u32 turn, u32 warps, u32 values, const Find& find) {
    const u32 lane = threadIdx.x % WARP, count = order.count<PARTS>();
    auto claim = [&] { return lane == 0 ? atomicAdd(&progress.claimed, 1u) : 0; };
    Part<T> part = {};
    Place now = {{}, 0, 0, NOWHERE};
    u32 next = claim();
    while (true) {
        const u32 i = __shfl_sync(~0u, next, 0);
        Place ahead = {{}, 0, 0, NOWHERE};
        if (i < count) {
            u32 tile, step, of_tile;
            order.find<PARTS>(i, tile, step, of_tile);
            if (step < order.steps) find(tile, step, of_tile, ahead);
            ahead.index = order.index<PARTS>(tile, step) + of_tile;
            next = claim();
        }
        part.turn_over(now, ahead, values); // what is loaded is under way until the next time round
        if (now.index != NOWHERE) {
            copies_see_memory();
            __syncwarp();
            if (lane == 0) say(&progress.made[now.index], turn);
        }
        if (i >= count) break;
        now = ahead;
    }
    if (lane == 0 && is_last(&progress.idle, warps)) {
        progress.claimed = 0;
        say(&progress.all, turn);
    }
}
