// Attention of groups of rows over the columns that each group lists, for sm_90a. Compiled at run time behind what
// instructions.py writes, primitives.cuh, rows.cuh, gather.cuh and softmax.cuh:
//   WIDTH      of a head, 64 or 128
//   CONSUMERS  warpgroups of 64 rows each; one more warpgroup gathers
//   COLUMNS    listed columns in one tile, a multiple of 32, at most 128
//   BUFFERS    tiles of keys or values in shared memory

constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int PAIRS = WIDTH / 16;  // of chunks of 8 columns

__device__ __forceinline__ void scores_of(float (&s)[COLUMNS / 2], u32 queries, u32 keys) {
#pragma unroll
    for (int i = 0; i < WIDTH / 16; i++)
        multiply_keys(s, described(queries + i / 4 * 64 * LINE + i % 4 * 32),
                      described(keys + i / 4 * COLUMNS * LINE + i % 4 * 32), i > 0);
    products_end();
}

__device__ __forceinline__ void add_values(float (&o)[WIDTH / 2], const u32 (&weights)[COLUMNS / 4], u32 values) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++)
        multiply_values(o, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3],
                        described(values + i * 16 * LINE, COLUMNS * LINE), true);
    products_end();
}

struct Rows {  // the two of a thread
    i64 row[2];
    bool live[2];

    __device__ __forceinline__ Rows(const Problem &p, int first) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int place = first + row_of_thread(r);
            live[r] = place < p.grouped;
            row[r] = live[r] ? place : p.grouped - 1;
            if (p.order) row[r] = p.order[row[r]];
        }
    }
};

// The same number, but what depends on it is computed anew.
__device__ __forceinline__ int again(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ __forceinline__ void load_old(uint2 (&old)[2][PAIRS], const Problem &p, const Place &at, const Rows &rows) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const char *from =
            p.old + at.batch * p.old_batch + at.head * p.old_head + rows.row[r] * p.old_row + byte_of_lane();
#pragma unroll
        for (int i = 0; i < PAIRS; i++) old[r][i] = load_once(from + i * 32);
    }
}

__device__ __forceinline__ void store_result(
    const float (&o)[WIDTH / 2], uint2 (&old)[2][PAIRS], Softmax &softmax, const Problem &p, const Place &at,
    const Rows &rows) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float total = quad_sum(softmax.total[r]);
        const i64 scalar = (i64)at.line * p.rows + rows.row[r];
        float factor = total > 0 ? 1 / total : 0;
        if (p.lse) {
            const float some = log2f(total) + softmax.top[r] * p.scale;
            const float share = total > 0 ? fminf(exp2_(p.power * (some - p.lse[scalar] * LOG2E)), 1.0f) : 0.0f;
            if (rows.live[r] && threadIdx.x % 4 == 0) p.share[scalar] = share;
            factor *= -share;
        } else {
            factor *= p.share[scalar];
        }
        char *to = p.result + at.batch * p.result_batch + at.head * p.result_head + rows.row[r] * p.result_row +
                   byte_of_lane();
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            uint2 x = old[r][i];
            swap_with_neighbour(x.x, x.y);
            const int first = 8 * i + 2 * r;
            x.x = pack(fmaf(factor, o[first], low(x.x)), fmaf(factor, o[first + 1], high(x.x)));
            x.y = pack(fmaf(factor, o[first + 4], low(x.y)), fmaf(factor, o[first + 5], high(x.y)));
            swap_with_neighbour(x.x, x.y);
            if (rows.live[r]) store_once(to + i * 32, x);
        }
    }
}

// One warpgroup of 64 rows. Products are made in turns, with the values of one tile and the keys of the next: while one
// warpgroup has its turn the others are at their exponentials.
struct Consumer {
    const Shared &shared;
    const int number;
    Ring ring;

    // the next tile of the ring, when it is there
    __device__ __forceinline__ u32 take() {
        barrier_wait(shared.full + ring.slot * 8, ring.parity);
        fence_before_products();
        return shared.tiles + ring.slot * TILE_BYTES;
    }

    __device__ __forceinline__ void give_back() {
        if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty + ring.slot * 8);
        ring.advance();
    }

    __device__ __forceinline__ void wait_turn() { named_wait(1 + number); }
    __device__ __forceinline__ void pass_turn() { named_pass(1 + (number + 1) % CONSUMERS); }

    // the last step of a turn
    __device__ __forceinline__ void multiply_by_keys(float (&s)[COLUMNS / 2]) {
        const u32 keys = take();
        products_begin();
        scores_of(s, shared.queries + number * QUERY_BYTES, keys);
        pass_turn();
        products_wait(s);
        give_back();
    }
};

__device__ __forceinline__ void consume(const Problem &p, const Shared &shared) {
    const int number = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0);
    Consumer me{shared, number, Ring()};
    if (number == CONSUMERS - 1) me.pass_turn();
    u32 turn = 0;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const Listed listed(p, tile);
        float o[WIDTH / 2], s[COLUMNS / 2], fade[2];
        u32 weights[COLUMNS / 4];
        Softmax softmax = {{none(), none()}, {0, 0}};
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) o[i] = 0;
        if (listed.tiles) {
            barrier_wait(shared.queries_full + number * 8, turn);
            turn ^= 1;
            me.wait_turn();
            me.multiply_by_keys(s);
            softmax.advance(s, p.scale, listed.live(listed.tiles), fade);
            pack_all(weights, s);
#pragma unroll 1
            for (int left = listed.tiles - 1; left > 0; left--) {
                const u32 values = me.take();
                me.wait_turn();
                products_begin();
                add_values(o, weights, values);
                products_wait(o);
                me.give_back();
                me.multiply_by_keys(s);
                if (softmax.advance(s, p.scale, listed.live(left), fade)) fade_result(o, fade);
                pack_all(weights, s);
            }
            if (threadIdx.x % 32 == 0) barrier_arrive(shared.queries_empty + number * 8);
            const u32 values = me.take();
            products_begin();
            add_values(o, weights, values);
        }
        const Place at = locate(p, again(tile));  // kept out of the registers of the loop
        const Rows rows(p, at.first + number * 64);
        uint2 old[2][PAIRS];
        load_old(old, p, at, rows);
        if (listed.tiles) {
            products_wait(o);
            me.give_back();
        }
        store_result(o, old, softmax, p, at, rows);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_columns(const __grid_constant__ Problem p) {
    run<Shared>(p);
}
