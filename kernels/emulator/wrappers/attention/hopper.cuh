inline void publish_shared() { emulator::publish(); }
inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const u32 from[4] = {a, b, c, d};
    emulator::store_matrices(address, from);
}
