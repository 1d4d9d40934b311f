// Products of at most 16 tokens with 4-bit weights: arguments, tiles, and what is added to their sums and becomes of them.
//
// A tile is two times 8 rows of weights, those that belong together: rows i and i + half of a head, which rotary turns, or the
// same row of gate and up, or 16 neighbours.
#pragma once
#include "codes.cuh"
#include "decoding/token.cuh"
#include "linear/loads.cuh"
#include "linear/ptx.cuh"

// A weight [n, k] of codes in blocks of 64, whose scales are 8-bit codes in blocks of 256; and its adapters: B [n, rank] of
// T, whose factors are columns from `column` on of t; gains f32 [adapters, n] or null.
struct Part {
    const u8 *codes, *absmax;
    const float *nested, *map, *offset;
    const void* b;
    const float* gains;
    u32 n, rank, column, unused;
};

struct Product {
    Part parts[3];
    const void *x, *t;    // [tokens, k], [tokens, columns]
    const Token* tokens_at;
    const void* residual; // like y; null where there is none
    void* y;
    void *keys, *values;  // the cache, [capacity, width of a row]
    const float *cos, *sin;
    u32 k, tokens, columns, half, length, tiles, quant_type, unused;
};

// PLAIN: y = x·Wᵀ + t·Bᵀ + residual. TURN: parts are q, k, v; q to y and k to the cache after rotary, v to the cache.
// GATE: parts are gate and up; y = silu(gate)·up.
enum Kind { PLAIN, TURN, GATE };

// Two times eight rows.
struct Tile {
    u32 part[2], row[2];
};
template <Kind KIND> __device__ __forceinline__ Tile locate(const Product& p, u32 tile) {
    if constexpr (KIND == PLAIN) return {{0, 0}, {16 * tile, 16 * tile + 8}};
    if constexpr (KIND == GATE) return {{0, 1}, {8 * tile, 8 * tile}};
    u32 part = 0;
    while (part < 2 && tile >= p.parts[part].n / 16) tile -= p.parts[part++].n / 16;
    if (part == 2) return {{2, 2}, {16 * tile, 16 * tile + 8}};
    u32 of_head = p.half / 8, row = tile / of_head * 2 * p.half + tile % of_head * 8;
    return {{part, part}, {row, row + p.half}};
}

// Fills a table of two values for each byte of codes, as T in one register, 32 times over: lane l reads bank l, whatever its byte.
// Rows are PITCH bytes apart.
template <typename T, int PITCH> __device__ __forceinline__ void fill_table(u32 table, u32 quant_type) {
    const int lane = threadIdx.x % WARP;
    // A warp writes 32 rows: lane l knows the pair of the l-th, rows go out four at a time, 16 bytes a lane.
    for (u32 first = threadIdx.x / WARP * 32; first < 256; first += blockDim.x) {
        u32 byte = first + lane;
        u32 mine = pair<T>(CODE_VALUES[quant_type][byte >> 4], CODE_VALUES[quant_type][byte & 15]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int of = 4 * j + lane / 8;
            u32 v = __shfl_sync(~0u, mine, of);
            store16(table + (first + of) * PITCH + lane % 8 * 16, v, v, v, v);
        }
    }
}

// sum += scale · group, where rows of the upper half have one scale and those of the lower another.
template <int NT>
__device__ __forceinline__ void add_scaled(float (&sum)[NT][4], const float (&group)[NT][4], float top_scale, float low_scale) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
        sum[n][0] = fmaf(top_scale, group[n][0], sum[n][0]);
        sum[n][1] = fmaf(top_scale, group[n][1], sum[n][1]);
        sum[n][2] = fmaf(low_scale, group[n][2], sum[n][2]);
        sum[n][3] = fmaf(low_scale, group[n][3], sum[n][3]);
    }
}

