// The first product of a column-sparse MLP for the neurons that each group lists, for sm_90a: rows of x times gathered
// rows of the weights, activation, exchange with the cache. Compiled at run time behind what instructions.py writes,
// primitives.cuh, cluster.cuh and products.cuh:
//   CONSUMERS  warpgroups of 64 rows each; one more warpgroup copies
//   COLUMNS    gathered weights in one tile, a multiple of 16
//   DEPTH      neurons in a stage of the second product, a multiple of 32
//   GATED      half of them are those of the up branch
//   FP8        x, weights and what the second product gets are e4m3, with scales; else 2 bytes a value, without
//   BUFFERS    stages in shared memory
//   CLUSTER    blocks of a cluster: one more tile of columns than needed may be computed
//   activate   fp32 to fp32

constexpr int NEURONS = GATED ? COLUMNS / 2 : COLUMNS;
constexpr int PIECES = SPAN / 16, AT_ONCE = 128 / PIECES;       // of 16 bytes, in a line of a stage; lines copied at once
constexpr int PASSES = (COLUMNS + AT_ONCE - 1) / AT_ONCE;
constexpr int LAST_AT_ONCE = 4;                           // after the last tile: else each would wait for memory
static_assert(LAST_AT_ONCE * KEPT <= BUFFERS * STAGE, "");
constexpr bool TOGETHER = FP8 || !GATED;  // all consumers do so at the same stages: 1 to 4 % faster there
constexpr int TIMES = FP8 ? (NEURONS + 63) / 64 * 4 : (NEURONS + 15) / 16;  // a consumer exchanges 16 neurons at a time

struct Problem {
    const char *x, *w1, *wu;        // x: [batch x groups, parts, steps] left operands of a stage
    i64 w1_row, wu_row;             // bytes from one neuron to the next
    const unsigned short *b1, *bu;  // or null
    const int *lists;               // [batch x groups, listed]
    char *hidden, *change;          // [batch x groups, neurons, group_rows]; packed for the second product. 2 bytes a value
    const float *means;             // [batch x groups, neurons]
    float *mean;
    const float *row_scales, *scales, *change_scale;  // [batch, rows] in the order of groups; [1 or 2] of w1 and wu; [1]
    int rows, steps, neurons, groups, listed, parts, batches, tiles;
};

// Of a tile, three times: the copying warpgroup is one tile ahead, and what was put aside is of the one before.
struct Tables {
    u32 pointers, ids, biases;  // 8 bytes a column, once; 4 bytes a neuron, -1 past the end of the list; 4 bytes a column
    __device__ __forceinline__ Tables(const Shared &shared, u32 turn) {
        pointers = shared.tables;
        ids = pointers + COLUMNS * 8 + turn % 3 * (NEURONS + COLUMNS) * 4;
        biases = ids + NEURONS * 4;
    }
};

__device__ __forceinline__ float2 taken_pair(u32 address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
    return x;
}

__device__ __forceinline__ void enter(const Problem &p, const Place &at, const Tables &tables) {
    const int *list = p.lists + (i64)at.list * p.listed;
#pragma unroll 1
    for (int column = threadIdx.x; column < COLUMNS; column += 128) {
        const bool up = GATED && column >= NEURONS;
        const int place = at.column * NEURONS + column - (up ? NEURONS : 0);
        const int id = list[min(place, p.listed - 1)];
        const unsigned short *bias = up ? p.bu : p.b1;
        put(tables.pointers + column * 8, (u64)((up ? p.wu : p.w1) + id * (up ? p.wu_row : p.w1_row)));
        put(tables.biases + column * 4, __float_as_uint(bias ? low((u32)bias[id]) : 0.0f));
        if (up) continue;
        const bool present = place < p.listed;
        put(tables.ids + column * 4, (u32)(present ? id : -1));
        const i64 neuron = (i64)at.list * p.neurons + id;
        if (present && at.part == 0) p.mean[neuron] = p.means[neuron];
    }
}

__device__ __forceinline__ u32 swizzled(int line, int piece) {
    return line * SPAN + (SPAN == 128 ? piece ^ line & 7 : piece ^ line >> 1 & 3) * 16;
}

__device__ __forceinline__ void produce(const Problem &p, const Shared &shared) {
    Ring ring;
    u32 turn = 0;
    const int piece = threadIdx.x % PIECES, line = threadIdx.x % 128 / PIECES;
    const u32 place = shared.stages + LEFT + swizzled(line, piece), pointers = shared.tables + line * 8;
    each_tile(p, [&](const Place &at) {
        asm volatile("bar.sync 1, 128;" ::: "memory");  // all have read the pointers of the tile before
        enter(p, at, Tables(shared, turn++));
        barrier_arrive(shared.listed);
        asm volatile("bar.sync 1, 128;" ::: "memory");
        u64 from[PASSES];  // in registers: a read of shared memory before each copy would take as long as all the rest
#pragma unroll
        for (int i = 0; i < PASSES; i++)
            if (line + i * AT_ONCE < COLUMNS) from[i] = taken8(pointers + i * AT_ONCE * 8) + piece * 16;
        const char *left = p.x + (i64)at.block * p.steps * LEFT;
#pragma unroll 1
        for (int step = 0; step < p.steps; step++, left += LEFT) {
            const u32 to = place + free_stage(shared, ring, left);
#pragma unroll
            for (int i = 0; i < PASSES; i++)
                if (line + i * AT_ONCE < COLUMNS) {
                    copy16(to + i * AT_ONCE * SPAN, from[i]);
                    from[i] += SPAN;
                }
            barrier_arrive_after_copies(shared.full + ring.slot * 8);
            ring.advance();
        }
    });
}

