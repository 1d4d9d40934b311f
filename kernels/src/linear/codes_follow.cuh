// What follows the sums of codes_hopper.cuh: scale and residual, or SwiGLU or its gradients. They go by way of shared memory,
// so that a lane has eight columns of a row.
#pragma once
#include "linear/hopper.cuh"
#include "swiglu/element.cuh"

constexpr int COLUMNS = 128; // of the sums in a tile
constexpr int DEPTH = 64;    // of a step along the contraction
constexpr int CONSUMERS = 2; // warpgroups that have sums: 64 columns each
// What a warpgroup writes at a time: 32 tokens of its 64 columns; PITCH: lanes fall into different banks.
constexpr int SLAB = 32, PITCH = 64 + 4, SLAB_BYTES = SLAB * PITCH * 4;
// Sums that a cluster shares: all tokens of a tile by its columns.
constexpr int SHARED_PITCH = COLUMNS + 4;

// Row g of a warp's sums of an input gradient is this column of the warpgroup's 64, row g + 8 is the next one.
__device__ __forceinline__ u32 backward_column(u32 warp, u32 g) { return warp / 2 * 32 + g * 4 + warp % 2 * 2; }

// Leaves the sums of 32 tokens, `x` of a warpgroup's eights of them, as rows of columns in shared memory.
template <bool FORWARD, int PITCH> __device__ __forceinline__ void leave_sums(const float* x, u32 rows) {
    const u32 warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP, g = lane / 4;
#pragma unroll
    for (int j = 0; j < SLAB / 8; j++, x += 4) {
        const u32 row = rows + (8 * j + lane % 4 * 2) * PITCH * 4;
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

// Eight elements of T in four registers.
template <typename T> __device__ __forceinline__ uint4 load_eight(const void* from, u64 at) {
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(from) + at);
}
template <typename T> __device__ __forceinline__ void store_eight(void* to, u64 at, const float (&x)[8]) {
    const uint4 v = make_uint4(pair<T>(x[0], x[1]), pair<T>(x[2], x[3]), pair<T>(x[4], x[5]), pair<T>(x[6], x[7]));
    *reinterpret_cast<uint4*>(static_cast<T*>(to) + at) = v;
}
template <typename T> __device__ __forceinline__ void widen(float (&to)[8], uint4 v) {
    const Pack<T>& pack = reinterpret_cast<const Pack<T>&>(v);
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = wide(pack.at[i]);
}

// Scales the sums, adds `in` and rounds once.
template <typename O> struct Plain {
    static constexpr int SIZE = Pack<O>::SIZE, PARTS = 8 / SIZE;
    static constexpr bool AHEAD = sizeof(O) == 2; // for more there are no registers
    void* out;      // [tokens, n]
    const void* in; // the same, or null; may be `out`
    u32 n;
    float scale;

    struct Ahead {
        uint4 added[PARTS]; // packed, so that an element takes no register of its own
    };
    __device__ __forceinline__ void load(Ahead& ahead, u64 at) const {
        if (!in) return;
#pragma unroll
        for (int part = 0; part < PARTS; part++) ahead.added[part] = load_eight<O>(in, at + part * SIZE);
    }
    __device__ __forceinline__ void finish(const Ahead& ahead, const float (&x)[8], u64 at) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            Pack<O> y = reinterpret_cast<const Pack<O>&>(ahead.added[part]);
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                y.at[i] = narrow<O>(x[part * SIZE + i] * scale + (in ? wide(y.at[i]) : 0.0f));
            }
            store_pack(static_cast<O*>(out) + at + part * SIZE, y);
        }
    }
};

// The sums are the gradient of SwiGLU's output: gate and up [tokens, n] become their gradients, and the output is made again.
template <typename T> struct Differentiate {
    static constexpr bool AHEAD = true;
    const void *gate, *up;
    void *of_gate, *of_up, *out; // the former may be `gate` and `up`
    u32 n;

    struct Ahead {
        uint4 gate, up;
    };
    __device__ __forceinline__ void load(Ahead& ahead, u64 at) const {
        ahead.gate = load_eight<T>(gate, at);
        ahead.up = load_eight<T>(up, at);
    }
    __device__ __forceinline__ void finish(const Ahead& ahead, const float (&x)[8], u64 at) const {
        float gates[8], ups[8], grads[8];
        widen<T>(gates, ahead.gate);
        widen<T>(ups, ahead.up);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            grads[i] = wide(narrow<T>(x[i])); // as the gradient would have been written
            differentiate<T>(gates[i], ups[i], grads[i]);
        }
        store_eight<T>(of_gate, at, gates);
        store_eight<T>(of_up, at, ups);
        store_eight<T>(out, at, grads);
    }
};

