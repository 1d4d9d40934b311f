inline void barrier_init(u32 barrier, u32 count) { emulator::barrier_init(barrier, count); }
inline void barriers_ready() {}
inline void barrier_arrive(u32 barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_expect(u32 barrier, u32 bytes) { emulator::barrier_expect(barrier, bytes); }
inline void barrier_wait(u32 barrier, u32 parity) { emulator::barrier_wait(barrier, parity); }
inline void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    emulator::copy_box(to, map, column, row, barrier);
}
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
template <int THREADS> void meet(int id) { emulator::bar_sync(id, THREADS); }
inline u32 cluster_size() { return emulator::cluster_size(); }
inline u32 cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_meet() {
    emulator::cluster_arrive();
    emulator::cluster_wait();
}
inline u32 in_block(u32 address, u32 rank) { return emulator::map_rank(address, rank); }
inline float4 load_float4_there(u32 there) { return emulator::load<float4>(there); }
inline void say(u32* word, u32 value) { *word = value; }
inline u32 hear(const u32* word) {
    emulator::pause();
    return *word;
}
template <int WORDS> void await_words(const u32* words, u32 value) {
    auto there = [=] {
        for (int i = 0; i < WORDS; i++)
            if (words[i] != value) return false;
        return true;
    };
    emulator::wait_until(there, "await_words (value)", value);
}
inline bool is_last(u32* count, u32 last) {
    const u32 before = *count;
    *count = before >= last - 1 ? 0 : before + 1;
    return before == last - 1;
}
inline void copies_see_memory() {}
