// What the two products of a column-sparse MLP share: a ring of stages in shared memory, each with 64 of the inner
// dimension of both operands, filled by one warpgroup and multiplied by the others.
//   ROWS       of the result in one tile, 64 a consumer
//   COLUMNS    of the result in one tile
//   STAGE      bytes of a stage

constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int ROWS = 64 * CONSUMERS;
constexpr int DEPTH = 64;                             // of the inner dimension, in one stage
constexpr int STAGE = (ROWS + COLUMNS) * DEPTH * 2;   // the left operand, then the right one
constexpr int RIGHT = ROWS * DEPTH * 2;

struct Shared {
    u32 stages, full, empty, listed, tables;
    __device__ __forceinline__ explicit Shared(u32 base) {
        stages = base;
        full = stages + BUFFERS * STAGE;
        empty = full + BUFFERS * 8;
        listed = empty + BUFFERS * 8;  // barrier: what a kernel keeps of a tile's list is there
        tables = listed + 16;
    }
};

__device__ __forceinline__ void prepare(const Shared &shared) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < BUFFERS; i++) {
            barrier_init(shared.full + i * 8, 128);
            barrier_init(shared.empty + i * 8, 4 * CONSUMERS);
        }
        barrier_init(shared.listed, 128);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
}

// The place of a lane's 16 bytes in a block of lines of 128: 4 lines a warp, 16 lines in one instruction of all four,
// chunks swizzled by line.
__device__ __forceinline__ int line_of_lane() { return threadIdx.x % 128 / 8; }
__device__ __forceinline__ u32 place_of_lane() {
    return line_of_lane() * LINE + ((threadIdx.x ^ line_of_lane()) & 7) * 16;
}

// The next stage, when all have read what lay there before.
__device__ __forceinline__ u32 free_stage(const Shared &shared, const Ring &ring) {
    barrier_wait(shared.empty + ring.slot * 8, ring.parity ^ 1);
    return ring.slot * STAGE;
}

__device__ __forceinline__ void give_back(const Shared &shared, u32 slot) {
    if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty + slot * 8);
}

// result += left right over `steps` stages, or without `add` from zero; returns the slot that `finish` gives back.
// multiply_stage(result, left, right, add) makes the products of one stage.
template <class Multiply>
__device__ __forceinline__ u32 multiply_all(
    float (&result)[COLUMNS / 2], int steps, bool add, Ring &ring, const Shared &shared, Multiply multiply_stage) {
    u32 last = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        barrier_wait(shared.full + ring.slot * 8, ring.parity);
        fence_before_products();
        const u32 stage = shared.stages + ring.slot * STAGE;
        products_begin();
        multiply_stage(result, stage, stage + RIGHT, add || step > 0);
        products_end();
        if (step > 0) {
            products_wait_but_last();
            give_back(shared, last);
        }
        last = ring.slot;
        ring.advance();
    }
    return last;
}

__device__ __forceinline__ void finish(float (&result)[COLUMNS / 2], const Shared &shared, u32 last) {
    products_wait(result);
    give_back(shared, last);
}

// Where a tile lies. list: batch entry and group; first: row in the order of groups; part: of the group; column: tile of
// columns of the result.
struct Place {
    int list, batch, first, part, column;
};

// Tiles of the same columns come one after the other: ascending lists sweep the same weights.
__device__ __forceinline__ Place locate(int tile, int lists, int groups, int parts) {
    const int at = tile % (lists * parts), list = at / parts, part = at % parts;
    return {list, list / groups, (list % groups * parts + part) * ROWS, part, tile / (lists * parts)};
}

// A kernel: `produce` and `consume` of its problem.
template <class Problem>
__device__ __forceinline__ void run(const Problem &p) {
    extern __shared__ __align__(1024) char memory[];
    const Shared shared(shared_address(memory));
    prepare(shared);
    using Roles = Registers<CONSUMERS == 2 ? 88 : 80, CONSUMERS == 2 ? 208 : 144>;
    if (threadIdx.x < 128) {
        Roles::give();
        produce(p, shared);
    } else {
        Roles::take();
        consume(p, shared);
    }
}
