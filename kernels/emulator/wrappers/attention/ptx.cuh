inline void copy_async16(u32 shared, const void* global, bool valid) {
    emulator::copy_async(shared, global, 16, valid ? 16 : 0);
}
inline void copy_async4(u32 shared, const void* global, bool valid) {
    emulator::copy_async(shared, global, 4, valid ? 4 : 0);
}
inline void store_shared(u32 address, u32 x) { emulator::store(address, x); }
inline float load_shared_float(u32 address) { return emulator::load<float>(address); }
inline float2 load_shared_float2(u32 address) { return emulator::load<float2>(address); }
