// The second product of a column-sparse MLP, for sm_90a: what the listed neurons changed, times their gathered weights,
// onto the result kept. Compiled at run time behind what instructions.py writes, primitives.cuh and products.cuh:
//   CONSUMERS  warpgroups of 64 rows each; one more warpgroup copies
//   COLUMNS    of the result in one tile, a multiple of 64 that divides its width
//   BUFFERS    stages in shared memory

constexpr int BLOCK = DEPTH * LINE;           // bytes of 64 listed neurons by 64 rows or columns
constexpr int PAIRS = COLUMNS / 16;           // of chunks of 8 columns

struct Problem {
    const char *change, *weights;  // [batch x groups, listed, group_rows], [neurons, width]; 2 bytes a value
    const int *order, *lists;      // [rows] or null, [batch x groups, listed]
    float *out;                    // [batch, rows, width]
    char *result;                  // the same, 2 bytes a value
    int rows, width, groups, listed, parts, batches, tiles;
};

__device__ __forceinline__ i64 row_of(const Problem &p, const Place &at, int place) {
    const int row = min(at.first + place, p.rows - 1);
    return (i64)at.batch * p.rows + (p.order ? p.order[row] : row);
}

__device__ __forceinline__ void produce(const Problem &p, const Shared &shared) {
    constexpr int PASSES = DEPTH / 16;
    Ring ring;
    const u32 place = shared.stages + place_of_lane(), pitch = p.parts * ROWS * 2, row = p.width * 2;
    const int line = line_of_lane(), byte = threadIdx.x % 8 * 16;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const Place at = locate(tile, p.batches, p.groups, p.parts);
        const int *list = p.lists + (i64)at.list * p.listed;
        const char *left = p.change + ((i64)at.list * p.listed + line) * pitch + at.part * ROWS * 2 + byte;
        const char *weights = p.weights + at.column * COLUMNS * 2 + byte;
#pragma unroll 1
        for (int line = threadIdx.x; line < ROWS; line += 128)
#pragma unroll
            for (int i = 0; i < COLUMNS * 4; i += LINE)
                prefetch((const char *)(p.out + row_of(p, at, line) * p.width + at.column * COLUMNS) + i);
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
                const u32 to = place + free_stage(shared, ring);
#pragma unroll
                for (int i = 0; i < PASSES; i++) {
                    const bool there = first + i * 16 + line < p.listed;
                    const char *right = weights + (u64)ids[half][i] * row;
#pragma unroll
                    for (int c = 0; c < CONSUMERS; c++)
                        copy16_if(to + i * 16 * LINE + c * BLOCK, left + (i * 16 * pitch + c * LINE), there);
#pragma unroll
                    for (int c = 0; c < COLUMNS / 64; c++)
                        copy16_if(to + RIGHT + i * 16 * LINE + c * BLOCK, right + c * LINE, there);
                }
                left += DEPTH * pitch;
                barrier_arrive_after_copies(shared.full + ring.slot * 8);
                ring.advance();
                read(ids[half], first + 2 * DEPTH);
            }
    }
}

struct Rows {  // the two of a thread: where they begin in the result, at the tile's columns
    i64 start[2];
    bool live[2];

    __device__ __forceinline__ Rows(const Problem &p, const Place &at, int number) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int place = number * 64 + row_of_thread(r);
            live[r] = at.first + place < p.rows;
            start[r] = row_of(p, at, place) * p.width + at.column * COLUMNS;
        }
    }

    __device__ __forceinline__ float2 *out(const Problem &p, int r, int chunk) const {
        return (float2 *)(p.out + start[r] + chunk * 8 + threadIdx.x % 4 * 2);
    }
};

__device__ __forceinline__ void load_out(float (&d)[COLUMNS / 2], const Problem &p, const Rows &rows) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float2 x = *rows.out(p, r, i);
            d[4 * i + 2 * r] = x.x;
            d[4 * i + 2 * r + 1] = x.y;
        }
}

__device__ __forceinline__ void store_out(const float (&d)[COLUMNS / 2], const Problem &p, const Rows &rows) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            u32 words[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 x = {d[8 * i + 4 * half + 2 * r], d[8 * i + 4 * half + 2 * r + 1]};
                if (rows.live[r]) *rows.out(p, r, 2 * i + half) = x;
                words[half] = pack(x.x, x.y);
            }
            swap_with_neighbour(words[0], words[1]);
            if (rows.live[r]) store(p.result + rows.start[r] * 2 + i * 32 + byte_of_lane(), {words[0], words[1]});
        }
}

__device__ __forceinline__ void consume(const Problem &p, const Shared &shared) {
    const int number = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0);
    Ring ring;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const Rows rows(p, locate(tile, p.batches, p.groups, p.parts), number);
        float d[COLUMNS / 2];
        load_out(d, p, rows);
        const int steps = (p.listed + DEPTH - 1) / DEPTH;
        const u32 last = multiply_all(
            d, steps, true, ring, shared, [&](float (&d)[COLUMNS / 2], u32 left, u32 right, bool add) {
#pragma unroll
                for (int i = 0; i < DEPTH / 16; i++)
                    multiply(d, described(left + number * BLOCK + i * 16 * LINE, BLOCK),
                             described(right + i * 16 * LINE, BLOCK), add);
            });
        finish(d, shared, last);
        store_out(d, p, rows);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) add_listed(const __grid_constant__ Problem p) {
    run(p);
}
