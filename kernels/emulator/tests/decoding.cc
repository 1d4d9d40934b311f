// decoding_ring_sm90a.cu against f64: products with adapters, and what follows them, of blocks.
#include "emulator.h"
#include "decoding/decoding_ring_sm90a.cu"
using namespace emulator;

// A weight [n, k] as a decoding step has it, with the B of its adapters; values as the kernel sees them.
template <typename T> struct Side {
    u32 n, k, rank, column, adapters;
    bool fp4;
    Array<u8> codes, absmax;
    Array<float> nested, map, offset, gains;
    Array<T> b;

    Side(u32 n, u32 k, u32 rank, u32 column, u32 adapters, bool fp4)
        : n(n), k(k), rank(rank), column(column), adapters(adapters), fp4(fp4), codes((u64)n * k / 2), absmax((u64)n * k / 64),
          nested(Array<float>::random((u64)n * k / 64 / 256 + 1)), map(Array<float>::random(256)),
          offset(Array<float>::random(1)), gains(Array<float>::random((u64)adapters * n)), b(Array<T>::random((u64)n * rank)) {
        for (u64 i = 0; i < codes.count; i++) codes[i] = (u8)random_u32();
        for (u64 i = 0; i < absmax.count; i++) absmax[i] = (u8)random_u32();
    }
    double at(u64 row, u64 i) const {
        const u64 at = row * k + i, block = at / 64;
        const float scale = map[absmax[block]] * nested[block / 256] + offset[0];
        return value(rounded<T>(CODE_VALUES[fp4][at % 2 ? codes[at / 2] & 15 : codes[at / 2] >> 4])) * scale;
    }
    Part part() const {
        return {codes.data, absmax.data, nested.data, map.data, offset.data, b.data, adapters ? gains.data : nullptr, n, rank, column, 0};
    }
};

struct Shape {
    u32 tokens, k, clusters; // of the grid, at most
    u32 ranks[3], adapters;
};

template <typename T> struct Inputs {
    Shape shape;
    u32 columns;
    Array<T> x, t;
    Array<Token> who;

    Inputs(const Shape& shape, u32 capacity)
        : shape(shape), columns(shape.ranks[0] + shape.ranks[1] + shape.ranks[2]),
          x(Array<T>::random((u64)shape.tokens * shape.k, 0.3f)), t(Array<T>::random((u64)shape.tokens * columns, 0.3f)),
          who(shape.tokens) {
        for (u32 i = 0; i < shape.tokens; i++)
            who[i] = {(int)(random_u32() % capacity), (int)(i * capacity), (int)(random_u32() % (shape.adapters + 1)) - 1, 0};
    }
    Expected sum(const Side<T>& side, u64 token, u64 row) const {
        Expected sum;
        double gain = 1;
        if (side.adapters && who[token].owner >= 0) gain = side.gains.at((u64)who[token].owner * side.n + row);
        for (u64 i = 0; i < side.k; i++) sum.add(gain * x.at(token * side.k + i) * side.at(row, i));
        for (u64 i = 0; i < side.rank; i++)
            sum.add(gain * t.at(token * columns + side.column + i) * side.b.at(row * side.rank + i));
        return sum;
    }
    Product product(u32 tiles, bool fp4) const {
        Product p{};
        p.x = x.data, p.t = t.data, p.tokens_at = who.data;
        p.k = shape.k, p.tokens = shape.tokens, p.columns = columns, p.tiles = tiles, p.quant_type = fp4;
        return p;
    }
    double roundings() const { return shape.k / 16 + columns + 100; }
};

