// Blocks of a cluster (Hopper, PTX ISA 8.4), one function each: their ranks, and what they send one another.
#pragma once
#include "common.cuh"

// The rank of this block in its cluster.
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Waits for all threads of the cluster; what they wrote before is seen behind it.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where the block of that rank has what lies at `address` here.
__device__ __forceinline__ u32 of_block(u32 address, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
// 16 bytes from there, or zeros.
__device__ __forceinline__ uint4 load_there(u32 there, bool valid) {
    uint4 v;
    asm volatile("{.reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
                 "@q ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];}"
                 : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
                 : "r"(there), "r"((u32)valid)
                 : "memory");
    return v;
}
// Starts to store 16 bytes in a block's shared memory; they count at `barrier`, which is that block's.
__device__ __forceinline__ void send(u32 to, const float (&v)[4], u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
                 "r"(__float_as_uint(v[3])), "r"(barrier)
                 : "memory");
}
// Waits as `barrier_wait`, for what other blocks have sent.
__device__ __forceinline__ void wait_sent(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}
// Arrives at a barrier of another block.
__device__ __forceinline__ void arrive_at(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
