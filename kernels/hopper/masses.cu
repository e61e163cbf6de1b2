// Column masses for sm_90a: the attention that each key receives from the sampled rows of each group. Compiled at run time
// behind what instructions.py writes, primitives.cuh and rows.cuh:
//   WIDTH      of a head, 64 or 128
//   CONSUMERS  warpgroups that multiply, each 64 keys by the rows of its own GROUPS groups; one more warpgroup copies
//   SAMPLED    rows of a group, a multiple of 8
//   GROUPS     of a consumer; GROUPS x SAMPLED is a multiple of 64
//   BUFFERS    tiles of 64 keys in shared memory
//   LEAST      exponent of the smallest mass that is told from 0, as fp32 has it

constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int ROWS = GROUPS * SAMPLED;
constexpr int KEYS = 64;
constexpr int TILE_BYTES = KEYS * WIDTH * 2;
constexpr int QUERY_BYTES = ROWS * WIDTH * 2;  // of one consumer
constexpr int CODE_BYTES = GROUPS * KEYS * 2;  // of one consumer's tile

struct Problem {
    const char *q, *k;  // bytes from here on: strides too
    i64 q_batch, q_head, q_row, k_batch, k_head, k_row;
    const int *order;   // [grouped] or null
    const float *lse;   // [batch x heads, rows]
    char *masses;       // [lines, groups, pitch] codes of 2 bytes
    // lines: heads from first_head on; the groups begin with first_group. A block takes `run` keys, of `runs`, and the
    // groups of one of `parts`
    int heads, shared_by, rows, grouped, keys, pitch, first_head, first_group, groups, group_rows, stride;
    int run, runs, parts, tiles;
    float scale;        // times log2 e
};

struct Place {  // of a tile of the result; line: of all heads of all batch entries; group: of the call; last: key
    int line, group, first, last;

    __device__ __forceinline__ Place(const Problem &p, int tile) {
        line = p.first_head + tile / (p.parts * p.runs);
        group = tile % p.parts * (CONSUMERS * GROUPS);
        first = tile / p.parts % p.runs * p.run;
        last = min(first + p.run, p.keys);
    }
};

struct Shared {
    u32 queries, tiles, codes, shifts, full, empty, queries_full, queries_empty;
    __device__ __forceinline__ explicit Shared(u32 base) {
        queries = base;
        tiles = queries + CONSUMERS * QUERY_BYTES;
        codes = tiles + BUFFERS * TILE_BYTES;
        shifts = codes + CONSUMERS * 2 * CODE_BYTES;
        full = shifts + CONSUMERS * ROWS * 4;
        empty = full + BUFFERS * 8;
        queries_full = empty + BUFFERS * 8;
        queries_empty = queries_full + CONSUMERS * 8;
    }
};

// Where in q the row of a consumer's sample lies, as `sampled_rows` in chipmunk_fx/ops/groups.py; -1 where there is none.
__device__ __forceinline__ int sampled_row(const Problem &p, int group, int sample) {
    group += sample / SAMPLED;
    const int i = sample % SAMPLED;
    const int place = (p.first_group + group) * p.group_rows + min(i * p.stride + 3 * i % p.stride, p.group_rows - 1);
    if (group >= p.groups || place >= p.grouped) return -1;
    return p.order ? p.order[place] : place;
}

__device__ __forceinline__ void produce(const Problem &p, const Shared &shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = row_of_lane(warp, lane);
    const u32 place = shared.tiles + place_of_lane<KEYS>(warp, lane);
    const u32 query_place = shared.queries + place_of_lane<ROWS>(warp, lane);
    Ring ring;
    u32 turn = 1;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const Place at(p, tile);
        const i64 batch = at.line / p.heads, head = at.line % p.heads;
        const char *q = p.q + batch * p.q_batch + head * p.q_head + lane % CHUNKS * 16;
        const char *k = p.k + batch * p.k_batch + head / p.shared_by * p.k_head + lane % CHUNKS * 16;
#pragma unroll 1
        for (int c = 0; c < CONSUMERS; c++) {
            barrier_wait(shared.queries_empty + c * 8, turn);
#pragma unroll 1
            for (int first = 0; first < ROWS; first += 64) {
                const int of = max(sampled_row(p, at.group + c * GROUPS, first + row), 0);
                gather<64>(query_place + c * QUERY_BYTES + first * LINE, q, p.q_row, of);
            }
            barrier_arrive_after_copies(shared.queries_full + c * 8);
        }
        turn ^= 1;
        for (int first = at.first; first < at.last; first += KEYS) {
            barrier_wait(shared.empty + ring.slot * 8, ring.parity ^ 1);
            gather<KEYS>(place + ring.slot * TILE_BYTES, k, p.k_row, min(first + row, p.keys - 1));
            barrier_arrive_after_copies(shared.full + ring.slot * 8);
            ring.advance();
        }
    }
}

