// A 4-bit weight that the blocks of a product dequantize themselves, ahead of the tiles that want it: value * absmax rounded once,
// the bits of dequantize.cu, to a 16-bit matrix in device memory.
//
// To dequantize is to write memory, to multiply is work for the tensor cores. So only the part that the first tiles want is
// dequantized by all blocks; then some, which are `late`, dequantize the rest in the time of their first tile, which
// others take, while those multiply. The weight is cut into squares; a thread that brings tiles waits for the square that it
// wants, and squares are made in the order in which they are wanted.
#pragma once
#include "codes.cuh"
#include "linear/hopper.cuh"
#include "runs.cuh"

constexpr u32 SQUARE = 256;         // rows and columns of a square
constexpr u32 UNIT_ROWS = 128;      // of what a block dequantizes at a time
constexpr u32 UNITS = SQUARE / UNIT_ROWS; // of a square
constexpr u32 MAX_SQUARES = 1 << 14;

// Units of each square that are dequantized, and blocks that wait for no more of them. 0 between launches.
__device__ u32 dequantized[MAX_SQUARES];
__device__ u32 ended;

// The weight: nothing if `packed` is null.
struct Ahead {
    const u8* packed;
    Scales scales;
    const float* map;
    u32 book;
    void* dense;
    u32 rows, columns; // of the weight: columns a multiple of 64, blocks of 64 codes or more
    u32 across;        // squares along the result that the first tiles want at once
    u32 rounds;        // units that each block makes before all else
    u32 late;          // blocks that make the rest before their first tile
};

// The place of a square: along the result, and along the contraction.
struct Squares {
    u32 along_result, along_depth;

    template <bool FORWARD> __device__ __forceinline__ static Squares of(const Ahead& weight) {
        const u32 down = (weight.rows + SQUARE - 1) / SQUARE, over = (weight.columns + SQUARE - 1) / SQUARE;
        return FORWARD ? Squares{down, over} : Squares{over, down};
    }
    __device__ __forceinline__ u32 count() const { return along_result * along_depth; }
    __device__ __forceinline__ u32* counter(u32 of_result, u32 of_depth) const {
        return dequantized + of_result * along_depth + of_depth;
    }
};

// A thread's part of a unit on the way from memory: eight weights in each of its rows.
template <int THREADS> struct Unit {
    static constexpr u32 WARPS = THREADS / WARP, ROWS = (UNIT_ROWS + WARPS - 1) / WARPS;
    u32 words[ROWS];
    uint2 scales[ROWS];
    u32 row, end, column; // `end`: of the rows that are there, 0 if none are
    u32* counter;

    // The unit-th, in the order in which they are wanted; none after the last.
    template <bool FORWARD>
    __device__ __forceinline__ void fetch(const Ahead& weight, const Squares& squares, u32 unit) {
        const u32 square = unit / UNITS, strip = square / (weight.across * squares.along_depth);
        const u32 place = square % (weight.across * squares.along_depth);
        const u32 width = min(weight.across, squares.along_result - strip * weight.across);
        const u32 of_result = strip * weight.across + place % width, of_depth = place / width;
        const u32 down = FORWARD ? of_result : of_depth, over = FORWARD ? of_depth : of_result;
        const u32 first = down * SQUARE + unit % UNITS * UNIT_ROWS;
        counter = squares.counter(of_result, of_depth);
        row = first + threadIdx.x / WARP;
        column = over * SQUARE + threadIdx.x % WARP * 8;
        end = square < squares.count() && column < weight.columns ? min(first + UNIT_ROWS, weight.rows) : 0;
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            words[i] = 0, scales[i] = make_uint2(0, 0);
            if (row + i * WARPS >= end) continue;
            const u64 at = (u64)(row + i * WARPS) * weight.columns + column;
            words[i] = __ldg(reinterpret_cast<const u32*>(weight.packed + at / 2));
            scales[i] = weight.scales.fetch(at >> weight.scales.block_shift);
        }
    }
    // `values`: of the 16 codes, `map`: of scales; in shared memory.
    template <typename T>
    __device__ __forceinline__ void dequantize(const Ahead& weight, const float* values, const float* map) const {
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            if (row + i * WARPS >= end) continue;
            const float scale = weight.scales.value(scales[i], map);
            float x[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                // The even element is the high nibble of its byte.
                x[j] = __fmul_rn(values[words[i] >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0)) & 15], scale);
            }
            store(static_cast<T*>(weight.dense) + (u64)(row + i * WARPS) * weight.columns + column, x);
        }
    }
};

// A block's part of the weight. `shared`: room for SCRATCH bytes.
constexpr u32 SCRATCH = (16 + 256) * 4;
template <typename T, bool FORWARD, int THREADS>
__device__ __forceinline__ void dequantize_ahead(const Ahead& weight, u8* shared) {
    float *values = reinterpret_cast<float*>(shared), *map = values + 16;
    if (threadIdx.x < 16) values[threadIdx.x] = CODE_VALUES[weight.book][threadIdx.x];
    if (weight.scales.nested && threadIdx.x < 256) map[threadIdx.x] = weight.map[threadIdx.x];
    __syncthreads();
    const Squares squares = Squares::of<FORWARD>(weight);
    const u32 units = squares.count() * UNITS, by_all = weight.rounds * gridDim.x;
    auto unit_of = [&](u32 turn) {
        if (turn < weight.rounds) return blockIdx.x + turn * gridDim.x;
        return blockIdx.x < weight.late ? by_all + (turn - weight.rounds) * weight.late + blockIdx.x : units;
    };
    Unit<THREADS> now, next;
    now.template fetch<FORWARD>(weight, squares, unit_of(0));
    for (u32 turn = 0; unit_of(turn) < units; turn++) {
        next.template fetch<FORWARD>(weight, squares, unit_of(turn + 1));
        now.template dequantize<T>(weight, values, map);
        __syncthreads();
        // Takes until all has been written: another warp each time.
        if (threadIdx.x == turn % (THREADS / WARP) * WARP) arrive_at(now.counter);
        now = next;
    }
    __syncthreads(); // `shared` is no longer read
}

// Waits for the square that the tile at `column` of the result wants, at `depth` of the contraction. One thread.
template <bool FORWARD> __device__ __forceinline__ void wait_for_square(const Ahead& weight, u32 column, u32 depth) {
    const Squares squares = Squares::of<FORWARD>(weight);
    wait_at(squares.counter(column / SQUARE, depth / SQUARE), UNITS);
    asm volatile("fence.proxy.async.global;" ::: "memory"); // the TMA sees it, too
}
// Once for each block, after it waits for no more: the last of them sets the counters back. One thread.
template <bool FORWARD> __device__ __forceinline__ void end_waiting(const Ahead& weight) {
    u32 found;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(found) : "l"(&ended) : "memory");
    if (found != gridDim.x - 1) return;
    const u32 count = Squares::of<FORWARD>(weight).count();
    for (u32 i = 0; i < count; i++) dequantized[i] = 0;
    ended = 0;
}
