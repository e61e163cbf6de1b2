// What both kernels of attention share: rows of one head, WIDTH values of 2 bytes, copied by one warpgroup into shared memory as
// wgmma wants them, 16 bytes a lane; and how a kernel begins.

constexpr int CHUNKS = WIDTH / 8;     // of 16 bytes in a row
constexpr int AT_ONCE = 32 / CHUNKS;  // rows that one warp copies in one instruction
constexpr int PASS = 4 * AT_ONCE;     // rows that the warpgroup copies in one instruction of each warp

// The rows that one lane in CHUNKS copies, one in each pass, lie in `index` of CHUNKS neighbouring lanes.
__device__ __forceinline__ int row_of_lane(int warp, int lane) {
    return lane % CHUNKS * PASS + warp * AT_ONCE + lane / CHUNKS;
}

template <int ROWS>
__device__ __forceinline__ void gather(u32 to, const char *from, u32 stride, u32 index) {
    constexpr int BATCH = 4;  // a copy holds on to its address for long: several are made at once
    static_assert(ROWS / PASS % BATCH == 0 && ROWS / PASS <= CHUNKS, "");
#pragma unroll
    for (int i = 0; i < ROWS / PASS; i += BATCH) {
        u64 row[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            asm volatile("mad.wide.u32 %0, %1, %2, %3;"
                         : "=l"(row[j]) : "r"(__shfl_sync(~0u, index, i + j, CHUNKS)), "r"(stride), "l"(from));
#pragma unroll
        for (int j = 0; j < BATCH; j++) copy16(to + (i + j) * PASS * LINE, row[j]);
    }
}

// Where in a tile of ROWS rows a lane's first 16 bytes go: two blocks of 64 elements, their chunks swizzled by row.
template <int ROWS>
__device__ __forceinline__ u32 place_of_lane(int warp, int lane) {
    const int row = warp * AT_ONCE + lane / CHUNKS, chunk = lane % CHUNKS;
    return chunk / 8 * (ROWS * LINE) + row * LINE + ((chunk ^ row) & 7) * 16;
}

// A kernel of attention: tiles come through a ring of buffers, each consumer's queries have a place of their own.
template <class Shared, class Problem>
__device__ __forceinline__ void run(const Problem &p) {
    extern __shared__ __align__(1024) char memory[];
    const Shared shared(shared_address(memory));
    if (threadIdx.x == 0) {
        for (int i = 0; i < BUFFERS; i++) {
            barrier_init(shared.full + i * 8, 128);
            barrier_init(shared.empty + i * 8, 4 * CONSUMERS);
        }
        for (int i = 0; i < CONSUMERS; i++) {
            barrier_init(shared.queries_full + i * 8, 128);
            barrier_init(shared.queries_empty + i * 8, 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    using Roles = Registers<CONSUMERS == 2 ? 40 : 32, CONSUMERS == 2 ? 232 : 160>;
    divide<Roles>(p, shared);
}
