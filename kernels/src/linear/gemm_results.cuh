// What becomes of the sums of gemm_hopper_sm90a.cu, rounded, in shared memory: the TMA copies them to a matrix as they are, or
// others are made of them first. These read of a place before its sums are there (`load`, which goes faster after `prefetch`),
// and then have something else to copy from the sums' place, in more places, or both (`finish`). A place is eight neighbours of a row.
#pragma once
#include "linear/hopper.cuh"
#include "runs.cuh"
#include "swiglu/element.cuh"

// Eight neighbours as they lie in memory; `set` rounds.
template <typename T> struct Neighbours {
    uint4 pairs;

    __device__ __forceinline__ void load(const T* from) { pairs = *reinterpret_cast<const uint4*>(from); }
    // From shared memory, and back.
    __device__ __forceinline__ void take(u32 from) { pairs = load_shared_uint4(from); }
    __device__ __forceinline__ void leave(u32 to) const { store16(to, pairs.x, pairs.y, pairs.z, pairs.w); }
    __device__ __forceinline__ void get(float (&x)[8]) const { open(*reinterpret_cast<const Pack<T>*>(&pairs), x); }
    __device__ __forceinline__ void set(const float (&x)[8]) {
        pairs = make_uint4(pair<T>(x[0], x[1]), pair<T>(x[2], x[3]), pair<T>(x[4], x[5]), pair<T>(x[6], x[7]));
    }
};
// out = sums + in in f32, where `wide` is that; or else out = sums + added of the operands' type.
struct Plus {
    static constexpr bool MAY_BE_F32 = true;
    float* wide;                  // or null
    const float* in;              // or null; may be `wide`
    const TensorMap *out, *added; // in boxes of 64 x 64; `added` may be null

    __device__ __forceinline__ void prefetch(u32, u32, u32) const {}
};

// Has the second-level cache hold rows of 128 from `row` on, `columns` from `column` on.
__device__ __forceinline__ void prefetch_boxes(const TensorMap* map, u32 row, u32 column, u32 columns) {
#pragma unroll
    for (u32 at = 0; at < columns; at += 64) prefetch_box(map, column + at, row);
}

// The sums are `up` of SwiGLU, rounded as if SwiGLU were a pass of its own: up, and output = silu(gate) · up.
template <typename T> struct Gated {
    static constexpr bool MAY_BE_F32 = false;
    static constexpr bool CHANGES = false; // the sums
    static constexpr int MADE = 1;         // others, beside them
    const TensorMap* gates;                // in boxes of 128 x 64
    const T* gate;
    const TensorMap *up, *output; // in boxes of 8 x 64
    static constexpr const float* wide = nullptr;
    static constexpr const TensorMap* added = nullptr;
    struct Loaded {
        Neighbours<T> gate;
    };

    __device__ __forceinline__ void prefetch(u32 row, u32 column, u32 columns) const {
        prefetch_boxes(gates, row, column, columns);
    }
    __device__ __forceinline__ void load(Loaded& loaded, u64 at) const { loaded.gate.load(gate + at); }
    __device__ __forceinline__ void finish(const Loaded& loaded, const Neighbours<T>& y, Neighbours<T> (&made)[MADE]) const {
        float x[8], gates[8];
        y.get(x);
        loaded.gate.get(gates);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = gated<T>(gates[i], x[i]);
        made[0].set(x);
    }
    __device__ __forceinline__ const TensorMap* of_sums() const { return up; }
    __device__ __forceinline__ const TensorMap* of_made(int) const { return output; }
};

// The sums are the gradient of SwiGLU's output, rounded as if its gradients were a pass of their own: gate and up become their
// gradients; output = silu(gate) · up.
template <typename T> struct Differentiated {
    static constexpr bool MAY_BE_F32 = false;
    static constexpr bool CHANGES = true;
    static constexpr int MADE = 2;
    const TensorMap *gates, *ups; // in boxes of 128 x 64
    const T *gate, *up;
    const TensorMap *of_gate, *of_up, *output; // in boxes of 8 x 64
    static constexpr const float* wide = nullptr;
    static constexpr const TensorMap* added = nullptr;
    struct Loaded {
        Neighbours<T> gate, up;
    };

    __device__ __forceinline__ void prefetch(u32 row, u32 column, u32 columns) const {
        prefetch_boxes(gates, row, column, columns);
        prefetch_boxes(ups, row, column, columns);
    }
    __device__ __forceinline__ void load(Loaded& loaded, u64 at) const {
        loaded.gate.load(gate + at);
        loaded.up.load(up + at);
    }
    __device__ __forceinline__ void finish(const Loaded& loaded, Neighbours<T>& y, Neighbours<T> (&made)[MADE]) const {
        float x[8], gates[8], ups[8];
        y.get(x);
        loaded.gate.get(gates);
        loaded.up.get(ups);
#pragma unroll
        for (int i = 0; i < 8; i++) differentiate<T>(gates[i], ups[i], x[i]);
        made[0].set(gates);
        made[1].set(ups);
        y.set(x);
    }
    __device__ __forceinline__ const TensorMap* of_sums() const { return output; }
    __device__ __forceinline__ const TensorMap* of_made(int i) const { return i == 0 ? of_gate : of_up; }
};

// Makes a warp's part of an f32 result [m, n] of its sums: 16 rows of BN columns from (row0, column0) on.
template <int BN>
__device__ __forceinline__ void write_wide(const Plus& result, u32 m, u32 n, u32 row0, u32 column0, const float (&sums)[BN / 2],
                                           float scale) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < BN / 2; i += 2) {
        const u32 row = row0 + lane / 4 + i / 2 % 2 * 8, column = column0 + i / 4 * 8 + lane % 4 * 2;
        if (row >= m || column >= n) continue;
        const u64 at = (u64)row * n + column;
        float2 x = make_float2(sums[i] * scale, sums[i + 1] * scale);
        if (result.in) {
            const float2 more = *reinterpret_cast<const float2*>(result.in + at);
            x.x += more.x, x.y += more.y;
        }
        *reinterpret_cast<float2*>(result.wide + at) = x;
    }
}

