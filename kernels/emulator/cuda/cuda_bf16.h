// What kernels use of CUDA's header of this name.
#pragma once
#include "../cuda.h"

struct __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((u32)x.bits << 16); }
// To nearest even; any NaN becomes 0x7fff.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    if (std::isnan(x)) return {0x7fff};
    const u32 bits = __float_as_uint(x), half = 0x7fff + (bits >> 16 & 1);
    return {(unsigned short)((bits + half) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
