inline void barrier_init(u32 barrier, u32 count) { emulator::barrier_init(barrier, count); }
inline void barriers_ready() {}
inline void barrier_arrive(u32 barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_expect(u32 barrier, u32 bytes) { emulator::barrier_expect(barrier, bytes); }
inline void barrier_wait(u32 barrier, u32 parity) { emulator::barrier_wait(barrier, parity); }
inline void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    emulator::copy_box(to, map, column, row, barrier);
}
inline void store_box(const TensorMap* map, int column, int row, u32 from) { emulator::store_box(map, column, row, from); }
inline void stores_commit() { emulator::commit(emulator::BULK); }
// (The emulator makes no difference between read and written.)
template <int PENDING> void stores_read() { emulator::wait_groups(emulator::BULK, PENDING); }
inline void prefetch_box(const TensorMap*, int, int) {}
inline void prefetch_map(const TensorMap*) {}
template <int REGISTERS> void give_registers() {}
template <int REGISTERS> void take_registers() {}
inline void products_begin() { emulator::products_fence(); }
inline void products_commit() { emulator::products_commit(); }
template <int PENDING> void products_wait() { emulator::products_wait(PENDING); }
template <int N> void pin(float (&)[N]) {}
template <typename T, bool A_COLUMNS, bool B_COLUMNS, int S> void multiply_shared(float (&d)[S], u64 a, u64 b, u32 keep) {
    emulator::product_shared<T, A_COLUMNS, B_COLUMNS>(d, a, b, keep);
}
inline void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) { emulator::copy_bulk(to, from, bytes, barrier); }
inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const u32 from[4] = {a, b, c, d};
    emulator::store_matrices(address, from);
}
inline void pin(u32&) {}
inline void pin(float&) {}
template <int N> void pin(u32 (&)[N][4]) {}
template <typename T, bool B_COLUMNS, int S> void multiply_held(float (&d)[S], const u32 (&a)[4], u64 b, u32 keep) {
    emulator::product_held<T, B_COLUMNS>(d, a, b, keep);
}
template <int THREADS> void meet(int id) { emulator::bar_sync(id, THREADS); }
// Blocks that wait for one another run as a cluster here, an OS thread each.
inline void arrive_at(u32* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }
inline void wait_at(u32* counter, u32 blocks) {
    emulator::wait_until([=] { return __atomic_load_n(counter, __ATOMIC_ACQUIRE) >= blocks; }, "wait_at (blocks)", blocks);
}
inline void leave(u32* counter, u32 blocks) {
    if (__atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL) == 2 * blocks - 1) __atomic_store_n(counter, 0, __ATOMIC_RELEASE);
}
inline void publish_shared() { emulator::publish(); }
