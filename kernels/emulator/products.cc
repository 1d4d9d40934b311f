// See products.h. Layouts of operands in shared memory and in registers: PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions" and "Warp Level Matrix Instructions".
#include "products.h"
#include "copies.h"
#include "state.h"
#include <algorithm>

namespace emulator {

// The two elements of a register, the low half first.
static void widen_pair(float* to, u32 x, bool bf16) {
    for (u32 i = 0; i < 2; i++) {
        const auto bits = (unsigned short)(x >> 16 * i);
        to[i] = bf16 ? __bfloat162float({bits}) : __half2float({bits});
    }
}
// Eight elements of shared memory.
static void widen(float (&to)[8], const u8* from, bool bf16) {
    unsigned short x[8];
    std::memcpy(x, from, sizeof x);
    for (u32 i = 0; i < 8; i++) to[i] = bf16 ? __bfloat162float({x[i]}) : __half2float({x[i]});
}

// ---- wgmma ----
// The sums in one array d of a warp's threads, while products are under way.
struct Sums {
    float* d[32];
    u32 size;                // floats of a lane
    std::vector<float> rows; // [16, 2 · size]
    u64 group;               // of the last product

    // Where element i of a lane lies in `rows`.
    float& at(u32 lane, u32 i) { return rows[(lane / 4 + i / 2 % 2 * 8) * 2 * size + i / 4 * 8 + lane % 4 * 2 + i % 2]; }
};
struct Product {
    Sums* sums;
    u64 a, b;
    const u32* held[32]; // or null
    bool keep;
    ProductKind kind;
    u64 group;
};
struct WarpProducts {
    u32 warp; // in the block
    u32 rank; // of the block in the cluster
    bool fenced = false;
    u64 committed = 0; // groups
    bool open = false; // products since the last commit
    std::deque<Product> under_way;
    u32 pace = 1; // rounds of the scheduler that a product takes, on average
    std::vector<std::unique_ptr<Sums>> sums;
    u64 count = 0, hash = 0; // of all products: the warps of a warpgroup must agree
};
std::shared_ptr<WarpProducts> new_products(u32 rank, u32 warp) {
    auto products = std::make_shared<WarpProducts>();
    products->rank = rank, products->warp = warp;
    return products;
}

// An operand in shared memory with 128-byte swizzle: rows of A or columns of B ("rows" below), times 16 along the
// contraction.
class Operand {
    const char* name;
    u32 rank, start, leading, stride; // bytes

public:
    Operand(const char* name, u64 descriptor, u32 rank) : name(name), rank(rank) {
        auto field = [&](int bit) { return (u32)(descriptor >> bit & 0x3fff) << 4; };
        start = field(0), leading = field(16), stride = field(32);
        if (descriptor & ~0xc00e3fff3fff3fffull)
            fail("%s: descriptor 0x%llx has bits that none can have", name, descriptor);
        if (descriptor >> 62 != 1 || descriptor >> 49 & 7)
            fail("%s: descriptor 0x%llx: 128-byte swizzle without base offset alone is emulated", name, descriptor);
        if (start & 0x380) fail("%s: shared address 0x%x is not in the first row of a swizzle atom", name, start);
    }
    // Eight elements that lie together: of row `row` from k (0 or 8) on.
    const u8* along_row(u32 row, u32 k) const { return chunk(row / 8 * stride + row % 8 * 128 + k * 2); }
    // Those at k of eight rows from `row` on (a multiple of 8), of an operand by columns.
    const u8* across_rows(u32 row, u32 k) const {
        return chunk(row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128);
    }

private:
    const u8* chunk(u32 offset) const {
        const u32 address = rank << 24 | swizzled(start + offset, 128);
        check_published(address, 16, name);
        return at(address, 16, 16, name);
    }
};
// Calls f(row, k, element) for `count` rows from `first` on.
template <typename F>
static void each_element(const Operand& operand, u32 first, u32 count, bool columns, bool bf16, F f) {
    float eight[8];
    for (u32 row = 0; row < count; row += columns ? 8 : 1) {
        for (u32 k = 0; k < 16; k += columns ? 1 : 8) {
            widen(eight, columns ? operand.across_rows(first + row, k) : operand.along_row(first + row, k), bf16);
            for (u32 i = 0; i < 8; i++) f(columns ? row + i : row, columns ? k : k + i, eight[i]);
        }
    }
}
// A warp's 16 rows of the product.
static void run(const WarpProducts& w, const Product& p) {
    const u32 n = p.kind.n;
    float a[16][16], b[16][256];
    if (p.held[0]) {
        for (u32 l = 0; l < 32; l++)
            for (u32 i = 0; i < 4; i++) widen_pair(&a[l / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8], p.held[l][i], p.kind.bf16);
    } else {
        const Operand operand("wgmma's a", p.a, w.rank);
        auto put = [&](u32 row, u32 k, float x) { a[row][k] = x; };
        each_element(operand, 16 * (w.warp % 4), 16, p.kind.a_columns, p.kind.bf16, put);
    }
    const Operand operand("wgmma's b", p.b, w.rank);
    auto put = [&](u32 column, u32 k, float x) { b[k][column] = x; };
    each_element(operand, 0, n, p.kind.b_columns, p.kind.bf16, put);
    for (u32 row = 0; row < 16; row++) {
        float* d = &p.sums->rows[row * n];
        if (!p.keep) std::fill(d, d + n, 0.0f);
        for (u32 k = 0; k < 16; k++) {
            const float x = a[row][k];
            for (u32 j = 0; j < n; j++) d[j] += x * b[k][j];
        }
    }
}
static void run_first(WarpProducts& w) {
    const Product p = w.under_way.front();
    w.under_way.pop_front();
    run(w, p);
}
void finish_some_products(WarpProducts& w) {
    if (!w.under_way.empty() && chance(w.pace)) run_first(w);
}

void products_fence() {
    int nothing = 0;
    collective("wgmma.fence", ~0u, nothing, +[](int**) { products().fenced = true; });
}
void products_commit() {
    int nothing = 0;
    collective("wgmma.commit_group", ~0u, nothing, +[](int**) {
        products().committed++;
        products().open = false;
    });
}
constexpr u32 POISON = ~0u; // a NaN that no product makes

static void give_back(Sums& sums) {
    for (u32 l = 0; l < 32; l++) {
        for (u32 i = 0; i < sums.size; i++) {
            if (std::bit_cast<u32>(sums.d[l][i]) != POISON)
                fail("element %u of the sums of lane %u was written while a product was under way", i, l);
            sums.d[l][i] = sums.at(l, i);
        }
    }
}
void products_wait(u32 pending) {
    collective("wgmma.wait_group", ~0u, pending, +[](u32** lanes) {
        WarpProducts& w = products();
        const u64 done = w.committed - std::min<u64>(w.committed, *lanes[0]); // groups 1..done
        while (!w.under_way.empty() && w.under_way.front().group <= done) run_first(w);
        std::erase_if(w.sums, [&](auto& sums) {
            if (sums->group > done) return false;
            give_back(*sums);
            return true;
        });
        w.fenced = false;
    });
}

struct ProductArguments {
    float* d;
    u64 a;
    const u32* held;
    u64 b;
    u32 keep;
    ProductKind kind;
};
// The sums that a product goes to: those of products under way, or new ones, which the threads lose until they are given
// back.
static Sums& take_sums(WarpProducts& w, ProductArguments** lanes) {
    const u32 size = lanes[0]->kind.n / 2;
    float* d = lanes[0]->d;
    for (auto& sums : w.sums) {
        if (sums->d[0] == d && sums->size == size) return *sums;
        if (d < sums->d[0] + sums->size && sums->d[0] < d + size) fail("wgmma: the sums overlap with others under way");
    }
    if (!w.fenced) fail("wgmma without products_begin since registers could last be accessed");
    Sums& sums = *w.sums.emplace_back(std::make_unique<Sums>());
    sums.size = size;
    sums.rows.resize(16 * 2 * size);
    for (u32 l = 0; l < 32; l++) {
        sums.d[l] = lanes[l]->d;
        for (u32 i = 0; i < size; i++) sums.at(l, i) = sums.d[l][i];
        std::memset(sums.d[l], 0xff, size * sizeof(float));
    }
    return sums;
}
static void issue(ProductArguments** lanes) {
    WarpProducts& w = products();
    for (u32 l = 0; l < 32; l++) {
        if (!lanes[l]) fail("wgmma: lane %u has ended", l);
        const ProductArguments &x = *lanes[0], &y = *lanes[l];
        if (x.a != y.a || x.b != y.b || !x.keep != !y.keep || !x.held != !y.held)
            fail("wgmma: the lanes of a warp have different operands");
    }
    const ProductArguments& x = *lanes[0];
    if (x.kind.n % 8 || x.kind.n < 8 || x.kind.n > 256) fail("wgmma: n is %u", x.kind.n);
    Product p{};
    p.sums = &take_sums(w, lanes), p.a = x.a, p.b = x.b, p.keep = x.keep != 0, p.kind = x.kind;
    p.group = p.sums->group = w.committed + 1;
    for (u32 l = 0; l < 32; l++) p.held[l] = lanes[l]->held;
    // A descriptor that is wrong should fail here, not when the product is run.
    if (!x.held) Operand("wgmma's a", x.a, w.rank);
    Operand("wgmma's b", x.b, w.rank);
    w.open = true;
    // Some are done at once, others as late as in their wait.
    if (w.under_way.empty()) w.pace = 1u << random_u32() % 9;
    w.under_way.push_back(p);
    w.count++;
    const u64 kinds = x.kind.n * 8 + x.kind.bf16 * 4 + x.kind.a_columns * 2 + x.kind.b_columns;
    for (u64 y : {x.a, x.b, (u64)p.keep, kinds, p.group}) w.hash = (w.hash ^ y) * 0x100000001b3ull; // FNV-1a
}
void product(float* d, u64 a, const u32* held, u64 b, u32 keep, ProductKind kind) {
    ProductArguments mine{d, a, held, b, keep, kind};
    collective("wgmma.mma_async", ~0u, mine, issue);
}
void check_products_ended(const std::vector<Warp>& warps) {
    for (size_t i = 0; i < warps.size(); i++) {
        const WarpProducts &w = *warps[i].products, &first = *warps[i / 4 * 4].products;
        if (!w.under_way.empty() || !w.sums.empty() || w.open) fail("warp %zu ends with products under way", i);
        if (w.count != first.count || w.hash != first.hash)
            fail("warps %u and %u of a warpgroup have not issued the same products (%llu, %llu)", first.warp, w.warp,
                 first.count, w.count);
    }
}

// ---- mma.sync ----
struct Mma {
    float* d;
    const u32* a;
    u32 b[2];
    bool bf16;
};
void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bool bf16) {
    Mma mine{d, a, {b0, b1}, bf16};
    collective("mma.sync", ~0u, mine, +[](Mma** lanes) {
        float x[16][16], y[8][16]; // a, and b transposed
        for (u32 l = 0; l < 32; l++) {
            if (!lanes[l]) fail("mma.sync: lane %u has ended", l);
            const Mma& m = *lanes[l];
            for (u32 i = 0; i < 4; i++) widen_pair(&x[l / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8], m.a[i], m.bf16);
            for (u32 i = 0; i < 2; i++) widen_pair(&y[l / 4][l % 4 * 2 + i * 8], m.b[i], m.bf16);
        }
        for (u32 l = 0; l < 32; l++) {
            for (u32 i = 0; i < 4; i++) {
                const u32 row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
                for (u32 k = 0; k < 16; k++) lanes[l]->d[i] += x[row][k] * y[column][k];
            }
        }
    });
}

