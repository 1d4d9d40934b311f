// The emulated machine: threads of a block as fibers, the blocks of a cluster as OS threads that take turns, shared memory
// with 32-bit addresses, and operations that complete at a random later time. For the wrappers of instructions
// (wrappers/), for cuda.h and for tests; kernels see none of it.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

struct uint3 {
    u32 x, y, z;
};
struct dim3 {
    u32 x, y, z;
    constexpr dim3(u32 x = 1, u32 y = 1, u32 z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx; // of the thread that runs
extern dim3 blockDim, gridDim;

namespace emulator {

// ---- Errors ----
// Prints the message, block and thread, and with EMULATOR_DUMP set where all threads are; ends the program with status 1.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- Random numbers of the schedule: EMULATOR_SEED is the seed, 1 by default ----
u32 random_u32();
inline bool chance(u32 out_of) { return random_u32() % out_of == 0; }

// ---- The thread that runs ----
u32 thread_rank(); // in its block
u32 lane();
u32 cluster_rank();
u32 cluster_size();
// Gives others the turn until `ready(context)`. `what` and the numbers are printed if that never comes.
void wait_until(bool (*ready)(void*), void* context, const char* what, u64 number0, u64 number1);
template <typename F> void wait_until(F&& ready, const char* what, u64 number0 = 0, u64 number1 = 0) {
    typedef std::remove_reference_t<F> Ready;
    wait_until([](void* f) -> bool { return (*static_cast<Ready*>(f))(); }, &ready, what, number0, number1);
}

void pause(); // gives others the turn, now and then: where another thread may see what this one has just done

// ---- Shared memory ----
// An address is the block's rank in the cluster << 24 | offset. All bytes are 0xff (NaN, for floats) when a block starts.
u32 address_of(const void* p);                                   // __cvta_generic_to_shared
u8* at(u32 address, u32 bytes, u32 alignment, const char* what); // the place, checked
inline u32 map_rank(u32 address, u32 rank) { return (address & 0xffffff) | rank << 24; } // mapa
// Stores are by the generic proxy: until the thread calls `publish` (fence.proxy.async) it is an error if the async proxy
// (wgmma, bulk copies) reads those bytes. Plain C++ stores through pointers are not marked.
void mark_written(u32 address, u32 bytes);
void check_published(u32 address, u32 bytes, const char* what);
void publish();
template <typename T> T load(u32 address) { // ld.shared, ld.shared::cluster
    T x;
    std::memcpy(&x, at(address, sizeof(T), sizeof(T), "load"), sizeof(T));
    return x;
}
template <typename T> void store(u32 address, const T& x) { // st.shared, st.shared::cluster
    std::memcpy(at(address, sizeof(T), sizeof(T), "store"), &x, sizeof(T));
    mark_written(address, sizeof(T));
}

// ---- Collective instructions of a warp ----
// Waits until all living lanes of `mask` are here with the same `what`. The last one calls `run(lanes)`, where lanes[i] is
// the argument of lane i or null, and all go on. Arguments stay in place, so results can be left in them.
void collective(const char* what, u32 mask, void* mine, void (*run)(void** lanes));
template <typename A> void collective(const char* what, u32 mask, A& mine, void (*run)(A** lanes)) {
    collective(what, mask, (void*)&mine, reinterpret_cast<void (*)(void**)>(run));
}

// ---- Barriers of threads ----
constexpr u32 ALL = ~0u;          // count: the living threads of the block
void bar_sync(u32 id, u32 count); // bar.sync
void bar_arrive(u32 id, u32 count);
int bar_or(int predicate); // __syncthreads_or
void cluster_arrive();
void cluster_wait();

// ---- Barriers in shared memory (mbarrier), of any block of the cluster ----
void barrier_init(u32 barrier, u32 count);
void barrier_arrive(u32 barrier);
void barrier_expect(u32 barrier, u32 bytes);   // arrive.expect_tx
void barrier_complete(u32 barrier, u32 bytes); // complete_tx
void barrier_wait(u32 barrier, u32 parity);    // try_wait.parity until true

// ---- Operations under way ----
typedef std::function<void()> Operation;
// Is called at a random later time, in any order.
void later(Operation finish);
// The same in groups of a thread (cp.async, bulk copies to global memory), which it waits for.
enum Queue { CP_ASYNC, BULK, QUEUES };
void later_in(Queue queue, Operation finish);
void commit(Queue queue);
void wait_groups(Queue queue, u32 pending);

// ---- Launches ----
struct Launch {
    dim3 grid, block;
    u32 shared_bytes;
    u32 cluster; // blocks, consecutive along x
};
void run_grid(const Launch& launch, const std::function<void()>& thread);
// As <<<grid, block, shared_bytes>>>; returns when the kernel is done. Arguments convert to the kernel's parameters.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, u32 shared_bytes, u32 cluster, A&&... args) {
    std::tuple<std::remove_cv_t<P>...> values{std::remove_cv_t<P>(std::forward<A>(args))...};
    run_grid({grid, block, shared_bytes, cluster}, [&] { std::apply(kernel, values); });
}
// Where shared memory begins, modulo 1024: a test may set another multiple of 16, which is all that a kernel may rely on if
// it does not ask for more.
extern u32 shared_skew;

} // namespace emulator
