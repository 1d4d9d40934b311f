// Copies that are done later: of the tensor memory accelerator (TMA), bulk copies, st.async and cp.async. Places in shared
// memory that they will write are poisoned (NaN) until then.
#pragma once
#include "machine.h"

namespace emulator {

// What the 128 bytes of a TensorMap hold here.
struct Map {
    u64 magic;
    u8* base;
    u64 rows, columns, pitch; // pitch: bytes from row to row
    u32 element;              // bytes
    u32 box_rows, box_columns;
    u32 swizzle; // 0, 32, 64 or 128
};
constexpr u64 MAP_MAGIC = 0x70616d726f736e74;
// With what cuTensorMapEncodeTiled would refuse.
void check_map(const Map& map);
// A matrix [rows, columns], `stride` elements from row to row (0: columns). TENSOR_MAP: the kernels' struct of 128 bytes.
template <typename TENSOR_MAP, typename T>
TENSOR_MAP tensor_map(const T* base, u64 rows, u64 columns, u32 box_rows, u32 box_columns, u32 swizzle = 128,
                      u64 stride = 0) {
    static_assert(sizeof(TENSOR_MAP) == 128 && sizeof(Map) <= 128);
    const u64 pitch = (stride ? stride : columns) * sizeof(T);
    const Map map{MAP_MAGIC, (u8*)base, rows, columns, pitch, sizeof(T), box_rows, box_columns, swizzle};
    check_map(map);
    TENSOR_MAP out{};
    std::memcpy(&out, &map, sizeof map);
    return out;
}

// cp.async.bulk.tensor.2d, global to shared memory. `mask`: the blocks of the cluster that get it, at the same place and
// barrier of theirs (multicast); 0: only the one that `to` belongs to.
void copy_box(u32 to, const void* map, int column, int row, u32 barrier, u32 mask = 0);
// cp.async.bulk.tensor.2d, shared to global memory, in a group of BULK.
void store_box(const void* map, int column, int row, u32 from);
// cp.async.bulk of multiples of 16 bytes: global to shared memory; shared to global memory, and added to floats there
// (cp.reduce), both in a group of BULK.
void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier);
void store_bulk(void* to, u32 from, u32 bytes);
void add_bulk(float* to, u32 from, u32 bytes);
// st.async of 4, 8 or 16 bytes to a block of the cluster, which count at a barrier of that block.
void store_async(u32 to, const void* x, u32 bytes, u32 barrier);
// cp.async of `bytes` (4, 8, 16), of which `valid` are read and the others are zeros; in a group of CP_ASYNC.
void copy_async(u32 to, const void* from, u32 bytes, u32 valid);

// With a swizzle of so many bytes, what would lie at this shared address lies there: 16-byte chunk c of a row of 128 bytes
// at c ^ (row % 8); of rows of 64, or 32, with bits of the row's place among the 128-byte lines likewise.
inline u32 swizzled(u32 address, u32 swizzle) {
    const u32 bits = swizzle ? swizzle / 16 - 1 : 0;
    return address ^ (address >> 7 & bits) << 4;
}

} // namespace emulator
