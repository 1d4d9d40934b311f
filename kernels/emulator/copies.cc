// See copies.h.
#include "copies.h"
#include <algorithm>
#include <vector>

namespace emulator {

static u8* poison(u32 address, u32 bytes, u32 alignment, const char* what) {
    return (u8*)std::memset(at(address, bytes, alignment, what), 0xff, bytes);
}

// ---- Boxes ----
void check_map(const Map& m) {
    const u32 width = m.box_columns * m.element;
    const bool swizzle = m.swizzle == 0 || ((m.swizzle == 32 || m.swizzle == 64 || m.swizzle == 128) && width <= m.swizzle);
    const bool matrix = m.rows > 0 && m.columns > 0 && m.columns * m.element <= m.pitch && m.pitch < 1ull << 40;
    auto side = [](u32 size) { return size >= 1 && size <= 256; };
    const bool box = side(m.box_rows) && side(m.box_columns) && width % 16 == 0;
    if (!swizzle || !matrix || !box || (u64)m.base % 16 || m.pitch % 16)
        fail("tensor map: [%llu, %llu] of %u bytes, %llu bytes from row to row, at %p, in boxes of %u x %u, swizzle %u",
             m.rows, m.columns, m.element, m.pitch, (void*)m.base, m.box_rows, m.box_columns, m.swizzle);
}
static u32 box_bytes(const Map& m) { return m.box_rows * m.box_columns * m.element; }
static Map map_at(const void* p, const char* what) {
    Map m;
    std::memcpy(&m, p, sizeof m);
    if (m.magic != MAP_MAGIC) fail("%s: no tensor map at %p", what, p);
    if ((u64)p % 64) fail("%s: the tensor map at %p is at no multiple of 64", what, p);
    if (m.swizzle && m.box_columns * m.element != m.swizzle)
        fail("%s: boxes narrower than their swizzle are not emulated", what);
    return m;
}
// Calls f(shared address, global address, skip, size) for each 16 bytes of a box in shared memory. `size` bytes of them,
// from byte `skip` on, are inside of the matrix.
template <typename F> static void walk_box(const Map& m, u32 shared, int column, int row, F f) {
    const u32 width = m.box_columns * m.element;
    const long long end = (long long)(m.columns * m.element);
    for (u32 i = 0; i < m.box_rows; i++) {
        const long long r = (long long)row + i;
        const bool inside = r >= 0 && r < (long long)m.rows;
        for (u32 x = 0; x < width; x += 16) {
            const long long first = (long long)column * m.element + x;
            const long long low = std::clamp(first, 0ll, end), high = inside ? std::clamp(first + 16, 0ll, end) : low;
            f(swizzled(shared + i * width + x, m.swizzle), m.base + r * m.pitch + low, (u32)(low - first), (u32)(high - low));
        }
    }
}
static void copy_box_to(u32 to, const Map& m, int column, int row, u32 barrier) {
    at(barrier, 8, 8, "copy_box's barrier");
    poison(to, box_bytes(m), 128, "copy_box");
    later([=] {
        walk_box(m, to, column, row, [&](u32 address, const u8* from, u32 skip, u32 size) {
            u8 chunk[16] = {}; // zeros outside of the matrix
            if (size) std::memcpy(chunk + skip, from, size);
            std::memcpy(at(address, 16, 16, "copy_box"), chunk, 16);
        });
        barrier_complete(barrier, box_bytes(m));
    });
}
void copy_box(u32 to, const void* map, int column, int row, u32 barrier, u32 mask) {
    const Map m = map_at(map, "copy_box");
    if (mask == 0) copy_box_to(to, m, column, row, barrier);
    for (u32 rank = 0; rank < 16; rank++) {
        if (mask >> rank & 1) copy_box_to(map_rank(to, rank), m, column, row, map_rank(barrier, rank));
    }
}
void store_box(const void* map, int column, int row, u32 from) {
    const Map m = map_at(map, "store_box");
    at(from, box_bytes(m), 128, "store_box");
    later_in(BULK, [=] {
        walk_box(m, from, column, row, [&](u32 address, u8* to, u32 skip, u32 size) {
            check_published(address, 16, "store_box");
            if (size) std::memcpy(to, at(address, 16, 16, "store_box") + skip, size);
        });
    });
}

// ---- Rows of bytes ----
static void check_bulk(const void* global, u32 bytes, const char* what) {
    if (bytes % 16 || (u64)global % 16) fail("%s: %u bytes at %p: no multiples of 16", what, bytes, global);
}
void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    check_bulk(from, bytes, "copy_bulk");
    at(barrier, 8, 8, "copy_bulk's barrier");
    poison(to, bytes, 16, "copy_bulk");
    later([=] {
        std::memcpy(at(to, bytes, 16, "copy_bulk"), from, bytes);
        barrier_complete(barrier, bytes);
    });
}
// The bytes of a copy from shared to global memory, at its end.
static const u8* published(u32 from, u32 bytes, const char* what) {
    check_published(from, bytes, what);
    return at(from, bytes, 16, what);
}
void store_bulk(void* to, u32 from, u32 bytes) {
    check_bulk(to, bytes, "store_bulk");
    at(from, bytes, 16, "store_bulk");
    later_in(BULK, [=] { std::memcpy(to, published(from, bytes, "store_bulk"), bytes); });
}
void add_bulk(float* to, u32 from, u32 bytes) {
    check_bulk(to, bytes, "add_bulk");
    at(from, bytes, 16, "add_bulk");
    later_in(BULK, [=] {
        const float* x = reinterpret_cast<const float*>(published(from, bytes, "add_bulk"));
        for (u32 i = 0; i < bytes / 4; i++) to[i] += x[i];
    });
}
void store_async(u32 to, const void* x, u32 bytes, u32 barrier) {
    if (to >> 24 != barrier >> 24) fail("st.async: the barrier is not of the block that is written to");
    at(barrier, 8, 8, "st.async's barrier");
    poison(to, bytes, bytes, "st.async");
    const std::vector<u8> kept((const u8*)x, (const u8*)x + bytes);
    later([=] {
        std::memcpy(at(to, bytes, bytes, "st.async"), kept.data(), bytes);
        barrier_complete(barrier, bytes);
    });
}
void copy_async(u32 to, const void* from, u32 bytes, u32 valid) {
    if (valid && (u64)from % bytes) fail("cp.async: %u bytes from %p", bytes, from);
    poison(to, bytes, bytes, "cp.async");
    later_in(CP_ASYNC, [=] {
        u8* p = at(to, bytes, bytes, "cp.async");
        std::memset(p, 0, bytes);
        if (valid) std::memcpy(p, from, valid);
    });
}

} // namespace emulator