// ---- 8x8 matrices ----
// Lane l holds (l / 4, 2 (l % 4)) and the element to the right; of the transpose, (2 (l % 4), l / 4) and the one below.
typedef unsigned short Matrix[8][8];
static u32 held(const Matrix& m, u32 lane, bool transposed) {
    const u32 i = lane / 4, j = lane % 4 * 2;
    return transposed ? m[j][i] | (u32)m[j + 1][i] << 16 : m[i][j] | (u32)m[i][j + 1] << 16;
}
static void put(Matrix& m, u32 lane, u32 pair) {
    m[lane / 4][lane % 4 * 2] = (unsigned short)pair;
    m[lane / 4][lane % 4 * 2 + 1] = (unsigned short)(pair >> 16);
}
struct Matrices {
    u32 (&registers)[4];
    u32 address;
    bool transposed;
};
void load_matrices(u32 (&to)[4], u32 address, bool transposed) {
    Matrices mine{to, address, transposed};
    collective("ldmatrix", ~0u, mine, +[](Matrices** lanes) {
        for (u32 i = 0; i < 4; i++) {
            Matrix m;
            for (u32 row = 0; row < 8; row++) std::memcpy(m[row], at(lanes[8 * i + row]->address, 16, 16, "ldmatrix"), 16);
            for (u32 l = 0; l < 32; l++) lanes[l]->registers[i] = held(m, l, lanes[l]->transposed);
        }
    });
}
void store_matrices(u32 address, const u32 (&from)[4]) {
    u32 registers[4];
    std::copy(from, from + 4, registers);
    Matrices mine{registers, address, false};
    mark_written(address, 16); // by the thread that gives the address
    collective("stmatrix", ~0u, mine, +[](Matrices** lanes) {
        for (u32 i = 0; i < 4; i++) {
            Matrix m;
            for (u32 l = 0; l < 32; l++) put(m, l, lanes[l]->registers[i]);
            for (u32 row = 0; row < 8; row++) std::memcpy(at(lanes[8 * i + row]->address, 16, 16, "stmatrix"), m[row], 16);
        }
    });
}
u32 transpose_matrix(u32 x) {
    collective("movmatrix", ~0u, x, +[](u32** lanes) {
        Matrix m;
        for (u32 l = 0; l < 32; l++) put(m, l, *lanes[l]);
        for (u32 l = 0; l < 32; l++) *lanes[l] = held(m, l, true);
    });
    return x;
}

} // namespace emulator
