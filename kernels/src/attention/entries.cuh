// The kernels of attention in 16 bits for heads of up to DIM elements, which the including file defines.
#include "attention/backward.cuh"
#include "attention/decode.cuh"
#include "attention/delta.cuh"
#include "attention/forward.cuh"

#define ENTRIES(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_forward_##T(                                    \
        const T* q, const T* k, const T* v, T* o, float* lse, const int4* tiles, u32 heads, u32 group, u32 d,          \
        u32 total, float scale_log2) {                                                                                 \
        forward<T, DIM>(q, k, v, o, lse, tiles, heads, group, d, total, scale_log2);                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_decode_##T(                                     \
        const T* q, const T* k, const T* v, float* part_o, float* part_lse, const int4* chunks, u32 heads, u32 group,  \
        u32 d, u32 most, float scale_log2) {                                                                           \
        decode<T, DIM>(q, k, v, part_o, part_lse, chunks, heads, group, d, most, scale_log2);                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_combine_##T(                                       \
        const float* part_o, const float* part_lse, T* o, float* lse, const int4* rows, u32 heads, u32 d, u32 most,    \
        u32 total) {                                                                                                   \
        combine<T>(part_o, part_lse, o, lse, rows, heads, d, most, total);                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(DELTA_THREADS) attention_delta_##T(                                   \
        const T* o, const T* grad, float* delta, u32 heads, u32 d, u32 total) {                                        \
        make_delta<T>(o, grad, delta, heads, d, total);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_keys_##T(                                       \
        const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* dk, T* dv,         \
        const int4* tiles, u32 heads, u32 group, u32 d, u32 total, float scale, float scale_log2) {                    \
        keys_backward<T, DIM>(                                                                                         \
            q, k, v, grad, lse, delta, dk, dv, tiles, heads, group, d, total, scale, scale_log2);                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_queries_##T(                                    \
        const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* dq,                \
        const int4* tiles, u32 heads, u32 group, u32 d, u32 total, float scale, float scale_log2) {                    \
        queries_backward<T, DIM>(q, k, v, grad, lse, delta, dq, tiles, heads, group, d, total, scale, scale_log2);     \
    }
ENTRIES(f16)
ENTRIES(bf16)
