// Tiles of 16-bit rows in shared memory, and the two products over them.
//
// A row is D elements in pieces of 16 bytes. Piece p of row r lies at piece p ^ swizzle(r), so that the eight rows that
// ldmatrix reads at once are in different banks. Tiles start at multiples of 128 bytes.
#pragma once
#include "attention/ptx.cuh"
#include "fast.cuh"

// Threads of a block, query rows of a block, and keys of a tile.
constexpr int THREADS = 128, QUERIES = 128, KEYS = 64;
constexpr float LN_2 = 0.69314718055994531f;

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

template <int D> struct Rows {
    static constexpr u32 PIECES = D / 8;
    static constexpr u32 BYTES = D * 2;
    static_assert(D % 32 == 0, "pieces are permuted in groups of 4 or 8");

    // 64 and 128: 8 pieces cover all banks. 96: 4 pieces do for half of them, and rows alternate between the halves.
    static __device__ __forceinline__ u32 swizzle(u32 row) { return D % 64 == 0 ? row % 8 : row / 2 % 4; }
    static __device__ __forceinline__ u32 at(u32 row, u32 piece) { return row * BYTES + (piece ^ swizzle(row)) * 16; }

    // From the address of piece 0 or 1 of a row to that of the piece 2 · step further.
    static __device__ __forceinline__ u32 advance(u32 address, u32 step) {
        return D % 64 == 0 ? (address ^ step % 4 * 32) + step / 4 * 128 : (address ^ step % 2 * 32) + step / 2 * 64;
    }

    // Where this lane reads with ldmatrix. A operand [16, 16] from rows, and B operand [16, 8] x 2 (k, n) from rows k:
    static __device__ __forceinline__ u32 lane_a(u32 lane) { return at(lane % 16, lane / 16); }
    // B operand [16, 8] x 2 (k, n) from rows n, that is, of the transposed tile:
    static __device__ __forceinline__ u32 lane_b(u32 lane) { return at(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

    // Starts copying `COUNT` rows of d <= D elements, `stride` apart; from `valid` on rows are zero, and so are elements
    // beyond d. By `THREADS` threads.
    template <int COUNT, int THREADS, typename T>
    static __device__ __forceinline__ void load(u32 tile, const T* from, u32 stride, int valid, u32 d) {
        if constexpr (THREADS % PIECES == 0) {
            constexpr u32 STEP = THREADS / PIECES;
            static_assert(COUNT % STEP == 0 && STEP % 8 == 0, "each thread copies the same piece of several rows");
            u32 row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
            bool inside = piece * 8 < d;
            u32 to = tile + at(row, piece);
            const T* source = from + (row * stride + piece * 8);
#pragma unroll
            for (u32 i = 0; i < COUNT / STEP; i++) {
                bool copy = inside && (int)(row + i * STEP) < valid;
                copy_async16(to + i * STEP * BYTES, source + i * STEP * stride, copy);
            }
        } else {
            static_assert(COUNT * PIECES % THREADS == 0, "each thread copies as many pieces");
#pragma unroll
            for (u32 i = 0; i < COUNT * PIECES / THREADS; i++) {
                u32 index = threadIdx.x + i * THREADS, row = index / PIECES, piece = index % PIECES;
                bool copy = piece * 8 < d && (int)row < valid;
                copy_async16(tile + at(row, piece), from + (row * stride + piece * 8), copy);
            }
        }
    }

    // Writes accumulators [M·16, D] of a warp, times `scale` of each row, to `valid` rows of d elements in global memory,
    // by way of `tile`, which this warp alone uses.
    template <typename T, int M>
    static __device__ __forceinline__ void store(
        const float (&acc)[M][D / 8][4], const float (&scale)[M][2], u32 tile, T* to, u32 stride, int valid, u32 d) {
        u32 lane = threadIdx.x % WARP;
        __syncwarp();
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float(&c)[4] = acc[m][n];
                u32 address = tile + at(lane / 4, n) + m * 16 * BYTES + lane % 4 * 4;
                store_shared(address, pair<T>(c[0] * scale[m][0], c[1] * scale[m][0]));
                store_shared(address + 8 * BYTES, pair<T>(c[2] * scale[m][1], c[3] * scale[m][1]));
            }
        }
        __syncwarp();
#pragma unroll 4
        for (u32 i = lane; i < M * 16 * PIECES; i += WARP) {
            u32 row = i / PIECES, piece = i % PIECES;
            if ((int)row < valid && piece * 8 < d) {
                uint4 x = load_shared_uint4(tile + at(row, piece));
                *reinterpret_cast<uint4*>(to + (row * stride + piece * 8)) = x;
            }
        }
    }
};

// Fragments of A: M·16 rows of D elements from `a` (an address with lane_a).
template <int D, int M> __device__ __forceinline__ void load_fragments(u32 (&fragments)[M][D / 16][4], u32 a) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            load_matrices(fragments[m][step], Rows<D>::advance(a, step) + m * 16 * Rows<D>::BYTES);
        }
    }
}

// s [M·16, N·8] = A·Bᵀ of a warp: rows of A from `a` (with lane_a), rows of B from `b` (with lane_b).
template <typename T, int D, int M, int N>
__device__ __forceinline__ void product(float (&s)[M][N][4], u32 a, u32 b) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        u32 fa[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices(fa[m], Rows<D>::advance(a, step) + m * 16 * Rows<D>::BYTES);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 fb[4];
            load_matrices(fb, Rows<D>::advance(b, step) + n * 8 * Rows<D>::BYTES);
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply<T>(s[m][n], fa[m], fb[0], fb[1]);
                multiply<T>(s[m][n + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

// As above with the fragments of A in registers.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void product(float (&s)[M][N][4], const u32 (&a)[M][D / 16][4], u32 b) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 fb[4];
            load_matrices(fb, Rows<D>::advance(b, step) + n * 8 * Rows<D>::BYTES);
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply<T>(s[m][n], a[m][step], fb[0], fb[1]);
                multiply<T>(s[m][n + 1], a[m][step], fb[2], fb[3]);
            }
        }
    }
}

// acc [M·16, D] += P·B of a warp: P [M·16, K·16] in fragments, K·16 rows of B from `b` (with lane_a).
template <typename T, int D, int M, int K>
__device__ __forceinline__ void accumulate(float (&acc)[M][D / 8][4], const u32 (&p)[M][K][4], u32 b) {
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 fb[4];
            load_matrices_transposed(fb, Rows<D>::advance(b, n) + k * 16 * Rows<D>::BYTES);
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply<T>(acc[m][2 * n], p[m][k], fb[0], fb[1]);
                multiply<T>(acc[m][2 * n + 1], p[m][k], fb[2], fb[3]);
            }
        }
    }
}

// Accumulators [M·16, N·8] as fragments of A. The two layouts agree lane by lane.
template <typename T, int M, int N>
__device__ __forceinline__ void to_fragments(u32 (&p)[M][N / 2][4], const float (&s)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            p[m][n / 2][n % 2 * 2] = pair<T>(s[m][n][0], s[m][n][1]);
            p[m][n / 2][n % 2 * 2 + 1] = pair<T>(s[m][n][2], s[m][n][3]);
        }
    }
}

template <int M, int N> __device__ __forceinline__ void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
    }
}
