// The second product of a column-sparse MLP, for sm_90a: what the listed neurons changed, times their gathered weights,
// onto the result kept. Compiled at run time behind what instructions.py writes, primitives.cuh, cluster.cuh and products.cuh:
//   CONSUMERS  warpgroups of 64 rows each; one more warpgroup copies
//   COLUMNS    of the result in one tile, a multiple of 64 that divides its width
//   BUFFERS    stages in shared memory
//   CLUSTER    blocks of a cluster; the result has a multiple of so many tiles in a row
// Lists are padded to whole stages: what is past their end has changed by zero, which first.cu writes.

constexpr int DEPTH = SPAN / 2;      // listed neurons in one stage
constexpr int BLOCK = DEPTH * LINE;  // bytes of those by 64 rows or columns

struct Problem {
    const char *change, *weights;  // [batch x groups, parts, steps] left operands of a stage, [neurons, width]; 2 bytes a value
    const int *order, *lists;      // [rows] or null, [batch x groups, listed]
    float *out;                    // [batch, rows, width]
    char *result;                  // the same, 2 bytes a value
    int rows, width, groups, listed, parts, batches, tiles;
};

__device__ __forceinline__ void produce(const Problem &p, const Shared &shared) {
    constexpr int PASSES = DEPTH / 16;
    Ring ring;
    const u32 row = p.width * 2;
    const int line = threadIdx.x % 128 / 8, byte = threadIdx.x % 8 * 16, steps = (p.listed + DEPTH - 1) / DEPTH;
    const u32 place = shared.stages + LEFT + line * LINE + ((threadIdx.x ^ line) & 7) * 16;
    each_tile(p, [&](const Place &at) {
        const int *list = p.lists + (i64)at.list * p.listed;
        const char *left = p.change + (i64)at.block * steps * LEFT;
        const char *weights = p.weights + at.column * COLUMNS * 2 + byte;
        u32 ids[2][PASSES];  // of this stage and the next: each is read two stages ahead
        auto read = [&](u32 (&ids)[PASSES], int first) {
#pragma unroll
            for (int i = 0; i < PASSES; i++) ids[i] = list[min(first + i * 16 + line, p.listed - 1)];
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
                for (int i = 0; i < PASSES; i++) {
                    const char *right = weights + (u64)ids[half][i] * row;
#pragma unroll
                    for (int c = 0; c < COLUMNS / 64; c++) copy16(to + i * 16 * LINE + c * BLOCK, (u64)(right + c * LINE));
                }
                left += LEFT;
                barrier_arrive_after_copies(shared.full + ring.slot * 8);
                ring.advance();
                read(ids[half], first + 2 * DEPTH);
            }
    });
}

// A consumer has 64 rows of a tile.
struct Part : Addition<Problem, 64, COLUMNS> {
    using Addition::Addition;

    __device__ __forceinline__ void begin(const float (&d)[COLUMNS / 2], const Place &tile, int number) {
        meet(number);  // nothing is left to do with what lies there
        const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
        for (int i = 0; i < COLUMNS / 8; i += 2) {
            u32 x[4];
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = pack(d[4 * i + 2 * j], d[4 * i + 2 * j + 1]);
            put_blocks(place(row, i + lane / 16), x);
        }
        Addition::begin(tile, tile.first + number * 64, tile.column * COLUMNS);
        meet(number);
        fetch();
    }
};

__device__ __forceinline__ void consume(const Problem &p, const Shared &shared) {
    const int number = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0), steps = (p.listed + DEPTH - 1) / DEPTH;
    Ring ring;
    Part part(p, shared, number);
    int times = 0;  // there is nothing to do beside the first tile
    each_tile(p, [&](const Place &at) {
        float d[COLUMNS / 2];
        auto stage = [&](float (&d)[COLUMNS / 2], u32 left, u32 right, bool add) {
#pragma unroll
            for (int i = 0; i < DEPTH / 16; i++)
                multiply(d, described(left + number * BLOCK + i * 16 * LINE, BLOCK),
                         described(right + i * 16 * LINE, BLOCK), add || i > 0);
        };
        const u32 last = multiply_all(d, steps, ring, shared, stage, times, false, [&] { part.run(); });
        finish(d, shared, last);
        part.begin(d, at, number);
        times = Part::TIMES;
    });
    if (times) part.run_all(shared);
}

extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) add_listed(const __grid_constant__ Problem p) {
    run(p);
}
