// Attention of groups of rows over the columns that each group lists, for sm_90a. Compiled at run time behind what
// instructions.py writes, primitives.cuh, rows.cuh, gather.cuh and softmax.cuh:
//   WIDTH      of a head, 64 or 128
//   CONSUMERS  warpgroups of 64 rows each; one more warpgroup gathers
//   COLUMNS    listed columns in one tile, a multiple of 32, at most 128
//   BUFFERS    tiles of keys or values in shared memory
//   OTHERS     0, or 1: the columns are the keys that a list lacks. The result is then attention over them alone, with the
//              logarithms of its denominators; nothing is added to it
//   MERGING    0, or 1: what comes of that is merged with attention over the columns listed, into that over all keys

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

__device__ __forceinline__ char *place_of_old(const Problem &p, const Place &at, i64 row) {
    return p.old + at.batch * p.old_batch + at.head * p.old_head + row * p.old_row + byte_of_lane();
}

__device__ __forceinline__ void load_row(uint2 (&old)[PAIRS], const char *from) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) old[i] = OTHERS ? make_uint2(0, 0) : load_once(from + i * 32);
}

// What becomes of a row's old values x and of its sums o: x times `old` and o times `sums` are the result, x times `old` and
// o times `kept` are what is kept where both are merged.
struct Mixture {
    float old = 1, sums, kept = 0;

    // total: the row's denominator, of the maximum `top`; one lane of the four that share a row `writes`
    __device__ __forceinline__ Mixture(const Problem &p, float total, float top, i64 scalar, bool writes) {
        const float some = total > 0 ? log2f(total) + top * p.scale : none();
        sums = total > 0 ? 1 / total : 0;
        if (OTHERS) {
            if (writes) p.lse[scalar] = some / LOG2E;
            return;
        }
        if (!p.lse) {
            sums *= p.share[scalar];
            return;
        }
        float whole = p.lse[scalar] * LOG2E, part = 0;
        __syncwarp();  // all have read it
        if (MERGING) {
            const float others = whole, most = fmaxf(some, others);
            whole = most + log2f(exp2_(some - most) + exp2_(others - most));
            old = exp2_(others - whole);
            part = exp2_(some - whole);
            if (writes) p.lse[scalar] = whole / LOG2E;
        }
        const float share = total > 0 ? fminf(exp2_(p.power * (some - whole)), 1.0f) : 0.0f;
        if (writes) p.share[scalar] = share;
        kept = (part - share) * sums;
        sums *= MERGING ? part : -share;
    }
};

__device__ __forceinline__ uint2 mixed(const float (&o)[WIDTH / 2], int first, float sums, uint2 x, float old) {
    uint2 y;
    y.x = pack(fmaf(sums, o[first], old * low(x.x)), fmaf(sums, o[first + 1], old * high(x.x)));
    y.y = pack(fmaf(sums, o[first + 4], old * low(x.y)), fmaf(sums, o[first + 5], old * high(x.y)));
    swap_with_neighbour(y.x, y.y);
    return y;
}

__device__ __forceinline__ void store_result(
    const float (&o)[WIDTH / 2], uint2 (&old)[2][PAIRS], Softmax &softmax, const Problem &p, const Place &at,
    const Rows &rows) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const i64 row = rows.row[r];
        const Mixture of(
            p, quad_sum(softmax.total[r]), softmax.top[r], (i64)at.line * p.rows + row, rows.live[r] && threadIdx.x % 4 == 0);
        char *to = p.result + at.batch * p.result_batch + at.head * p.result_head + row * p.result_row + byte_of_lane();
        char *back = place_of_old(p, at, row);
        if (MERGING) load_row(old[r], back);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            uint2 x = old[r][i];
            swap_with_neighbour(x.x, x.y);
            const int first = 8 * i + 2 * r;
            const uint2 result = mixed(o, first, of.sums, x, of.old);
            if (rows.live[r]) store_once(to + i * 32, result);
            if (MERGING) {
                const uint2 kept = mixed(o, first, of.kept, x, of.old);
                if (rows.live[r]) store_once(back + i * 32, kept);
            }
        }
    }
}

// Whether the product with the next keys is begun right behind that with the values, not after it: results of both and weights
// are in registers then, 160 of them. Three warpgroups have not as many; heads of 64 became slower.
constexpr bool BEHIND = CONSUMERS == 2 && WIDTH == 128;

