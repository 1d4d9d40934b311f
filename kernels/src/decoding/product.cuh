// Products of at most 16 tokens with 4-bit weights, and what follows them in a layer, in one launch (mod.rs has the
// contracts). Bound by the bytes of the codes, which are read once.
//
// As in linear/decode.cu the rows of a weight are rows of mma fragments and the tokens columns, padded to 8 or 16, and the
// inner index is shared out over the 8 warps of a block. A tile is two times 8 rows, those that belong together: rows i
// and i + half of a head, which rotary turns, or the same row of gate and up, or 16 neighbours. Its sums stay in the
// block until the layer's next step over single elements is done too.
#pragma once
#include "codes.cuh"
#include "decoding/dependent.cuh"
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

constexpr int WARPS = 8, TEAM = WARPS * WARP, TEAMS = 2, GROUPS = 4, CHUNK = 64 * GROUPS;

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

// What a warp reads of 256 of the inner index. The four lanes of a row read 64 bytes of it together, 16 each: two lanes have
// 64 codes, the other two the next 64. Lane i fetches the scale of the i-th 64.
struct Chunk {
    uint4 codes[GROUPS / 2][2];
    u32 absmax[2];
    float nested[2];

    // Codes of groups 2v and 2v + 1 in row h, 16 a lane: the lanes of one give those of the other half of what they have.
    __device__ __forceinline__ void exchange(int v, int h, uint2 (&groups)[2]) const {
        const bool upper = threadIdx.x & 2;
        const uint2 low = make_uint2(codes[v][h].x, codes[v][h].y), high = make_uint2(codes[v][h].z, codes[v][h].w);
        uint2 other = upper ? low : high;
        other = make_uint2(__shfl_xor_sync(~0u, other.x, 2), __shfl_xor_sync(~0u, other.y, 2));
        groups[0] = upper ? other : low, groups[1] = upper ? high : other;
    }
    // Which of a group's 64 the lane has, then: the first of 16.
    static __device__ __forceinline__ u32 place() { return threadIdx.x % 2 * 32 + threadIdx.x / 2 % 2 * 16; }
};

// Where a lane reads next of its two rows. Rows beyond the last are read as the last, and not stored.
struct Lines {
    const u8* codes[2];
    u32 block[2]; // of 64 codes; the host keeps n · k below 2^32
    u32 part;

    template <Kind KIND> __device__ __forceinline__ void start(const Product& p, u32 tile, u32 k0) {
        const Tile at = locate<KIND>(p, min(tile, p.tiles - 1));
        part = at.part[0];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const Part& of = p.parts[at.part[h]];
            u32 first = min(at.row[h] + threadIdx.x % WARP / 4, of.n - 1) * p.k + k0;
            codes[h] = of.codes + (first / 2 + threadIdx.x % 4 * 16);
            block[h] = first / 64 + threadIdx.x % 4;
        }
    }
    // The part of row h: where the kind says it, known to the compiler.
    template <Kind KIND> __device__ __forceinline__ u32 of(int h) const {
        return KIND == PLAIN ? 0 : KIND == GATE ? h : part;
    }
    // Loads `groups` times 64 of the inner index and goes on to what the warp has next of these rows.
    template <Kind KIND> __device__ __forceinline__ Chunk load(const Product& p, u32 groups) {
        Chunk chunk;
#pragma unroll
        for (int u = 0; u < GROUPS; u += 2) {
            bool there = u + threadIdx.x / 2 % 2 < groups;
#pragma unroll
            for (int h = 0; h < 2; h++) chunk.codes[u / 2][h] = load_once(codes[h] + 32 * u, there);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const Part& from = p.parts[of<KIND>(h)];
            u32 number = threadIdx.x % 4 < groups ? block[h] : 0;
            chunk.absmax[h] = __ldg(from.absmax + number);
            chunk.nested[h] = __ldg(from.nested + number / 256);
            codes[h] += WARPS * CHUNK / 2, block[h] += WARPS * CHUNK / 64;
        }
        return chunk;
    }
};

