// What kernels use of CUDA's header of this name.
#pragma once
#include "../cuda.h"

struct __half {
    unsigned short bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
inline float __half2float(__half x) { return (float)std::bit_cast<_Float16>(x); }
// To nearest even; any NaN becomes 0x7fff.
inline __half __float2half_rn(float x) {
    if (std::isnan(x)) return {0x7fff};
    return std::bit_cast<__half>((_Float16)x);
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 x) { return make_float2(__half2float(x.x), __half2float(x.y)); }
