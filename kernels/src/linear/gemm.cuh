// Large matrix products with 16-bit operands on tensor cores: `out [M, N] = scale * (a · b + a2 · b2) + in`.
//
// | direction | a [M, K] | b | second pair |
// |---|---|---|---|
// | forward | x [T, K] | Wᵀ, W [N, K] | t [T, r], Bᵀ of B [N, r] |
// | input gradient | g [T, N] | W [N, K] | u [T, r], A [r, K] |
//
// (M, N and K below are those of the product: rows, columns, contraction.) W is dense or in 4 bits (decode4.cuh). The
// second pair is a LoRA adapter: a few more steps into the same accumulators instead of one more pass over `out`.
//
// Method. A block computes a tile of `out`; each warp 64 x 64 of it (32 x 64 in the smallest tile), as m16n8k16
// products. Tiles of 64 along K pass through rings in shared memory: cp.async brings them, `stages - 1` ahead, and
// ldmatrix reads them (transposed for the input gradient's W). Rows of a tile are split into 16-byte chunks; chunk c of
// row i lies at place c ^ (i % 8), so that eight rows of one chunk, which is what ldmatrix and the decoder's stores
// touch at once, fall into all banks once. 4-bit weights come two tiles ahead into registers, are decoded one tile
// ahead between the products of the present one, and have a ring of two. Tiles of `out` are visited in strips of 2048
// rows, so that the blocks that run together share rows of `a` and columns of `b` in the second-level cache.
//
// | tile | threads | accumulators | fragments (a, b) | shared memory a stage: a, b | where |
// |---|---|---|---|---|---|
// | 256 x 128 | 256 | 128 registers | 16, 32 | 32 KiB, 16 KiB; 4 stages (192 KiB), 2 fit 99 KiB | many rows |
// | 128 x 128 | 128, two blocks an SM | 128 | 16, 32 | 16 KiB, 16 KiB; 3 stages | when it fills the SMs better |
// | 64 x 128 | 128, two blocks an SM | 64 | 8, 32 | 8 KiB, 16 KiB; 4 stages | few rows |
//
// A fragment of `a` is loaded again as soon as its eight products are issued, one of `b` into the other of two sets.
// The decoder adds 12 registers of raw codes and scales (24 where a thread has two units), 8 of tables and 6 of weights
// in the making.
// Bound by the tensor cores; ldmatrix takes about 60 % of the bandwidth of shared memory meanwhile.
//
// Wants: rows of 16-bit operands that are multiples of 8 elements (second pair: any r), of 4-bit ones of 32; 16-byte
// aligned pointers. Everything else goes to gemm_general.cuh.
#pragma once
#include "linear/decode4.cuh"

constexpr int DEPTH = 64;     // of a tile along K
constexpr int STRIP = 2048;   // rows of `out` that are visited together
constexpr int STEPS = DEPTH / 16;

// A product; see the table above.
struct Problem {
    void* out;      // [M, N]
    const void* in; // [M, N] in the type of out, or null; may be `out`
    const void* a;
    const void* b;    // W, dense or packed codes
    Scales scales;    // of a 4-bit W
    const float* map; // [256], of a doubly quantized W
    u32 book;         // code book of a 4-bit W: row of CODE_VALUES
    const void* a2;
    const void* b2;
    u32 m, n, k, rank; // rank: of the second pair, 0 without
    float scale;
    bool wide; // out is f32
    int stages;
};

// Calls `f` with 0, 1, .. N - 1 as constants: a loop that is unrolled before registers are assigned to arrays.
template <int I> struct Index {
    static constexpr int value = I;
};
template <int N, int I = 0, typename F> __device__ __forceinline__ void repeat(F&& f) {
    if constexpr (I < N) {
        f(Index<I>());
        repeat<N, I + 1>(f);
    }
}

