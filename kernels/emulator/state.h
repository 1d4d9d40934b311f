// What the parts of the machine share: the threads, warps and blocks that run. Only one thread runs at a time.
#pragma once
#include "machine.h"
#include <deque>
#include <memory>
#include <vector>

namespace emulator {

constexpr u32 MOST_SHARED = 227 << 10; // bytes of dynamic shared memory

struct Pending {
    Operation finish;
    u64 due; // round of the scheduler in which it is done
};
struct Fiber {
    void* stack_pointer;
    uint3 index;
    u32 rank;
    bool alive;
    // What it waits for; null if it runs whenever it gets the turn.
    bool (*ready)(void*);
    void* context;
    const char* what;
    u64 number0, number1;
    // Operations by queue: not committed, and groups that are.
    std::vector<Pending> open[QUEUES];
    std::deque<std::vector<Pending>> committed[QUEUES];
    std::vector<u32> written; // rank << 24 | granule of 16 bytes that it has written and not published
};

// Lanes of a mask that meet at a collective instruction.
struct Meeting {
    u32 mask, arrived;
    const char* what;
    u64 generation;
    void (*run)(void**);
    void* lanes[32];
};
struct WarpProducts; // products.cc
struct Warp {
    std::vector<std::unique_ptr<Meeting>> meetings; // one for each mask that was used
    u32 living;                                     // lanes
    u32 stalled;                                    // rounds that it leaves out if others can run
    std::shared_ptr<WarpProducts> products;
};

struct ThreadBarrier {
    u32 arrived, expected;
    u64 generation;
    int any, result;
};
struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    ThreadBarrier barriers[16];
    uint3 index;
    u32 rank, living; // in the cluster; threads
    // Shared memory is what is thread-local in this program; its dynamic part is MOST_SHARED bytes of that.
    u8 *window, *dynamic;
    u32 window_bytes;
    std::vector<unsigned short> written; // by granule of 16 bytes: 1 + the thread that has written and not published
    void* scheduler;                     // its stack pointer
};
extern std::vector<std::unique_ptr<Block>> blocks; // of the cluster
extern Block* block;                               // whose turn it is
extern Fiber* fiber;                               // that runs, or null
extern const Launch* configuration;                // of the launch
extern u64 rounds;                                 // of the scheduler, so far

// Barriers.
void prepare_cluster_barrier();
void leave_barriers(); // of the thread that runs, which has ended

// Operations under way.
bool any_under_way(); // that belong to no thread
u64 next_due(); // ~0 if there are none
void finish_due(Block& block);
void check_all_waited_for(); // by the thread that runs, at its end

// Products of a warp; those of the thread that runs; of all warps of a block that has ended.
std::shared_ptr<WarpProducts> new_products(u32 rank, u32 warp); // of the block in the cluster, in the block
inline WarpProducts& products() { return *block->warps[thread_rank() / 32].products; }
void finish_some_products(WarpProducts& products);
void check_products_ended(const std::vector<Warp>& warps);

} // namespace emulator
