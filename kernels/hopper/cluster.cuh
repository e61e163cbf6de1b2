// A cluster of thread blocks: one instruction, or a few, of PTX for sm_90a each.
//   CLUSTER  blocks of one

typedef unsigned int u32;

// To all blocks of the cluster, by the copy engine: a multiple of 16 bytes, to the same place in each and counted at the
// same barrier of each.
__device__ __forceinline__ void copy_to_cluster(u32 to, const char *from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"((unsigned short)((1 << CLUSTER) - 1)) : "memory");
}

// The barrier's phase does not end before so many more bytes are there.
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ u32 rank_in_cluster() {
    u32 x;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
    return x;
}

// The same barrier in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{ .reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier), "r"(rank) : "memory");
}

// All threads of the cluster meet; between arriving and waiting each may do something else.
__device__ __forceinline__ void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ void meet_in_cluster() {
    arrive_in_cluster();
    wait_for_cluster();
}

// What block `rank` of the cluster has in its shared memory where this one has *mine.
__device__ __forceinline__ u32 taken_from(u32 rank, const u32 *mine) {
    u32 x;
    asm volatile(
        "{ .reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %1, %2;\n"
        "ld.shared::cluster.u32 %0, [there]; }" : "=r"(x) : "r"((u32)__cvta_generic_to_shared(mine)), "r"(rank) : "memory");
    return x;
}

__device__ __forceinline__ float taken_from(u32 rank, const float *mine) {
    return __uint_as_float(taken_from(rank, (const u32 *)mine));
}
