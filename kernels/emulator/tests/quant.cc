// gemm_quant_bf16.cu (mma.sync, ldmatrix, cp.async and decoded 4-bit weights) against f64 of the dequantized weight.
#include "emulator.h"
#include "linear/gemm_quant_bf16.cu"
using namespace emulator;

static Array<u8> random_bytes(u64 count) {
    Array<u8> bytes(count);
    for (u64 i = 0; i < count; i++) bytes.data[i] = (u8)(int)(random_float() * 128 + 128);
    return bytes;
}
// W is [n, k] forward, [k, n] for the input gradient, in blocks of 64 along its rows; `nested`: their scales are codes, too.
static bool check(bool forward, u32 tile_rows, u32 m, u32 n, u32 k, u32 rank, bool nested) {
    const u64 count = (u64)n * k, blocks = (count + 63) / 64;
    const auto a = Array<bf16>::random((u64)m * k);
    const auto a2 = Array<bf16>::random((u64)m * rank), b2 = Array<bf16>::random((u64)n * rank);
    const auto codes = random_bytes(count / 2), nested_codes = random_bytes(blocks);
    const auto absmax = Array<float>::random(blocks), absmax2 = Array<float>::random((blocks + 255) / 256);
    const auto map = Array<float>::random(256), offset = Array<float>::random(1);
    Array<bf16> out((u64)m * n), w(count);
    for (u64 i = 0; i < count; i++) {
        const u64 block = i / 64;
        const float of_code = map.data[nested_codes.data[block]] * absmax2.data[block / 256] + offset.data[0];
        const float scale = nested ? of_code : absmax.data[block];
        const u8 byte = codes.data[i / 2];
        w.data[i] = rounded<bf16>(CODE_VALUES[0][i % 2 ? byte & 15 : byte >> 4] * scale);
    }
#define KERNEL(DIRECTION)                                                                                              \
    (tile_rows == 256   ? gemm_quant_##DIRECTION##_256_bf16                                                            \
     : tile_rows == 128 ? gemm_quant_##DIRECTION##_128_bf16                                                            \
                        : gemm_quant_##DIRECTION##_64_bf16)
    constexpr u32 STAGES = 2;
    const u32 shared = STAGES * tile_rows * 128 + 2 * 128 * 128 + (256 + 16) * 4; // a, decoded b, map and code book
    launch(forward ? KERNEL(forward) : KERNEL(input_grad), (m + tile_rows - 1) / tile_rows * ((n + 127) / 128),
           tile_rows == 256 ? 256 : 128, shared, 1, out.data, nullptr, a.data, codes.data,
           nested ? (const void*)nested_codes.data : absmax.data, nested ? absmax2.data : nullptr, map.data, a2.data,
           b2.data, m, n, k, rank, 1.0f, offset.data, 6, 8, 0, 0, 0, STAGES);
    char name[100];
    snprintf(name, sizeof name, "%s, tiles of %u rows, %u x %u x %u, rank %u, nested %d", forward ? "forward" : "input_grad",
             tile_rows, m, n, k, rank, nested);
    return compare(name, out.data, m, n, k + rank, [&](u64 i, u64 j) {
        Expected sum;
        for (u32 x = 0; x < k; x++) sum.add(a.at(i * k + x) * w.at(forward ? j * k + x : (u64)x * n + j));
        for (u32 x = 0; x < rank; x++) sum.add(a2.at(i * rank + x) * b2.at(forward ? j * rank + x : (u64)x * n + j));
        return sum;
    });
}
int main() {
    bool good = true;
    for (bool forward : {true, false}) {
        for (u32 tile_rows : {256u, 128u, 64u})
            good &= check(forward, tile_rows, 100, 160, 192, tile_rows == 64 ? 0 : 16, tile_rows != 128);
    }
    return !good;
}
