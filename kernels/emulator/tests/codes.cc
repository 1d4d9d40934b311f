// codes_hopper_sm90a.cu against f64 of the dequantized weight.
#include "emulator.h"
#include "linear/codes_hopper_sm90a.cu"
using namespace emulator;

#define KERNEL_OF(NAME) (std::is_same_v<T, bf16> ? codes_hopper_##NAME##_bf16 : codes_hopper_##NAME##_f16)

// Shared memory of a block, as codes_hopper.rs has it.
static u32 shared_bytes(u32 tile) {
    const u32 stages = tile == 256 ? 5 : tile == 128 ? 8 : 12;
    return stages * (tile * 128 + 2 * 128 * 32) + 4 * 16 * 68 * 4 + 256 * 4 + 25 * 8 + 1024;
}

// A weight [rows, row] in blocks of 2^shift codes, their scales quantized too if `nested`; and its values as T.
template <typename T> struct Quantized {
    u32 rows, row, shift;
    bool nested, fp4;
    Array<u8> codes, scale_codes;
    Array<float> absmax, nested_absmax, map, offset;
    Array<T> values;

    Quantized(u32 rows, u32 row, u32 shift, bool nested, bool fp4)
        : rows(rows), row(row), shift(shift), nested(nested), fp4(fp4), codes((u64)rows * row / 2),
          scale_codes(((u64)rows * row + (1 << shift) - 1) >> shift), absmax(Array<float>::random(scale_codes.count)),
          nested_absmax(Array<float>::random((scale_codes.count + 15) / 16)), map(Array<float>::random(256)),
          offset(Array<float>::random(1)), values((u64)rows * row) {
        for (u64 i = 0; i < codes.count; i++) codes[i] = (u8)random_u32();
        for (u64 i = 0; i < scale_codes.count; i++) scale_codes[i] = (u8)random_u32();
        for (u64 i = 0; i < values.count; i++) {
            const u64 block = i >> shift;
            const float scale = nested ? map[scale_codes[block]] * nested_absmax[block / 16] + offset[0] : absmax[block];
            values[i] = rounded<T>(CODE_VALUES[fp4][i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * scale);
        }
    }
};

struct Shape {
    u32 tokens, columns, depth, rank;
};
// How scales are kept.
struct Kind {
    u32 shift;
    bool nested, fp4;
};
// What is added to the product: nothing, another matrix, or what `out` held.
enum Added { NOTHING, IN, OUT };

template <typename T, typename O>
static bool product(bool forward, u32 tile, u32 shares, const Shape& s, const Kind& kind, float scale, Added added) {
    const u32 rows = forward ? s.columns : s.depth, row = forward ? s.depth : s.columns, box = forward ? 128 : 64;
    const Quantized<T> w(rows, row, kind.shift, kind.nested, kind.fp4);
    const auto x = Array<T>::random((u64)s.tokens * s.depth, 0.3f), x2 = Array<T>::random((u64)s.tokens * s.rank, 0.3f);
    const auto b2 = Array<T>::random((u64)s.columns * s.rank);
    const auto before = Array<O>::random((u64)s.tokens * s.columns, 4);
    Array<O> out(before.count);
    if (added == OUT) std::copy(before.data, before.data + before.count, out.data);
    const u32 tiles = (s.tokens + tile - 1) / tile * ((s.columns + 127) / 128);
    Array<float4> parts(shares > 1 ? (u64)tiles * shares * tile * 128 / 4 : 0);

    const auto left = tensor_map<TensorMap>(x.data, s.tokens, s.depth, tile, 64);
    const auto codes = tensor_map<TensorMap>(w.codes.data, rows, row / 2, box, 32, 32);
    const auto left2 = s.rank ? tensor_map<TensorMap>(x2.data, s.tokens, s.rank, tile, 64) : left;
    const auto right2 = !s.rank ? left
                        : forward ? tensor_map<TensorMap>(b2.data, s.columns, s.rank, box, 64)
                                  : tensor_map<TensorMap>(b2.data, s.rank, s.columns, box, 64);
    auto kernel = forward ? (tile == 256 ? KERNEL_OF(forward_256) : tile == 128 ? KERNEL_OF(forward_128) : KERNEL_OF(forward_64))
                  : tile == 256 ? KERNEL_OF(input_grad_256)
                  : tile == 128 ? KERNEL_OF(input_grad_128)
                                : KERNEL_OF(input_grad_64);
    // Blocks of a cluster run at once here, others one after another.
    launch(kernel, tiles * shares, 384, shared_bytes(tile), shares, left, codes, left2, right2,
           kind.nested ? (const void*)w.scale_codes.data : w.absmax.data, kind.nested ? w.nested_absmax.data : nullptr,
           w.map.data, w.offset.data, kind.shift, 4, kind.fp4, (void*)out.data, added == IN ? before.data : nullptr, parts.data,
           s.tokens, s.columns, s.depth, s.rank, scale, added == OUT, std::is_same_v<O, float>, shares);
    bool good = true;
    for (u32 count : arrived) good &= count == 0;
    if (!good) printf("WRONG: counters are left behind\n");
    char name[150];
    snprintf(name, sizeof name, "%s, tile %u, %u shares: %u x %u x %u, rank %u, blocks of 2^%u, nested %d",
             forward ? "forward" : "input gradient", tile, shares, s.tokens, s.columns, s.depth, s.rank, kind.shift, kind.nested);
    return good & compare(name, out.data, s.tokens, s.columns, s.depth + s.rank + 8, [&](u64 i, u64 j) {
        Expected sum;
        for (u64 k = 0; k < s.depth; k++) {
            sum.add((double)scale * x.at(i * s.depth + k) * w.values.at(forward ? j * s.depth + k : k * s.columns + j));
        }
        for (u64 k = 0; k < s.rank; k++) {
            sum.add((double)scale * x2.at(i * s.rank + k) * b2.at(forward ? j * s.rank + k : k * s.columns + j));
        }
        if (added != NOTHING) sum.add(before.at(i * s.columns + j));
        return sum;
    });
}

int main() {
    bool good = true;
    shared_skew = random_u32() % 64 * 16; // the kernel aligns its ring by itself
    const Kind plain{6, false, false}, nested{6, true, false}, fp4{7, true, true}, large{12, true, false};
    for (bool forward : {true, false}) {
        for (u32 tile : {256u, 128u, 64u}) {
            good &= product<bf16, bf16>(forward, tile, 1, {tile, 256, 448, 0}, nested, 1, NOTHING);
            good &= product<bf16, bf16>(forward, tile, 1, {tile - 56, 320, 192, 8}, plain, 0.5f, IN);
            good &= product<f16, float>(forward, tile, 1, {tile + 44, 192, 64, 16}, fp4, 1, IN);
            good &= product<bf16, float>(forward, tile, 1, {1, 64, 64, 64}, nested, 2, OUT);
            good &= product<f16, f16>(forward, tile, 2, {tile + 30, 192, 320, 72}, large, 1, OUT);
            good &= product<bf16, bf16>(forward, tile, 3, {tile - 7, 192, 320, 0}, nested, 1, NOTHING);
            good &= product<bf16, bf16>(forward, tile, 4, {tile, 128, 448, 16}, nested, 1, IN);
            good &= product<f16, float>(forward, tile, 7, {33, 64, 384, 8}, plain, 0.5f, OUT);
            good &= product<bf16, float>(forward, tile, 2, {20, 64, 64, 0}, nested, 1, NOTHING); // one has nothing to do
        }
    }
    return !good;
}
