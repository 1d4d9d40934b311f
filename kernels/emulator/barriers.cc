// Where threads wait for each other or for bytes: collective instructions of a warp, barriers of a block and of a cluster,
// and barriers in shared memory. See machine.h.
#include "state.h"
#include <algorithm>

namespace emulator {

// ---- Warps ----
static void run_if_complete(const Warp& warp, Meeting& meeting) {
    if (!meeting.arrived || meeting.mask & warp.living & ~meeting.arrived) return;
    meeting.run(meeting.lanes);
    meeting.arrived = 0;
    meeting.generation++;
    std::fill(std::begin(meeting.lanes), std::end(meeting.lanes), nullptr);
}
void collective(const char* what, u32 mask, void* mine, void (*run)(void**)) {
    Warp& warp = block->warps[fiber->rank / 32];
    const u32 me = lane();
    if (!(mask >> me & 1)) fail("%s with a mask 0x%08x that lane %u is not in", what, mask, me);
    auto found = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](auto& m) { return m->mask == mask; });
    if (found == warp.meetings.end())
        found = warp.meetings.insert(found, std::make_unique<Meeting>(Meeting{mask, 0, nullptr, 0, nullptr, {}}));
    Meeting& meeting = **found;
    if (meeting.arrived == 0) meeting.what = what, meeting.run = run;
    else if (meeting.run != run || strcmp(meeting.what, what) != 0)
        fail("lanes of a warp differ: some are at %s, this one is at %s", meeting.what, what);
    meeting.arrived |= 1u << me;
    meeting.lanes[me] = mine;
    const u64 generation = meeting.generation;
    run_if_complete(warp, meeting);
    auto over = [&] { return meeting.generation != generation; };
    wait_until(over, what, mask);
}

// ---- Barriers of a block ----
static void release(ThreadBarrier& barrier) {
    barrier.result = barrier.any;
    barrier.arrived = 0, barrier.any = 0;
    barrier.generation++;
}
static ThreadBarrier& arrive(u32 id, u32 count, int predicate) {
    if (id >= 16) fail("barrier %u: there are 16", id);
    if (count != ALL && (count % 32 || count == 0 || count > block->fibers.size()))
        fail("barrier %u of %u threads, in a block of %zu", id, count, block->fibers.size());
    ThreadBarrier& barrier = block->barriers[id];
    if (barrier.arrived == 0) barrier.expected = count;
    if (barrier.expected != count)
        fail("barrier %u: some come with a count of %u threads, this one with %u", id, barrier.expected, count);
    barrier.any |= predicate != 0;
    if (++barrier.arrived >= (count == ALL ? block->living : count)) release(barrier);
    return barrier;
}
static int arrive_and_wait(u32 id, u32 count, int predicate, const char* what) {
    const u64 generation = id < 16 ? block->barriers[id].generation : 0;
    ThreadBarrier& barrier = arrive(id, count, predicate);
    auto over = [&] { return barrier.generation != generation; };
    wait_until(over, what, id, count);
    return barrier.result;
}
void bar_sync(u32 id, u32 count) {
    arrive_and_wait(id, count, 0, count == ALL ? "__syncthreads" : "bar.sync (id, count)");
}
void bar_arrive(u32 id, u32 count) { arrive(id, count, 0); }
int bar_or(int predicate) { return arrive_and_wait(0, ALL, predicate, "__syncthreads_or"); }

// ---- The barrier of the cluster ----
static struct {
    u32 arrived; // living threads
    u64 generation;
    std::vector<u64> waits_for; // by block and thread: the generation, or 0 if it has not arrived
} cluster_barrier;

