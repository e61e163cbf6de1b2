// One instruction, or a few, of PTX for sm_90a each: barriers in shared memory, copies, products of a warpgroup.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int LINE = 128;  // bytes of one row in one block of 64 elements, as wgmma wants them
constexpr float LOG2E = 1.4426950408889634f;
__device__ __forceinline__ float none() { return __int_as_float(0xFF800000); }  // below every number

__device__ __forceinline__ u32 shared_address(const void *x) { return (u32)__cvta_generic_to_shared(x); }

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The first warpgroup of a block copies, the others multiply, in as many registers a thread as each needs. BEGIN: what the
// compiler lets a block of so many threads begin with. A warpgroup that asks for more than others have given waits for ever.
constexpr int BEGIN = CONSUMERS == 2 ? 168 : 128;

template <int COPYING, int MULTIPLYING>
struct Registers {
    static_assert(COPYING + CONSUMERS * MULTIPLYING <= (CONSUMERS + 1) * BEGIN, "more registers than a block begins with");
    static __device__ __forceinline__ void give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPYING)); }
    static __device__ __forceinline__ void take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING)); }
};

// A kernel's work: `produce` and `consume`, each by its warpgroups.
template <class Roles, class Problem, class Shared>
__device__ __forceinline__ void divide(const Problem &p, const Shared &shared) {
    if (threadIdx.x < 128) {
        Roles::give();
        produce(p, shared);
    } else {
        Roles::take();
        consume(p, shared);
    }
}

// Arrives when all copies that this thread has started are there
__device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void copy16(u32 to, u64 from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Read and written once: first to leave the cache.
__device__ __forceinline__ uint2 load_once(const char *from) {
    uint2 x;
    asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from));
    return x;
}

__device__ __forceinline__ void store_once(char *to, uint2 x) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}

__device__ __forceinline__ void store_once(char *to, uint4 x) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

__device__ __forceinline__ void store(char *to, u32 x) { asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory"); }

__device__ __forceinline__ void store(char *to, uint2 x) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}

__device__ __forceinline__ void store(char *to, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Shared memory.
__device__ __forceinline__ void put(u32 address, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ void put(u32 address, u64 x) {
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
}

__device__ __forceinline__ u32 taken(u32 address) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

__device__ __forceinline__ u32 taken2(u32 address) {
    unsigned short x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address));
    return x;
}

__device__ __forceinline__ u64 taken8(u32 address) {
    u64 x;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(x) : "r"(address));
    return x;
}

__device__ __forceinline__ uint4 taken16(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address));
    return x;
}

// Four blocks of 8 x 8 values of 2 bytes, as products leave them in a warp; lane 8 i + j says where row j of block i goes,
// or where it is `transposed`, column j.
__device__ __forceinline__ void put_blocks(u32 address, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

__device__ __forceinline__ void put_blocks_transposed(u32 address, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// Makes what ordinary copies have written visible to the products.
__device__ __forceinline__ void fence_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Two warpgroups meet at a named barrier: one waits there, the other passes by.
__device__ __forceinline__ void named_wait(int barrier) {
    asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void named_pass(int barrier) {
    asm volatile("bar.arrive %0, 256;" ::"r"(barrier) : "memory");
}

// Of an operand in shared memory with rows of SPAN bytes, swizzled over as many: `block` bytes from 64 elements to the
// next 64 where rows are the inner dimension of the product.
template <int SPAN = 128>
__device__ __forceinline__ u64 described(u32 address, u32 block = 16) {
    return (SPAN == 128 ? 1ull : 2ull) << 62 | (u64)(8 * SPAN >> 4) << 32 | (u64)(block >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// `x` is not read or moved before.
template <int N>
__device__ __forceinline__ void keep(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// Waits for all products under way, whose results are `x`
template <int N>
__device__ __forceinline__ void products_wait(float (&x)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    keep(x);
}

// As above, but for the group of products that was begun last.
__device__ __forceinline__ void products_wait_but_last() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// A ring of buffers: the place of the next item, and the parity of its barriers.
struct Ring {
    u32 slot = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == BUFFERS) slot = 0, parity ^= 1;
    }
};

// Of a result [64, n], the row of a thread's first (0) or second (1) values.
__device__ __forceinline__ int row_of_thread(int r) {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
}

// Between the layout of a result, where a lane has 2 neighbours of 8 columns in each of two chunks x and y, and one
// where it has 4 neighbours of one chunk: 8 bytes. Its own inverse.
__device__ __forceinline__ void swap_with_neighbour(u32 &x, u32 &y) {
    const bool odd = threadIdx.x % 2;
    const u32 got = __shfl_xor_sync(~0u, odd ? x : y, 1);
    if (odd) x = got;
    else y = got;
}

// Where these lie among the 32 bytes of the two chunks.
__device__ __forceinline__ int byte_of_lane() { return threadIdx.x % 2 * 16 + threadIdx.x % 4 / 2 * 8; }
