// cross_entropy_hopper_sm90a.cu against f64: rows of a vocabulary that a cluster shares.
#include "emulator.h"
#include "cross_entropy/cross_entropy_hopper_sm90a.cu"
using namespace emulator;

// Logits of which some are −∞; labels by turns the first of the largest logits, the last of them, and any.
template <typename T> static bool check(u32 count, u32 vocab, bool want) {
    Array<float> logits = Array<float>::random((u64)count * vocab, 4.0f);
    Array<int> labels(count), places(count);
    for (u32 row = 0; row < count; row++) {
        float* x = logits.data + (u64)row * vocab;
        for (u32 i = 0; i < vocab; i++) x[i] = i % 7 == 3 ? -INFINITY : std::round(x[i] * 4.0f);
        const u32 first = std::max_element(x, x + vocab) - x;
        u32 last = vocab - 1;
        while (x[last] != x[first]) last--;
        const u32 any = random_u32() % vocab;
        labels[row] = row % 3 == 0 ? first : row % 3 == 1 ? last : x[any] > -INFINITY ? any : first;
        places[row] = count - 1 - row;
    }
    const float scale = 0.5f;
    Array<double> expected((u64)count * vocab);
    Array<float> nll(count);
    Array<u8> correct(count);
    std::vector<double> losses(count);
    std::vector<bool> hits(count);
    for (u32 row = 0; row < count; row++) {
        const float* x = logits.data + (u64)row * vocab;
        double sum = 0;
        for (u32 i = 0; i < vocab; i++) sum += std::exp((double)x[i]);
        for (u32 i = 0; i < vocab; i++)
            expected[(u64)row * vocab + i] = scale * (std::exp((double)x[i]) / sum - (i == (u32)labels[row]));
        losses[row] = std::log(sum) - x[labels[row]];
        hits[row] = std::max_element(x, x + vocab) - x == labels[row];
    }
    Array<T> grad((u64)count * vocab);
    void (*kernel)(float*, const int*, const int*, T*, u32, float*, u8*, u32, float);
    if constexpr (std::is_same_v<T, float>) kernel = cross_entropy_cluster_f32;
    else if constexpr (std::is_same_v<T, f16>) kernel = cross_entropy_cluster_f16;
    else kernel = cross_entropy_cluster_bf16;
    const u32 shared = LOGITS + (vocab + 8 * CLUSTER - 1) / (8 * CLUSTER) * 32;
    constexpr bool in_place = std::is_same_v<T, float>;
    launch(kernel, count * CLUSTER, THREADS, shared, CLUSTER, logits.data, labels.data, places.data,
           in_place ? nullptr : grad.data, want, nll.data, correct.data, vocab, scale);
    bool right = true;
    for (u32 row = 0; row < count; row++) {
        const u32 place = places[row];
        if (std::abs(nll[place] - losses[row]) > 2e-6 * (1 + losses[row]) || correct[place] != hits[row]) {
            printf("row %u of [%u, %u]: %f for %f, %u for %d\n", row, count, vocab, nll[place], losses[row], correct[place],
                   (int)hits[row]);
            right = false;
        }
    }
    for (u64 i = 0; want && right && i < (u64)count * vocab; i++) {
        double found;
        if constexpr (in_place) found = logits[i];
        else found = value(grad[i]);
        const double tolerance = (in_place ? 1e-5 : std::is_same_v<T, f16> ? 1e-3 : 8e-3) * std::abs(expected[i]) + 1e-6;
        if (!(std::abs(found - expected[i]) <= tolerance)) {
            printf("gradient %llu of [%u, %u]: %g for %g\n", (unsigned long long)i, count, vocab, found, expected[i]);
            right = false;
        }
    }
    return right;
}

int main() {
    bool right = true;
    // Parts with one run, with none, with a turn of all threads and a few more.
    for (u32 vocab : {8u, 72u, 4096u, 16'448u}) {
        right &= check<bf16>(3, vocab, true) && check<f16>(2, vocab, true) && check<float>(3, vocab, true);
    }
    right &= check<bf16>(3, 512, false);
    return right ? 0 : 1;
}
