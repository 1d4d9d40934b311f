// CUDA's own words, as far as kernels use them, for C++. A word that is missing is added here.
#pragma once
#include "machine.h"

#define __device__
#define __global__
#define __constant__ static const
#define __shared__ thread_local // a block is an OS thread
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(N) __attribute__((aligned(N)))
#define __CUDA_ARCH__ 900
#undef INFINITY // common.cuh has its own

// ---- Vectors ----
#define VECTORS(T, NAME)                                                                                               \
    struct alignas(2 * sizeof(T)) NAME##2 {                                                                            \
        T x, y;                                                                                                        \
    };                                                                                                                 \
    struct alignas(4 * sizeof(T)) NAME##4 {                                                                            \
        T x, y, z, w;                                                                                                  \
    };                                                                                                                 \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                                         \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(int, int)
VECTORS(u32, uint)
VECTORS(float, float)

// ---- Arithmetic ----
template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
    return std::common_type_t<A, B>(a) < std::common_type_t<A, B>(b) ? a : b;
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
    return std::common_type_t<A, B>(a) > std::common_type_t<A, B>(b) ? a : b;
}
constexpr u32 __float_as_uint(float x) { return std::bit_cast<u32>(x); }
constexpr float __uint_as_float(u32 x) { return std::bit_cast<float>(x); }
constexpr float __int_as_float(int x) { return std::bit_cast<float>(x); }
// Each rounds once: programs are compiled without contraction to fused multiply-adds.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __log2f(float x) { return std::log2(x); }
inline int __float2int_rn(float x) { return (int)std::nearbyint(x); }
inline int __float2int_rd(float x) { return (int)std::floor(x); }
inline u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
inline int __popc(u32 x) { return std::popcount(x); }
// Byte i of the result is byte `selector >> 4 i & 7` of the eight bytes of b and a, as NVRTC 12.4 compiles it: PTX's prmt
// would make bit 3 copies of the byte's sign, and its selector is masked with 0x7777.
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}

// ---- Memory ----
template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> T __ldcv(const T* p) { return *p; }
inline size_t __cvta_generic_to_shared(const void* p) { return emulator::address_of(p); }
inline size_t __cvta_generic_to_global(const void* p) { return (size_t)p; }
inline void __threadfence() {}
template <typename T> T atomicAdd(T* p, std::type_identity_t<T> x) { return std::exchange(*p, T(*p + x)); }

// ---- Threads ----
inline void __syncthreads() { emulator::bar_sync(0, emulator::ALL); }
inline int __syncthreads_or(int x) { return emulator::bar_or(x); }
inline void __syncwarp() {
    int nothing = 0;
    emulator::collective("__syncwarp", ~0u, nothing, +[](int**) {});
}
namespace emulator {
struct Shuffle {
    u64 value;
    u32 from; // lane
    u64 result;
};
template <typename T> T shuffle(const char* what, u32 mask, T x, u32 from) {
    static_assert(sizeof(T) <= 8);
    Shuffle mine{0, from, 0};
    std::memcpy(&mine.value, &x, sizeof x);
    collective(what, mask, mine, +[](Shuffle** lanes) {
        for (int i = 0; i < 32; i++) {
            if (!lanes[i]) continue;
            const Shuffle* other = lanes[lanes[i]->from];
            if (!other) fail("shuffle: lane %d reads from lane %u, which takes no part", i, lanes[i]->from);
            lanes[i]->result = other->value;
        }
    });
    std::memcpy(&x, &mine.result, sizeof x);
    return x;
}
struct Vote {
    u32 value, nonzero, most; // nonzero: a bit for each lane
};
inline Vote vote(const char* what, u32 mask, u32 value) {
    Vote mine{value, 0, 0};
    collective(what, mask, mine, +[](Vote** lanes) {
        Vote result{};
        for (int i = 0; i < 32; i++) {
            if (!lanes[i]) continue;
            result.nonzero |= (u32)(lanes[i]->value != 0) << i;
            result.most = max(result.most, lanes[i]->value);
        }
        for (int i = 0; i < 32; i++) {
            if (lanes[i]) *lanes[i] = result;
        }
    });
    return mine;
}
} // namespace emulator
template <typename T> T __shfl_sync(u32 mask, T x, int from) {
    return emulator::shuffle("__shfl_sync", mask, x, from % 32u);
}
template <typename T> T __shfl_xor_sync(u32 mask, T x, int bits) {
    return emulator::shuffle("__shfl_xor_sync", mask, x, (emulator::lane() ^ bits) % 32);
}
inline u32 __ballot_sync(u32 mask, int x) { return emulator::vote("__ballot_sync", mask, x).nonzero; }
inline int __any_sync(u32 mask, int x) { return emulator::vote("__any_sync", mask, x).nonzero != 0; }
inline u32 __reduce_max_sync(u32 mask, u32 x) { return emulator::vote("__reduce_max_sync", mask, x).most; }
