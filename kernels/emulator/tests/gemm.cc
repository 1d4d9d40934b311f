// gemm_hopper_sm90a.cu against f64.
#include "emulator.h"
#include "linear/gemm_hopper_sm90a.cu"
#include <string>
#include <vector>
using namespace emulator;

// The kernel of type T.
#define KERNEL(NAME) (std::is_same_v<T, bf16> ? NAME##_bf16 : NAME##_f16)

// As in hopper.rs.
constexpr u32 SHARED = (220 << 10) + (2 * 5 + 3 * 2) * 8 + 1024;

struct Shape {
    u32 m, n, columns, blocks; // columns: of a tile
    bool wide;                 // out is f32
};
static std::string text(const Shape& s) {
    return std::to_string(s.m) + " x " + std::to_string(s.n) + ", tiles of " + std::to_string(s.columns) + ", " +
           std::to_string(s.blocks) + " blocks" + (s.wide ? ", f32" : "");
}

// Matrices that are multiplied: a [m, depth], b [n, depth] forward, [depth, n] otherwise.
template <typename T> struct Pair {
    u32 depth;
    bool forward;
    Array<T> a, b;
    TensorMap a_map, b_map;

    Pair(const Shape& s, u32 depth, bool forward)
        : depth(depth), forward(forward), a(Array<T>::random((u64)s.m * depth)), b(Array<T>::random((u64)s.n * depth)) {
        if (depth == 0) return; // its maps are not looked at
        a_map = tensor_map<TensorMap>(a.data, s.m, depth, 128, 64);
        b_map = forward ? tensor_map<TensorMap>(b.data, s.n, depth, s.columns, 64)
                        : tensor_map<TensorMap>(b.data, depth, s.n, 64, 64);
    }
    void add(Expected& sum, u64 i, u64 j, u32 n, double scale) const {
        for (u32 k = 0; k < depth; k++)
            sum.add(scale * a.at(i * depth + k) * b.at(forward ? j * depth + k : (u64)k * n + j));
    }
};
// Checks out [m, n] = scale · the sum of the pairs' products + before (or null).
template <typename T, typename O>
static bool is_right(const std::string& name, const Shape& s, const Array<O>& out, const std::vector<Pair<T>>& pairs,
                     float scale, const O* before) {
    u32 terms = 8;
    for (auto& pair : pairs) terms += pair.depth;
    return compare((name + ", " + text(s)).c_str(), out.data, s.m, s.n, terms, [&](u64 i, u64 j) {
        Expected sum;
        for (auto& pair : pairs) pair.add(sum, i, j, s.n, scale);
        if (before) sum.add(value(before[i * s.n + j]));
        return sum;
    });
}

// What is added to the product: nothing, another matrix, or what `out` held.
enum Added { NOTHING, IN, OUT };
template <typename T, typename O>
static bool product(const Shape& s, bool forward, u32 depth, u32 rank, float scale, Added added) {
    std::vector<Pair<T>> pairs;
    for (u32 size : {depth, rank}) pairs.emplace_back(s, size, forward);
    const auto before = Array<O>::random((u64)s.m * s.n, 4);
    Array<O> out((u64)s.m * s.n);
    if (added == OUT) std::copy(before.data, before.data + before.count, out.data);
    auto kernel = forward ? (s.columns == 256 ? KERNEL(gemm_hopper_forward_256) : KERNEL(gemm_hopper_forward_128))
                          : (s.columns == 256 ? KERNEL(gemm_hopper_input_grad_256) : KERNEL(gemm_hopper_input_grad_128));
    const O* in = added == IN ? before.data : added == OUT ? out.data : nullptr;
    TensorMap out_map, in_map;
    if (!s.wide) out_map = tensor_map<TensorMap>(out.data, s.m, s.n, 64, 64);
    if (in && !s.wide) in_map = tensor_map<TensorMap>(in, s.m, s.n, 64, 64);
    launch(kernel, s.blocks, THREADS, SHARED, 1, pairs[0].a_map, pairs[0].b_map, pairs[1].a_map, pairs[1].b_map,
           s.wide ? (float*)out.data : nullptr, s.wide ? (const float*)in : nullptr, out_map, in_map, in && !s.wide, scale, s.m,
           s.n, depth, rank);
    const char* direction = forward ? "forward" : "input_grad";
    char name[100];
    snprintf(name, sizeof name, "%s of depth %u, rank %u, scale %g, adds %d", direction, depth, rank, scale, added);
    return is_right(name, s, out, pairs, scale, added == NOTHING ? nullptr : before.data);
}
template <typename T> static bool product(const Shape& s, bool forward, u32 depth, u32 rank, float scale, Added added) {
    return s.wide ? product<T, float>(s, forward, depth, rank, scale, added)
                  : product<T, T>(s, forward, depth, rank, scale, added);
}

