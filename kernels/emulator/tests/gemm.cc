// gemm_hopper_sm90a.cu against f64.
#include "emulator.h"
#include "linear/gemm_hopper_sm90a.cu"
#include <memory>
#include <string>
#include <vector>
using namespace emulator;

// The kernel of type T.
#define KERNEL(NAME) (std::is_same_v<T, bf16> ? NAME##_bf16 : NAME##_f16)

// As in hopper.rs.
constexpr u32 SHARED = (192 << 10) + 2048 + 8 * 16 * 40 * 4 + 2 * 6 * 8 + 2048;

struct Shape {
    u32 m, n, columns, blocks; // columns: of a tile; blocks: of a grid without clusters
    bool wide;                 // out is f32
    u32 cluster = 1;
    u32 grid() const { return cluster == 1 ? blocks : cluster * ((m + 127) / 128) * ((n + columns - 1) / columns); }
};
static std::string text(const Shape& s) {
    return std::to_string(s.m) + " x " + std::to_string(s.n) + ", tiles of " + std::to_string(s.columns) + ", " +
           std::to_string(s.grid()) + " blocks, clusters of " + std::to_string(s.cluster) + (s.wide ? ", f32" : "");
}

// How weights are quantized: blocks of 2^shift codes, whose scales are quantized too if `nested`.
struct Kind {
    u32 shift = 6;
    bool nested = true, fp4 = false;
};
// Codes of a weight of `count` elements, and its values as T.
template <typename T> struct Quantized {
    Kind kind;
    Array<u8> codes, scale_codes;
    Array<float> absmax, nested_absmax, map, offset;
    Array<T> values, made;

    Quantized(u64 count, Kind kind)
        : kind(kind), codes(count / 2), scale_codes((count >> kind.shift) + 1), absmax(Array<float>::random(scale_codes.count)),
          nested_absmax(Array<float>::random(scale_codes.count / 256 + 1)), map(Array<float>::random(256)),
          offset(Array<float>::random(1)), values(count), made(count) {
        for (u64 i = 0; i < codes.count; i++) codes[i] = (u8)random_u32();
        for (u64 i = 0; i < scale_codes.count; i++) scale_codes[i] = (u8)random_u32();
        for (u64 i = 0; i < count; i++) {
            const u64 block = i >> kind.shift;
            const float nested = map[scale_codes[block]] * nested_absmax[block / 256] + offset[0];
            const float value = CODE_VALUES[kind.fp4][i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
            values[i] = rounded<T>(value * (kind.nested ? nested : absmax[block]));
        }
    }
    const void* scales() const { return kind.nested ? (const void*)scale_codes.data : absmax.data; }
    const float* nested() const { return kind.nested ? nested_absmax.data : nullptr; }
    // What was made has the bits of what it should be.
    bool is_made() const {
        if (!std::memcmp(made.data, values.data, sizeof(T) * values.count)) return true;
        printf("the matrix that was made ahead is wrong\n");
        return false;
    }
};
// The kernel's arguments of a weight of codes, which may be null: there is none.
#define CODES_OF(Q)                                                                                                    \
    (Q) ? (Q)->codes.data : nullptr, (Q) ? (Q)->scales() : nullptr, (Q) ? (Q)->nested() : nullptr,                     \
        (Q) ? (Q)->map.data : nullptr, (Q) ? (Q)->offset.data : nullptr, (Q) ? (void*)(Q)->made.data : nullptr
#define SHIFTS_OF(KIND) (KIND).shift, 8, (KIND).fp4

// Matrices that are multiplied: a [m, depth], b [n, depth] forward, [depth, n] otherwise.
template <typename T> struct Pair {
    u32 depth;
    bool forward;
    Array<T> a, b;
    TensorMap a_map, b_map;
    std::unique_ptr<Quantized<T>> coded; // where b is made ahead

    Pair(const Shape& s, u32 depth, bool forward, const Kind* kind = nullptr)
        : depth(depth), forward(forward), a(Array<T>::random((u64)s.m * depth)), b(Array<T>::random((u64)s.n * depth)) {
        if (depth == 0) return; // its maps are not looked at
        if (kind) {
            coded = std::make_unique<Quantized<T>>(b.count, *kind);
            std::memcpy(b.data, coded->values.data, sizeof(T) * b.count);
        }
        const Array<T>& b = coded ? coded->made : this->b;
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
static bool product(const Shape& s, bool forward, u32 depth, u32 rank, float scale, Added added, const Kind* kind) {
    std::vector<Pair<T>> pairs;
    pairs.emplace_back(s, depth, forward, kind);
    pairs.emplace_back(s, rank, forward);
    const Quantized<T>* coded = pairs[0].coded.get();
    const auto before = Array<O>::random((u64)s.m * s.n, 4);
    Array<O> out((u64)s.m * s.n);
    if (added == OUT) std::copy(before.data, before.data + before.count, out.data);
    auto kernel = forward ? (s.columns == 256 ? KERNEL(gemm_hopper_forward_256) : KERNEL(gemm_hopper_forward_128))
                          : (s.columns == 256 ? KERNEL(gemm_hopper_input_grad_256) : KERNEL(gemm_hopper_input_grad_128));
    launch(kernel, s.grid(), THREADS, SHARED, s.cluster, pairs[0].a_map, pairs[0].b_map, pairs[1].a_map, pairs[1].b_map,
           CODES_OF(coded), SHIFTS_OF(kind ? *kind : Kind{}), out.data, added == IN ? before.data : nullptr, s.m, s.n, depth, rank, scale, added == OUT, s.wide);
    const char* direction = forward ? "forward" : "input_grad";
    char name[100];
    snprintf(name, sizeof name, "%s of depth %u, rank %u, scale %g, adds %d", direction, depth, rank, scale, added);
    return is_right(name, s, out, pairs, scale, added == NOTHING ? nullptr : before.data) & (!coded || coded->is_made());
}
template <typename T>
static bool product(const Shape& s, bool forward, u32 depth, u32 rank, float scale, Added added, const Kind* kind = nullptr) {
    return s.wide ? product<T, float>(s, forward, depth, rank, scale, added, kind)
                  : product<T, T>(s, forward, depth, rank, scale, added, kind);
}

// The sum of the input gradients of up to three linears: each a product, and one with a low rank where it is not 0.
template <typename T, typename O>
static bool sum(const Shape& s, const std::vector<std::pair<u32, u32>>& linears, const Kind* kind = nullptr) {
    std::vector<Pair<T>> pairs;
    std::string name = "input_grads of depths";
    for (auto [depth, rank] : linears) {
        // Of several weights one may be dense.
        pairs.emplace_back(s, depth, false, kind && (pairs.empty() || !chance(3)) ? kind : nullptr);
        pairs.emplace_back(s, rank, false);
        name += " " + std::to_string(depth) + " + " + std::to_string(rank);
    }
    while (pairs.size() < 6) pairs.emplace_back(s, 0, false);
    Array<O> out((u64)s.m * s.n);
    auto kernel = s.columns == 256 ? KERNEL(gemm_hopper_input_grads_256) : KERNEL(gemm_hopper_input_grads_128);
    const Pair<T>* p = pairs.data();
    launch(kernel, s.grid(), THREADS, SHARED, s.cluster, p[0].a_map, p[0].b_map, p[1].a_map, p[1].b_map, p[2].a_map, p[2].b_map,
           p[3].a_map, p[3].b_map, p[4].a_map, p[4].b_map, p[5].a_map, p[5].b_map, CODES_OF(p[0].coded),
           CODES_OF(p[2].coded), CODES_OF(p[4].coded), SHIFTS_OF(kind ? *kind : Kind{}), out.data, s.m, s.n, p[0].depth,
           p[1].depth, p[2].depth, p[3].depth, p[4].depth, p[5].depth, s.wide);
    bool good = is_right<T, O>(name, s, out, pairs, 1, nullptr);
    for (auto& pair : pairs) good &= !pair.coded || pair.coded->is_made();
    return good;
}

static u32 eights(u32 most) { return (1 + random_u32() % most) * 8; }

int main() {
    bool good = true;
    shared_skew = random_u32() % 64 * 16; // the kernel aligns its ring by itself
    for (u32 columns : {256u, 128u}) {
        for (bool forward : {true, false}) {
            good &= product<bf16>({256, 256, columns, 4, false}, forward, 256, 0, 1, NOTHING);
            good &= product<bf16>({200, 328, columns, 1, false}, forward, 136, 8, 0.5f, IN);
            good &= product<f16>({300, 520, columns, 2, true}, forward, 72, 16, 1, NOTHING);
            good &= product<bf16>({1, 8, columns, 1, true}, forward, 8, 64, 2, OUT);
            const Shape any{1 + random_u32() % 300, eights(64), columns, 1 + random_u32() % 4, chance(2)};
            const u32 rank = chance(3) ? 0 : eights(12);
            good &= product<f16>(any, forward, eights(64), rank, 1, Added(random_u32() % 3));
            // Clusters.
            good &= product<bf16>({200, 328, columns, 0, false, 2}, forward, 328, 16, 0.5f, IN);
            good &= product<bf16>({130, 264, columns, 0, true, 4}, forward, 640, 0, 1, OUT);
            good &= product<f16>({60, 72, columns, 0, false, 8}, forward, 200, 8, 1, NOTHING);
            // Weights of codes, whose rows are multiples of 64.
            const Kind kinds[] = {{}, {6, false, true}, {7, true, false}, {8 + random_u32() % 3, true, true}};
            for (const Kind& kind : kinds) {
                const u32 free = eights(64), whole = (1 + random_u32() % 9) * 64; // of rows and of columns of W
                const Shape any{1 + random_u32() % 400, forward ? free : whole, columns, 1 + random_u32() % 4, chance(3),
                                chance(2) ? 1u : 2u << random_u32() % 3};
                const u32 rank = chance(3) ? 0 : eights(12);
                good &= product<bf16>(any, forward, forward ? whole : free, rank, 1, Added(random_u32() % 3), &kind);
            }
            good &= product<f16>({300, 576, columns, 3, false}, forward, 320, 16, 2, IN, &kinds[0]);
        }
        const Kind kind;
        good &= sum<bf16, bf16>({200, 320, columns, 3, false}, {{136, 16}, {72, 0}, {64, 8}}, &kind);
        good &= sum<f16, float>({200, 192, columns, 0, true, 2}, {{136, 16}, {72, 0}}, &kind);
        good &= sum<bf16, bf16>({200, 264, columns, 3, false}, {{136, 16}, {72, 0}, {64, 8}});
        good &= sum<f16, float>({130, 136, columns, 1, true}, {{200, 0}, {8, 0}});
        const Shape any{1 + random_u32() % 200, eights(40), columns, 1 + random_u32() % 3, false};
        good &= sum<bf16, bf16>(any, {{eights(16), eights(8)}, {eights(16), eights(8)}, {eights(16), eights(8)}});
    }
    return !good;
}
