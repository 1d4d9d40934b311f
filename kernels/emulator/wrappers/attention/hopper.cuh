template <typename T, int S> void multiply_held(float (&d)[S], const u32 (&a)[4], u64 b, u32 keep) {
    emulator::product_held<T, true>(d, a, b, keep);
}
inline void publish_shared() { emulator::publish(); }
inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const u32 from[4] = {a, b, c, d};
    emulator::store_matrices(address, from);
}
