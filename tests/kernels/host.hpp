// What pack.cu, select.cu and neurons.cu ask of CUDA and of the texts before it, for a CPU. Threads are contexts of one process, which take turns where
// they wait for each other; clusters run one after the other.
//   HALF  values are fp16, else bf16

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
using std::max;
using std::min;

struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

struct Meeting {
    int expected, arrived = 0, times = 0;
};

struct Index { int x; };
struct Thread {
    Index index, block;
    int times = 0;   // it has exchanged something with its warp
    int before = 0;  // its cluster had met so often when it arrived
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
};

static Thread *current;
static ucontext_t scheduler;
static Index gridDim;
static std::vector<Meeting> warps, blocks;
static Meeting cluster;
static std::vector<u32> words;            // that threads show their warp, in turns
static std::vector<std::vector<char>> memories;  // shared, of each block

#define threadIdx (current->index)
#define blockIdx (current->block)

static inline int arrive(Meeting &all) {
    const int before = all.times;
    if (++all.arrived == all.expected) all.arrived = 0, all.times++;
    return before;
}

static inline void wait(const Meeting &all, int before) {
    while (all.times == before) {
        current->done = false;
        swapcontext(&current->context, &scheduler);
    }
}

static inline void meet(Meeting &all) { wait(all, arrive(all)); }

static inline u32 rank_in_cluster() { return blockIdx.x % CLUSTER; }
static inline void arrive_in_cluster() { current->before = arrive(cluster); }
static inline void wait_for_cluster() { wait(cluster, current->before); }
static inline void meet_in_cluster() { meet(cluster); }
static inline void __syncthreads() { meet(blocks[rank_in_cluster()]); }

static inline void __syncwarp() {}

template <class T>
static inline T taken_from(u32 rank, const T *mine) {
    const size_t place = (const char *)mine - memories[rank_in_cluster()].data();
    return *(const T *)(memories[rank].data() + place);
}

// What the lanes of a warp show: 32 words.
static inline const u32 *shown(u32 x) {
    const int warp = rank_in_cluster() * (THREADS / 32) + threadIdx.x / 32;
    u32 *of_warp = &words[(current->times++ % 2 * warps.size() + warp) * 32];
    of_warp[threadIdx.x % 32] = x;
    meet(warps[warp]);
    return of_warp;
}

static inline int __shfl_sync(u32, int x, int lane) { return shown(x)[lane]; }
static inline u32 __shfl_up_sync(u32, u32 x, int lanes) {
    const u32 *of_warp = shown(x);
    const int lane = threadIdx.x % 32;
    return of_warp[lane < lanes ? lane : lane - lanes];
}
template <class T>
static inline T atomicAdd(T *to, u32 x) { return (*to += x) - x; }
static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __ffs(u32 x) { return __builtin_ffs(x); }
static inline int __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
static inline u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
static inline int __float_as_int(float x) {
    int y;
    memcpy(&y, &x, 4);
    return y;
}
static inline u32 __reduce_max_sync(u32, u32 x) {
    const u32 *of_warp = shown(x);
    return *std::max_element(of_warp, of_warp + 32);
}

static inline u32 __vmaxu2(u32 a, u32 b) { return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16; }
static inline float __uint_as_float(u32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static inline float __frcp_rn(float x) { return 1 / x; }
template <class T>
static inline T __ldg(const T *from) { return *from; }

// To the nearest, with so many bits of exponent and after the point; from `most` on `above`.
static inline u32 rounded(float x, int exponents, int bits, float most, u32 above, u32 nan) {
    if (x != x) return nan;
    const float size = std::fabs(x);
    const int least = 3 - (1 << (exponents - 1));
    int exponent;
    std::frexp(size, &exponent);
    exponent = size == 0 ? least : max(exponent, least);
    const u32 digits = (u32)std::nearbyint(std::ldexp((double)size, bits + 1 - exponent));
    const u32 code = ((exponent - least + 1) << bits) + digits - (1u << bits);
    return (size >= most ? above : code) | (std::signbit(x) ? 1u << (exponents + bits) : 0);
}

static inline u32 rounded8(float x) { return rounded(x, 4, 3, 448, 0x7E, 0x7F); }
static inline u32 pack8(float x, float y) { return rounded8(x) | rounded8(y) << 8; }

#ifdef HALF
static inline u32 rounded16(float x) { return rounded(x, 5, 10, 65520, 0x7C00, 0x7FFF); }
static inline float low(u32 x) {
    const int exponent = x >> 10 & 31, digits = x & 1023;
    const float finite = std::ldexp(digits + (exponent ? 1024.0f : 0.0f), max(exponent, 1) - 25);
    return (x & 0x8000 ? -1 : 1) * (exponent < 31 ? finite : digits ? NAN : INFINITY);
}
static inline float high(u32 x) { return low(x >> 16); }
#else
static inline u32 rounded16(float x) { return rounded(x, 8, 7, INFINITY, 0x7F80, 0x7FFF); }
static inline float low(u32 x) { return __uint_as_float(x << 16); }
static inline float high(u32 x) { return __uint_as_float(x & 0xFFFF0000); }
#endif
static inline u32 pack(float x, float y) { return rounded16(x) | rounded16(y) << 16; }

// Calls f() in each thread of each block.
static inline void run_grid(int count, int shared, void (*f)()) {
    gridDim.x = count;
    cluster = {CLUSTER * THREADS};
    for (int first = 0; first < count; first += CLUSTER) {
        blocks.assign(CLUSTER, {THREADS});
        warps.assign(CLUSTER * THREADS / 32, {32});
        words.assign(warps.size() * 64, 0);
        memories.assign(CLUSTER, std::vector<char>(shared));
        std::vector<Thread> threads(CLUSTER * THREADS);
        for (int i = 0; i < CLUSTER * THREADS; i++) {
            Thread &thread = threads[i];
            thread.index.x = i % THREADS, thread.block.x = first + i / THREADS;
            thread.stack.resize(1 << 14);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = &scheduler;
            makecontext(&thread.context, f, 0);
        }
        for (bool more = true; more;) {
            more = false;
            for (Thread &thread : threads) {
                if (thread.done) continue;
                current = &thread, thread.done = true;
                swapcontext(&scheduler, &thread.context);
                more |= !thread.done;
            }
        }
    }
}