// sum += t · Bᵀ of the tile, for the tokens from `first` on: of the rank in steps of 16, every `sharers`-th from `which` on, which is a warp's; what BATCH steps
// read is on its way at once. The halves of a tile may be of two adapters with factors of their own.
template <typename T, int NT, Kind KIND, int BATCH>
__device__ __forceinline__ void add_branch(const Product& p, const Tile& at, u32 first, u32 which, u32 sharers, float (&sum)[NT][4]) {
    constexpr int OWN = KIND == GATE ? 2 : 1; // factors
    const u32 lane = threadIdx.x % WARP, g = lane / 4, i = lane % 4;
    const Part* const parts[2] = {&p.parts[at.part[0]], &p.parts[at.part[1]]};
#pragma unroll 1
    for (u32 r0 = which * 16; r0 < max(parts[0]->rank, parts[1]->rank); r0 += sharers * 16 * BATCH) {
        u32 b[BATCH][2][2], t[BATCH][OWN][NT][2];
#pragma unroll
        for (int s = 0; s < BATCH; s++) {
            const u32 r = r0 + s * sharers * 16 + 2 * i;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const Part& part = *parts[h];
                const bool low = r < part.rank, high = r + 8 < part.rank, there = at.row[h] + g < part.n;
                const T* from = (const T*)part.b + (u64)(at.row[h] + g) * part.rank + r;
                b[s][h][0] = load_cached4(from, low && there), b[s][h][1] = load_cached4(from + 8, high && there);
                if (h >= OWN) continue;
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const T* factor = (const T*)p.t + (u64)(first + 8 * n + g) * p.columns + part.column + r;
                    const bool token = first + 8 * n + g < p.tokens;
                    t[s][h][n][0] = load_now4(factor, token && low), t[s][h][n][1] = load_now4(factor + 8, token && high);
                }
            }
        }
#pragma unroll
        for (int s = 0; s < BATCH; s++) {
            const u32 both[4] = {b[s][0][0], b[s][1][0], b[s][0][1], b[s][1][1]};
            const u32 top[4] = {b[s][0][0], 0, b[s][0][1], 0}, low[4] = {0, b[s][1][0], 0, b[s][1][1]};
#pragma unroll
            for (int n = 0; n < NT; n++) {
                multiply<T>(sum[n], OWN == 2 ? top : both, t[s][0][n][0], t[s][0][n][1]);
                if (OWN == 2) multiply<T>(sum[n], low, t[s][OWN - 1][n][0], t[s][OWN - 1][n][1]);
            }
        }
    }
}

// Two elements of a tile and a token to where they go.
template <typename T, Kind KIND>
__device__ __forceinline__ void finish(const Product& p, const Tile& at, u32 line, u32 token, float a, float b) {
    const Part &pa = p.parts[at.part[0]], &pb = p.parts[at.part[1]];
    const u32 row[2] = {at.row[0] + line, at.row[1] + line};
    if (row[0] >= pa.n) return;
    if (pa.gains || pb.gains) {
        const int owner = p.tokens_at[token].owner;
        if (owner >= 0 && pa.gains) a *= pa.gains[(u64)owner * pa.n + row[0]];
        if (owner >= 0 && pb.gains && row[1] < pb.n) b *= pb.gains[(u64)owner * pb.n + row[1]];
    }
    T* y = (T*)p.y;
    if constexpr (KIND == GATE) {
        // As the two products and SwiGLU after one another: gate and up are rounded before.
        float gate = wide(narrow<T>(a)), up = wide(narrow<T>(b));
        y[(u64)token * pa.n + row[0]] = narrow<T>(__fdividef(gate, 1.0f + __expf(fminf(-gate, 87.0f))) * up);
    } else if constexpr (KIND == PLAIN) {
        const T* residual = (const T*)p.residual;
        u64 to = (u64)token * pa.n + row[0];
        y[to] = narrow<T>(residual ? a + wide(residual[to]) : a);
        if (row[1] < pa.n) y[to + 8] = narrow<T>(residual ? b + wide(residual[to + 8]) : b);
    } else {
        const Token who = p.tokens_at[token];
        u64 cache_row = (u64)(who.first + who.position);
        if (at.part[0] == 2) {
            T* values = (T*)p.values + cache_row * pa.n;
            values[row[0]] = narrow<T>(a), values[row[1]] = narrow<T>(b);
            return;
        }
        u32 angle = min((u32)max(who.position, 0), p.length - 1) * p.half + row[0] % p.half;
        float c = p.cos[angle], s = p.sin[angle];
        a = wide(narrow<T>(a)), b = wide(narrow<T>(b));
        T* to = at.part[0] == 0 ? y + (u64)token * pa.n : (T*)p.keys + cache_row * pa.n;
        to[row[0]] = narrow<T>(a * c - b * s), to[row[1]] = narrow<T>(b * c + a * s);
    }
}
