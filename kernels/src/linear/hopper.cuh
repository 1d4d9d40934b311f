// The instructions of Hopper's matrix products, one function each (PTX ISA 8.4, sm_90a): barriers in shared memory,
// copies of boxes by the tensor memory accelerator (TMA), products of a warpgroup (128 threads).
#pragma once
#include "linear/ptx.cuh"

// A matrix as the TMA sees it: encoded by the driver (CUtensorMap), passed as a `__grid_constant__` parameter.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Barriers. A phase ends when `count` arrivals have come and all bytes that were announced; phases count 0, 1, 0, ..
__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialized barriers visible to the TMA.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the present phase if its parity is `parity`; does not wait if that phase is over. A new barrier
// is in phase 0, and counts as past a phase of parity 1.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

// What this thread has written to shared memory is there for the tensor cores and the TMA, once a barrier has followed.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Starts to copy the box of `map` whose first element is (row, column) to shared memory; its bytes, of which those
// outside of the matrix are zeros, count at `barrier`.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}
// Has the box brought to the second-level cache.
__device__ __forceinline__ void prefetch_box(const TensorMap* map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row)
                 : "memory");
}
// Starts to copy a box from shared memory, where `publish_shared` has followed, to the matrix, as far as it is inside of that.
__device__ __forceinline__ void store_box(const TensorMap* map, int column, int row, u32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(from)
                 : "memory");
}
// Closes the group of copies from shared memory that this thread has started; waits until no more than PENDING of
// its groups have not been read.
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Starts to copy `bytes` bytes that follow one another, in multiples of 16.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Registers of each thread of this warpgroup from here on, given back or taken from what others gave back.
template <int REGISTERS> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Before the first product of a group: orders accesses to registers before it.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until no more than PENDING groups are under way.
template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of the sums past this place.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Keeps a value in its register, where the compiler would make it again for each use; and makes it here.
__device__ __forceinline__ void pin(u32& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// As for the sums for left operands in registers, which a product reads until it is done.
template <int N> __device__ __forceinline__ void pin(u32 (&a)[N][4]) {
#pragma unroll
    for (int i = 0; i < N * 4; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Four 8x8 matrices of 16-bit elements to shared memory: the inverse of load_matrices.
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// Describes an operand in shared memory that the TMA has written with 128-byte swizzle, at a multiple of 1024 bytes
// (plus 32 for each 16 elements along the contraction where that is contiguous). See the PTX ISA, "matrix descriptor".
// `leading` and `stride` in bytes:
// - Contraction contiguous (K-major): rows of 128 bytes lie one after another; eight of them are a swizzle atom. stride:
//   from 8 rows to the next 8, 1024. leading: not used.
// - Rows of the product contiguous (MN-major): a box is 64 of them (128 bytes) times 64 along the contraction; the atom
//   is 64 x 8. stride: from 8 along the contraction to the next 8, 1024. leading: from 64 columns to the next 64, a box,
//   8192.
__device__ __forceinline__ u64 describe(u32 address, u32 leading, u32 stride) {
    constexpr u64 SWIZZLE_128 = 1;
    return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | SWIZZLE_128 << 62;
}

// d [64, N] = a [64, 16] · b [16, N] + (keep ? d : 0), N being 256, 128 or 64. Both in shared memory, K-major or
// (A_COLUMNS, B_COLUMNS) not. Warp w of the four has rows 16 w .. 16 w + 15; its lane l holds at d[4 j] row l / 4,
// columns 8 j + 2 (l % 4) and one more, at d[4 j + 2] the same of row l / 4 + 8.

#define SUMS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_64 \
    SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_128 \
    SUMS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_OF_8(i)                                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define SUMS_OF_32(i) SUMS_OF_8(i), SUMS_OF_8(i + 8), SUMS_OF_8(i + 16), SUMS_OF_8(i + 24)
#define SUMS_OF_64(i) SUMS_OF_32(i), SUMS_OF_32(i + 32)
#define SUMS_OF_128 SUMS_OF_64(0), SUMS_OF_64(64)

template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;

#define SHARED_PRODUCT(N, TYPE, SUMS, SUMS_LIST, A, B, KEEP, A_T, B_T)                                                 \
    asm volatile("{\n"                                                                                                 \
                 ".reg .pred keep;\n"                                                                                  \
                 "setp.ne.b32 keep, %" KEEP ", 0;\n"                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" SUMS "}, %" A ", %" B            \
                 ", keep, 1, 1, %" A_T ", %" B_T ";\n"                                                                 \
                 "}"                                                                                                   \
                 : SUMS_LIST                                                                                           \
                 : "l"(a), "l"(b), "r"(keep), "n"(int(A_COLUMNS)), "n"(int(B_COLUMNS)))
template <typename T, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void multiply_shared(float (&d)[128], u64 a, u64 b, u32 keep) {
    if constexpr (IS_BF16<T>)
        SHARED_PRODUCT("256", "bf16", SUMS_128, SUMS_OF_128, "128", "129", "130", "131", "132");
    else SHARED_PRODUCT("256", "f16", SUMS_128, SUMS_OF_128, "128", "129", "130", "131", "132");
}
template <typename T, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void multiply_shared(float (&d)[64], u64 a, u64 b, u32 keep) {
    if constexpr (IS_BF16<T>) SHARED_PRODUCT("128", "bf16", SUMS_64, SUMS_OF_64(0), "64", "65", "66", "67", "68");
    else SHARED_PRODUCT("128", "f16", SUMS_64, SUMS_OF_64(0), "64", "65", "66", "67", "68");
}
template <typename T, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void multiply_shared(float (&d)[32], u64 a, u64 b, u32 keep) {
    if constexpr (IS_BF16<T>) SHARED_PRODUCT("64", "bf16", SUMS_32, SUMS_OF_32(0), "32", "33", "34", "35", "36");
    else SHARED_PRODUCT("64", "f16", SUMS_32, SUMS_OF_32(0), "32", "33", "34", "35", "36");
}

// The same with a in registers, as `mma.sync` takes it. They are read until the product is done.
#define HELD_PRODUCT(N, TYPE, SUMS, SUMS_LIST, A0, A1, A2, A3, B, KEEP, B_T)                                           \
    asm volatile("{\n"                                                                                                 \
                 ".reg .pred keep;\n"                                                                                  \
                 "setp.ne.b32 keep, %" KEEP ", 0;\n"                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" SUMS "}, {%" A0 ", %" A1 ", %"    \
                 A2 ", %" A3 "}, %" B ", keep, 1, 1, %" B_T ";\n"                                                      \
                 "}"                                                                                                   \
                 : SUMS_LIST                                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(int(B_COLUMNS)))
#define HELD_256(TYPE)                                                                                                 \
    HELD_PRODUCT("256", TYPE, SUMS_128, SUMS_OF_128, "128", "129", "130", "131", "132", "133", "134")
#define HELD_128(TYPE)                                                                                                 \
    HELD_PRODUCT("128", TYPE, SUMS_64, SUMS_OF_64(0), "64", "65", "66", "67", "68", "69", "70")
#define HELD_64(TYPE) HELD_PRODUCT("64", TYPE, SUMS_32, SUMS_OF_32(0), "32", "33", "34", "35", "36", "37", "38")
template <typename T, bool B_COLUMNS>
__device__ __forceinline__ void multiply_held(float (&d)[128], const u32 (&a)[4], u64 b, u32 keep) {
    if constexpr (IS_BF16<T>) HELD_256("bf16");
    else HELD_256("f16");
}
template <typename T, bool B_COLUMNS>
__device__ __forceinline__ void multiply_held(float (&d)[64], const u32 (&a)[4], u64 b, u32 keep) {
    if constexpr (IS_BF16<T>) HELD_128("bf16");
    else HELD_128("f16");
}
template <typename T, bool B_COLUMNS>
__device__ __forceinline__ void multiply_held(float (&d)[32], const u32 (&a)[4], u64 b, u32 keep) {
    if constexpr (IS_BF16<T>) HELD_64("bf16");
    else HELD_64("f16");
}

// Waits for all of the `THREADS` threads that share barrier `id`.
template <int THREADS> __device__ __forceinline__ void meet(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

// Blocks that wait for one another: each counts itself at `counter`, so that what its threads have written is seen by those who
// find all there. They must fit on the GPU together. One thread.
__device__ __forceinline__ void arrive_at(u32* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait_at(u32* counter, u32 blocks) {
    u32 found;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    } while (found < blocks);
}
// After it: the last of them sets the counter back to 0.
__device__ __forceinline__ void leave(u32* counter, u32 blocks) {
    u32 found;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(found) : "l"(counter) : "memory");
    if (found == 2 * blocks - 1) asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(counter) : "memory");
}