void prepare_cluster_barrier() {
    cluster_barrier.arrived = 0, cluster_barrier.generation = 0;
    cluster_barrier.waits_for.assign(blocks.size() * blocks[0]->fibers.size(), 0);
}
static u64& cluster_waits() { return cluster_barrier.waits_for[block->rank * block->fibers.size() + fiber->rank]; }
static void release_cluster_if_complete() {
    u32 living = 0;
    for (auto& b : blocks) living += b->living;
    if (cluster_barrier.arrived == 0 || cluster_barrier.arrived < living) return;
    cluster_barrier.arrived = 0;
    cluster_barrier.generation++;
}
void cluster_arrive() {
    u64& waits = cluster_waits();
    if (waits != 0) fail("cluster_arrive twice without cluster_wait");
    waits = cluster_barrier.generation + 1;
    cluster_barrier.arrived++;
    release_cluster_if_complete();
}
void cluster_wait() {
    u64& waits = cluster_waits();
    if (waits == 0) fail("cluster_wait without cluster_arrive");
    auto over = [&] { return cluster_barrier.generation >= waits; };
    wait_until(over, "cluster_wait (generation)", waits);
    waits = 0;
}

void leave_barriers() {
    Warp& warp = block->warps[fiber->rank / 32];
    warp.living &= ~(1u << lane());
    for (size_t i = 0; i < warp.meetings.size(); i++) run_if_complete(warp, *warp.meetings[i]);
    for (ThreadBarrier& barrier : block->barriers) {
        if (barrier.arrived && barrier.expected == ALL && barrier.arrived >= block->living) release(barrier);
    }
    if (cluster_waits() > cluster_barrier.generation) cluster_barrier.arrived--;
    release_cluster_if_complete();
}

// ---- Barriers in shared memory ----
// Eight bytes, of which a kernel may know nothing but their size.
struct SharedBarrier {
    u64 pending : 20, count : 20;
    long long bytes : 21; // announced and not there yet; they may come before they are announced
    u64 phase : 1, tag : 2;
};
static_assert(sizeof(SharedBarrier) == 8);
constexpr u64 TAG = 1; // not that of memory that nobody has written

static SharedBarrier& shared_barrier(u32 address, const char* what) {
    SharedBarrier& b = *reinterpret_cast<SharedBarrier*>(at(address, 8, 8, what));
    if (b.tag != TAG) fail("%s: no initialized barrier at 0x%08x", what, address);
    return b;
}
static void end_phase_if_over(SharedBarrier& b) {
    if (b.pending != 0 || b.bytes != 0) return;
    b.phase ^= 1;
    b.pending = b.count;
}
void barrier_init(u32 barrier, u32 count) {
    if (count == 0 || count >= 1 << 20) fail("barrier_init of 0x%08x with count %u", barrier, count);
    SharedBarrier b{};
    b.pending = b.count = count, b.tag = TAG;
    std::memcpy(at(barrier, 8, 8, "barrier_init"), &b, 8);
}
void barrier_arrive(u32 barrier) {
    SharedBarrier& b = shared_barrier(barrier, "barrier_arrive");
    if (b.pending == 0) fail("barrier_arrive at 0x%08x: all %u arrivals of this phase have come", barrier, (u32)b.count);
    b.pending--;
    end_phase_if_over(b);
    pause();
}
static void change_bytes(SharedBarrier& b, u32 barrier, long long by) {
    const long long bytes = b.bytes + by;
    if (bytes >= 1 << 20 || bytes <= -(1 << 20))
        fail("barrier at 0x%08x: %lld bytes under way, there can be 2^20 - 1", barrier, bytes);
    b.bytes = bytes;
}
void barrier_expect(u32 barrier, u32 bytes) {
    change_bytes(shared_barrier(barrier, "barrier_expect"), barrier, bytes);
    barrier_arrive(barrier);
}
void barrier_complete(u32 barrier, u32 bytes) {
    SharedBarrier& b = shared_barrier(barrier, "complete_tx");
    change_bytes(b, barrier, -(long long)bytes);
    end_phase_if_over(b);
}
void barrier_wait(u32 barrier, u32 parity) {
    if (parity > 1) fail("barrier_wait: parity %u", parity);
    auto over = [=] { return shared_barrier(barrier, "barrier_wait").phase != parity; };
    wait_until(over, "barrier_wait (barrier, parity)", barrier, parity);
}

} // namespace emulator
