// AdamW over all tensors in one launch (see adamw/mod.rs). Bound by memory: with f32 moments 28 bytes an element, and 4
// more where the values from before are kept. Every operation is rounded as on the CPU, so that the results are the same.
#include "dynamic8/dynamic8.cuh"
#include "tensor_list.cuh"

constexpr int THREADS = 256;
constexpr u32 PIECE = 8192; // elements a block updates: the scales of its codes are a whole cache line, a packet on the bus
constexpr int BLOCK = 256;  // elements that share a scale in the 8-bit form
constexpr int EACH = BLOCK / WARP; // elements of a thread, side by side
constexpr u32 ZERO = 127; // code of zero in the signed map; a negative first moment never takes it
enum Flags : u32 { DECAY = 1, EIGHT_BIT = 2, GRAD_F16 = 4, GRAD_BF16 = 8 };

// One parameter; laid out as the host writes it.
struct Entry {
    float* w;
    const void* grad;
    void* m;
    void* v;
    float* m_absmax;
    float* v_absmax;
    float* previous; // gets the values from before the update, unless null
    u64 numel;
    u32 first_piece;
    u32 flags;
};

// The table of a launch for few tensors, which is among its parameters: nothing has to be copied before it.
constexpr int FEW = 32;
struct Few {
    Entry at[FEW];
};

struct Coefficients {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, root_scale, eps, decay_before, decay_after;
};

__device__ __forceinline__ float gradient(const Entry& entry, u64 i) {
    if (entry.flags & GRAD_F16) return wide(((const f16*)entry.grad)[i]);
    if (entry.flags & GRAD_BF16) return wide(((const bf16*)entry.grad)[i]);
    return ((const float*)entry.grad)[i];
}

// One element: its new value; the moments are overwritten.
__device__ __forceinline__ float update(const Coefficients& c, float w, float g, float scale, float& m, float& v) {
    g = __fmul_rn(g, scale);
    m = __fadd_rn(__fmul_rn(m, c.beta1), __fmul_rn(c.one_minus_beta1, g));
    v = __fadd_rn(__fmul_rn(v, c.beta2), __fmul_rn(__fmul_rn(c.one_minus_beta2, g), g));
    float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(v), c.root_scale), c.eps);
    float moved = __fsub_rn(__fmul_rn(w, c.decay_before), __fdiv_rn(__fmul_rn(c.step_size, m), denominator));
    return __fmul_rn(moved, c.decay_after);
}

__device__ __forceinline__ bool infinite(float x) { return !(fabsf(x) < INFINITY); }

// 32-bit moments; four elements a thread at a time where everything is aligned. Whether a value became infinite.
__device__ __forceinline__ bool update32(const Entry& e, const Coefficients& c, float scale, u64 from, u64 to) {
    float *m = (float*)e.m, *v = (float*)e.v;
    bool bad = false;
    u64 addresses = (u64)e.w | (u64)e.grad | (u64)m | (u64)v | (u64)e.previous;
    if (addresses % 16 == 0 && to % 4 == 0 && !(e.flags & (GRAD_F16 | GRAD_BF16))) {
        for (u64 i = from + threadIdx.x * 4; i < to; i += THREADS * 4) {
            Pack<float> pw = load_pack(e.w + i), pg = load_pack((const float*)e.grad + i);
            Pack<float> pm = load_pack(m + i), pv = load_pack(v + i);
            if (e.previous) store_pack(e.previous + i, pw);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                pw.at[j] = update(c, pw.at[j], pg.at[j], scale, pm.at[j], pv.at[j]);
                bad |= infinite(pw.at[j]);
            }
            store_pack(e.w + i, pw);
            store_pack(m + i, pm);
            store_pack(v + i, pv);
        }
        return bad;
    }
    for (u64 i = from + threadIdx.x; i < to; i += THREADS) {
        float w = e.w[i], mi = m[i], vi = v[i];
        if (e.previous) e.previous[i] = w;
        w = update(c, w, gradient(e, i), scale, mi, vi);
        e.w[i] = w;
        m[i] = mi;
        v[i] = vi;
        bad |= infinite(w);
    }
    return bad;
}

// A thread's elements, of which `count` are there. Where they are `whole`, all of them and aligned, a warp takes whole cache
// lines at a time: what is in host memory goes over the bus in few packets.
union Codes {
    uint2 all;
    u8 at[EACH];
};

__device__ __forceinline__ void load_floats(float* to, const float* from, int count, bool whole) {
#pragma unroll
    for (int j = 0; j < EACH; j += 4) {
        if (whole) *(float4*)(to + j) = *(const float4*)(from + j);
        else
#pragma unroll
            for (int i = j; i < j + 4; i++) to[i] = i < count ? from[i] : 0.0f;
    }
}

__device__ __forceinline__ void store_floats(float* to, const float* from, int count, bool whole) {
#pragma unroll
    for (int j = 0; j < EACH; j += 4) {
        if (whole) *(float4*)(to + j) = *(const float4*)(from + j);
        else
#pragma unroll
            for (int i = j; i < j + 4; i++)
                if (i < count) to[i] = from[i];
    }
}

__device__ __forceinline__ Codes load_codes(const u8* from, int count, bool whole) {
    Codes codes;
    if (whole) codes.all = *(const uint2*)from;
    else
#pragma unroll
        for (int j = 0; j < EACH; j++) codes.at[j] = j < count ? from[j] : 0;
    return codes;
}