// What is left to do with a tile, 16 neurons at a time. Put aside are bias and all before it, rounded, neuron by neuron: a
// line of 64 rows, its 16 byte pieces swizzled by neuron. A lane has one of the 8 pieces of a line here and in the caches. The
// second product in fp8 wants its changes row by row: there a lane has four neurons one after the other, and turns them.
struct Exchange {
    const Problem &p;
    u32 aside, ids;
    int pitch, left, number;   // bytes of a neuron in the caches; rows of the piece that there are, or more
    int first, next, time;     // of the list, the tile's; of the tile, the lane's, which may lie behind its end; how often
    int id;                    // its place in the cache, or -1
    char *hidden, *change;
    u32 turned[8];             // in fp8, of each row of the piece, the changes of the lane's last four neurons
    Kept kept;

    __device__ __forceinline__ Exchange(const Problem &p, const Shared &shared, int number)
        : p(p), kept(shared.kept), aside(shared.aside + number * ASIDE), pitch(p.parts * ROWS * 2), number(number) {}

    static __device__ __forceinline__ int piece() { return threadIdx.x % 8; }

    // The lane's neuron, at the time that is due
    __device__ __forceinline__ int neuron() const {
        if (!FP8) return time * 16 + threadIdx.x % 128 / 8;
        return (time / 4 * 4 + threadIdx.x % 128 / 32) * 16 + threadIdx.x % 32 / 8 * 4 + time % 4;
    }

    // Its neuron's piece
    __device__ __forceinline__ u32 place(int column) const { return aside + column * LINE + ((piece() ^ column) & 7) * 16; }

    __device__ __forceinline__ void begin(const float (&h)[COLUMNS / 2], const Place &at, const Tables &tables) {
        meet(number);  // nothing is left to do with what lies there
        put_aside(h, at, tables.biases);
        const int row = number * 64 + piece() * 8;
        ids = tables.ids;
        left = p.rows - at.first - row;
        hidden = p.hidden + (i64)at.list * p.neurons * pitch + (at.part * ROWS + row) * 2;
        change = p.change + (i64)at.block * ((p.listed + DEPTH - 1) / DEPTH) * LEFT;
        first = at.column * NEURONS;
        time = 0;
        fetch();
        meet(number);
    }

