// The second product of a column-sparse MLP in fp8, for sm_90a: as second.cu, with changes and weights in e4m3. Compiled at run
// time behind the same parts.
//   CONSUMERS  warpgroups that multiply, each 64 columns of the result by all ROWS rows; one more warpgroup copies
//   COLUMNS    of the result in one tile, 64 a consumer. Its width is a multiple of 64
//   BUFFERS    stages in shared memory
//   CLUSTER    blocks of a cluster: one more tile of columns than needed may be computed
// The products want both operands along listed neurons, weights lie across them. So the result is turned: weights are the left
// operand, which comes from registers, where bytes of four neurons are put together; changes are the right one.

constexpr int DEPTH = SPAN;  // listed neurons in one stage

struct Problem {
    const char *change, *weights;  // [batch x groups, parts, steps] right operands of a stage, [neurons, width]
    const int *order, *lists;      // [rows] or null, [batch x groups, listed]
    float *out;                    // [batch, rows, width]
    char *result;                  // the same, 2 bytes a value
    const float *scale, *change_scale;
    int rows, width, groups, listed, parts, batches, tiles;
};

// The first column of a consumer's part, or of the last 64 again: what comes of them is not stored.
__device__ __forceinline__ int column_of(const Problem &p, const Place &at, int consumer) {
    return min(at.column * COLUMNS + consumer * 64, p.width - 64);
}

__device__ __forceinline__ void produce(const Problem &p, const Shared &shared) {
    constexpr int PASSES = DEPTH / 32;
    Ring ring;
    const u32 row = p.width;
    const int line = threadIdx.x % 128 / 4, piece = threadIdx.x % 4, steps = (p.listed + DEPTH - 1) / DEPTH;
    const u32 place = shared.stages + LEFT + line * COLUMNS + (piece ^ line / 4 % 4) * 16;
    each_tile(p, [&](const Place &at) {
        const int *list = p.lists + (i64)at.list * p.listed;
        const char *left = p.change + (i64)at.block * steps * LEFT;
        const char *weights[CONSUMERS];
#pragma unroll
        for (int c = 0; c < CONSUMERS; c++) weights[c] = p.weights + column_of(p, at, c) + piece * 16;
        u32 ids[2][PASSES];  // of this stage and the next: each is read two stages ahead
        auto read = [&](u32 (&ids)[PASSES], int first) {
#pragma unroll
            for (int i = 0; i < PASSES; i++) ids[i] = list[min(first + i * 32 + line, p.listed - 1)];
        };
        read(ids[0], 0);
        read(ids[1], DEPTH);
#pragma unroll 1
        for (int pair = 0; pair < p.listed; pair += 2 * DEPTH)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int first = pair + half * DEPTH;
                if (first >= p.listed) break;
                const u32 to = place + free_stage(shared, ring, left);
#pragma unroll
                for (int i = 0; i < PASSES; i++)
#pragma unroll
                    for (int c = 0; c < CONSUMERS; c++)
                        copy16(to + i * 32 * COLUMNS + c * 64, (u64)(weights[c] + (u64)ids[half][i] * row));
                left += LEFT;
                barrier_arrive_after_copies(shared.full + ring.slot * 8);
                ring.advance();
                read(ids[half], first + 2 * DEPTH);
            }
    });
}

// A consumer has 64 columns of a tile.
struct Part : Addition<Problem, ROWS, 64> {
    using Addition::Addition;

    __device__ __forceinline__ void begin(const float (&d)[ROWS / 2], const Place &tile, int number) {
        meet(number);  // nothing is left to do with what lies there
        const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, pair = lane / 4;
        const float scale = *p.scale * *p.change_scale;
#pragma unroll
        for (int i = 0; i < ROWS / 8; i++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                put(place(i * 8 + lane % 4 * 2 + e, warp * 2 + pair / 4) + pair % 4 * 4,
                    pack(d[4 * i + e] * scale, d[4 * i + 2 + e] * scale));
        Addition::begin(tile, tile.first, tile.column * COLUMNS + number * 64);
        meet(number);
        fetch();
    }
};

// The left operand of a stage: of 32 neurons at a time, four and four of each of two columns of the result.
struct Weights {
    u32 from;
    __device__ __forceinline__ explicit Weights(int number) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
        from = LEFT + lane % 4 * 4 * COLUMNS + number * 64 + (warp ^ lane % 4) * 16 + lane / 4 * 2;
    }

    __device__ __forceinline__ void load(u32 (&a)[DEPTH / 8], u32 stage) const {
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++) {
            u32 two[4];  // columns of a neuron each
#pragma unroll
            for (int j = 0; j < 4; j++) two[j] = taken2(stage + from + (i * 16 + j) * COLUMNS);
            const u32 x = __byte_perm(two[0], two[1], 0x5140), y = __byte_perm(two[2], two[3], 0x5140);
            a[2 * i] = __byte_perm(x, y, 0x5410);
            a[2 * i + 1] = __byte_perm(x, y, 0x7632);
        }
        __syncwarp();  // one lane gives the stage back for all
    }
};

__device__ __forceinline__ void consume(const Problem &p, const Shared &shared) {
    const int number = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0), steps = (p.listed + DEPTH - 1) / DEPTH;
    const Weights weights(number);
    Ring ring;
    Part part(p, shared, number);
    int times = 0;  // there is nothing to do beside the first tile
    each_tile(p, [&](const Place &at) {
        float d[ROWS / 2];
        u32 a[2][DEPTH / 8];  // of this stage and of the one that is being multiplied
        u32 last = 0;
        int due = number * steps / CONSUMERS;
#pragma unroll 1
        for (int pair = 0; pair < steps; pair += 2)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (pair + half >= steps) break;
                const bool add = pair + half > 0;
                barrier_wait(shared.full + ring.slot * 8, ring.parity);
                const u32 stage = shared.stages + ring.slot * STAGE;
                weights.load(a[half], stage);
                products_begin();
#pragma unroll
                for (int i = 0; i < DEPTH / 32; i++)
                    multiply(d, a[half][4 * i], a[half][4 * i + 1], a[half][4 * i + 2], a[half][4 * i + 3],
                             described<SPAN>(stage + i * 32), add || i > 0);
                products_end();
                if (add) {
                    products_wait_but_last();
                    give_back(shared, last);
                }
                last = ring.slot;
                ring.advance();
#pragma unroll 1
                for (due += times; due >= steps; due -= steps) part.run();
            }
        products_wait(d);
        give_back(shared, last);
        part.begin(d, at, number);
        times = Part::TIMES;
    });
    if (times) part.run_all(shared);
}

extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) add_listed(const __grid_constant__ Problem p) {
    run(p);
}
