inline uint4 load_once(const void* p, bool valid) { return valid ? *(const uint4*)p : make_uint4(0, 0, 0, 0); }
inline uint2 load_once8(const void* p, bool valid) { return valid ? *(const uint2*)p : make_uint2(0, 0); }
inline uint4 load_cached(const void* p, bool valid) { return valid ? *(const uint4*)p : make_uint4(0, 0, 0, 0); }
inline uint4 load_now(const void* p, bool valid) { return valid ? *(const uint4*)p : make_uint4(0, 0, 0, 0); }
inline u32 load_cached4(const void* p, bool valid) { return valid ? *(const u32*)p : 0; }
inline u32 transpose8(u32 pair) { return emulator::transpose_matrix(pair); }
inline u32 load_once4(const void* p, bool valid) { return valid ? *(const u32*)p : 0; }
