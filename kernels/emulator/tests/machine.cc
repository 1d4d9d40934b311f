// The emulator itself, where no other test goes: clusters, multicast, boxes of bytes, bulk copies, st.async, bar.arrive; and
// CUDA's words.
#include "emulator.h"
#include "attention/hopper.cuh"
using namespace emulator;

static int wrong = 0;
#define CHECK(X)                                                                                                       \
    do {                                                                                                               \
        if (!(X)) {                                                                                                    \
            printf("WRONG: %s\n", #X);                                                                                 \
            wrong++;                                                                                                   \
        }                                                                                                              \
    } while (0)

constexpr u32 ROWS = 16, PART = ROWS * 128; // of a block's share of x; bytes
constexpr u32 FULL = 4 * PART, MAIL = FULL + 8, LETTER = MAIL + 8, NUMBER = LETTER + 4, CLUSTER_SHARED = NUMBER + 4;

// Each block copies its share of x, which all of the cluster receive; reads a number of its right neighbour, and sends one
// to its left neighbour by st.async. out: what each block has received; numbers: what it has read, and was sent.
__global__ void cluster_kernel(const __grid_constant__ TensorMap x, u8* out, u32* numbers) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared), rank = cluster_rank(), size = cluster_size();
    if (threadIdx.x == 0) {
        emulator::barrier_init(base + FULL, 1), emulator::barrier_init(base + MAIL, 1);
        emulator::store(base + NUMBER, 100 + blockIdx.x);
    }
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x == 0) {
        emulator::barrier_expect(base + FULL, size * PART);
        emulator::barrier_expect(base + MAIL, 4);
        emulator::copy_box(base + rank * PART, &x, 0, rank * ROWS, base + FULL, (1 << size) - 1);
        const u32 letter = 1000 + blockIdx.x, left = (rank + size - 1) % size;
        emulator::store_async(map_rank(base + LETTER, left), &letter, 4, map_rank(base + MAIL, left));
    }
    emulator::barrier_wait(base + FULL, 0);
    emulator::barrier_wait(base + MAIL, 0);
    out += blockIdx.x * 4 * PART;
    for (u32 i = threadIdx.x; i < size * PART; i += blockDim.x) out[i] = emulator::load<u8>(base + i);
    if (threadIdx.x == 0) {
        numbers[2 * blockIdx.x] = emulator::load<u32>(map_rank(base + NUMBER, (rank + 1) % size));
        numbers[2 * blockIdx.x + 1] = emulator::load<u32>(base + LETTER);
    }
    cluster_arrive(); // its shared memory is read no longer
    cluster_wait();
}
static void test_cluster(u32 size) {
    constexpr u32 BLOCKS = 8;
    Array<u8> x(4 * PART), out(BLOCKS * 4 * PART);
    for (u32 i = 0; i < 4 * PART; i++) x.data[i] = (u8)(i * 7 + i / 128);
    Array<u32> numbers(2 * BLOCKS);
    const TensorMap map = tensor_map<TensorMap>(x.data, 64, 128, ROWS, 128);
    launch(cluster_kernel, BLOCKS, 64, CLUSTER_SHARED, size, map, out.data, numbers.data);
    for (u32 block = 0; block < BLOCKS; block++) {
        const u32 right = block / size * size + (block + 1) % size;
        CHECK(numbers.data[2 * block] == 100 + right);
        CHECK(numbers.data[2 * block + 1] == 1000 + right);
        for (u32 i = 0; i < size * PART; i++) {
            const u32 row = i / 128, chunk = i % 128 / 16;
            CHECK(out.data[block * 4 * PART + i] == x.data[row * 128 + (chunk ^ row % 8) * 16 + i % 16]);
        }
    }
}

