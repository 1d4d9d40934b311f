// What becomes of the sums of gemm_hopper_sm90a.cu. Each of these reads of a place before its sums are there (`load`, which
// goes faster after `prefetch`), and then stores (`finish`). A place is eight neighbours of a row.
#pragma once
#include "linear/hopper.cuh"
#include "runs.cuh"
#include "swiglu/element.cuh"

// Eight neighbours as they lie in memory; `set` rounds.
template <typename T> struct Neighbours {
    uint4 pairs;

    __device__ __forceinline__ void load(const T* from) { pairs = *reinterpret_cast<const uint4*>(from); }
    __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = pairs; }
    __device__ __forceinline__ void get(float (&x)[8]) const { open(*reinterpret_cast<const Pack<T>*>(&pairs), x); }
    __device__ __forceinline__ void set(const float (&x)[8]) {
        pairs = make_uint4(pair<T>(x[0], x[1]), pair<T>(x[2], x[3]), pair<T>(x[4], x[5]), pair<T>(x[6], x[7]));
    }
};
template <> struct Neighbours<float> {
    float4 halves[2];

    __device__ __forceinline__ void load(const float* from) {
        halves[0] = reinterpret_cast<const float4*>(from)[0], halves[1] = reinterpret_cast<const float4*>(from)[1];
    }
    __device__ __forceinline__ void store(float* to) const {
        reinterpret_cast<float4*>(to)[0] = halves[0], reinterpret_cast<float4*>(to)[1] = halves[1];
    }
    __device__ __forceinline__ void get(float (&x)[8]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x[4 * i] = halves[i].x, x[4 * i + 1] = halves[i].y, x[4 * i + 2] = halves[i].z, x[4 * i + 3] = halves[i].w;
        }
    }
    __device__ __forceinline__ void set(const float (&x)[8]) {
        halves[0] = make_float4(x[0], x[1], x[2], x[3]), halves[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
};

// What a result does with a place's sums as they are in f32: out = sums + in.
struct Plus {
    float* out;
    const float* in; // or null; may be `out`
    struct Loaded {
        Neighbours<float> in;
    };

    __device__ __forceinline__ void load(Loaded& loaded, u64 at) const {
        if (in) loaded.in.load(in + at);
    }
    __device__ __forceinline__ void finish(const Loaded& loaded, u64 at, float (&x)[8]) const {
        if (in) {
            float more[8];
            loaded.in.get(more);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] += more[i];
        }
        Neighbours<float> y;
        y.set(x);
        y.store(out + at);
    }
};

// What others do with them rounded to T: out = sums.
template <typename T> struct Plain {
    T* out;
    struct Loaded {};

    __device__ __forceinline__ void load(Loaded&, u64) const {}
    __device__ __forceinline__ void finish(const Loaded&, u64 at, const Neighbours<T>& y, bool there) const {
        if (there) y.store(out + at);
    }
};
// The one or the other: out = sums + in in f32 where that is `wide`, or else out = sums + added of T.
template <typename T> struct PlusAny {
    static constexpr bool EITHER = true;
    void* out;
    const float* in;        // or null; may be `out`
    const TensorMap* added; // or null; in boxes of 64 x 64
    bool wide;

    __device__ __forceinline__ Plus plus() const { return {static_cast<float*>(out), in}; }
    __device__ __forceinline__ Plain<T> plain() const { return {static_cast<T*>(out)}; }
    __device__ __forceinline__ void prefetch(u32, u32, u32) const {}
    __device__ __forceinline__ bool adds() const { return added != nullptr; }
    __device__ __forceinline__ const TensorMap* addend() const { return added; }
};

// Has the second-level cache hold rows of 128 from `row` on, `columns` from `column` on.
__device__ __forceinline__ void prefetch_boxes(const TensorMap* map, u32 row, u32 column, u32 columns) {
#pragma unroll
    for (u32 at = 0; at < columns; at += 64) prefetch_box(map, column + at, row);
}

// The sums are `up` of SwiGLU, rounded as if SwiGLU were a pass of its own: up, and output = silu(gate) · up.
template <typename T> struct Gated {
    static constexpr bool EITHER = false;
    const TensorMap* gates; // in boxes of 128 x 64
    const T* gate;
    T *up, *output;
    static __device__ __forceinline__ bool adds() { return false; }
    static __device__ __forceinline__ const TensorMap* addend() { return nullptr; }
    struct Loaded {
        Neighbours<T> gate;
    };

    __device__ __forceinline__ void prefetch(u32 row, u32 column, u32 columns) const {
        prefetch_boxes(gates, row, column, columns);
    }
    __device__ __forceinline__ void load(Loaded& loaded, u64 at) const { loaded.gate.load(gate + at); }
    __device__ __forceinline__ void finish(const Loaded& loaded, u64 at, Neighbours<T> y, bool there) const {
        if (there) y.store(up + at);
        float x[8], gates[8];
        y.get(x);
        loaded.gate.get(gates);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = gated<T>(gates[i], x[i]);
        y.set(x);
        if (there) y.store(output + at);
    }
};

// The sums are the gradient of SwiGLU's output, rounded as if its gradients were a pass of their own: gate and up become their
// gradients; output = silu(gate) · up.
template <typename T> struct Differentiated {
    static constexpr bool EITHER = false;
    const TensorMap *gates, *ups; // in boxes of 128 x 64
    T *gate, *up, *output;
    static __device__ __forceinline__ bool adds() { return false; }
    static __device__ __forceinline__ const TensorMap* addend() { return nullptr; }
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
    __device__ __forceinline__ void finish(const Loaded& loaded, u64 at, Neighbours<T> y, bool there) const {
        float x[8], gates[8], ups[8];
        y.get(x);
        loaded.gate.get(gates);
        loaded.up.get(ups);
#pragma unroll
        for (int i = 0; i < 8; i++) differentiate<T>(gates[i], ups[i], x[i]);
        y.set(gates);
        if (there) y.store(gate + at);
        y.set(ups);
        if (there) y.store(up + at);
        y.set(x);
        if (there) y.store(output + at);
    }
};

