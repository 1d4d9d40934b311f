// attention_hopper_d128_sm90a.cu, forward and backward, against f64.
#include "emulator.h"
#include "attention/attention_hopper_d128_sm90a.cu"
#include <algorithm>
#include <vector>
using namespace emulator;

constexpr u32 DIM = 128;
// As in hopper.rs.
constexpr u32 FORWARD_SHARED = 6 * 128 * DIM * 2 + 80;

template <typename T, typename A, typename B> static auto kernel_of(A bf16_kernel, B f16_kernel) {
    if constexpr (BF16<T>) return bf16_kernel;
    else return f16_kernel;
}

// Whether ‖found - expected‖ / ‖expected‖ is small enough.
template <typename T> static bool close(const char* name, const std::vector<double>& expected, const T* found) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        const double d = value(found[i]) - expected[i];
        difference += d * d, size += expected[i] * expected[i];
    }
    const double error = std::sqrt(difference / size), limit = EPSILON<T> * 2;
    printf("  %s: relative error %.5f\n", name, error);
    if (!(error < limit)) printf("WRONG: the limit is %.5f\n", limit);
    return error < limit;
}

// Sequences of these lengths, packed; each query sees the keys of its sequence up to its own.
template <typename T> static bool check(const std::vector<u32>& lengths, u32 heads, u32 kv_heads) {
    u32 rows = 0;
    const u32 group = heads / kv_heads;
    std::vector<u32> starts;
    std::vector<int4> tiles, blocks; // see `forward` and `backward`
    for (u32 length : lengths) {
        starts.push_back(rows);
        for (u32 i = 0; i < length; i += 128) {
            const int first = rows + i, left = length - i;
            tiles.push_back({first, std::min(left, 128), (int)rows, (int)i + 1});
            blocks.push_back({first, left, (int)blocks.size(), (int)i / 128});
        }
        rows += length;
    }
    printf("%zu sequences, %u rows, %u heads, %u for keys and values\n", lengths.size(), rows, heads, kv_heads);
    std::stable_sort(tiles.begin(), tiles.end(), [](int4 a, int4 b) { return a.w + a.y > b.w + b.y; });
    std::stable_sort(blocks.begin(), blocks.end(), [](int4 a, int4 b) { return a.y > b.y; });
    const u64 q_count = (u64)rows * heads * DIM, kv_count = (u64)rows * kv_heads * DIM;
    const auto q = Array<T>::random(q_count), k = Array<T>::random(kv_count), v = Array<T>::random(kv_count);
    const auto g = Array<T>::random(q_count); // dO
    const float scale = 1 / std::sqrt((float)DIM), scale_log2 = scale * LOG2_E;

    std::vector<double> o_expected(q_count), dq_expected(q_count), dk_expected(kv_count), dv_expected(kv_count);
    Array<float> delta((u64)heads * rows);
    for (u32 s = 0; s < lengths.size(); s++) {
        for (u32 item = 0; item < heads * lengths[s]; item++) {
            const u32 head = item / lengths[s], i = starts[s] + item % lengths[s];
            const u64 at_q = ((u64)i * heads + head) * DIM;
            auto at_k = [&](u32 j) { return ((u64)j * kv_heads + head / group) * DIM; };
            std::vector<double> p(i + 1), dp(i + 1);
            double sum = 0, mean = 0;
            for (u32 j = starts[s]; j <= i; j++) {
                for (u32 d = 0; d < DIM; d++) {
                    p[j] += q.at(at_q + d) * k.at(at_k(j) + d) * scale;
                    dp[j] += g.at(at_q + d) * v.at(at_k(j) + d);
                }
                sum += p[j] = std::exp(p[j]);
            }
            for (u32 j = starts[s]; j <= i; j++) p[j] /= sum, mean += p[j] * dp[j];
            delta.data[(u64)head * rows + i] = (float)mean;
            for (u32 j = starts[s]; j <= i; j++) {
                const double ds = p[j] * (dp[j] - mean) * scale;
                for (u32 d = 0; d < DIM; d++) {
                    o_expected[at_q + d] += p[j] * v.at(at_k(j) + d);
                    dq_expected[at_q + d] += ds * k.at(at_k(j) + d);
                    dk_expected[at_k(j) + d] += ds * q.at(at_q + d);
                    dv_expected[at_k(j) + d] += p[j] * g.at(at_q + d);
                }
            }
        }
    }

    // Gradients of q and k are of what they were before these turned them.
    const u32 positions_end = 50;
    std::vector<int> positions(rows);
    std::vector<float> cosines(positions_end * DIM / 2), sines(positions_end * DIM / 2);
    for (u32 i = 0; i < rows; i++) positions[i] = i * 7 % positions_end;
    for (u32 i = 0; i < cosines.size(); i++) cosines[i] = std::cos(i * 0.37f), sines[i] = std::sin(i * 0.37f);
    auto turn_back = [&](std::vector<double>& x, u32 of_heads) {
        for (u32 item = 0; item < rows * of_heads; item++) {
            for (u32 d = 0; d < DIM / 2; d++) {
                double &low = x[(u64)item * DIM + d], &high = x[(u64)item * DIM + DIM / 2 + d];
                const double c = cosines[positions[item / of_heads] * DIM / 2 + d], s = sines[positions[item / of_heads] * DIM / 2 + d];
                const double turned = low * c + high * s;
                high = high * c - low * s, low = turned;
            }
        }
    };
    turn_back(dq_expected, heads);
    turn_back(dk_expected, kv_heads);

#define KERNEL(NAME) kernel_of<T>(NAME##_bf16, NAME##_f16)
    auto map = [&](const Array<T>& x, u32 heads, u32 box_rows) {
        return tensor_map<TensorMap>(x.data, rows, heads * DIM, box_rows, 64);
    };
    const u32 count = (u32)tiles.size();
    Array<T> o(q_count), dq(q_count), dk(kv_count), dv(kv_count);
    Array<float> lse((u64)heads * rows);
    launch(KERNEL(attention_hopper_forward), 3, THREADS, FORWARD_SHARED, 1, map(q, heads, 128), map(k, kv_heads, 128),
           map(v, kv_heads, 128), o.data, lse.data, tiles.data(), count * heads, heads, group, rows, scale_log2);
    bool good = close("o", o_expected, o.data);

    const u32 parts = count * 2 * heads;
    Array<float> sums((u64)parts * backward::ROWS * DIM);
    std::vector<u32> counters(parts + 1);
    launch(KERNEL(attention_hopper_backward), count * kv_heads, backward::THREADS, backward::SHARED, 1, map(q, heads, 64),
           map(k, kv_heads, 128), map(v, kv_heads, 128), map(g, heads, 64), lse.data, delta.data, sums.data, dk.data,
           dv.data, counters.data(), blocks.data(), heads, group, rows, scale, scale_log2,
           positions.data(), cosines.data(), sines.data(), positions_end);
    launch(KERNEL(attention_hopper_finish), count * 2 * ((heads + 3) / 4), 256, 0, 1, sums.data, dq.data, blocks.data(), heads,
           scale, positions.data(), cosines.data(), sines.data(), positions_end);
    good &= close("dq", dq_expected, dq.data);
    good &= close("dk", dk_expected, dk.data);
    good &= close("dv", dv_expected, dv.data);
    return good;
}

int main() {
    bool good = check<bf16>({200}, 2, 1);
    good &= check<f16>({300}, 2, 2);
    good &= check<bf16>({64, 130, 1}, 1, 1);
    return !good;
}