__device__ __forceinline__ void load_eight_sums(float (&x)[8], u32 from) {
    const float4 a = load_float4(from), b = load_float4(from + 16);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// Writes the sums of a warpgroup by way of its slab. `column0` is of its 64 columns.
template <bool FORWARD, int TOKENS, typename Finish>
__device__ __forceinline__ void write_sums(const Finish& finish, const float (&sums)[TOKENS / 2], u32 slab, int barrier,
                                           u32 tokens, u32 token0, u32 column0) {
    const u32 t = threadIdx.x % 128;
    const u32 token = token0 + t / 4, column = column0 + t % 4 * 8; // and 32 columns further; SLAB tokens further in the next
    const u32 from = slab + (t / 4 * PITCH + t % 4 * 8) * 4;
    u64 at = (u64)token * finish.n + column;
    u32 left = token < tokens ? tokens - token : 0;
    const bool inside[2] = {column < finish.n, column + 32 < finish.n};
    typename Finish::Ahead ahead[2];
    auto load = [&] {
#pragma unroll
        for (int part = 0; part < 2; part++)
            if (left > 0 && inside[part]) finish.load(ahead[part], at + part * 32);
    };
    if (Finish::AHEAD) load();
#pragma unroll
    for (int s = 0; s < TOKENS / SLAB; s++) {
        meet<128>(barrier); // the last slab has been read
        leave_sums<FORWARD, PITCH>(sums + s * SLAB / 2, slab);
        meet<128>(barrier);
        if (!Finish::AHEAD) load();
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float x[8];
            load_eight_sums(x, from + part * 128);
            if (left > 0 && inside[part]) finish.finish(ahead[part], x, at + part * 32);
        }
        at += (u64)SLAB * finish.n;
        left -= min(left, (u32)SLAB);
        if (Finish::AHEAD && s + 1 < TOKENS / SLAB) load();
    }
}

// Adds up what the blocks of a cluster have of the tile, each its part of the tokens, and writes it.
template <int TOKENS, typename Finish>
__device__ __forceinline__ void add_up_sums(const Finish& finish, u32 all, u32 tokens, u32 token0, u32 column0) {
    const u32 blocks = cluster_size(), own = TOKENS / blocks, from = cluster_rank() * own;
    for (u32 i = threadIdx.x - 128; i < own * (COLUMNS / 8); i += 128 * CONSUMERS) {
        const u32 token = from + i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
        if (token0 + token >= tokens || column0 + column >= finish.n) continue;
        const u64 at = (u64)(token0 + token) * finish.n + column0 + column;
        typename Finish::Ahead ahead;
        finish.load(ahead, at);
        float x[8] = {};
        for (u32 block = 0; block < blocks; block++) {
            const u32 there = in_block(all + (token * SHARED_PITCH + column) * 4, block);
            const float4 a = load_float4_there(there), b = load_float4_there(there + 16);
            x[0] += a.x, x[1] += a.y, x[2] += a.z, x[3] += a.w, x[4] += b.x, x[5] += b.y, x[6] += b.z, x[7] += b.w;
        }
        finish.finish(ahead, x, at);
    }
}

