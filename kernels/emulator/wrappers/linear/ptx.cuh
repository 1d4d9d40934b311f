inline void copy16(u32 to, const void* from, bool valid) { emulator::copy_async(to, from, 16, valid ? 16 : 0); }
inline void commit_copies() { emulator::commit(emulator::CP_ASYNC); }
inline void wait_copies(int pending) { emulator::wait_groups(emulator::CP_ASYNC, pending > 3 ? 3 : pending); }
inline void load_matrices(u32 (&to)[4], u32 address) { emulator::load_matrices(to, address, false); }
inline void load_matrices_transposed(u32 (&to)[4], u32 address) { emulator::load_matrices(to, address, true); }
template <typename T> void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::mma(d, a, b0, b1, emulator::BF16<T>);
}
inline void store16(u32 address, u32 x, u32 y, u32 z, u32 w) { emulator::store(address, make_uint4(x, y, z, w)); }
template <typename T> void store_element(u32 address, T x) { emulator::store(address, x); }
inline void store_float(u32 address, float x) { emulator::store(address, x); }
inline uint4 load_shared_uint4(u32 address) { return emulator::load<uint4>(address); }
inline uint2 load_shared_uint2(u32 address) { return emulator::load<uint2>(address); }
inline void store_float4(u32 address, float x, float y, float z, float w) { emulator::store(address, make_float4(x, y, z, w)); }
inline void store_float2(u32 address, float x, float y) { emulator::store(address, make_float2(x, y)); }
inline u32 load_pair(u32 address) { return emulator::load<u32>(address); }
inline u32 load_element(u32 address) { return emulator::load<unsigned short>(address); }
inline u32 spread_tops(u32 x, u32 y) {
    auto ones = [](u32 word, int byte) { return word >> (byte * 8 + 7) & 1 ? 0xffu : 0u; };
    return ones(y, 0) | ones(x, 0) << 8 | ones(y, 1) << 16 | ones(x, 1) << 24;
}
