inline void barrier_init(u32 barrier, u32 count) { emulator::barrier_init(barrier, count); }
inline void barriers_ready() {}
inline void barrier_arrive(u32 barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_expect(u32 barrier, u32 bytes) { emulator::barrier_expect(barrier, bytes); }
inline void barrier_wait(u32 barrier, u32 parity) { emulator::barrier_wait(barrier, parity); }
inline void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    emulator::copy_box(to, map, column, row, barrier);
}
inline void copy_box_to_both(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    emulator::copy_box(to, map, column, row, barrier, 3);
}
inline void barrier_arrive_there(u32 there) { emulator::barrier_arrive(there); }
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
inline u32 cluster_size() { return emulator::cluster_size(); }
inline u32 cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_meet() {
    emulator::cluster_arrive();
    emulator::cluster_wait();
}
inline u32 in_block(u32 address, u32 rank) { return emulator::map_rank(address, rank); }
inline float4 load_float4_there(u32 there) { return emulator::load<float4>(there); }