// Of a product: sums, residual, and the type of the result.
template <typename T> struct ToRows {
    u32 tokens, n;
    void* out;
    const void* in;
    float scale;
    bool full; // of f32

    template <bool FORWARD, int TOKENS>
    __device__ __forceinline__ void write(const float (&sums)[TOKENS / 2], u32 slabs, u32 consumer, u32 token0, u32 column0) const {
        const u32 slab = slabs + consumer * SLAB_BYTES, column = column0 + consumer * 64;
        if (full) write_sums<FORWARD, TOKENS>(Plain<float>{out, in, n, scale}, sums, slab, 1 + consumer, tokens, token0, column);
        else write_sums<FORWARD, TOKENS>(Plain<T>{out, in, n, scale}, sums, slab, 1 + consumer, tokens, token0, column);
    }
    template <int TOKENS> __device__ __forceinline__ void add_up(u32 all, u32 token0, u32 column0) const {
        if (full) add_up_sums<TOKENS>(Plain<float>{out, in, n, scale}, all, tokens, token0, column0);
        else add_up_sums<TOKENS>(Plain<T>{out, in, n, scale}, all, tokens, token0, column0);
    }
};

// Of the gradient of SwiGLU's output.
template <typename T> struct ToGradients {
    u32 tokens, n;
    Differentiate<T> finish;

    template <bool FORWARD, int TOKENS>
    __device__ __forceinline__ void write(const float (&sums)[TOKENS / 2], u32 slabs, u32 consumer, u32 token0, u32 column0) const {
        write_sums<FORWARD, TOKENS>(finish, sums, slabs + consumer * SLAB_BYTES, 1 + consumer, tokens, token0, column0 + consumer * 64);
    }
    template <int TOKENS> __device__ __forceinline__ void add_up(u32 all, u32 token0, u32 column0) const {
        add_up_sums<TOKENS>(finish, all, tokens, token0, column0);
    }
};

// Of gate and up, which the warpgroups have 64 columns of each: SwiGLU of them, and themselves where they are kept.
template <typename T> struct Gated {
    u32 tokens, n;
    void *gate, *up, *out; // [tokens, n]; the former may be null

    __device__ __forceinline__ void finish(float (&gates)[8], float (&ups)[8], u64 at) const {
        if (gate) store_eight<T>(gate, at, gates);
        if (up) store_eight<T>(up, at, ups);
#pragma unroll
        for (int i = 0; i < 8; i++) gates[i] = gated<T>(wide(narrow<T>(gates[i])), wide(narrow<T>(ups[i])));
        store_eight<T>(out, at, gates);
    }
    template <bool FORWARD, int TOKENS>
    __device__ __forceinline__ void write(const float (&sums)[TOKENS / 2], u32 slabs, u32 consumer, u32 token0, u32 column0) const {
        const u32 t = threadIdx.x - 128, column = column0 + t % 8 * 8;
        const u32 from = slabs + (t / 8 * PITCH + t % 8 * 8) * 4;
#pragma unroll
        for (int s = 0; s < TOKENS / SLAB; s++) {
            meet<128 * CONSUMERS>(1); // the last slabs have been read
            leave_sums<FORWARD, PITCH>(sums + s * SLAB / 2, slabs + consumer * SLAB_BYTES);
            meet<128 * CONSUMERS>(1);
            const u32 token = token0 + s * SLAB + t / 8;
            if (token >= tokens || column >= n) continue;
            float gates[8], ups[8];
            load_eight_sums(gates, from);
            load_eight_sums(ups, from + SLAB_BYTES);
            finish(gates, ups, (u64)token * n + column);
        }
    }
    template <int TOKENS> __device__ __forceinline__ void add_up(u32 all, u32 token0, u32 column0) const {
        const u32 blocks = cluster_size(), own = TOKENS / blocks, from = cluster_rank() * own;
        for (u32 i = threadIdx.x - 128; i < own * 8; i += 128 * CONSUMERS) {
            const u32 token = from + i / 8, column = i % 8 * 8;
            if (token0 + token >= tokens || column0 + column >= n) continue;
            float x[2][8] = {};
            for (u32 block = 0; block < blocks; block++) {
#pragma unroll
                for (int w = 0; w < 2; w++) {
                    const u32 there = in_block(all + (token * SHARED_PITCH + w * 64 + column) * 4, block);
                    const float4 a = load_float4_there(there), b = load_float4_there(there + 16);
                    x[w][0] += a.x, x[w][1] += a.y, x[w][2] += a.z, x[w][3] += a.w;
                    x[w][4] += b.x, x[w][5] += b.y, x[w][6] += b.z, x[w][7] += b.w;
                }
            }
            finish(x[0], x[1], (u64)(token0 + token) * n + column0 + column);
        }
    }
};