// A box of bytes without a swizzle, partly outside, and back to global memory.
__global__ void byte_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int column,
                            int row) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 barrier;
    const u32 full = shared_address(&barrier);
    if (threadIdx.x == 0) {
        emulator::barrier_init(full, 1);
        emulator::barrier_expect(full, 8 * 32);
        emulator::copy_box(shared_address(shared), &from, column, row, full);
        emulator::barrier_wait(full, 0);
        store_box(&to, 0, 0, shared_address(shared));
        commit(BULK);
        wait_groups(BULK, 0);
    }
}
static void test_bytes(int column, int row) {
    Array<u8> x(10 * 48), out(8 * 32);
    for (u32 i = 0; i < x.count; i++) x.data[i] = (u8)(i + 1);
    launch(byte_kernel, 1, 32, 1024, 1, tensor_map<TensorMap>(x.data, 10, 44, 8, 32, 0, 48),
           tensor_map<TensorMap>(out.data, 8, 32, 8, 32, 0), column, row);
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 32; j++) {
            const int r = row + i, c = column + j;
            CHECK(out.data[i * 32 + j] == (r >= 0 && r < 10 && c >= 0 && c < 44 ? x.data[r * 48 + c] : 0));
        }
    }
}

// A warp copies and a warp computes: bar.arrive says that the bytes are there, and that they have been used.
__global__ void arrive_kernel(const float* x, float* sum, u32 rounds) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 barrier;
    const u32 base = shared_address(shared), full = shared_address(&barrier), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) emulator::barrier_init(full, 1);
    __syncthreads();
    float total = 0;
    for (u32 i = 0; i < rounds; i++) {
        if (threadIdx.x < 32) {
            if (i > 0) bar_sync(2, 64);
            if (lane == 0) {
                emulator::barrier_expect(full, 128);
                emulator::copy_bulk(base, x + 32 * i, 128, full);
            }
            emulator::barrier_wait(full, i % 2);
            bar_arrive(1, 64);
        } else {
            bar_sync(1, 64);
            total += emulator::load<float>(base + 4 * lane);
            if (i + 1 < rounds) bar_arrive(2, 64);
        }
    }
    if (threadIdx.x >= 32) sum[lane] = total;
}
static void test_arrive() {
    const auto x = Array<float>::random(5 * 32);
    Array<float> sum(32);
    launch(arrive_kernel, 1, 64, 128, 1, x.data, sum.data, 5);
    for (u32 i = 0; i < 32; i++) {
        float expected = 0;
        for (u32 j = 0; j < 5; j++) expected += x.data[32 * j + i];
        CHECK(sum.data[i] == expected);
    }
}

__global__ void warp_kernel() {
    const u32 lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    CHECK(__shfl_sync(~0u, lane, 3) == 3);
    CHECK(__shfl_xor_sync(~0u, lane, 5) == (lane ^ 5));
    if (lane < 8) CHECK(__shfl_sync(0xff, lane, 7) == 7);
    CHECK(__ballot_sync(~0u, lane % 3 == 0) == 0x49249249);
    CHECK(__any_sync(~0u, lane == 9) && !__any_sync(~0u, lane == 32));
    CHECK(__reduce_max_sync(~0u, lane ^ 4) == 31);
    // The identity times b [16, 8], b(i, j) = i + 100 j.
    auto b = [](u32 i, u32 j) { return (float)(i + 100 * j); };
    const u32 diagonal = row == column ? pair<f16>(1, 0) : row == column + 1 ? pair<f16>(0, 1) : 0;
    const u32 a[4] = {diagonal, 0, 0, diagonal};
    float d[4] = {};
    mma(d, a, pair<f16>(b(column, row), b(column + 1, row)), pair<f16>(b(column + 8, row), b(column + 9, row)), false);
    for (u32 i = 0; i < 4; i++) CHECK(d[i] == b(row + i / 2 * 8, column + i % 2));
    // Of the matrix 8 i + j.
    CHECK(transpose_matrix(lane * 2 | (lane * 2 + 1) << 16) == ((column * 8 + row) | (column * 8 + 8 + row) << 16));
}

int main() {
    for (u32 size : {1u, 2u, 4u}) test_cluster(size);
    test_bytes(0, 0), test_bytes(16, 3), test_bytes(-8, -2), test_bytes(40, 6);
    test_arrive();
    launch(warp_kernel, 1, 64, 0, 1);
    CHECK(__byte_perm(0x80112233, 0x44556677, 0xb040) == 0x80337733);
    CHECK(__float2bfloat16_rn(1 + 0x1p-8f).bits == 0x3f80 && __float2bfloat16_rn(1 + 0x3p-8f).bits == 0x3f82);
    return wrong != 0;
}