constexpr int EXCHANGE_BYTES = 4096; // of a warp

// The place of a warp's sums in the result [m, n]: 16 rows of BN columns from (row0, column0) on, which go through shared
// memory as they are, so that a lane has neighbours of a row.
template <int BN> struct WideWriter {
    static constexpr int SLAB = 32, PITCH = SLAB + 8; // columns at a time; PITCH: lanes fall into different banks
    static_assert(16 * PITCH * 4 <= EXCHANGE_BYTES);
    const Plus result;
    const u32 n, column; // `column`: this lane's in the first slab
    const bool inside[2];
    const u64 first, eight_rows;
    Plus::Loaded next[2];

    __device__ __forceinline__ WideWriter(const Plus& result, u32 m, u32 n, u32 row0, u32 column0)
        : result(result), n(n), column(column0 + threadIdx.x % 4 * 8),
          inside{row0 + threadIdx.x % WARP / 4 < m, row0 + threadIdx.x % WARP / 4 + 8 < m},
          first((u64)(row0 + threadIdx.x % WARP / 4) * n + column), eight_rows((u64)8 * n) {
        load(0, 0), load(1, 0);
    }
    __device__ __forceinline__ bool there(int half, int s) const { return inside[half] && column + s * SLAB < n; }
    __device__ __forceinline__ u64 at(int half, int s) const { return first + half * eight_rows + s * SLAB; }
    __device__ __forceinline__ void load(int half, int s) {
        if (there(half, s)) result.load(next[half], at(half, s));
    }
    // `exchange`: shared memory of the warp's own.
    __device__ __forceinline__ void write(const float (&sums)[BN / 2], float scale, u8* exchange) {
        const int lane = threadIdx.x % WARP, row = lane / 4, odd = row & 1;
        float* const slab = reinterpret_cast<float*>(exchange);
        float* to = slab + row * PITCH + lane % 4 * 2;
        const float4* from = reinterpret_cast<const float4*>(slab + row * PITCH + lane % 4 * 8);
#pragma unroll
        for (int s = 0; s < BN / SLAB; s++) {
            __syncwarp(); // the last slab has been read
#pragma unroll
            for (int j = 0; j < SLAB / 8; j++) {
                const float* x = sums + (s * (SLAB / 8) + j) * 4;
                *reinterpret_cast<float2*>(to + j * 8) = make_float2(x[0] * scale, x[1] * scale);
                *reinterpret_cast<float2*>(to + 8 * PITCH + j * 8) = make_float2(x[2] * scale, x[3] * scale);
            }
            __syncwarp();
#pragma unroll
            for (int half = 0; half < 2; half++) {
                // Odd rows begin with their second half, so that eight lanes read from all banks.
                const float4 a = from[half * (8 * PITCH / 4) + odd], b = from[half * (8 * PITCH / 4) + (odd ^ 1)];
                const float4 low = odd ? b : a, high = odd ? a : b;
                float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                if (there(half, s)) result.finish(next[half], at(half, s), x);
                if (s + 1 < BN / SLAB) load(half, s + 1);
            }
        }
    }
};

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

// Makes the result of those of a warpgroup, 64 rows of BN columns from (row0, column0) on: a warp's parts of it, which are
// four rows of a slab each.
template <int BN, typename T, typename RESULT> struct Writer {
    static constexpr u32 ACROSS = BN / SLAB, PARTS = 16 * ACROSS, AHEAD = 2;
    const RESULT& result;
    const u32 n, column, rows; // `column`: this lane's in the first slab; `rows` of the result from this lane's first on
    const u32 begin, end, stride; // of its parts
    const u64 first, four_rows;
    typename RESULT::Loaded next[AHEAD];

    __device__ __forceinline__ Writer(const RESULT& result, u32 m, u32 n, u32 row0, u32 column0, u32 begin, u32 end, u32 stride)
        : result(result), n(n), column(column0 + threadIdx.x % 8 * 8),
          rows(max((int)m - (int)(row0 + threadIdx.x % WARP / 8), 0)), begin(begin), end(end), stride(stride),
          first((u64)(row0 + threadIdx.x % WARP / 8) * n + column), four_rows((u64)4 * n) {
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) load(begin + i * stride, i);
    }
    __device__ __forceinline__ bool there(u32 part) const {
        return part < end && part / ACROSS * 4 < rows && column + part % ACROSS * SLAB < n;
    }
    __device__ __forceinline__ u64 at(u32 part) const { return first + part / ACROSS * four_rows + part % ACROSS * SLAB; }
    __device__ __forceinline__ void load(u32 part, u32 i) {
        if (there(part)) result.load(next[i], at(part));
    }
    __device__ __forceinline__ void write(u32 slabs) {
        const u32 lane = threadIdx.x % WARP;
#pragma unroll 1
        for (u32 start = begin; start < end; start += stride * AHEAD) {
            Neighbours<T> y[AHEAD];
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                const u32 part = min(start + i * stride, PARTS - 1), row = part / ACROSS * 4 + lane / 8;
                y[i].pairs = load_shared_uint4(slabs + part % ACROSS * SLAB_BYTES + row * (SLAB * 2) + (lane % 8 ^ row % 8) * 16);
            }
            // No branches, so that the parts go on beside each other.
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                const u32 part = start + i * stride;
                result.finish(next[i], at(part), y[i], there(part));
                load(part + stride * AHEAD, i);
            }
        }
    }
};
