// The producer: one warpgroup that copies the listed rows of K and V, and the queries, into shared memory.

constexpr int TILE_BYTES = COLUMNS * WIDTH * 2;
constexpr int QUERY_BYTES = 64 * WIDTH * 2;  // of one consumer

struct Problem {
    const char *q, *k, *v;       // bytes from here on: strides too
    i64 q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
    char *old;                   // what the result is added to: rest, or with lse the dense result
    char *result;
    i64 old_batch, old_head, old_row, result_batch, result_head, result_row;
    const int *order, *lists;    // [grouped] or null, [batch x heads, groups, columns]
    float *share;                // [batch x heads, rows]
    float *lse;                  // [batch x heads, rows] or null
    int heads, shared_by, rows, grouped, keys, groups, columns, parts, whole, tasks, group_rows;
    float scale, power;          // scale times log2 e
    int padded;                  // lists may end in `keys`, which stands for no column
};

// What a block does at once: a tile of rows, or of those from `whole` on, too few for all blocks, the 64 of one consumer.
struct Task {
    int tile, only;  // only: the consumer, or -1: all

    __device__ __forceinline__ Task(const Problem &p, int number) : tile(number), only(-1) {
        if (number >= p.whole) {
            tile = p.whole + (number - p.whole) / CONSUMERS;
            only = (number - p.whole) % CONSUMERS;
        }
    }
};

struct Place {  // of a tile of rows; line: batch entry and head; first: row, in the order of groups
    int batch, head, line, first;
};

struct Shared {
    u32 queries, tiles, full, empty, queries_full, queries_empty;
    __device__ __forceinline__ explicit Shared(u32 base) {
        queries = base;
        tiles = queries + CONSUMERS * QUERY_BYTES;
        full = tiles + BUFFERS * TILE_BYTES;
        empty = full + BUFFERS * 8;
        queries_full = empty + BUFFERS * 8;
        queries_empty = queries_full + CONSUMERS * 8;
    }
};

// The columns of a tile of rows, as tiles of columns, all full but the last: the part of its list that is not padding, which
// comes last, or where OTHERS all keys but those.
struct Listed {
    int count, tiles, taken;  // taken: by the list

    __device__ __forceinline__ Listed(const Problem &p, int tile) : taken(p.columns) {
        if (p.padded) {
            const int *list = p.lists + (i64)(tile / p.parts) * p.columns;
            int low = 0;
            while (low < taken) {
                const int middle = (low + taken) / 2;
                if (list[middle] < p.keys) low = middle + 1;
                else taken = middle;
            }
        }
        count = OTHERS ? p.keys - taken : taken;
        tiles = (count + COLUMNS - 1) / COLUMNS;
    }

    // columns of a tile, `left` tiles before the end of the list, itself counted
    __device__ __forceinline__ int live(int left) const { return left == 1 ? count - (tiles - 1) * COLUMNS : COLUMNS; }
};

// The columns of a list in order, for a warp whose lanes ask for different ones.
struct Taken {
    const int *list;

    __device__ __forceinline__ Taken(const int *list, int) : list(list) {}
    __device__ __forceinline__ int operator()(int place, int) const { return list[place]; }
};

// The keys that a list lacks, in order. As many are behind listed key i as i is less than it; so the n-th is n and as many
// more as there are listed keys with no more than n before them. A lane holds that number for one of 32 listed keys, and for
// one of the 32 after these.
struct Lacking {
    const int *list;
    int taken, passed, before, next;

    __device__ __forceinline__ Lacking(const int *list, int taken) : list(list), taken(taken), passed(0) {
        before = before_listed(0);
        next = before_listed(32);
    }

    __device__ __forceinline__ int before_listed(int first) const {
        const int place = first + threadIdx.x % 32;
        return place < taken ? list[place] - place : 0x7FFFFFFF;
    }

    // place: of each lane, in no call less than the largest of the call before; last: the largest of all threads
    __device__ __forceinline__ int operator()(int place, int last) {
        int key = place + passed;
        while (true) {
            const int largest = __shfl_sync(~0u, before, 31);
            int reached = 0;
#pragma unroll
            for (int step = 16; step; step /= 2)
                if (__shfl_sync(~0u, before, reached + step - 1) <= place) reached += step;
            key += largest <= place ? 32 : reached;
            if (largest > last) return key;
            passed += 32;
            before = next;
            next = before_listed(passed + 32);
        }
    }
};

template <bool> struct Chosen { using Type = Taken; };
template <> struct Chosen<true> { using Type = Lacking; };

__device__ __forceinline__ Place locate(const Problem &p, int tile) {
    const int list = tile / p.parts, line = list / p.groups;
    return {line / p.heads, line % p.heads, line, list % p.groups * p.group_rows + tile % p.parts * (64 * CONSUMERS)};
}

__device__ __forceinline__ void produce(const Problem &p, const Shared &shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = row_of_lane(warp, lane);
    const u32 place = shared.tiles + place_of_lane<COLUMNS>(warp, lane);
    const u32 query_place = shared.queries + place_of_lane<64>(warp, lane);
    Ring ring;
    u32 turn = 0;
    auto copy_tile = [&](const char *from, i64 stride, int index) {
        barrier_wait(shared.empty + ring.slot * 8, ring.parity ^ 1);
        gather<COLUMNS>(place + ring.slot * TILE_BYTES, from, stride, index);
        barrier_arrive_after_copies(shared.full + ring.slot * 8);
        ring.advance();
    };
    for (int number = blockIdx.x; number < p.tasks; number += gridDim.x) {
        const Task task(p, number);
        const int tile = task.tile;
        const Listed listed(p, tile);
        if (!listed.tiles) continue;
        const Place at = locate(p, tile);
        Chosen<OTHERS>::Type columns(p.lists + (i64)(tile / p.parts) * p.columns, listed.taken);
        const i64 key_head = at.head / p.shared_by;
        const char *k = p.k + at.batch * p.k_batch + key_head * p.k_head + lane % CHUNKS * 16;
        const char *v = p.v + at.batch * p.v_batch + key_head * p.v_head + lane % CHUNKS * 16;
        asm volatile("" : "+l"(k), "+l"(v));  // sums that are not to be made again for every copy
        // places past the end stand for the last column: its weights are masked
        const int end = listed.count - 1;
        int index = columns(min(row, end), min(COLUMNS - 1, end));
        for (int first = 0; first < listed.count; first += COLUMNS) {
            const int next = columns(min(first + COLUMNS + row, end), min(first + 2 * COLUMNS - 1, end));
            copy_tile(k, p.k_row, index);
            if (first == 0) {  // here, so that the first keys do not wait for the last use of the queries before
                const char *q = p.q + at.batch * p.q_batch + at.head * p.q_head + lane % CHUNKS * 16;
#pragma unroll 1
                for (int c = 0; c < CONSUMERS; c++) {
                    if (task.only >= 0 && task.only != c) continue;
                    int of = min(at.first + c * 64 + row, p.grouped - 1);
                    if (p.order) of = p.order[of];
                    barrier_wait(shared.queries_empty + c * 8, turn ^ 1);
                    gather<64>(query_place + c * QUERY_BYTES, q, p.q_row, of);
                    barrier_arrive_after_copies(shared.queries_full + c * 8);
                }
                turn ^= 1;
            }
            copy_tile(v, p.v_row, index);
            index = next;
        }
    }
}