__device__ __forceinline__ void store_codes(u8* to, const Codes& codes, int count, bool whole) {
    if (whole) *(uint2*)to = codes.all;
    else
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (j < count) to[j] = codes.at[j];
}

// 8-bit moments: a warp takes a block of codes. All threads come here.
__device__ __forceinline__ bool update8(const Entry& e, const Coefficients& c, float scale, u64 from, u64 to,
                                        const float* signed_map, const float* unsigned_map) {
    __shared__ float m_scales[PIECE / BLOCK], v_scales[PIECE / BLOCK];
    u64 first = from / BLOCK;
    int blocks = (to - from + BLOCK - 1) / BLOCK, lane = threadIdx.x % WARP;
    if (threadIdx.x < blocks) {
        m_scales[threadIdx.x] = e.m_absmax[first + threadIdx.x];
        v_scales[threadIdx.x] = e.v_absmax[first + threadIdx.x];
    }
    __syncthreads();
    u64 addresses = (u64)e.w | (u64)e.grad | (u64)e.previous | ((u64)e.m | (u64)e.v) << 1;
    bool narrow = e.flags & (GRAD_F16 | GRAD_BF16), aligned = addresses % 16 == 0 && !narrow, bad = false;
    for (int block = threadIdx.x / WARP; block < blocks; block += THREADS / WARP) {
        u64 start = from + block * BLOCK + lane * EACH;
        int count = start < to ? min(to - start, (u64)EACH) : 0;
        bool whole = aligned && count == EACH;
        Codes m_codes = load_codes((u8*)e.m + start, count, whole), v_codes = load_codes((u8*)e.v + start, count, whole);
        float w[EACH], g[EACH], m[EACH], v[EACH], m_most = 0.0f, v_most = 0.0f;
        load_floats(w, e.w + start, count, whole);
        if (narrow)
#pragma unroll
            for (int j = 0; j < EACH; j++) g[j] = j < count ? gradient(e, start + j) : 0.0f;
        else load_floats(g, (const float*)e.grad + start, count, whole);
        if (e.previous) store_floats(e.previous + start, w, count, whole);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            m[j] = v[j] = 0.0f;
            if (j >= count) continue;
            m[j] = __fmul_rn(signed_map[m_codes.at[j]], m_scales[block]);
            v[j] = __fmul_rn(unsigned_map[v_codes.at[j]], v_scales[block]);
            w[j] = update(c, w[j], g[j], scale, m[j], v[j]);
            bad |= infinite(w[j]);
            m_most = fmaxf(m_most, fabsf(m[j]));
            v_most = fmaxf(v_most, fabsf(v[j]));
        }
        store_floats(e.w + start, w, count, whole);
        m_most = warp_max(m_most);
        v_most = warp_max(v_most);
        float m_inverse = __fdiv_rn(1.0f, m_most), v_inverse = __fdiv_rn(1.0f, v_most);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            u32 code = dynamic8_encode<true>(signed_map, __fmul_rn(m[j], m_inverse));
            m_codes.at[j] = code - (code == ZERO && m[j] < 0.0f);
            v_codes.at[j] = dynamic8_encode<false>(unsigned_map, __fmul_rn(v[j], v_inverse));
        }
        store_codes((u8*)e.m + start, m_codes, count, whole);
        store_codes((u8*)e.v + start, v_codes, count, whole);
        __syncwarp(); // every lane has read them
        if (lane == 0) {
            m_scales[block] = m_most;
            v_scales[block] = v_most;
        }
    }
    __syncthreads();
    if (threadIdx.x < blocks) {
        e.m_absmax[first + threadIdx.x] = m_scales[threadIdx.x];
        e.v_absmax[first + threadIdx.x] = v_scales[threadIdx.x];
    }
    return bad;
}

// The table is `few` where `table` is null. `clip`: see norm.cu. Nothing is changed where the gradients are not finite.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_step(const __grid_constant__ Few few, const Entry* table, u32 count, float beta1, float one_minus_beta1,
           float beta2, float one_minus_beta2, float step_size, float root_scale, float eps, float decay_before, float decay_after, float* clip,
           const float* signed_map, const float* unsigned_map) {
    if (clip[2] == 0.0f) return;
    const Entry entry = tensor_of_piece(table == nullptr ? few.at : table, count, blockIdx.x);
    u64 from = (u64)(blockIdx.x - entry.first_piece) * PIECE, to = min(from + PIECE, entry.numel);
    bool decays = entry.flags & DECAY;
    Coefficients c = {beta1,      one_minus_beta1, beta2,
                      one_minus_beta2, step_size,  root_scale,
                      eps,        decays ? decay_before : 1.0f, decays ? decay_after : 1.0f};
    float scale = clip[1];
    bool bad;
    if (entry.flags & EIGHT_BIT) {
        __shared__ float maps[512];
        dynamic8_load(maps, signed_map);
        dynamic8_load(maps + 256, unsigned_map);
        __syncthreads();
        bad = update8(entry, c, scale, from, to, maps, maps + 256);
    } else {
        bad = update32(entry, c, scale, from, to);
    }
    if (bad) clip[3] = 0.0f; // whoever finds one writes the same
}