// The sum of the input gradients of up to three linears: each a product, and one with a low rank where it is not 0.
template <typename T, typename O> static bool sum(const Shape& s, const std::vector<std::pair<u32, u32>>& linears) {
    std::vector<Pair<T>> pairs;
    std::string name = "input_grads of depths";
    for (auto [depth, rank] : linears) {
        pairs.emplace_back(s, depth, false);
        if (rank > 0) pairs.emplace_back(s, rank, false);
        name += " " + std::to_string(depth) + " + " + std::to_string(rank);
    }
    while (pairs.size() < 6) pairs.emplace_back(s, 0, false);
    Array<O> out((u64)s.m * s.n);
    auto kernel = s.columns == 256 ? KERNEL(gemm_hopper_input_grads_256) : KERNEL(gemm_hopper_input_grads_128);
    const Pair<T>* p = pairs.data();
    TensorMap out_map;
    if (!s.wide) out_map = tensor_map<TensorMap>(out.data, s.m, s.n, 64, 64);
    launch(kernel, s.blocks, THREADS, SHARED, 1, p[0].a_map, p[0].b_map, p[1].a_map, p[1].b_map, p[2].a_map, p[2].b_map,
           p[3].a_map, p[3].b_map, p[4].a_map, p[4].b_map, p[5].a_map, p[5].b_map, s.wide ? (float*)out.data : nullptr,
           out_map, s.m, s.n, p[0].depth, p[1].depth, p[2].depth, p[3].depth, p[4].depth, p[5].depth);
    return is_right<T, O>(name, s, out, pairs, 1, nullptr);
}

// What the sigmoid of 16-bit types may be wrong by, in roundings of f32.
constexpr u32 SIGMOID = 256;
static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

// up, the product, and silu(gate) · up.
template <typename T> static bool gated(const Shape& s, u32 depth, u32 rank) {
    std::vector<Pair<T>> pairs;
    for (u32 size : {depth, rank}) pairs.emplace_back(s, size, true);
    const auto gate = Array<T>::random((u64)s.m * s.n, 4);
    Array<T> up((u64)s.m * s.n), output((u64)s.m * s.n);
    auto made = [&](const Array<T>& matrix) { return tensor_map<TensorMap>(matrix.data, s.m, s.n, MADE_ROWS, 64); };
    const TensorMap gates = tensor_map<TensorMap>(gate.data, s.m, s.n, 128, 64);
    launch(KERNEL(gemm_hopper_gated), s.blocks, THREADS, SHARED, 1, pairs[0].a_map, pairs[0].b_map, pairs[1].a_map,
           pairs[1].b_map, gates, gate.data, made(up), made(output), s.m, s.n, depth, rank);
    bool good = is_right<T, T>("gated", s, up, pairs, 1, nullptr);
    return good & compare(("output, " + text(s)).c_str(), output.data, s.m, s.n, SIGMOID, [&](u64 i, u64 j) {
        const double g = gate.at(i * s.n + j), u = value(up.data[i * s.n + j]);
        Expected y;
        y.add(g * sigmoid(g) * u);
        return y;
    });
}