// Adds `in` to 16 rows of WN sums of a warp, rounds once and writes them. `whole`: rows of `out` are multiples of 8.
template <int WN, typename O>
__device__ __forceinline__ void write_rows(O* out, const O* in, const float* rows, u32 row0, u32 column0,
                                           const Problem& p, bool whole) {
    constexpr int PITCH = WN + 8, LANES = WN / 8, PASS = WARP / LANES; // lanes of a row, rows at a time
    const int lane = threadIdx.x % WARP;
    if (!whole) {
        for (int i = lane; i < 16 * WN; i += WARP) {
            u32 row = row0 + i / WN, column = column0 + i % WN;
            if (row >= p.m || column >= p.n) continue;
            u64 at = (u64)row * p.n + column;
            out[at] = narrow<O>(rows[i / WN * PITCH + i % WN] + (in ? wide(in[at]) : 0.0f));
        }
        return;
    }
    const u32 column = column0 + lane % LANES * 8;
    if (column >= p.n) return;
#pragma unroll
    for (int r = 0; r < 16; r += PASS) {
        const int row = r + lane / LANES;
        if (row0 + row >= p.m) break;
        const float4* sums = reinterpret_cast<const float4*>(rows + row * PITCH + lane % LANES * 8);
        float4 low = sums[0], high = sums[1];
        float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const u64 at = (u64)(row0 + row) * p.n + column;
        constexpr int SIZE = Pack<O>::SIZE;
#pragma unroll
        for (int part = 0; part < 8; part += SIZE) {
            Pack<O> pack;
            if (in) {
                pack = load_pack(in + at + part);
#pragma unroll
                for (int j = 0; j < SIZE; j++) x[part + j] += wide(pack.at[j]);
            }
#pragma unroll
            for (int j = 0; j < SIZE; j++) pack.at[j] = narrow<O>(x[part + j]);
            store_pack(out + at + part, pack);
        }
    }
}