// Two values for each byte of codes, as T in one register, 32 times over: lane l reads bank l, whatever its byte. Rows
// are 256 bytes apart, so that a byte permute makes an offset of a byte; half of each is not used.
extern __shared__ __align__(1024) unsigned char dynamic_shared[];
template <typename T> __device__ __forceinline__ void fill_table(u32 quant_type) {
    const int lane = threadIdx.x % WARP;
    // A warp writes 32 rows: lane l knows the pair of the l-th, rows go out four at a time, 16 bytes a lane.
    for (u32 first = threadIdx.x / WARP * 32; first < 256; first += blockDim.x) {
        u32 byte = first + lane;
        u32 mine = pair<T>(CODE_VALUES[quant_type][byte >> 4], CODE_VALUES[quant_type][byte & 15]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int of = 4 * j + lane / 8;
            u32 v = __shfl_sync(~0u, mine, of);
            store16(shared_address(dynamic_shared) + (first + of) * 256 + lane % 8 * 16, v, v, v, v);
        }
    }
}
// The values of byte `at` of `codes`. `bank`: the table's address and 4 · lane.
__device__ __forceinline__ u32 look_up(u32 codes, int at, u32 bank) {
    u32 value;
    asm("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(bank + __byte_perm(codes, 0, 0x4404 | at << 4)));
    return value;
}

// sum += the products of a chunk, of which `groups` times 64 are there: all of them if WHOLE.
template <typename T, int NT, bool WHOLE>
__device__ __forceinline__ void consume(const Chunk& chunk, const float (&scale)[2], const T* const (&x)[NT], u32 tokens,
                                        u32 groups, u32 bank, float (&sum)[NT][4]) {
    const int lane = threadIdx.x % WARP;
    uint2 upper[2], lower[2];
#pragma unroll
    for (int u = 0; u < GROUPS; u++) {
        if (!WHOLE && u >= groups) break;
        if (u % 2 == 0) chunk.exchange(u / 2, 0, upper), chunk.exchange(u / 2, 1, lower);
        uint4 b[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const bool there = 8 * n + lane / 4 < tokens;
            b[n][0] = load_now(x[n] + 64 * u, there), b[n][1] = load_now(x[n] + 64 * u + 8, there);
        }
        float group[NT][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) {
            // Codes 4s..4s + 4 of the lane's 16: bytes 2s and 2s + 1.
            u32 top = s < 2 ? upper[u % 2].x : upper[u % 2].y, low = s < 2 ? lower[u % 2].x : lower[u % 2].y;
            const int byte = s % 2 * 2;
            const u32 a[4] = {look_up(top, byte, bank), look_up(low, byte, bank), look_up(top, byte + 1, bank),
                              look_up(low, byte + 1, bank)};
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint4& v = b[n][s / 2];
                multiply<T>(group[n], a, s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
            }
        }
        float top_scale = __shfl_sync(~0u, scale[0], lane / 4 * 4 + u);
        float low_scale = __shfl_sync(~0u, scale[1], lane / 4 * 4 + u);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            sum[n][0] = fmaf(top_scale, group[n][0], sum[n][0]);
            sum[n][1] = fmaf(top_scale, group[n][1], sum[n][1]);
            sum[n][2] = fmaf(low_scale, group[n][2], sum[n][2]);
            sum[n][3] = fmaf(low_scale, group[n][3], sum[n][3]);
        }
    }
}

// Waits for the other warps of a team, which has barrier 1 + team.
__device__ __forceinline__ void join(u32 team) { asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(TEAM) : "memory"); }

