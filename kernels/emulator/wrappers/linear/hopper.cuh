inline void barrier_init(u32 barrier, u32 count) { emulator::barrier_init(barrier, count); }
inline void barriers_ready() {}
inline void barrier_arrive(u32 barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_expect(u32 barrier, u32 bytes) { emulator::barrier_expect(barrier, bytes); }
inline void barrier_wait(u32 barrier, u32 parity) { emulator::barrier_wait(barrier, parity); }
inline void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    emulator::copy_box(to, map, column, row, barrier);
}
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