// The gradients of gate and up from that of SwiGLU's output, the product; and the output.
template <typename T> static bool differentiated(const Shape& s, u32 depth, u32 rank) {
    std::vector<Pair<T>> pairs;
    for (u32 size : {depth, rank}) pairs.emplace_back(s, size, false);
    auto gate = Array<T>::random((u64)s.m * s.n, 4), up = Array<T>::random((u64)s.m * s.n, 4);
    const std::vector<T> gates(gate.data, gate.data + gate.count), ups(up.data, up.data + up.count);
    Array<T> output((u64)s.m * s.n);
    auto made = [&](const Array<T>& matrix) { return tensor_map<TensorMap>(matrix.data, s.m, s.n, MADE_ROWS, 64); };
    launch(KERNEL(gemm_hopper_differentiated), s.blocks, THREADS, SHARED, 1, pairs[0].a_map, pairs[0].b_map,
           pairs[1].a_map, pairs[1].b_map, tensor_map<TensorMap>(gate.data, s.m, s.n, 128, 64),
           tensor_map<TensorMap>(up.data, s.m, s.n, 128, 64), gate.data, up.data, made(gate), made(up), made(output), s.m, s.n,
           depth, rank);
    // The product is rounded to T, and then multiplied by `factor`, whose terms are at most `most`.
    const u32 terms = depth + rank + 8 + SIGMOID + u32(EPSILON<T> * 0x1p24);
    auto check = [&](const char* name, const Array<T>& found, auto factor, auto most) {
        return compare((name + (", " + text(s))).c_str(), found.data, s.m, s.n, terms, [&](u64 i, u64 j) {
            Expected sum;
            for (auto& pair : pairs) pair.add(sum, i, j, s.n, 1);
            const double g = value(gates[i * s.n + j]), u = value(ups[i * s.n + j]);
            return Expected{sum.value * factor(g, u), sum.magnitude * most(g, u)};
        });
    };
    auto silu = [](double g, double) { return g * sigmoid(g); };
    bool good = check(
        "gradient of gate", gate, [](double g, double u) { return u * sigmoid(g) * (1 + g * (1 - sigmoid(g))); },
        [](double g, double u) { return std::fabs(u) * sigmoid(g) * (1 + std::fabs(g) * (1 - sigmoid(g))); });
    good &= check("gradient of up", up, silu, [&](double g, double u) { return std::fabs(silu(g, u)); });
    return good & compare(("output, " + text(s)).c_str(), output.data, s.m, s.n, SIGMOID, [&](u64 i, u64 j) {
        const double y = silu(value(gates[i * s.n + j]), 0) * value(ups[i * s.n + j]);
        return Expected{y, std::fabs(y)};
    });
}

static u32 eights(u32 most) { return (1 + random_u32() % most) * 8; }

int main() {
    bool good = true;
    shared_skew = random_u32() % 64 * 16; // the kernel aligns its ring by itself
    for (auto [depth, rank] : {std::pair(136u, 16u), std::pair(64u, 0u), std::pair(eights(40), eights(12))}) {
        const Shape any{1 + random_u32() % 300, eights(64), 256, 1 + random_u32() % 4, false};
        good &= gated<bf16>(any, depth, rank) & gated<f16>({130, 264, 256, 2, false}, depth, rank);
        good &= differentiated<bf16>(any, depth, rank) & differentiated<f16>({130, 264, 256, 2, false}, depth, rank);
    }
    for (u32 columns : {256u, 128u}) {
        for (bool forward : {true, false}) {
            good &= product<bf16>({256, 256, columns, 4, false}, forward, 256, 0, 1, NOTHING);
            good &= product<bf16>({200, 328, columns, 1, false}, forward, 136, 8, 0.5f, IN);
            good &= product<f16>({300, 520, columns, 2, true}, forward, 72, 16, 1, NOTHING);
            good &= product<bf16>({1, 8, columns, 1, true}, forward, 8, 64, 2, OUT);
            const Shape any{1 + random_u32() % 300, eights(64), columns, 1 + random_u32() % 4, chance(2)};
            const u32 rank = chance(3) ? 0 : eights(12);
            good &= product<f16>(any, forward, eights(64), rank, 1, Added(random_u32() % 3));
        }
        good &= sum<bf16, bf16>({200, 264, columns, 3, false}, {{136, 16}, {72, 0}, {64, 8}});
        good &= sum<f16, float>({130, 136, columns, 1, true}, {{200, 0}, {8, 0}});
        const Shape any{1 + random_u32() % 200, eights(40), columns, 1 + random_u32() % 3, false};
        good &= sum<bf16, bf16>(any, {{eights(16), eights(8)}, {eights(16), eights(8)}, {eights(16), eights(8)}});
    }
    return !good;
}
