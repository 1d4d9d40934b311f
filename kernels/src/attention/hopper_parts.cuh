// The parts of dQ in attention's backward pass on Hopper: sizes, places in shared memory, how a block adds its part to the sums
// in its turn, and the kernel that rounds the sums.
#pragma once
#include "attention/hopper.cuh"
#include "fast.cuh"
#include "rotary/turn.cuh"

namespace backward {

constexpr int D = 128, KEYS = 128, ROWS = 64, STAGES = 2;
constexpr int THREADS = 3 * 128, PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr u32 KEY_BYTES = KEYS * D * 2, ROW_BYTES = ROWS * D * 2; // of K or V; of a stage of Q or dO
constexpr u32 DS_BYTES = KEYS * ROWS * 2, DQ_BYTES = ROWS * D * 4, NUMBERS = 2 * ROWS * 4;

// Where things lie in shared memory.
constexpr u32 K_TILE = 0, V_TILE = K_TILE + KEY_BYTES, Q_TILES = V_TILE + KEY_BYTES, GRAD_TILES = Q_TILES + STAGES * ROW_BYTES;
constexpr u32 DS_TILES = GRAD_TILES + STAGES * ROW_BYTES; // two
constexpr u32 DQ_PARTS = DS_TILES + 2 * DS_BYTES;         // two
constexpr u32 NUMBER_TILES = DQ_PARTS + 2 * DQ_BYTES;     // lse · log₂e, then delta, for each stage
constexpr u32 BARRIERS = NUMBER_TILES + STAGES * NUMBERS;
constexpr u32 KEYS_FULL = BARRIERS, Q_FULL = KEYS_FULL + 8, GRAD_FULL = Q_FULL + 8 * STAGES;
constexpr u32 Q_EMPTY = GRAD_FULL + 8 * STAGES, GRAD_EMPTY = Q_EMPTY + 8 * STAGES;
constexpr u32 DQ_FULL = GRAD_EMPTY + 8 * STAGES, DQ_EMPTY = DQ_FULL + 16;
constexpr u32 TICKET = DQ_EMPTY + 16, SHARED = TICKET + 8;

extern __shared__ __align__(1024) u8 dynamic_shared[];

// Begins to add (or, the first time, to copy) a part from shared memory to global memory; then waits until it has been added. By
// the thread that began.
__device__ __forceinline__ void add_part(float* to, u32 from, bool first) {
    if (first) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "n"(DQ_BYTES)
                     : "memory");
    } else {
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                     "n"(DQ_BYTES)
                     : "memory");
    }
    stores_commit();
}
__device__ __forceinline__ void part_added() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void wait_for_turn(const u32* counter, u32 turn) {
    u32 found;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    } while (found != turn);
    asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void end_turn(u32* counter, u32 turn) {
    asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(turn + 1) : "memory");
}

// dq = scale · the sums, which `backward` has left as its threads held them, turned back. One block of 256 threads for 64 rows
// of up to FINISH_HEADS heads, so that their angles are not read as often as they are. tiles: {first row, rows to the end of
// the sequence, number of its 128 rows, _}, two blocks each; heads vary fastest.
constexpr u32 FINISH_HEADS = 4;
template <typename T>
__device__ __forceinline__ void finish(const float* dq_sums, T* dq, const int4* tiles, u32 heads, float scale, const Turn& turn) {
    __shared__ __align__(16) u8 rows[2][ROW_BYTES];
    const u32 groups = (heads + FINISH_HEADS - 1) / FINISH_HEADS;
    const u32 first = blockIdx.x % groups * FINISH_HEADS, half = blockIdx.x / groups % 2;
    const int4 tile = tiles[blockIdx.x / groups / 2];
    const int valid = min(tile.y - (int)half * ROWS, ROWS), row0 = tile.x + half * ROWS;
    if (valid <= 0) return;
    // A thread has pairs of columns in 4 of the 8 pieces of each half of a head, of rows `row` and `row` + 8.
    const u32 side = threadIdx.x / 128 * 4, thread = threadIdx.x % 128, row = thread / WARP * 16 + thread % WARP / 4;
    Angles angles[4][2];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 2; j++)
            angles[i][j] = Angles(turn, row0 + min((int)(row + 8 * j), valid - 1), (side + i) * 8 + thread % 4 * 2, D / 2);
    }
    for (u32 head = first; head < min(first + FINISH_HEADS, heads); head++) {
        const u64 part = (u64)(tile.z * 2 + half) * heads + head;
        const float4* from = reinterpret_cast<const float4*>(dq_sums + part * (DQ_BYTES / 4));
        u8* const mine = rows[head % 2];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float4 low = __ldcs(from + (side + i) * 128 + thread), high = __ldcs(from + (side + i + 8) * 128 + thread);
            angles[i][0].back(low.x, low.y, high.x, high.y);
            angles[i][1].back(low.z, low.w, high.z, high.w);
            auto put = [&](u32 piece, const float4& x) {
                u8* to = mine + row * D * 2 + ((piece ^ row % 8) * 16 + thread % 4 * 4);
                *reinterpret_cast<u32*>(to) = pair<T>(x.x * scale, x.y * scale);
                *reinterpret_cast<u32*>(to + 8 * D * 2) = pair<T>(x.z * scale, x.w * scale);
            };
            put(side + i, low), put(side + i + 8, high);
        }
        __syncthreads(); // also: what is written here after the next head has been read by then
#pragma unroll
        for (u32 i = 0; i < ROW_BYTES / 16 / 256; i++) {
            const u32 at = i * 256 + threadIdx.x, r = at / (D / 8), piece = at % (D / 8);
            if ((int)r >= valid) continue;
            T* to = dq + ((u64)(row0 + r) * heads + head) * D + piece * 8;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(mine + r * D * 2 + (piece ^ r % 8) * 16);
        }
    }
}

} // namespace backward
