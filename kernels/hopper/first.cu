// The first product of a column-sparse MLP for the neurons that each group lists, for sm_90a: rows of x times gathered
// rows of the weights, activation, exchange with the cache. Compiled at run time behind what instructions.py writes,
// primitives.cuh and products.cuh:
//   CONSUMERS  warpgroups of 64 rows each; one more warpgroup copies
//   COLUMNS    gathered weights in one tile, a multiple of 16
//   GATED      half of them are those of the up branch
//   BUFFERS    stages in shared memory
//   activate   fp32 to fp32

constexpr int NEURONS = GATED ? COLUMNS / 2 : COLUMNS;
constexpr int LINES = ROWS + COLUMNS;  // copied in each stage: rows of x, then weights
constexpr int CHUNKS = NEURONS / 8;
constexpr int AHEAD = COLUMNS == 192 ? 4 : 8;  // chunks of old values under way: as registers allow

struct Problem {
    const char *x, *w1, *wu;            // bytes from here on: strides too
    i64 x_batch, x_row, w1_row, wu_row;
    const unsigned short *b1, *bu;      // or null
    const int *order, *lists;           // [rows] or null, [batch x groups, listed]
    char *hidden, *change;              // [batch x groups, neurons or listed, group_rows]
    const float *means;                 // [batch x groups, neurons]
    float *mean;
    int rows, steps, neurons, groups, listed, parts, batches, tiles;
};

// Of a tile, twice: the copying warpgroup is one tile ahead.
struct Tables {
    u32 pointers, ids, biases;  // 8 bytes a line; 4 bytes a neuron, -1 past the end of the list; 4 bytes a column
    __device__ __forceinline__ Tables(const Shared &shared, u32 turn) {
        pointers = shared.tables;
        ids = pointers + LINES * 8 + turn * (NEURONS + COLUMNS) * 4;
        biases = ids + NEURONS * 4;
    }
};

__device__ __forceinline__ void put(u32 address, u64 x) {
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
}

__device__ __forceinline__ void put(u32 address, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ u32 taken(u32 address) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

__device__ __forceinline__ u64 taken_pointer(u32 address) {
    u64 x;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(x) : "r"(address));
    return x;
}

__device__ __forceinline__ float2 taken_pair(u32 address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
    return x;
}

__device__ __forceinline__ void enter(const Problem &p, const Place &at, const Tables &tables) {
    const int *list = p.lists + (i64)at.list * p.listed;
#pragma unroll 1
    for (int line = threadIdx.x; line < LINES; line += 128) {
        const int column = line - ROWS;
        if (column < 0) {
            const int place = min(at.first + line, p.rows - 1), row = p.order ? p.order[place] : place;
            put(tables.pointers + line * 8, (u64)(p.x + at.batch * p.x_batch + row * p.x_row));
            continue;
        }
        const bool up = GATED && column >= NEURONS;
        const int place = at.column * NEURONS + column - (up ? NEURONS : 0);
        const int id = list[min(place, p.listed - 1)];
        const unsigned short *bias = up ? p.bu : p.b1;
        put(tables.pointers + line * 8, (u64)((up ? p.wu : p.w1) + id * (up ? p.wu_row : p.w1_row)));
        put(tables.biases + column * 4, __float_as_uint(bias ? low((u32)bias[id]) : 0.0f));
        if (up) continue;
        const bool present = place < p.listed;
        put(tables.ids + column * 4, (u32)(present ? id : -1));
        const i64 neuron = (i64)at.list * p.neurons + id;
        if (present && at.part == 0) p.mean[neuron] = p.means[neuron];
#pragma unroll
        for (int byte = 0; byte < ROWS * 2; byte += LINE)
            prefetch(p.hidden + (neuron * p.parts + at.part) * (ROWS * 2) + byte);
    }
}

__device__ __forceinline__ void produce(const Problem &p, const Shared &shared) {
    Ring ring;
    u32 turn = 0;
    const u32 place = shared.stages + place_of_lane(), pointers = shared.tables + line_of_lane() * 8;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, turn ^= 1) {
        asm volatile("bar.sync 1, 128;" ::: "memory");  // all have read the pointers of the tile before
        enter(p, locate(tile, p.batches, p.groups, p.parts), Tables(shared, turn));
        barrier_arrive(shared.listed);
        asm volatile("bar.sync 1, 128;" ::: "memory");
        u64 from[LINES / 16];  // in registers: a read of shared memory before each copy would take as long as all the rest
#pragma unroll
        for (int i = 0; i < LINES / 16; i++) from[i] = taken_pointer(pointers + i * 128) + threadIdx.x % 8 * 16;
#pragma unroll 1
        for (int step = 0; step < p.steps; step++) {
            const u32 to = place + free_stage(shared, ring);
#pragma unroll
            for (int i = 0; i < LINES / 16; i++) {
                copy16(to + i * 16 * LINE, from[i]);
                from[i] += LINE;
            }
            barrier_arrive_after_copies(shared.full + ring.slot * 8);
            ring.advance();
        }
    }
}