// sum += t · Bᵀ of the tile: the rank in steps of 16, shared out over the warps. The halves of a tile may be of two
// adapters with factors of their own.
template <typename T, int NT>
__device__ __forceinline__ void add_branch(const Product& p, const Tile& at, float (&sum)[NT][4]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS, g = lane / 4, i = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const Part& part = p.parts[at.part[h]];
        u32 row = at.row[h] + g;
        for (u32 r0 = warp * 16; r0 < part.rank; r0 += WARPS * 16) {
            const T* b = (const T*)part.b + (u64)row * part.rank + r0 + 2 * i;
            bool low = r0 + 2 * i < part.rank, high = r0 + 2 * i + 8 < part.rank;
            u32 b0 = load_cached4(b, low && row < part.n), b1 = load_cached4(b + 8, high && row < part.n);
            u32 a[4] = {h ? 0 : b0, h ? b0 : 0, h ? 0 : b1, h ? b1 : 0};
#pragma unroll
            for (int n = 0; n < NT; n++) {
                u32 token = 8 * n + g;
                const T* t = (const T*)p.t + (u64)token * p.columns + part.column + r0 + 2 * i;
                bool there = token < p.tokens;
                u32 t0 = there && low ? *(const u32*)t : 0, t1 = there && high ? *(const u32*)(t + 8) : 0;
                multiply<T>(sum[n], a, t0, t1);
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

// A block has TEAMS teams of 8 warps, each with tiles of its own; one block fills a multiprocessor.
template <typename T, int NT, Kind KIND> __device__ __forceinline__ void product(const Product& p) {
    __shared__ float maps[3][256], offsets[3];
    __shared__ float4 sums[TEAMS][WARPS][NT][WARP];
    const u32 team = threadIdx.x / TEAM, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS;
    const u32 k0 = warp * CHUNK, step = TEAMS * gridDim.x;
    // The warp has `mine` chunks of a row, the last of `rest` times 64.
    const u32 mine = p.k > k0 ? (p.k - k0 + WARPS * CHUNK - 1) / (WARPS * CHUNK) : 0;
    const u32 rest = mine > 0 ? min((p.k - k0 - (mine - 1) * WARPS * CHUNK) / 64, (u32)GROUPS) : 0;
    u32 tile = blockIdx.x + team * gridDim.x;
    // Times 64 of a tile's first chunk.
    auto first = [&](u32 tile) { return tile >= p.tiles ? 0 : mine > 1 ? GROUPS : rest; };
    Lines lines;
    lines.start<KIND>(p, tile, k0);
    Chunk next = lines.load<KIND>(p, first(tile));
    fill_table<T>(p.quant_type);
#pragma unroll
    for (int part = 0; part < (KIND == PLAIN ? 1 : KIND == TURN ? 3 : 2); part++) {
        if (threadIdx.x < 256) maps[part][threadIdx.x] = p.parts[part].map[threadIdx.x];
        if (threadIdx.x == 0) offsets[part] = *p.parts[part].offset;
    }
    wait_before();
    __syncthreads();
    // Made behind the barrier, so that no look-up can come before it.
    u32 bank;
    asm volatile("mov.u32 %0, %1;" : "=r"(bank) : "r"(shared_address(dynamic_shared) + 4 * lane) : "memory");

    auto scales = [&](const Chunk& chunk, float (&scale)[2]) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 part = lines.of<KIND>(h);
            // Two roundings, as the reference: no fused multiply-add.
            scale[h] = __fadd_rn(__fmul_rn(maps[part][chunk.absmax[h]], chunk.nested[h]), offsets[part]);
        }
    };
    for (; tile < p.tiles; tile += step) {
        const Tile at = locate<KIND>(p, tile);
        float sum[NT][4] = {}, scale[2];
        add_branch<T, NT>(p, at, sum);
        // Columns beyond the last token are zeros.
        const T* x[NT];
#pragma unroll
        for (int n = 0; n < NT; n++)
            x[n] = (const T*)p.x + (u64)(8 * n + lane / 4) * p.k + k0 + Chunk::place();
#pragma unroll 1
        for (u32 left = mine; left > 1; left--) {
            const Chunk now = next;
            scales(now, scale);
            next = lines.load<KIND>(p, left > 2 ? GROUPS : rest);
            consume<T, NT, true>(now, scale, x, p.tokens, GROUPS, bank, sum);
#pragma unroll
            for (int n = 0; n < NT; n++) x[n] += WARPS * CHUNK;
        }
        // The last of these rows, while the first of the next tile's are on their way.
        const Chunk now = next;
        scales(now, scale);
        lines.start<KIND>(p, tile + step, k0);
        next = lines.load<KIND>(p, first(tile + step));
        consume<T, NT, false>(now, scale, x, p.tokens, rest, bank, sum);

        join(team); // the last tile's sums have been read
#pragma unroll
        for (int n = 0; n < NT; n++)
            sums[team][warp][n][lane] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
        join(team);
        // A thread for two elements: 8 lines, then tokens.
        for (u32 e = threadIdx.x % TEAM; e < 8 * p.tokens; e += TEAM) {
            u32 line = e % 8, token = e / 8, holder = line * 4 + token % 8 / 2, odd = token % 2;
            float total[2] = {};
#pragma unroll
            for (int from = 0; from < WARPS; from++) {
                const float* part = reinterpret_cast<const float*>(&sums[team][from][token / 8][holder]);
                total[0] += part[odd], total[1] += part[2 + odd];
            }
            finish<T, KIND>(p, at, line, token, total[0], total[1]);
        }
    }
}
