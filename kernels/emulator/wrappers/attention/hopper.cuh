template <typename T, int S> void multiply_held(float (&d)[S], const u32 (&a)[4], u64 b, u32 keep) {
    emulator::product_held<T, true>(d, a, b, keep);
}
template <int THREADS> void meet(int id) { emulator::bar_sync(id, THREADS); }
inline void publish_shared() { emulator::publish(); }