template <typename T, bool QUANT, bool FORWARD, int BM, int BN, int WARPS_M, int WARPS_N>
__device__ __forceinline__ void gemm(const Problem& p) {
    constexpr int THREADS = WARPS_M * WARPS_N * WARP;
    constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N; // of a warp
    constexpr int MI = WM / 16, NJ = WN / 16;           // fragments of 16 rows, of 16 columns
    constexpr int A_BYTES = BM * DEPTH * 2, B_BYTES = BN * DEPTH * 2;
    // 16-byte chunks in a row of b's tile, and the rows that all threads copy at once.
    constexpr int B_CHUNKS = FORWARD ? DEPTH / 8 : BN / 8, B_ROWS = FORWARD ? BN : DEPTH;
    constexpr int A_PASS = THREADS / 8, B_PASS = THREADS / B_CHUNKS;
    constexpr int A_COPIES = BM / A_PASS, B_COPIES = B_ROWS / B_PASS;
    constexpr int UNITS = BN * DEPTH / UNIT / THREADS; // a thread decodes for a tile
    constexpr int SLOTS = (STEPS - 1) * MI;            // places between products where other work is put
    static_assert(A_PASS % 8 == 0 && B_PASS % 8 == 0, "a thread's place in the swizzle must be that of every pass");
    static_assert(!QUANT || (UNITS >= 1 && UNITS <= 2), "units of the decoder");
    static_assert(WN == 64 && NJ % MI == 0, "layout of warps");

    extern __shared__ __align__(1024) u8 shared[];
    const int tid = threadIdx.x, lane = tid % WARP, warp = tid / WARP;
    const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
    const int stages = p.stages;

    // Which tile of `out`.
    u32 m0, n0;
    {
        const u32 rows = (p.m + BM - 1) / BM, columns = (p.n + BN - 1) / BN, strip = STRIP / BM;
        u32 first = blockIdx.x / (strip * columns) * strip, inside = blockIdx.x % (strip * columns);
        u32 height = min(rows - first, strip);
        m0 = (first + inside % height) * BM;
        n0 = inside / height * BN;
    }

    const u32 a_shared = shared_address(shared);
    const u32 b_shared = a_shared + stages * A_BYTES;
    float* map = reinterpret_cast<float*>(shared + stages * A_BYTES + (QUANT ? 2 : stages) * B_BYTES);
    float* values = map + 256;

    // This thread's chunk of each row of a tile, and its first row.
    const int a_chunk = tid % 8, a_row = tid / 8, b_chunk = tid % B_CHUNKS, b_row = tid / B_CHUNKS;
    const u32 a_place = a_row * (DEPTH * 2) + ((a_chunk ^ (a_row & 7)) << 4);
    const u32 b_place = b_row * (B_CHUNKS * 16) + ((b_chunk ^ (b_row & 7)) << 4);
    const int a_rows = (int)(p.m - m0) - a_row; // rows of `a` from this thread's first on

    // Copies part `i` of this thread's share of the tile of `a` whose first chunk for this thread is at `from`;
    // `left`: elements of a row from there on.
    auto copy_a = [&](int i, u32 to, const T* from, u32 stride, int left) {
        copy16(to + a_place + i * (A_PASS * DEPTH * 2), from + (u64)(i * A_PASS) * stride,
               i * A_PASS < a_rows && left > 0);
    };
    // The same for a dense `b`; `left`: what is left of the contraction from this thread's chunk or row on.
    const int b_outer = FORWARD ? (int)(p.n - n0) - b_row : (int)(p.n - n0) - b_chunk * 8;
    auto copy_b = [&](int i, u32 to, const T* from, u32 stride, int left) {
        bool inside = FORWARD ? i * B_PASS < b_outer && left > 0 : b_outer > 0 && i * B_PASS < left;
        copy16(to + b_place + i * (B_PASS * B_CHUNKS * 16), from + (u64)(i * B_PASS) * stride, inside);
    };
    const int b_first = FORWARD ? b_chunk * 8 : b_row; // this thread's first place along the contraction

    // The next tile to copy: where in memory, and what is left of K.
    const T* a_next = static_cast<const T*>(p.a) + (u64)(m0 + a_row) * p.k + a_chunk * 8;
    const T* b_next = nullptr;
    if constexpr (!QUANT)
        b_next = static_cast<const T*>(p.b) + (FORWARD ? (u64)(n0 + b_row) * p.k + b_chunk * 8
                                                       : (u64)b_row * p.n + n0 + b_chunk * 8);
    int left = p.k, write = 0; // write: its stage
    constexpr int COPIES = A_COPIES + (QUANT ? 0 : B_COPIES);
    auto copy = [&](int i) {
        if (i < A_COPIES)
            copy_a(i, a_shared + write * A_BYTES, a_next, p.k, left - a_chunk * 8);
        else
            copy_b(i - A_COPIES, b_shared + write * B_BYTES, b_next, FORWARD ? p.k : p.n, left - b_first);
    };
    auto copied = [&] {
        commit_copies();
        a_next += DEPTH;
        if constexpr (!QUANT) b_next += FORWARD ? (u64)DEPTH : (u64)DEPTH * p.n;
        left -= DEPTH;
        write = write + 1 == stages ? 0 : write + 1;
    };

    // The decoder: unit `u` of this thread is 32 weights of a row of W. Two neighbours take 32 contiguous bytes, eight
    // lanes store to all banks.
    constexpr int PER_THREAD = QUANT ? UNITS : 1;
    u64 unit_at[PER_THREAD];   // flat element in W
    u32 unit_place[PER_THREAD] = {};
    bool unit_inside[PER_THREAD];
    int unit_left = 0; // what is left of the contraction
    Raw raw[PER_THREAD], raw_next[PER_THREAD];
    Table table;
    if constexpr (QUANT) {
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            int id = tid + u * THREADS;
            u32 row = (id >> 1) % B_ROWS, group = (id & 1) | (id / (2 * B_ROWS)) << 1;
            unit_place[u] = row * (B_CHUNKS * 16) + ((group * 4 ^ (row & 7)) << 4);
            unit_inside[u] = FORWARD ? n0 + row < p.n : n0 + group * UNIT < p.n;
            unit_at[u] = FORWARD ? (u64)(n0 + row) * p.k + group * UNIT : (u64)row * p.n + n0 + group * UNIT;
            // The same for each u: a pass of all threads changes neither the low bit of `id` nor a row below 64.
            unit_left = (int)p.k - (int)(FORWARD ? group * UNIT : row);
        }
        for (int i = tid; i < 256; i += THREADS) map[i] = p.scales.nested ? p.map[i] : 0.0f;
        if (tid < 16) values[tid] = CODE_VALUES[p.book][tid];
        __syncthreads();
    }
    auto fetch_next = [&] {
#pragma unroll
        for (int u = 0; u < PER_THREAD; u++) {
            raw_next[u] = fetch(static_cast<const u8*>(p.b), p.scales, unit_at[u], unit_inside[u] && unit_left > 0);
            unit_at[u] += FORWARD ? (u64)DEPTH : (u64)DEPTH * p.n;
        }
        unit_left -= DEPTH;
    };
    auto take_next = [&] {
#pragma unroll
        for (int u = 0; u < PER_THREAD; u++) raw[u] = raw_next[u];
    };
    // Part `i` of decoding a tile into the place `to` of the ring: for each unit its scale, four parts of its table,
    // and eight times four weights. Parts are small so that they can be spread evenly between products.
    constexpr int UNIT_PARTS = 13, PARTS = QUANT ? UNITS * UNIT_PARTS : 0;
    float unit_scale = 0.0f;
    Eight eight;
    auto decode = [&](int i, u32 to) {
        const Raw& unit = raw[i / UNIT_PARTS];
        const int part = i % UNIT_PARTS;
        if (part == 0) {
            unit_scale = scale_of(p.scales, unit, map);
        } else if (part < 5) {
            table.template make<T>(part - 1, values, unit_scale);
        } else {
            const int word = (part - 5) / 2, half = (part - 5) % 2;
            const uint4& c = unit.codes;
            if (half == 0) eight.start(word == 0 ? c.x : word == 1 ? c.y : word == 2 ? c.z : c.w);
            eight.look_up(half, table);
            u32 place = (to + unit_place[i / UNIT_PARTS]) ^ (word << 4);
            if (half == 1) store16(place, eight.to[0], eight.to[1], eight.to[2], eight.to[3]);
        }
    };

    // Fragments.
    const u32 a_lane = (warp_m * WM + lane % 16) * (DEPTH * 2) + (((lane >> 4) ^ (lane & 7)) << 4);
    const u32 b_lane = FORWARD ? (warp_n * WN + lane % 8 + (lane >> 4) * 8) * (DEPTH * 2) +
                                     ((((lane >> 3) & 1) ^ (lane & 7)) << 4)
                               : (lane % 16) * (BN * 2) + (((warp_n * (WN / 8) + (lane >> 4)) ^ (lane & 7)) << 4);
    u32 a_frag[MI][4], b_frag[2][NJ][4];
    float acc[MI][2 * NJ][4];
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < 2 * NJ; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
    // Rows 16 i.. of a's tile at `from`, and columns 16 j.. of b's, at 16 `step` along the contraction.
    auto load_a = [&](int i, int step, u32 from) {
        load_matrices(a_frag[i], ((from + a_lane) ^ (step << 5)) + i * (16 * DEPTH * 2));
    };
    auto load_b = [&](int set, int j, int step, u32 from) {
        if (FORWARD)
            load_matrices(b_frag[set][j], ((from + b_lane) ^ (step << 5)) + j * (16 * DEPTH * 2));
        else
            load_matrices_transposed(b_frag[set][j], ((from + b_lane) ^ (j << 5)) + step * (16 * BN * 2));
    };
    auto multiply_row = [&](int i, int set) {
#pragma unroll
        for (int k = 0; k < 2 * NJ; k++) {
            int j = i % 2 ? 2 * NJ - 1 - k : k; // there and back: the operand at the turn is at hand
            multiply<T>(acc[i][j], a_frag[i], b_frag[set][j / 2][2 * (j % 2)], b_frag[set][j / 2][2 * (j % 2) + 1]);
        }
    };

    // The second pair goes first, through the last stage, which the copies of the first tiles leave free: they are
    // under way meanwhile.
    const u32 a_last = a_shared + (stages - 1) * A_BYTES;
    const u32 b_last = b_shared + (QUANT ? 1 : stages - 1) * B_BYTES;
    auto copy_second = [&](u32 r0) {
        const T* a2 = static_cast<const T*>(p.a2);
        const T* b2 = static_cast<const T*>(p.b2);
        const int rest = p.rank - r0;
        const bool chunks = p.rank % 8 == 0; // rows of t and B are whole chunks
        // Element by element otherwise: `row`s of `from` from its start on, `rows` of which are there.
        auto copy_elements = [&](u32 to, const T* from, int count, int rows) {
            for (int i = tid; i < count; i += THREADS) {
                int row = i / DEPTH, at = i % DEPTH;
                T x = row < rows && at < rest ? from[(u64)row * p.rank + r0 + at] : narrow<T>(0.0f);
                store_element(to + row * (DEPTH * 2) + ((at / 8 ^ (row & 7)) << 4) + at % 8 * 2, x);
            }
        };
        if (chunks) {
            const T* from = a2 + (u64)(m0 + a_row) * p.rank + r0 + a_chunk * 8;
#pragma unroll
            for (int i = 0; i < A_COPIES; i++) copy_a(i, a_last, from, p.rank, rest - a_chunk * 8);
        } else {
            copy_elements(a_last, a2 + (u64)m0 * p.rank, BM * DEPTH, p.m - m0);
        }
        if (chunks || !FORWARD) {
            const u32 stride = FORWARD ? p.rank : p.n;
            const T* from = FORWARD ? b2 + (u64)(n0 + b_row) * stride + r0 + b_chunk * 8
                                    : b2 + (u64)(r0 + b_row) * stride + n0 + b_chunk * 8;
#pragma unroll
            for (int i = 0; i < B_COPIES; i++) copy_b(i, b_last, from, stride, rest - b_first);
        } else {
            copy_elements(b_last, b2 + (u64)n0 * p.rank, BN * DEPTH, p.n - n0);
        }
    };
    u32 r0 = 0;
    do {
        if (r0) __syncthreads(); // the stage has been read
        if (p.rank) copy_second(r0);
        commit_copies();
        if (r0 == 0) {
            for (int s = 0; s < stages - 1; s++) {
#pragma unroll
                for (int i = 0; i < COPIES; i++) copy(i);
                copied();
            }
        }
        if (!p.rank) break;
        wait_copies(r0 ? 0 : stages - 1);
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < STEPS && r0 + step * 16 < p.rank; step++) {
#pragma unroll
            for (int j = 0; j < NJ; j++) load_b(0, j, step, b_last);
#pragma unroll
            for (int i = 0; i < MI; i++) load_a(i, step, a_last);
#pragma unroll
            for (int i = 0; i < MI; i++) multiply_row(i, 0);
        }
        r0 += DEPTH;
    } while (r0 < p.rank);

    if constexpr (QUANT) {
        fetch_next();
        take_next();
        fetch_next();
#pragma unroll
        for (int i = 0; i < PARTS; i++) decode(i, b_shared);
        take_next();
    }
    wait_copies(stages - 2);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < NJ; j++) load_b(0, j, 0, b_shared);