// Codes as those of `coded` in kernels/triton/selection.py.
__device__ __forceinline__ u32 coded(float mass) {
    return min(max((__float_as_int(mass) >> 13) - (LEAST << 10), 0), 65534);
}

// One warpgroup. Products are made in turns: while one has its turn the others are at their exponentials.
struct Consumer {
    const Problem &p;
    const Shared &shared;
    const int number;
    const u32 queries, shifts;
    Ring ring;

    __device__ __forceinline__ Consumer(const Problem &p, const Shared &shared, int number)
        : p(p), shared(shared), number(number), queries(shared.queries + number * QUERY_BYTES),
          shifts(shared.shifts + number * ROWS * 4) {}

    __device__ __forceinline__ void meet() { asm volatile("bar.sync %0, 128;" ::"r"(1 + CONSUMERS + number) : "memory"); }
    __device__ __forceinline__ void pass_turn() { named_pass(1 + (number + 1) % CONSUMERS); }

    // Less the logarithm to base 2 of each row's denominator.
    __device__ __forceinline__ void load_shifts(const Place &at) {
        for (int sample = threadIdx.x % 128; sample < ROWS; sample += 128) {
            const int row = sampled_row(p, at.group + number * GROUPS, sample);
            const float shift = row < 0 ? none() : -LOG2E * p.lse[(i64)at.line * p.rows + row];
            put(shifts + sample * 4, __float_as_uint(shift));
        }
        meet();
    }

    __device__ __forceinline__ void multiply(float (&s)[ROWS / 2]) {
        barrier_wait(shared.full + ring.slot * 8, ring.parity);
        fence_before_products();
        const u32 keys = shared.tiles + ring.slot * TILE_BYTES;
        named_wait(1 + number);
        products_begin();
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++)
            multiply_keys(s, described(keys + i / 4 * KEYS * LINE + i % 4 * 32),
                          described(queries + i / 4 * ROWS * LINE + i % 4 * 32), i > 0);
        products_end();
        pass_turn();
        products_wait(s);
        if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty + ring.slot * 8);
        ring.advance();
    }

    // The sums over each group's rows, as codes in shared memory: [groups, keys]
    __device__ __forceinline__ void sum(const float (&s)[ROWS / 2], u32 codes) const {
        const u32 mine = shifts + threadIdx.x % 4 * 8;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            float total[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < SAMPLED / 8; j++) {
                const int i = g * (SAMPLED / 8) + j;
                const u64 both = taken8(mine + i * 32);
                const float shift[2] = {__uint_as_float((u32)both), __uint_as_float((u32)(both >> 32))};
#pragma unroll
                for (int n = 0; n < 4; n++) total[n / 2] += exp2_(fmaf(s[4 * i + n], p.scale, shift[n % 2]));
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 code = coded(quad_sum(total[r]));
                if (threadIdx.x % 4 == 0)
                    asm volatile("st.shared.u16 [%0], %1;" ::"r"(codes + (g * KEYS + row_of_thread(r)) * 2), "h"((unsigned short)code) : "memory");
            }
        }
    }

    // Two keys a thread. What lies behind the last key, up to the pitch, nobody reads.
    __device__ __forceinline__ void store(u32 codes, const Place &at, int first) const {
        const int group = at.group + number * GROUPS;
        for (int pair = threadIdx.x % 128; pair < GROUPS * KEYS / 2; pair += 128) {
            const int g = group + pair / (KEYS / 2), key = first + pair % (KEYS / 2) * 2;
            if (g >= p.groups || key >= p.pitch) continue;
            const i64 line = (i64)(at.line - p.first_head) * p.groups + g;
            *(u32 *)(p.masses + (line * p.pitch + key) * 2) = taken(codes + pair * 4);
        }
    }
};

__device__ __forceinline__ void consume(const Problem &p, const Shared &shared) {
    const int number = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0);
    Consumer me(p, shared, number);
    if (number == CONSUMERS - 1) me.pass_turn();
    u32 turn = 0, codes = shared.codes + number * 2 * CODE_BYTES, other = CODE_BYTES;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const Place at(p, tile);
        me.load_shifts(at);
        barrier_wait(shared.queries_full + number * 8, turn);
        turn ^= 1;
#pragma unroll 1
        for (int first = at.first; first < at.last; first += KEYS) {
            float s[ROWS / 2];
            me.multiply(s);
            if (first + KEYS >= at.last && threadIdx.x % 32 == 0) barrier_arrive(shared.queries_empty + number * 8);
            me.sum(s, codes);
            me.meet();  // two places for codes, so that it is enough to meet once
            me.store(codes, at, first);
            codes += other;
            other = -other;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) column_masses(const __grid_constant__ Problem p) {
    run<Shared>(p);
}
