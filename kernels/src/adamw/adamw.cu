// AdamW over all tensors in one launch (see adamw/mod.rs). Bound by memory: with f32 moments 28 bytes an element, and 4
// more where the values from before are kept. Every operation is rounded as on the CPU, so that the results are the same.
#include "dynamic8/dynamic8.cuh"
#include "tensor_list.cuh"

constexpr int THREADS = 256;
constexpr u32 PIECE = 4096; // elements a block updates: whole blocks of 8-bit codes
constexpr int BLOCK = 256;  // elements that share a scale in the 8-bit form
constexpr int LANE = BLOCK / WARP;
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

// 8-bit moments: a warp takes a block of codes.
__device__ __forceinline__ bool update8(const Entry& e, const Coefficients& c, float scale, u64 from, u64 to,
                                        const float* signed_map, const float* unsigned_map) {
    u8 *m_codes = (u8*)e.m, *v_codes = (u8*)e.v;
    int lane = threadIdx.x % WARP;
    bool bad = false;
    for (u64 start = from + threadIdx.x / WARP * BLOCK; start < to; start += THREADS / WARP * BLOCK) {
        u64 block = start / BLOCK;
        float m_scale = e.m_absmax[block], v_scale = e.v_absmax[block];
        float m[LANE], v[LANE], m_most = 0.0f, v_most = 0.0f;
#pragma unroll
        for (int j = 0; j < LANE; j++) {
            u64 i = start + j * WARP + lane;
            m[j] = v[j] = 0.0f;
            if (i >= to) continue;
            m[j] = __fmul_rn(signed_map[m_codes[i]], m_scale);
            v[j] = __fmul_rn(unsigned_map[v_codes[i]], v_scale);
            float w = e.w[i];
            if (e.previous) e.previous[i] = w;
            w = update(c, w, gradient(e, i), scale, m[j], v[j]);
            e.w[i] = w;
            bad |= infinite(w);
            m_most = fmaxf(m_most, fabsf(m[j]));
            v_most = fmaxf(v_most, fabsf(v[j]));
        }
        m_most = warp_max(m_most);
        v_most = warp_max(v_most);
        if (lane == 0) {
            e.m_absmax[block] = m_most;
            e.v_absmax[block] = v_most;
        }
        float m_inverse = __fdiv_rn(1.0f, m_most), v_inverse = __fdiv_rn(1.0f, v_most);
#pragma unroll
        for (int j = 0; j < LANE; j++) {
            u64 i = start + j * WARP + lane;
            if (i >= to) continue;
            u32 code = dynamic8_encode(signed_map, __fmul_rn(m[j], m_inverse));
            m_codes[i] = code - (code == ZERO && m[j] < 0.0f);
            v_codes[i] = dynamic8_encode(unsigned_map, __fmul_rn(v[j], v_inverse));
        }
    }
    return bad;
}

// `clip`: see norm.cu. Nothing is changed where the gradients are not finite.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_step(const Entry* table, u32 count, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2,
           float step_size, float root_scale, float eps, float decay_before, float decay_after, float* clip,
           const float* signed_map, const float* unsigned_map) {
    if (clip[2] == 0.0f) return;
    const Entry entry = tensor_of_piece(table, count, blockIdx.x);
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