// Others go through shared memory rounded to T: half of the bytes, and the warps that multiply have nothing more to do with them.
// Slabs are 64 columns of a warpgroup's 64 rows, rows of 128 bytes swizzled.
constexpr int SLAB = 64, SLAB_BYTES = 64 * SLAB * 2;

// Leaves a warp's sums in its warpgroup's slabs. If `adds`, what lies there is added to them before they are rounded.
template <int BN, typename T>
__device__ __forceinline__ void leave_sums(const float (&sums)[BN / 2], float scale, u32 slabs, bool adds) {
    const u32 lane = threadIdx.x % WARP, row = threadIdx.x / WARP % 4 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < BN / 16; i++) {
        const u32 place = slabs + i / 4 * SLAB_BYTES + row * (SLAB * 2) + ((i % 4 * 2 + lane / 16) ^ row % 8) * 16;
        u32 pairs[4] = {};
        if (adds) load_matrices(pairs, place);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 x = make_float2(sums[i * 8 + 2 * j] * scale, sums[i * 8 + 2 * j + 1] * scale);
            if (adds) x.x += both<T>(pairs[j]).x, x.y += both<T>(pairs[j]).y;
            pairs[j] = pair<T>(x.x, x.y);
        }
        store_matrices(place, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

constexpr int MADE_ROWS = 8; // of boxes of results that are made of the sums
constexpr int PART_BYTES = MADE_ROWS * SLAB * 2;
constexpr int STAGING_BYTES = 2 * 2 * PART_BYTES; // of a warp: what is made of two parts

// Makes the result of those of a warpgroup, 64 rows of BN columns from (row0, column0) on: every `of`th part of it from `begin` on,
// which is eight rows of a slab.
template <int BN, typename T, typename RESULT> struct Writer {
    static constexpr u32 ACROSS = BN / SLAB, PARTS = 64 / MADE_ROWS * ACROSS;
    const RESULT& result;
    const u32 m, n, row0, column0, begin, stride;
    typename RESULT::Loaded next[2];

    __device__ __forceinline__ Writer(const RESULT& result, u32 m, u32 n, u32 row0, u32 column0, u32 begin, u32 of)
        : result(result), m(m), n(n), row0(row0), column0(column0), begin(begin), stride(of) {
        load(begin);
    }
    // A lane has eight columns of two rows that are four apart.
    __device__ __forceinline__ void load(u32 part) {
        const u32 lane = threadIdx.x % WARP, row = row0 + part / ACROSS * MADE_ROWS + lane / 8;
        const u32 column = column0 + part % ACROSS * SLAB + lane % 8 * 8;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            if (part < PARTS && row + 4 * i < m && column < n) result.load(next[i], (u64)(row + 4 * i) * n + column);
        }
    }
    // `staging`: shared memory of the warp's own.
    __device__ __forceinline__ void write(u32 slabs, u32 staging) {
        const u32 lane = threadIdx.x % WARP, row = lane / 8;
        const u32 places[2] = {row * (SLAB * 2) + (lane % 8 ^ row) * 16, (row + 4) * (SLAB * 2) + (lane % 8 ^ (row + 4)) * 16};
        u32 made_at = staging, then_at = staging + 2 * PART_BYTES;
#pragma unroll 1
        for (u32 part = begin; part < PARTS; part += stride) {
            const u32 sums = slabs + part % ACROSS * SLAB_BYTES + part / ACROSS * PART_BYTES;
            Neighbours<T> y[2], made[2][RESULT::MADE];
#pragma unroll
            for (int i = 0; i < 2; i++) y[i].take(sums + places[i]);
#pragma unroll
            for (int i = 0; i < 2; i++) result.finish(next[i], y[i], made[i]);
            load(part + stride);
            if (lane == 0) stores_read<1>(); // what was made here last has been copied
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < RESULT::MADE; j++) made[i][j].leave(made_at + j * PART_BYTES + places[i]);
                if (RESULT::CHANGES) y[i].leave(sums + places[i]);
            }
            publish_shared();
            __syncwarp();
            if (lane == 0) {
                const u32 at_row = row0 + part / ACROSS * MADE_ROWS, at_column = column0 + part % ACROSS * SLAB;
                store_box(result.of_sums(), at_column, at_row, sums);
#pragma unroll
                for (int j = 0; j < RESULT::MADE; j++) store_box(result.of_made(j), at_column, at_row, made_at + j * PART_BYTES);
                stores_commit();
            }
            const u32 swapped = made_at;
            made_at = then_at, then_at = swapped;
        }
        if (lane == 0) stores_read<0>();
    }
};
// The same where that is the sums as they are: a part is a slab.
template <int BN, typename T> struct Writer<BN, T, Plus> {
    const TensorMap* const out;
    const u32 row0, column0, begin, stride;

    __device__ __forceinline__ Writer(const Plus& result, u32, u32, u32 row0, u32 column0, u32 begin, u32 of)
        : out(result.out), row0(row0), column0(column0), begin(begin), stride(of) {}
    __device__ __forceinline__ void write(u32 slabs, u32) {
        if (threadIdx.x % WARP != 0) return;
        for (u32 i = begin; i < BN / SLAB; i += stride) store_box(out, column0 + i * SLAB, row0, slabs + i * SLAB_BYTES);
        stores_commit();
        stores_read<0>();
    }
};
