// Products of at most 16 tokens with 4-bit weights, and what follows them in a layer, in one launch (mod.rs has the
// contracts). Bound by the bytes of the codes, which are read once.
//
// As in linear/decode.cu the rows of a weight are rows of mma fragments and the tokens columns, padded to 8 or 16, and the
// inner index is shared out over the 8 warps of a block. Its sums stay in the block until the layer's next step over single
// elements is done too.
#pragma once
#include "dependent.cuh"
#include "decoding/tile.cuh"

constexpr int WARPS = 8, TEAM = WARPS * WARP, TEAMS = 2, GROUPS = 4, CHUNK = 64 * GROUPS;

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

// Rows of the table are 256 bytes apart, so that a byte permute makes an offset of a byte; half of each is not used.
extern __shared__ __align__(1024) unsigned char dynamic_shared[];
constexpr int TABLE_PITCH = 256;
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
        add_scaled(sum, group, top_scale, low_scale);
    }
}

// Waits for the other warps of a team, which has barrier 1 + team.
__device__ __forceinline__ void join(u32 team) { asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(TEAM) : "memory"); }

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
    fill_table<T, TABLE_PITCH>(shared_address(dynamic_shared), p.quant_type);
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
        add_branch<T, NT, KIND, 1>(p, at, 0, warp, WARPS, sum);
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