__device__ __forceinline__ u32 transposed(u32 x) {  // of 8 x 8 values, two a lane
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Chunk i of 8 neurons for row half r of a warp: bias and activation, rounded after each step as the dense model does.
__device__ __forceinline__ u32 activated(const float (&h)[COLUMNS / 2], int i, int r, u32 biases) {
    const u32 at = biases + (i * 8 + threadIdx.x % 4 * 2) * 4;
    auto linear = [&](int chunk, u32 bias) {
        const float2 b = taken_pair(bias);
        return pack(h[4 * chunk + 2 * r] + b.x, h[4 * chunk + 2 * r + 1] + b.y);
    };
    const u32 x = linear(i, at);
    u32 y = pack(activate(low(x)), activate(high(x)));
    if (GATED) {
        const u32 up = linear(i + CHUNKS, at + NEURONS * 4);
        y = pack(low(y) * low(up), high(y) * high(up));
    }
    return y;
}

// The cache holds neuron by neuron: 8 x 8 values are transposed, then a lane has 4 rows of one neuron, 8 bytes.
struct Exchange {
    const Problem &p;
    const Tables tables;
    const int pitch, neuron;     // bytes of a neuron; of a chunk, the lane's
    char *hidden, *change;
    u32 live[2];                 // bits of the rows that there are: the last group may be short
    uint2 old[AHEAD];

    __device__ __forceinline__ Exchange(const Problem &p, const Place &at, const Tables &tables, int number)
        : p(p), tables(tables), pitch(p.parts * ROWS * 2), neuron(threadIdx.x % 32 / 4) {
        const int row = number * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 2 * 8 + threadIdx.x % 4 / 2 * 4;
        const i64 byte = (at.part * ROWS + row) * 2;
        hidden = p.hidden + (i64)at.list * p.neurons * pitch + byte;
        change = p.change + ((i64)at.list * p.listed + at.column * NEURONS + neuron) * pitch + byte;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int left = p.rows - at.first - row - 2 * i;
            live[i] = left >= 2 ? 0xFFFFFFFF : left == 1 ? 0xFFFF : 0;
        }
    }

    __device__ __forceinline__ int id(int i) const { return (int)taken(tables.ids + (i * 8 + neuron) * 4); }
    __device__ __forceinline__ void load(int i) { old[i % AHEAD] = load_once(hidden + (i64)max(id(i), 0) * pitch); }
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < AHEAD && i < CHUNKS; i++) load(i);
    }

    __device__ __forceinline__ void run(const float (&h)[COLUMNS / 2]) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            uint2 x = {transposed(activated(h, i, 0, tables.biases)), transposed(activated(h, i, 1, tables.biases))};
            swap_with_neighbour(x.x, x.y);
            const uint2 before = old[i % AHEAD];
            x.x = x.x & live[0] | before.x & ~live[0];
            x.y = x.y & live[1] | before.y & ~live[1];
            if (i + AHEAD < CHUNKS) load(i + AHEAD);
            const int to = id(i);
            const uint2 delta = {pack(low(x.x) - low(before.x), high(x.x) - high(before.x)),
                                 pack(low(x.y) - low(before.y), high(x.y) - high(before.y))};
            if (to >= 0) {
                store_once(hidden + (i64)to * pitch, x);
                store(change + (i64)i * 8 * pitch, delta);
            }
        }
    }
};

__device__ __forceinline__ void consume(const Problem &p, const Shared &shared) {
    const int number = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0);
    Ring ring;
    u32 turn = 0;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, turn ^= 1) {
        float h[COLUMNS / 2];
        barrier_wait(shared.listed, turn);  // here: while this tile is not begun, the tables of the next are not
        const u32 last = multiply_all(
            h, p.steps, false, ring, shared, [&](float (&d)[COLUMNS / 2], u32 left, u32 right, bool add) {
#pragma unroll
                for (int i = 0; i < DEPTH / 16; i++)
                    multiply(d, described(left + number * 64 * LINE + i * 32), described(right + i * 32), add || i > 0);
            });
        Exchange exchange(p, locate(tile, p.batches, p.groups, p.parts), Tables(shared, turn), number);
        exchange.begin();
        finish(h, shared, last);
        exchange.run(h);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) exchange_listed(const __grid_constant__ Problem p) {
    run(p);
}
