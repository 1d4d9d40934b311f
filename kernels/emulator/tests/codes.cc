// codes_hopper.cuh against f64 of the dequantized weight: products, gate and up with SwiGLU, and its gradients.
#include "emulator.h"
#include "linear/codes_bf16_sm90a.cu"
#undef TYPE
#include "linear/codes_f16_sm90a.cu"
using namespace emulator;

#define KERNEL_OF(NAME) (std::is_same_v<T, bf16> ? codes_hopper_##NAME##_bf16 : codes_hopper_##NAME##_f16)

// Shared memory of a block, as codes_hopper.rs has it.
static u32 shared_bytes(u32 tile) {
    return (tile == 256 ? 4 : 5) * ((tile + 128) * 128 + 128 * 32) + 2 * 32 * 68 * 4 + 2 * 5 * 8 + 1024;
}

// A weight [rows, row] in blocks of 2^shift codes, their scales quantized too if `nested`; and its values as T.
template <typename T> struct Quantized {
    u32 rows, row, shift;
    bool nested, fp4;
    Array<u8> codes, scale_codes;
    Array<float> absmax, nested_absmax, map, offset;
    Array<T> values;

    Quantized(u32 rows, u32 row, u32 shift = 6, bool nested = true, bool fp4 = false)
        : rows(rows), row(row), shift(shift), nested(nested), fp4(fp4), codes((u64)rows * row / 2),
          scale_codes(((u64)rows * row >> shift) + 1), absmax(Array<float>::random(scale_codes.count)),
          nested_absmax(Array<float>::random(scale_codes.count / 256 + 1)), map(Array<float>::random(256)),
          offset(Array<float>::random(1)), values((u64)rows * row) {
        for (u64 i = 0; i < codes.count; i++) codes[i] = (u8)random_u32();
        for (u64 i = 0; i < scale_codes.count; i++) scale_codes[i] = (u8)random_u32();
        for (u64 i = 0; i < values.count; i++) {
            const u64 block = i >> shift;
            const float scale = nested ? map[scale_codes[block]] * nested_absmax[block / 256] + offset[0] : absmax[block];
            values[i] = rounded<T>(CODE_VALUES[fp4][i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * scale);
        }
    }
    TensorMap box(u32 box_rows) const { return tensor_map<TensorMap>(codes.data, rows, row / 2, box_rows, 32, 32); }
    const void* scales() const { return nested ? (const void*)scale_codes.data : absmax.data; }
    const float* nested_scales() const { return nested ? nested_absmax.data : nullptr; }
};

// x [tokens, depth] and a weight that has `columns` outputs: [columns, depth] forward, [depth, columns] otherwise; with a pair.
template <typename T> struct Operand {
    bool forward;
    u32 tokens, columns, depth, rank;
    Quantized<T> weight;
    Array<T> x, x2, b2;

    Operand(bool forward, u32 tokens, u32 columns, u32 depth, u32 rank, Quantized<T> weight)
        : forward(forward), tokens(tokens), columns(columns), depth(depth), rank(rank), weight(std::move(weight)),
          x(Array<T>::random((u64)tokens * depth, 0.3f)), x2(Array<T>::random((u64)tokens * rank, 0.3f)),
          b2(Array<T>::random((u64)columns * rank)) {}
    TensorMap left(u32 tile) const { return tensor_map<TensorMap>(x.data, tokens, depth, tile, 64); }
    TensorMap left2(u32 tile) const { return rank ? tensor_map<TensorMap>(x2.data, tokens, rank, tile, 64) : left(tile); }
    TensorMap right2(u32 box_rows) const {
        if (!rank) return left(64);
        return forward ? tensor_map<TensorMap>(b2.data, columns, rank, box_rows, 64)
                       : tensor_map<TensorMap>(b2.data, rank, columns, box_rows, 64);
    }
    Expected sum(const Array<T>& x, u64 i, u64 j, double scale = 1) const {
        Expected sum;
        for (u64 k = 0; k < depth; k++) {
            sum.add(scale * x.at(i * depth + k) * weight.values.at(forward ? j * depth + k : k * columns + j));
        }
        for (u64 k = 0; k < rank; k++) {
            sum.add(scale * x2.at(i * rank + k) * b2.at(forward ? j * rank + k : k * columns + j));
        }
        return sum;
    }
};

struct Shape {
    u32 tokens, columns, depth, rank;
    u32 cluster, blocks; // blocks: of a grid without clusters, at most
    u32 grid(u32 tile, u32 width) const {
        const u32 tiles = ((tokens + tile - 1) / tile) * ((columns + width - 1) / width);
        return cluster > 1 ? tiles * cluster : std::min(tiles, blocks);
    }
};

template <typename T, typename O>
static bool product(bool forward, u32 tile, const Shape& s, u32 shift, bool nested, bool fp4, float scale, bool in, bool add) {
    const u32 rows = forward ? s.columns : s.depth, row = forward ? s.depth : s.columns, box = forward ? 128 : 64;
    const Operand<T> o(forward, s.tokens, s.columns, s.depth, s.rank, Quantized<T>(rows, row, shift, nested, fp4));
    const auto more = Array<O>::random((u64)s.tokens * s.columns, 4);
    Array<O> out(more.count);
    if (add) std::memcpy(out.data, more.data, sizeof(O) * more.count);
    auto kernel = forward ? (tile == 256 ? KERNEL_OF(forward_256) : KERNEL_OF(forward_128))
                          : (tile == 256 ? KERNEL_OF(input_grad_256) : KERNEL_OF(input_grad_128));
    launch(kernel, s.grid(tile, 128), 384, shared_bytes(tile), s.cluster, o.left(tile), o.weight.box(box), o.left2(tile),
           o.right2(box), o.weight.scales(), o.weight.nested_scales(), o.weight.map.data, o.weight.offset.data, shift, 8,
           fp4, s.tokens, s.columns, s.depth, s.rank, (void*)out.data, in ? more.data : nullptr, scale, add,
           std::is_same_v<O, float>);
    char name[150];
    snprintf(name, sizeof name, "%s, tile %u, cluster %u: %u x %u x %u, rank %u, blocks of 2^%u, nested %d",
             forward ? "forward" : "input gradient", tile, s.cluster, s.tokens, s.columns, s.depth, s.rank, shift, nested);
    return compare(name, out.data, s.tokens, s.columns, s.depth + s.rank + 8, [&](u64 i, u64 j) {
        Expected sum = o.sum(o.x, i, j, scale);
        if (in || add) sum.add(more.at(i * s.columns + j));
        return sum;
    });
}

static double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

// `rank`: of gate, and `rank1` of up.
template <typename T> static bool gated(const Shape& s, u32 rank1, bool kept) {
    const Operand<T> gate(true, s.tokens, s.columns, s.depth, s.rank, Quantized<T>(s.columns, s.depth));
    const Operand<T> up(true, s.tokens, s.columns, s.depth, rank1, Quantized<T>(s.columns, s.depth));
    const u64 count = (u64)s.tokens * s.columns;
    Array<T> gates(count), ups(count), out(count);
    const Quantized<T> &g = gate.weight, &u = up.weight;
    launch(KERNEL_OF(gated), s.grid(256, 64), 384, shared_bytes(256), s.cluster, gate.left(256), g.box(64), gate.left2(256),
           gate.right2(64), g.scales(), g.nested_scales(), g.map.data, g.offset.data, 6, 8, 0, s.tokens, s.columns, s.depth,
           s.rank, u.box(64), up.left2(256), up.right2(64), u.scales(), u.nested_scales(), u.map.data, u.offset.data, rank1,
           kept ? (void*)gates.data : nullptr, kept ? (void*)ups.data : nullptr, (void*)out.data);
    bool good = true;
    if (kept) {
        const double roundings = s.depth + s.rank + rank1 + 8;
        good &= compare("gate", gates.data, s.tokens, s.columns, roundings, [&](u64 i, u64 j) { return gate.sum(gate.x, i, j); });
        good &= compare("up", ups.data, s.tokens, s.columns, roundings, [&](u64 i, u64 j) { return up.sum(gate.x, i, j); });
    }
    // Of gate and up as they are rounded: where they were not kept, as far as they can be off.
    const double roundings = kept ? 100 : 0x1p24 * 8 * EPSILON<T>;
    return good & compare("SwiGLU", out.data, s.tokens, s.columns, roundings, [&](u64 i, u64 j) {
        const Expected a = gate.sum(gate.x, i, j), b = up.sum(gate.x, i, j);
        const double x = kept ? gates.at(i * s.columns + j) : a.value, y = kept ? ups.at(i * s.columns + j) : b.value;
        return Expected{x * sigmoid_of(x) * y, kept ? std::fabs(x * y) : (a.magnitude + 1) * (b.magnitude + 1)};
    });
}

template <typename T> static bool swiglu_gradients(const Shape& s, bool in_place) {
    const Operand<T> down(false, s.tokens, s.columns, s.depth, s.rank, Quantized<T>(s.depth, s.columns));
    const u64 count = (u64)s.tokens * s.columns;
    const auto gate = Array<T>::random(count, 3), up = Array<T>::random(count, 3);
    Array<T> of_gate(count), of_up(count), out(count);
    if (in_place) {
        std::memcpy(of_gate.data, gate.data, sizeof(T) * count);
        std::memcpy(of_up.data, up.data, sizeof(T) * count);
    }
    const Quantized<T>& w = down.weight;
    launch(KERNEL_OF(swiglu_grad), s.grid(256, 128), 384, shared_bytes(256), s.cluster, down.left(256), w.box(64),
           down.left2(256), down.right2(64), w.scales(), w.nested_scales(), w.map.data, w.offset.data, 6, 8, 0, s.tokens,
           s.columns, s.depth, s.rank, (const void*)(in_place ? of_gate : gate).data, (const void*)(in_place ? of_up : up).data,
           (void*)of_gate.data, (void*)of_up.data, (void*)out.data);
    // The gradient of the output is rounded before.
    const double roundings = 0x1p24 * 2 * EPSILON<T>;
    auto check = [&](const char* name, const Array<T>& found, auto by) {
        return compare(name, found.data, s.tokens, s.columns, roundings, [&](u64 i, u64 j) {
            const Expected d = down.sum(down.x, i, j);
            const double g = gate.at(i * s.columns + j), u = up.at(i * s.columns + j), factor = by(g, u, sigmoid_of(g));
            return Expected{d.value * factor, d.magnitude * std::fabs(factor)};
        });
    };
    bool good = check("gradient of gate", of_gate, [](double g, double u, double s) { return u * s * (1 + g * (1 - s)); });
    good &= check("gradient of up", of_up, [](double g, double, double s) { return g * s; });
    return good & compare("SwiGLU again", out.data, s.tokens, s.columns, 100, [&](u64 i, u64 j) {
        const double g = gate.at(i * s.columns + j), u = up.at(i * s.columns + j);
        return Expected{g * sigmoid_of(g) * u, std::fabs(g * u)};
    });
}

int main() {
    bool good = true;
    shared_skew = random_u32() % 64 * 16; // the kernel aligns its ring by itself
    for (bool forward : {true, false}) {
        for (u32 tile : {256u, 128u}) {
            good &= product<bf16, bf16>(forward, tile, {256, 256, 256, 0, 1, 4}, 6, true, false, 1, false, false);
            good &= product<bf16, bf16>(forward, tile, {200, 320, 192, 8, 1, 1}, 6, false, false, 0.5f, true, false);
            good &= product<f16, float>(forward, tile, {300, 576, 64, 16, 1, 2}, 7, true, true, 1, false, false);
            good &= product<bf16, float>(forward, tile, {1, 64, 64, 64, 1, 1}, 6, true, false, 2, false, true);
            good &= product<f16, f16>(forward, tile, {530, 192, 320, 72, 1, 3}, 12, true, false, 1, false, true);
            good &= product<bf16, bf16>(forward, tile, {200, 192, 320, 0, 2, 1}, 6, true, false, 1, false, false);
            good &= product<bf16, bf16>(forward, tile, {300, 128, 448, 16, 4, 1}, 6, true, false, 1, true, false);
            good &= product<f16, float>(forward, tile, {33, 64, 192, 8, 8, 1}, 6, false, true, 0.5f, false, true);
        }
    }
    good &= gated<bf16>({300, 192, 256, 16, 1, 2}, 16, true);
    good &= gated<f16>({64, 64, 64, 0, 1, 1}, 8, true);
    good &= gated<bf16>({520, 320, 192, 72, 1, 3}, 16, false);
    good &= gated<bf16>({256, 128, 448, 16, 4, 1}, 64, true);
    good &= swiglu_gradients<bf16>({300, 192, 256, 16, 1, 2}, true);
    good &= swiglu_gradients<f16>({520, 320, 192, 0, 1, 3}, false);
    good &= swiglu_gradients<bf16>({256, 128, 448, 72, 4, 1}, true);
    return !good;
}