// One warpgroup of 64 rows. Products are made in turns, with the values of one tile and the keys of the next: while one
// warpgroup has its turn the others are at their exponentials.
struct Consumer {
    const Shared &shared;
    const int number;
    Ring ring;
    u32 given = 0;       // slot of the ring that is given back next
    bool alone = false;  // the only one at work: always its turn

    // the next tile of the ring, when it is there
    __device__ __forceinline__ u32 take() {
        barrier_wait(shared.full + ring.slot * 8, ring.parity);
        fence_before_products();
        const u32 tile = shared.tiles + ring.slot * TILE_BYTES;
        ring.advance();
        return tile;
    }

    __device__ __forceinline__ void give_back() {
        if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty + given * 8);
        if (++given == BUFFERS) given = 0;
    }

    __device__ __forceinline__ void wait_turn() {
        if (!alone) named_wait(1 + number);
    }
    __device__ __forceinline__ void pass_turn() {
        if (!alone) named_pass(1 + (number + 1) % CONSUMERS);
    }

    // what the others have to do with its tiles
    __device__ __forceinline__ void pass_by(int count) {
#pragma unroll 1
        for (; count; count--) {
            take();
            __syncwarp();  // no lane is left a whole ring behind
            give_back();
        }
    }

    // the last step of a turn
    __device__ __forceinline__ void begin_scores(float (&s)[COLUMNS / 2], u32 keys) {
        products_begin();
        scores_of(s, shared.queries + number * QUERY_BYTES, keys);
        pass_turn();
    }

    // o += the weights times the values of one tile, s = the scores of the next
    __device__ __forceinline__ void take_turn(float (&o)[WIDTH / 2], float (&s)[COLUMNS / 2], const u32 (&weights)[COLUMNS / 4]) {
        const u32 values = take();
        u32 keys = BEHIND ? take() : 0;
        wait_turn();
        products_begin();
        add_values(o, weights, values);
        if (!BEHIND) {
            products_wait(o);
            give_back();
            keys = take();
        }
        begin_scores(s, keys);
        if (BEHIND) {
            products_wait_but_last();
            give_back();
        }
        products_wait(s);
        if (BEHIND) keep(o);
        give_back();
    }
};

__device__ __forceinline__ void consume(const Problem &p, const Shared &shared) {
    const int number = __shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0);
    Consumer me{shared, number, Ring()};
    if (number == CONSUMERS - 1) me.pass_turn();
    u32 turn = 0;
    for (int task = blockIdx.x; task < p.tasks; task += gridDim.x) {
        const Task of(p, task);
        const Listed listed(p, of.tile);
        me.alone = of.only >= 0;
        if (me.alone && of.only != number) {
            me.pass_by(2 * listed.tiles);
            continue;
        }
        float o[WIDTH / 2], s[COLUMNS / 2], fade[2];
        u32 weights[COLUMNS / 4];
        Softmax softmax = {{none(), none()}, {0, 0}};
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) o[i] = 0;
        if (listed.tiles) {
            barrier_wait(shared.queries_full + number * 8, turn);
            turn ^= 1;
            me.wait_turn();
            me.begin_scores(s, me.take());
            products_wait(s);
            me.give_back();
            softmax.advance(s, p.scale, listed.live(listed.tiles), fade);
            pack_all(weights, s);
#pragma unroll 1
            for (int left = listed.tiles - 1; left > 0; left--) {
                me.take_turn(o, s, weights);
                if (softmax.advance(s, p.scale, listed.live(left), fade)) fade_result(o, fade);
                pack_all(weights, s);
            }
            if (threadIdx.x % 32 == 0) barrier_arrive(shared.queries_empty + number * 8);
            const u32 values = me.take();
            products_begin();
            add_values(o, weights, values);
        }
        const Place at = locate(p, Task(p, again(task)).tile);  // kept out of the registers of the loop
        const Rows rows(p, at.first + number * 64);
        uint2 old[2][PAIRS];
        if (!MERGING) {
            load_row(old[0], place_of_old(p, at, rows.row[0]));
            load_row(old[1], place_of_old(p, at, rows.row[1]));
        }
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