#pragma unroll
    for (int i = 0; i < MI; i++) load_a(i, 0, a_shared);

    const int tiles = (p.k + DEPTH - 1) / DEPTH;
    u32 a_read = a_shared, b_read = b_shared; // the present tile
    int read = 0;
    for (int tile = 0; tile < tiles; tile++) {
        const u32 b_write = QUANT ? b_shared + (~tile & 1) * B_BYTES : 0;
        if constexpr (QUANT) fetch_next();
        repeat<STEPS>([&](auto index) {
            constexpr int step = decltype(index)::value, next = (step + 1) % STEPS, set = step % 2;
            if (step == STEPS - 1) {
                // From here on fragments come from the next tile: it must be complete for every thread. All have read
                // the last fragments of the present one, so that its stage may be written after this.
                copied();
                wait_copies(stages - 2);
                __syncthreads();
                read = read + 1 == stages ? 0 : read + 1;
                a_read = a_shared + read * A_BYTES;
                b_read = b_shared + (QUANT ? ~tile & 1 : read) * B_BYTES;
            }
#pragma unroll
            for (int i = 0; i < MI; i++) {
                multiply_row(i, set);
                load_a(i, next, a_read);
#pragma unroll
                for (int j = 0; j < NJ / MI; j++) load_b(set ^ 1, i * (NJ / MI) + j, next, b_read);
                const int slot = step * MI + i;
                if (slot < SLOTS) {
#pragma unroll
                    for (int c = slot * COPIES / SLOTS; c < (slot + 1) * COPIES / SLOTS; c++) copy(c);
#pragma unroll
                    for (int d = slot * PARTS / SLOTS; d < (slot + 1) * PARTS / SLOTS; d++) decode(d, b_write);
                }
            }
        });
        if constexpr (QUANT) take_next();
    }

    // To `out` through shared memory, 16 rows of a warp at a time, so that rows are read and written in whole lines.
    wait_copies(0);
    __syncthreads();
    constexpr int PITCH = WN + 8; // lanes of a store fall into different banks
    float* rows = reinterpret_cast<float*>(shared) + warp * (16 * PITCH);
    const u32 column0 = n0 + warp_n * WN;
    const bool whole = p.n % 8 == 0;
#pragma unroll 1
    for (int i = 0; i < MI; i++) {
        float* to = rows + lane / 4 * PITCH + lane % 4 * 2;
#pragma unroll
        for (int mine = 0; mine < MI; mine++) {
            if (mine != i) continue; // accumulators are registers: their index must be known to the compiler
#pragma unroll
            for (int j = 0; j < 2 * NJ; j++) {
                const float(&x)[4] = acc[mine][j];
                *reinterpret_cast<float2*>(to + j * 8) = make_float2(x[0] * p.scale, x[1] * p.scale);
                *reinterpret_cast<float2*>(to + 8 * PITCH + j * 8) = make_float2(x[2] * p.scale, x[3] * p.scale);
            }
        }
        __syncwarp();
        const u32 row0 = m0 + warp_m * WM + i * 16;
        if (p.wide)
            write_rows<WN>(static_cast<float*>(p.out), static_cast<const float*>(p.in), rows, row0, column0, p, whole);
        else
            write_rows<WN>(static_cast<T*>(p.out), static_cast<const T*>(p.in), rows, row0, column0, p, whole);
        __syncwarp();
    }
}
