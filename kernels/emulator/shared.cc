// Shared memory by its addresses, and operations that are under way. See machine.h.
#include "state.h"
#include <algorithm>

namespace emulator {

// ---- Shared memory ----
// Offsets in a block's window begin here: the first 1024 bytes are the system's.
static u32 first_offset() { return 1024 + shared_skew; }

u32 address_of(const void* p) {
    const u8* q = (const u8*)p;
    if (q < block->window || q >= block->window + block->window_bytes)
        fail("the address of something that is not in shared memory");
    return block->rank << 24 | (u32)(q - block->window + first_offset());
}
static Block& owner(u32 address, const char* what) {
    const u32 rank = address >> 24;
    if (rank >= blocks.size()) fail("%s: shared address 0x%08x: no block %u in the cluster", what, address, rank);
    Block& b = *blocks[rank];
    if (b.living == 0 && &b != block) fail("%s: shared memory of block %u of the cluster, which has ended", what, rank);
    return b;
}
u8* at(u32 address, u32 bytes, u32 alignment, const char* what) {
    Block& b = owner(address, what);
    const u32 offset = (address & 0xffffff) - first_offset();
    if ((address & 0xffffff) < first_offset() || offset + bytes > b.window_bytes)
        fail("%s: shared address 0x%08x, %u bytes: outside of shared memory", what, address, bytes);
    if (address % alignment) fail("%s: shared address 0x%08x is no multiple of %u", what, address, alignment);
    u8 *p = b.window + offset, *end = b.dynamic + configuration->shared_bytes;
    if (p + bytes > end && p < b.dynamic + MOST_SHARED && p + bytes > b.dynamic)
        fail("%s: shared address 0x%08x, %u bytes: ends %td bytes behind the dynamic shared memory of %u bytes", what,
             address, bytes, p + bytes - end, configuration->shared_bytes);
    return p;
}

// Calls f(granule) for each 16 bytes that the bytes at the address lie in.
template <typename F> static void each_granule(u32 address, u32 bytes, F f) {
    const u32 first = (address & 0xffffff) - first_offset();
    for (u32 granule = first / 16; granule <= (first + bytes - 1) / 16; granule++) f(granule);
}
void mark_written(u32 address, u32 bytes) {
    Block& b = owner(address, "store");
    each_granule(address, bytes, [&](u32 granule) {
        if (b.written[granule] == fiber->rank + 1) return;
        b.written[granule] = fiber->rank + 1;
        fiber->written.push_back(b.rank << 24 | granule);
    });
}
void publish() {
    for (u32 granule : fiber->written) {
        auto& by = blocks[granule >> 24]->written[granule & 0xffffff];
        if (by == fiber->rank + 1) by = 0;
    }
    fiber->written.clear();
}
void check_published(u32 address, u32 bytes, const char* what) {
    const Block& b = owner(address, what);
    each_granule(address, bytes, [&](u32 granule) {
        if (b.written[granule])
            fail("%s reads shared address 0x%08x, which thread %u has written without publish_shared since", what, address,
                 b.written[granule] - 1);
    });
}

// ---- Operations under way ----
static std::vector<Pending> under_way;

// After some rounds or some hundred, each order of magnitude as often.
static Pending pending(Operation finish) { return {std::move(finish), rounds + random_u32() % (2u << random_u32() % 9)}; }

void later(Operation finish) {
    under_way.push_back(pending(std::move(finish)));
    pause();
}
bool any_under_way() { return !under_way.empty(); }

void later_in(Queue queue, Operation finish) { fiber->open[queue].push_back(pending(std::move(finish))); }
void commit(Queue queue) {
    fiber->committed[queue].push_back(std::move(fiber->open[queue]));
    fiber->open[queue].clear();
    pause();
}
void wait_groups(Queue queue, u32 pending) {
    auto& groups = fiber->committed[queue];
    auto done = [&] {
        while (!groups.empty() && groups.front().empty()) groups.pop_front();
        return groups.size() <= pending;
    };
    wait_until(done, "a wait for groups of copies (queue, pending)", queue, pending);
}
void check_all_waited_for() {
    for (auto& operations : fiber->open) {
        if (!operations.empty()) fail("a thread ends with copies that it has not committed");
    }
    // Copies to shared memory that nobody waits for harm nobody; those from shared memory read it.
    if (!fiber->committed[BULK].empty()) fail("a thread ends without waiting for its copies to global memory");
}
// Calls f(operations) for those that belong to no thread, or to threads of the block.
template <typename F> static void each_queue(Block& b, F f) {
    f(under_way);
    for (Fiber& thread : b.fibers) {
        for (auto& groups : thread.committed) std::for_each(groups.begin(), groups.end(), f);
    }
}
u64 next_due() {
    u64 next = ~0ull;
    for (auto& b : blocks) {
        if (b->living == 0) continue; // nobody waits for what its threads have left
        each_queue(*b, [&](std::vector<Pending>& operations) {
            for (Pending& operation : operations) next = std::min(next, operation.due);
        });
    }
    return next;
}
void finish_due(Block& b) {
    each_queue(b, [](std::vector<Pending>& operations) {
        for (size_t i = operations.size(); i-- > 0;) {
            if (operations[i].due > rounds) continue;
            const Operation finish = std::move(operations[i].finish);
            operations[i] = std::move(operations.back());
            operations.pop_back();
            finish();
        }
    });
}

} // namespace emulator
