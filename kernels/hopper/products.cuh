// What the two products of a column-sparse MLP share: a ring of stages in shared memory, each with SPAN bytes of the inner
// dimension of both operands, filled by one warpgroup and multiplied by the others. Rows of the left operand lie in
// memory as in a stage; the copy engine brings them, each block of a cluster its share to all. Lines of the right operand
// are gathered. A tile's result is put aside, 2 bytes a value: what is left to do with it is done beside the next's products.
//   ROWS       of the result in one tile, 64 a consumer
//   COLUMNS    of the result in one tile
//   SPAN       bytes of the inner dimension in one stage, 64 or 128
//   CLUSTER    blocks that work on the same rows, with neighbouring columns

constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int ROWS = 64 * CONSUMERS;
constexpr int LEFT = ROWS * SPAN;            // bytes of a stage: the left operand, then the right one
constexpr int STAGE = LEFT + COLUMNS * SPAN;
constexpr int ASIDE = 64 * COLUMNS * 2;      // bytes of the result of a consumer
constexpr int KEPT = CONSUMERS * 128 * 16;   // bytes of what was kept that is under way to those who will need it

struct Shared {
    u32 stages, aside, kept, full, empty, listed, tables;
    __device__ __forceinline__ explicit Shared(u32 base) {
        stages = base;
        aside = stages + BUFFERS * STAGE;
        kept = aside + CONSUMERS * ASIDE;
        full = kept + KEPT;
        empty = full + BUFFERS * 8;
        listed = empty + BUFFERS * 8;  // barrier: what a kernel keeps of a tile's list is there
        tables = listed + 16;
    }
};

__device__ __forceinline__ void prepare(const Shared &shared) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < BUFFERS; i++) {
            barrier_init(shared.full + i * 8, 128);
            barrier_init(shared.empty + i * 8, 4 * CONSUMERS * CLUSTER);
        }
        barrier_init(shared.listed, 128);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet_in_cluster();
}

// The next stage, when all in the cluster have read what lay there before; begins to bring the `left` operand.
__device__ __forceinline__ u32 free_stage(const Shared &shared, const Ring &ring, const char *left) {
    constexpr int SHARE = LEFT / CLUSTER;
    const u32 stage = ring.slot * STAGE, full = shared.full + ring.slot * 8;
    barrier_wait(shared.empty + ring.slot * 8, ring.parity ^ 1);
    if (threadIdx.x == 0) {
        const u32 mine = rank_in_cluster() * SHARE;
        barrier_expect(full, LEFT);
        copy_to_cluster(shared.stages + stage + mine, left + mine, SHARE, full);
    }
    return stage;
}

__device__ __forceinline__ void give_back(const Shared &shared, u32 slot) {
    const u32 lane = threadIdx.x % 32;
    if (lane < CLUSTER) barrier_arrive_at(shared.empty + slot * 8, lane);
}

// result = left right over `steps` stages; returns the slot that `finish` gives back. multiply_stage(result, left, right, add)
// makes the products of one stage; aside(): other work, done `times` in all, spread over the stages while they multiply, by all
// consumers at once where `together`.
template <class Multiply, class Aside>
__device__ __forceinline__ u32 multiply_all(
    float (&result)[COLUMNS / 2], int steps, Ring &ring, const Shared &shared, Multiply multiply_stage, int times, bool together,
    Aside aside) {
    u32 last = 0;
    int due = together ? 0 : (int)(threadIdx.x / 128 - 1) * steps / CONSUMERS;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        barrier_wait(shared.full + ring.slot * 8, ring.parity);
        fence_before_products();
        const u32 stage = shared.stages + ring.slot * STAGE;
        products_begin();
        multiply_stage(result, stage, stage + LEFT, step > 0);
        products_end();
        if (step > 0) {
            products_wait_but_last();
            give_back(shared, last);
        }
        last = ring.slot;
        ring.advance();
#pragma unroll 1
        for (due += times; due >= steps; due -= steps) aside();
    }
    return last;
}

__device__ __forceinline__ void finish(float (&result)[COLUMNS / 2], const Shared &shared, u32 last) {
    products_wait(result);
    give_back(shared, last);
}

// What was kept comes to 16 bytes of shared memory of a thread's own, of which it has several, KEPT bytes apart: a register that
// waits for it would make every wait for a barrier wait, too.
struct Kept {
    u32 place;
    __device__ __forceinline__ explicit Kept(u32 base) : place(base + (threadIdx.x - 128) * 16) {}
    __device__ __forceinline__ void fetch(const void *from, int slot = 0) const { copy16(place + slot * KEPT, (u64)from); }
    __device__ __forceinline__ uint4 taken(int slot = 0) const { return taken16(place + slot * KEPT); }
};

__device__ __forceinline__ void wait_for_kept() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// All threads of a consumer meet.
__device__ __forceinline__ void meet(int number) { asm volatile("bar.sync %0, 128;" ::"r"(2 + number) : "memory"); }

// After the last tile the ring is free: what was kept may come there.
__device__ __forceinline__ Kept ring_for_kept(const Shared &shared) {
    asm volatile("bar.sync %0, %1;" ::"n"(2 + CONSUMERS), "n"(128 * CONSUMERS) : "memory");
    return Kept(shared.stages);
}

// Where a tile lies. list: batch entry and group; first: row in the order of groups; part: of the group; block: of both;
// column: tile of columns of the result.
struct Place {
    int list, batch, first, part, block, column;
};

// Tiles of the same columns come one after the other: ascending lists sweep the same weights.
__device__ __forceinline__ Place locate(int tile, int lists, int groups, int parts) {
    const int block = tile % (lists * parts), list = block / parts, part = block % parts;
    const int column = tile / (lists * parts) * CLUSTER + rank_in_cluster();
    return {list, list / groups, (list % groups * parts + part) * ROWS, part, block, column};
}

// A kernel: `produce` and `consume` of its problem, which call f(place) for each of a block's tiles.
template <class Problem, class F>
__device__ __forceinline__ void each_tile(const Problem &p, F f) {
    for (int tile = blockIdx.x / CLUSTER; tile < p.tiles; tile += gridDim.x / CLUSTER)
        f(locate(tile, p.batches, p.groups, p.parts));
}

template <class Problem>
__device__ __forceinline__ void run(const Problem &p) {
    extern __shared__ __align__(1024) char memory[];
    const Shared shared(shared_address(memory));
    prepare(shared);
    using Roles = Registers<CONSUMERS == 2 ? 88 : 80, CONSUMERS == 2 ? 208 : 144>;
    divide<Roles>(p, shared);
    meet_in_cluster();  // the others may still send something here
}