// As cuda.rs has it.
static u32 shared_bytes(u32 nt) { return 256 * 128 + (2 * 16 * nt + 2 * 4) * 512 + 256 + 3 * (16 * 2080 + 4096); }
#define RUN(KIND)                                                                                                      \
    template <typename T> static void run_##KIND(const Shape& shape, const Product& p) {                               \
        const bool half = std::is_same_v<T, f16>, small = shape.tokens <= 8;                                           \
        auto one = small ? (half ? decoding_ring1_##KIND##_8_f16 : decoding_ring1_##KIND##_8_bf16)                     \
                         : (half ? decoding_ring1_##KIND##_16_f16 : decoding_ring1_##KIND##_16_bf16);                  \
        auto four = small ? (half ? decoding_ring4_##KIND##_8_f16 : decoding_ring4_##KIND##_8_bf16)                    \
                          : (half ? decoding_ring4_##KIND##_16_f16 : decoding_ring4_##KIND##_16_bf16);                 \
        const u32 cluster = shape.k > 4096 ? 4 : 1, blocks = cluster * std::min(shape.clusters, p.tiles);              \
        launch(cluster == 1 ? one : four, blocks, THREADS, shared_bytes(small ? 1 : 2), cluster, p);                   \
    }
RUN(plain)
RUN(turn)
RUN(gate)

static char name[200];
static const char* describe(const char* kind, const Shape& s, u32 n) {
    snprintf(name, sizeof name, "%s: %u x %u x %u, %u clusters, ranks %u %u %u, %u adapters", kind, s.tokens, n, s.k, s.clusters,
             s.ranks[0], s.ranks[1], s.ranks[2], s.adapters);
    return name;
}

template <typename T> static bool plain(Shape s, u32 n, bool residual, bool fp4) {
    s.ranks[1] = s.ranks[2] = 0;
    const Inputs<T> in(s, 10);
    const Side<T> side(n, s.k, s.ranks[0], 0, s.adapters, fp4);
    const auto rest = Array<T>::random((u64)s.tokens * n);
    Array<T> y((u64)s.tokens * n);
    Product p = in.product((n + 15) / 16, fp4);
    p.parts[0] = p.parts[1] = p.parts[2] = side.part();
    p.residual = residual ? rest.data : nullptr, p.y = y.data;
    run_plain<T>(s, p);
    return compare(describe("plain", s, n), y.data, s.tokens, n, in.roundings(), [&](u64 i, u64 j) {
        Expected sum = in.sum(side, i, j);
        if (residual) sum.add(rest.at(i * n + j));
        return sum;
    });
}

template <typename T> static bool gate(Shape s, u32 n) {
    s.ranks[2] = 0;
    const Inputs<T> in(s, 10);
    const Side<T> gate(n, s.k, s.ranks[0], 0, s.adapters, false), up(n, s.k, s.ranks[1], s.ranks[0], s.adapters, false);
    Array<T> y((u64)s.tokens * n);
    Product p = in.product((n + 7) / 8, false);
    p.parts[0] = p.parts[2] = gate.part(), p.parts[1] = up.part(), p.y = y.data;
    run_gate<T>(s, p);
    // Gate and up are rounded before.
    return compare(describe("gate", s, n), y.data, s.tokens, n, 0x1p24 * 2 * EPSILON<T>, [&](u64 i, u64 j) {
        const Expected a = in.sum(gate, i, j), b = in.sum(up, i, j);
        const double x = a.value, y = b.value;
        return Expected{x / (1 + std::exp(-x)) * y, (std::fabs(x) + 0.1) * (std::fabs(y) + 0.1)};
    });
}

template <typename T> static bool turn(const Shape& s, u32 heads, u32 kv, u32 half) {
    const u32 capacity = 7, widths[3] = {heads * 2 * half, kv * 2 * half, kv * 2 * half};
    const Inputs<T> in(s, capacity);
    std::vector<Side<T>> sides;
    for (u32 i = 0, column = 0; i < 3; column += s.ranks[i++]) sides.emplace_back(widths[i], s.k, s.ranks[i], column, s.adapters, false);
    const auto cosines = Array<float>::random(capacity * half), sines = Array<float>::random(capacity * half);
    const u64 rows = (u64)s.tokens * capacity;
    Array<T> q((u64)s.tokens * widths[0]), keys(rows * widths[1]), values(rows * widths[1]);
    Product p = in.product((widths[0] + 2 * widths[1]) / 16, false);
    for (u32 i = 0; i < 3; i++) p.parts[i] = sides[i].part();
    p.y = q.data, p.keys = keys.data, p.values = values.data;
    p.cos = cosines.data, p.sin = sines.data, p.half = half, p.length = capacity;
    run_turn<T>(s, p);
    // Other rows of the cache are as they were; those of tokens next to each other.
    auto of_tokens = [&](const Array<T>& cache) {
        Array<T> found((u64)s.tokens * widths[1]);
        for (u64 i = 0; i < s.tokens; i++) {
            const u64 row = (u64)(in.who[i].first + in.who[i].position) * widths[1];
            for (u64 j = 0; j < widths[1]; j++) found[i * widths[1] + j] = std::exchange(cache.data[row + j], Array<T>(1)[0]);
        }
        return found;
    };
    const auto new_keys = of_tokens(keys), new_values = of_tokens(values);
    bool good = true;
    for (const Array<T>* cache : {&keys, &values}) {
        for (u64 i = 0; i < cache->count * sizeof(T); i++) good &= ((const u8*)cache->data)[i] == 0xff;
    }
    if (!good) printf("WRONG: rows of the cache that are of no token\n");
    auto turned = [&](const Side<T>& side) {
        return [&](u64 i, u64 j) {
            const u64 in_head = j % (2 * half), pair = in_head % half, angle = in.who[i].position * half + pair;
            const Expected a = in.sum(side, i, j - in_head + pair), b = in.sum(side, i, j - in_head + pair + half);
            const double c = cosines.at(angle), s = sines.at(angle);
            return Expected{in_head < half ? a.value * c - b.value * s : b.value * c + a.value * s,
                            std::fabs(a.value) + std::fabs(b.value) + 0.01};
        };
    };
    const double roundings = 0x1p24 * EPSILON<T>;
    good &= compare(describe("q", s, widths[0]), q.data, s.tokens, widths[0], roundings, turned(sides[0]));
    good &= compare(describe("k", s, widths[1]), new_keys.data, s.tokens, widths[1], roundings, turned(sides[1]));
    return good & compare(describe("v", s, widths[1]), new_values.data, s.tokens, widths[1], in.roundings(),
                          [&](u64 i, u64 j) { return in.sum(sides[2], i, j); });
}

static u32 up_to(u32 most) { return 1 + random_u32() % most; }

static Shape shape(u32 tokens) {
    const u32 adapters = random_u32() % 3;
    return {tokens, 256 * up_to(16), up_to(4), {2 * up_to(12), 2 * up_to(70), 2 * up_to(8)}, adapters};
}

int main() {
    bool good = true;
    shared_skew = random_u32() % 8 * 128;
    good &= plain<bf16>({1, 4096, 2, {16, 0, 0}, 0}, 16 * 9, false, false);
    good &= plain<bf16>({16, 4096, 2, {16, 0, 0}, 2}, 16 * 11 + 5, true, true);
    good &= plain<bf16>({1, 256, 3, {0, 0, 0}, 0}, 3, false, false);
    good &= plain<bf16>({2, 14336, 1, {16, 0, 0}, 0}, 16 * 11, true, false);
    good &= plain<f16>({13, 11008, 1, {16, 0, 0}, 1}, 16 * 9 + 2, true, false);
    good &= plain<f16>(shape(up_to(8)), up_to(150), true, false);
    good &= plain<bf16>(shape(8 + up_to(8)), up_to(150), true, true);
    good &= gate<bf16>({4, 4096, 2, {16, 16, 0}, 0}, 40);
    good &= gate<bf16>(shape(up_to(8)), up_to(80));
    good &= gate<f16>(shape(8 + up_to(8)), up_to(40));
    good &= gate<bf16>({10, 4096 + 256 * up_to(40), 2, {16, 16, 0}, 1}, 8 * 7);
    good &= turn<bf16>({3, 4096, 2, {16, 16, 16}, 0}, 2, 1, 32);
    good &= turn<f16>(shape(up_to(8)), 2, 1, 8 * up_to(4));
    good &= turn<bf16>(shape(8 + up_to(8)), 3, 1, 24);
    return !good;
}
