// For tests: global memory with guard pages, random numbers, comparison with what is expected.
#pragma once
#include <cstdio>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>

namespace emulator {

inline double value(float x) { return x; }
inline double value(__half x) { return __half2float(x); }
inline double value(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> T rounded(float x) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
    else return (T)x;
}
// Relative error of rounding to T, half a unit in the last place.
template <typename T> constexpr double EPSILON = 0x1p-24;
template <> constexpr double EPSILON<__half> = 0x1p-11;
template <> constexpr double EPSILON<__nv_bfloat16> = 0x1p-8;

// Uniform in [-1, 1), the same sequence whatever the schedule. (Knuth's MMIX generator.)
inline float random_float() {
    static u64 state = 12345;
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (float)(int)(state >> 32) * 0x1p-31f;
}

// Global memory: 0xff (NaN) at first, at a multiple of 16. An access behind its end (rounded up to 16 bytes), or more than a
// page before its beginning, ends the program.
template <typename T> struct Array {
    u64 count;
    T* data;

    explicit Array(u64 count) : count(count) {
        const size_t wanted = (count * sizeof(T) + 15) / 16 * 16, inner = (wanted + PAGE - 1) / PAGE * PAGE;
        bytes = inner + 2 * PAGE;
        pages = (u8*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) fail("no memory");
        std::memset(pages, 0xff, bytes);
        mprotect(pages, PAGE, PROT_NONE);
        mprotect(pages + PAGE + inner, PAGE, PROT_NONE);
        data = (T*)(pages + PAGE + inner - wanted);
    }
    // Values in [-scale, scale), rounded to T.
    static Array random(u64 count, float scale = 1.0f) {
        Array a(count);
        for (u64 i = 0; i < count; i++) a.data[i] = rounded<T>(random_float() * scale);
        return a;
    }
    Array(Array&& other)
        : count(other.count), data(other.data), pages(std::exchange(other.pages, nullptr)), bytes(other.bytes) {}
    ~Array() {
        if (pages) munmap(pages, bytes);
    }
    operator T*() { return data; }
    operator const T*() const { return data; }
    double at(u64 i) const { return value(data[i]); }

private:
    static constexpr size_t PAGE = 4096;
    u8* pages;
    size_t bytes;
};

// What a sum should be, and the sum of the magnitudes of its terms.
struct Expected {
    double value = 0, magnitude = 0;

    void add(double x) { value += x, magnitude += std::fabs(x); }
};
// Compares `out` [rows, columns] with expected(row, column) and prints the largest error, in units of what is allowed: one
// rounding of the value to T, and `roundings` of f32 of the magnitude. Returns whether no error is larger than that.
template <typename T, typename F>
bool compare(const char* name, const T* out, u64 rows, u64 columns, double roundings, F expected) {
    double worst = 0;
    u64 wrong = 0, first = 0;
    for (u64 at = 0; at < rows * columns; at++) {
        const Expected x = expected(at / columns, at % columns);
        // Results near 0 may be subnormal.
        const double allowed = EPSILON<T> * std::fabs(x.value) * 1.01 + roundings * 0x1p-24 * x.magnitude + 0x1p-25;
        double error = std::fabs(value(out[at]) - x.value) / allowed;
        if (!(error <= 1e30)) error = 1e30; // NaN too
        if (error > 1 && wrong++ == 0) first = at;
        worst = error > worst ? error : worst;
    }
    printf("%s: error %.3f of what is allowed\n", name, worst);
    if (wrong) {
        printf("WRONG: %llu of %llu elements, first at (%llu, %llu): %g, expected %g\n", wrong, rows * columns,
               first / columns, first % columns, value(out[first]), expected(first / columns, first % columns).value);
    }
    return wrong == 0;
}

} // namespace emulator