    __device__ __forceinline__ void put_aside(const float (&h)[COLUMNS / 2], const Place &at, u32 biases) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
        const int column = lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
        float scales[2] = {1, 1};
        if (FP8)
            for (int r = 0; r < 2; r++) {
                const int row = min(at.first + number * 64 + row_of_thread(r), p.rows - 1);
                scales[r] = p.row_scales[(i64)at.batch * p.rows + row];
            }
#pragma unroll
        for (int i = 0; i < COLUMNS / 8; i += 2) {
            u32 x[4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float2 b = taken_pair(biases + ((i + j) * 8 + lane % 4 * 2) * 4);
                const float scale = FP8 ? p.scales[GATED && (i + j) * 8 >= NEURONS] : 1;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float s = scale * scales[r], y = h[4 * (i + j) + 2 * r], z = h[4 * (i + j) + 2 * r + 1];
                    x[2 * j + r] = FP8 ? pack(fmaf(y, s, b.x), fmaf(z, s, b.y)) : pack(y + b.x, z + b.y);
                }
            }
            put_blocks_transposed(aside + (i * 8 + column) * LINE + ((piece ^ column) & 7) * 16, x);
        }
    }

    __device__ __forceinline__ void fetch(int slot = 0) {
        next = neuron();
        id = next < NEURONS ? (int)taken(ids + next * 4) : -1;
        if (id >= 0) kept.fetch(hidden + (i64)id * pitch, slot);
    }

    // Activation, rounded after each step as the dense model does.
    __device__ __forceinline__ u32 activated(u32 x, u32 up) const {
        const u32 y = pack(activate(low(x)), activate(high(x)));
        return GATED ? times(y, up) : y;
    }

    // The exchange with the cache; what values have changed by, two at a time.
    __device__ __forceinline__ uint4 renew(int slot) const {
        const uint4 old = kept.taken(slot), x = taken16(place(next)), up = GATED ? taken16(place(next + NEURONS)) : x;
        uint4 now = {activated(x.x, up.x), activated(x.y, up.y), activated(x.z, up.z), activated(x.w, up.w)};
        if (left < 8) {  // rows of the piece: others stay as they are
            now.x = mixed(now.x, old.x, 0), now.y = mixed(now.y, old.y, 2);
            now.z = mixed(now.z, old.z, 4), now.w = mixed(now.w, old.w, 6);
        }
        store_once(hidden + (i64)id * pitch, now);
        return {minus(now.x, old.x), minus(now.y, old.y), minus(now.z, old.z), minus(now.w, old.w)};
    }

    // Of rows `row` and the next, the new values of those that there are, the old ones of others
    __device__ __forceinline__ u32 mixed(u32 now, u32 old, int row) const {
        const u32 live = left >= row + 2 ? 0xFFFFFFFF : left == row + 1 ? 0xFFFF : 0;
        return now & live | old & ~live;
    }

    // Whether this tile leaves the second product neuron n of the list, or 0 in the rest of that one's last stage.
    __device__ __forceinline__ bool leaves(u32 n) const {
        const bool last = first + NEURONS >= p.listed;
        return (n < first + NEURONS || last) && n < (p.listed + DEPTH - 1) / DEPTH * DEPTH;
    }

    __device__ __forceinline__ void leave(uint4 delta) const {
        const u32 n = first + next;
        char *const to = change + (i64)(n / DEPTH) * LEFT + number * (DEPTH * LINE) + n % DEPTH * LINE;
        if (leaves(n)) store(to + ((piece() ^ n) & 7) * 16, delta);
    }

    // As rows of the second product's stage have it, neurons side by side: four at a time.
    __device__ __forceinline__ void leave_turned(uint4 delta, float scale) {
        const u32 words[4] = {delta.x, delta.y, delta.z, delta.w};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 y = words[2 * i], z = words[2 * i + 1];
            const u32 x = pack8(low(y) * scale, high(y) * scale) | pack8(low(z) * scale, high(z) * scale) << 16;
#pragma unroll
            for (int r = 0; r < 4; r++) turned[4 * i + r] = __byte_perm(turned[4 * i + r], x, 0x4321 + (r << 12));
        }
        if (time % 4 < 3) return;
        const u32 n = first + next / 4 * 4;
        char *const to = change + (i64)(n / DEPTH) * LEFT + (number * 64 + piece() * 8) * SPAN + n % 16;
        if (!leaves(n)) return;
#pragma unroll
        for (int r = 0; r < 8; r++) store(to + swizzled(r, n % DEPTH / 16), turned[r]);
    }

    __device__ __forceinline__ void exchange(int slot = 0) {
        const uint4 delta = id >= 0 ? renew(slot) : uint4{0, 0, 0, 0};
        if (FP8) leave_turned(delta, 1 / *p.change_scale);
        else leave(delta);
    }

    __device__ __forceinline__ void run() {
        wait_for_kept();
        exchange();
        time++;
        fetch();
    }

    // All of the last tile, and a little past its end
    __device__ __forceinline__ void run_all(const Shared &shared, int times) {
        kept = ring_for_kept(shared);
        while (time < times) {
            int nexts[LAST_AT_ONCE], ids[LAST_AT_ONCE];
#pragma unroll
            for (int i = 0; i < LAST_AT_ONCE; i++, time++) {
                fetch(i);
                nexts[i] = next, ids[i] = id;
            }
            time -= LAST_AT_ONCE;
            wait_for_kept();
#pragma unroll
            for (int i = 0; i < LAST_AT_ONCE; i++, time++) {
                next = nexts[i], id = ids[i];
                exchange(i);
            }
        }
    }
};

__device__ __forceinline__ void consume(const Problem &p, const Shared &shared) {
    const int number = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0);
    Ring ring;
    Exchange exchange(p, shared, number);
    u32 turn = 0;
    int times = 0;  // there is nothing to do beside the first tile
    each_tile(p, [&](const Place &at) {
        float h[COLUMNS / 2];
        barrier_wait(shared.listed, turn & 1);  // fewer BUFFERS than steps: not yet the next tile's
        auto stage = [&](float (&d)[COLUMNS / 2], u32 left, u32 right, bool add) {
#pragma unroll
            for (int i = 0; i < SPAN / 32; i++)
                multiply(d, described<SPAN>(left + number * 64 * SPAN + i * 32), described<SPAN>(right + i * 32), add || i > 0);
        };
        const u32 last = multiply_all(h, p.steps, ring, shared, stage, times, TOGETHER, [&] { exchange.run(); });
        finish(h, shared, last);
        exchange.begin(h, at, Tables(shared, turn++));
        // in fp8 a cluster's tiles may end in the middle of the second product's last stage
        times = TIMES + (FP8 && exchange.first + NEURONS >= p.listed ? 4 : 0);
    });
    if (times) exchange.run_all(shared, times);
}

extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) exchange_listed(const __grid_constant__ Problem p) {
    run(p);
}
