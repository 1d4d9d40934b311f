// narrow_hopper_sm90a.cu against f64: one operand with a rank, of up to three groups of 64.
#include "emulator.h"
#include "linear/narrow_hopper_sm90a.cu"
using namespace emulator;

enum Kind { BY_ROWS, BY_COLUMNS, GRADS, GRADS_TRANSPOSED };

// `slice`: steps of 64 of the contraction that a block takes.
template <typename T> static bool check(Kind kind, u32 rows, u32 inner, u32 rank, u32 warpgroups, u32 slice) {
#define KERNEL(NAME) (std::is_same_v<T, bf16> ? NAME##_bf16 : NAME##_f16)
#define KERNELS(NAME)                                                                                                  \
    (groups == 1 ? KERNEL(narrow_##NAME##_1) : groups == 2 ? KERNEL(narrow_##NAME##_2) : KERNEL(narrow_##NAME##_3))
    const bool grads = kind == GRADS || kind == GRADS_TRANSPOSED;
    const u32 groups = (rank + 63) / 64, stages = 3, steps = (inner + 63) / 64, slices = (steps + slice - 1) / slice;
    const auto x = Array<T>::random((u64)rows * inner), w = Array<T>::random((u64)rank * inner);
    auto map = [](const Array<T>& matrix, u32 rows, u32 columns) {
        return tensor_map<TensorMap>(matrix.data, rows, columns, 64, 64);
    };
    const TensorMap x_map = grads ? map(x, inner, rows) : map(x, rows, inner);
    const TensorMap w_map = kind == BY_ROWS ? map(w, rank, inner) : map(w, inner, rank);
    auto kernel = kind == BY_ROWS ? KERNELS(rows) : kind == BY_COLUMNS ? KERNELS(columns) : KERNELS(grads);
    const bool summed = grads || slices > 1; // by a second kernel
    const u32 total = rows * rank, shared = stages * ((warpgroups + groups) * 8192 + 16) + 1024;
    const float scale = 0.5f;
    Array<T> out(total);
    Array<float> partial(slices * total), gradient(total);
    void* first = summed ? nullptr : out.data;
    // All groups are of one output.
    const dim3 grid((rows + 64 * warpgroups - 1) / (64 * warpgroups), slices);
    launch(kernel, grid, warpgroups * 128 + 32, shared, 1, x_map, w_map, w_map, w_map, first, scale, 0, rank, 0, first,
           scale, 64, rank, 0, first, scale, 128, rank, 0, summed ? partial.data : nullptr, rows, inner, rank, slice, stages,
           kind == GRADS_TRANSPOSED);
    if (summed) {
        void* to = grads ? (void*)gradient.data : out.data;
        launch(grads ? narrow_sum_f32 : KERNEL(narrow_sum), (total / 4 + 255) / 256, 256, 0, 1, partial.data, to, scale,
               total, nullptr, 0, total, nullptr, 0, total, slices, total);
    }
    auto expected = [&](u64 i, u64 j) {
        if (kind == GRADS_TRANSPOSED) std::swap(i, j);
        Expected sum;
        for (u64 k = 0; k < inner; k++) {
            const double left = x.at(grads ? k * rows + i : i * inner + k);
            sum.add(scale * left * w.at(kind == BY_ROWS ? j * inner + k : k * rank + j));
        }
        return sum;
    };
    char name[100];
    snprintf(name, sizeof name, "kind %d, %u x %u, rank %u, %u warpgroups, %u slices", kind, rows, inner, rank, warpgroups,
             slices);
    if (kind == GRADS_TRANSPOSED) return compare(name, gradient.data, rank, rows, inner + 8, expected);
    if (kind == GRADS) return compare(name, gradient.data, rows, rank, inner + 8, expected);
    return compare(name, out.data, rows, rank, inner + 8, expected);
}

// narrow_both: u = scale · g · B and dB = gᵀ · t.
template <typename T> static bool check_both(u32 tokens, u32 columns, u32 rank, u32 slice) {
    const auto g = Array<T>::random((u64)tokens * columns), b = Array<T>::random((u64)columns * rank);
    const auto t = Array<T>::random((u64)tokens * rank);
    const u32 blocks = (columns + 255) / 256, steps = (tokens + 63) / 64, slices = (steps + slice - 1) / slice;
    Array<float> u_parts((u64)blocks * tokens * rank), b_parts((u64)slices * columns * rank), of_b((u64)columns * rank);
    Array<T> u((u64)tokens * rank);
    auto map = [](const Array<T>& matrix, u32 rows, u32 columns) {
        return tensor_map<TensorMap>(matrix.data, rows, columns, 64, 64);
    };
    launch(KERNEL(narrow_both), dim3(blocks, slices), 4 * 128 + 32, (4 + 4 * 5) * 8192 + 9 * 8 + 1024, 1,
           map(g, tokens, columns), map(b, columns, rank), map(t, tokens, rank), u_parts.data, b_parts.data, tokens, columns,
           rank, slice);
    const float scale = 0.5f;
    const u32 u_total = tokens * rank, b_total = columns * rank;
    launch(KERNEL(narrow_both_sum), dim3((std::max(u_total, b_total) / 4 + 255) / 256, 2), 256, 0, 1, u_parts.data, (void*)u.data, scale,
           u_total, blocks, b_parts.data, of_b.data, b_total, slices);
    bool good = compare("u of both", u.data, tokens, rank, columns + 8, [&](u64 i, u64 j) {
        Expected sum;
        for (u64 k = 0; k < columns; k++) sum.add(scale * g.at(i * columns + k) * b.at(k * rank + j));
        return sum;
    });
    return good & compare("dB of both", of_b.data, columns, rank, tokens + 8, [&](u64 i, u64 j) {
        Expected sum;
        for (u64 k = 0; k < tokens; k++) sum.add(g.at(k * columns + i) * t.at(k * rank + j));
        return sum;
    });
}

static u32 eights(u32 most) { return (1 + random_u32() % most) * 8; }

int main() {
    bool good = true;
    shared_skew = random_u32() % 64 * 16; // the kernel aligns its ring by itself
    for (Kind kind : {BY_ROWS, BY_COLUMNS, GRADS, GRADS_TRANSPOSED}) {
        good &= check<bf16>(kind, 200, 328, 16, 1, 100);
        good &= check<bf16>(kind, 136, 520, 64, 2, 3);
        good &= check<f16>(kind, 136, 136, 104, 2, 100);
        good &= check<f16>(kind, eights(40), eights(80), eights(24), 2, 1 + random_u32() % 10);
    }
    good &= check_both<bf16>(200, 328, 16, 100);
    good &= check_both<f16>(520, 1032, 32, 3);
    good &= check_both<bf16>(eights(40), eights(80), eights(4), 1 + random_u32() % 5);
    return !good;
}
