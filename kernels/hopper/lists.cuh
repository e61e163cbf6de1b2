// What both selections share: from thresholds of ranks to ascending lists, by the rules of kernels/triton/selection.py.
//   THREADS  of a block, which works on one row at a time, or on its part of one

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned char u8;

constexpr int RUN = 16;  // neighbouring columns of a thread, of which it holds a bit each
constexpr int WARPS = THREADS / 32;
constexpr u32 ALL = ~0u;

struct Rules {
    int *lists;        // [rows, columns]
    const i64 *clock;
    int rows, columns, total, drawn, first;  // total: columns that a row has
    u32 seed, site;
};

struct Share {
    int wanted, drawn, free;  // taken by rank, drawn of the others, how many others there are

    // eligible: columns that may be taken; wanted: of them by rank
    __device__ __forceinline__ Share(int eligible, int by_rank, int draws) {
        by_rank = max(min(by_rank, eligible), 0);
        const bool spent = draws >= eligible - by_rank;  // all others would be drawn
        wanted = spent ? eligible : by_rank;
        drawn = spent ? 0 : draws;
        free = eligible - wanted;
    }
};

// Of a run: columns that may be taken, and those of them with a rank above, or equal to, a threshold.
struct Bits {
    u32 may, larger, equal;
};

struct Sums {
    alignas(16) u32 of[2][2][WARPS];  // of two quantities, in turns
    int bin, past;
};

__device__ __forceinline__ u32 mix(u32 x) {  // the 32-bit finaliser of MurmurHash3
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

__device__ __forceinline__ u32 sum_before(u32 x, u32 &total) {  // of the lanes before; total: of the warp
    u32 upto = x;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        const u32 other = __shfl_up_sync(ALL, upto, i);
        if (threadIdx.x % 32 >= i) upto += other;
    }
    total = __shfl_sync(ALL, upto, 31);
    return upto - x;
}

// Of the warps before this one; total: of all. Each has left its own sum.
__device__ __forceinline__ u32 warps_before(const u32 (&warps)[WARPS], u32 &total) {
    u32 before = total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        if (i == threadIdx.x / 32) before = total;
        total += warps[i];
    }
    return before;
}

// Counts of ranks by bin. A thread has OWN neighbouring bins, of which each thread's begin at another bank.
template <int BINS>
struct Histogram {
    static constexpr int OWN = BINS / THREADS;
    u32 counts[BINS + THREADS];

    __device__ __forceinline__ static int place(int bin) { return bin + bin / OWN; }
    __device__ __forceinline__ static int lowest() { return BINS - (threadIdx.x + 1) * OWN; }  // of a thread's bins
    __device__ __forceinline__ void add(int bin) { atomicAdd(&counts[place(bin)], 1); }

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < BINS + THREADS; i += THREADS) counts[i] = 0;
    }

    // Sets sums.bin to the highest bin that, with all above, holds `wanted`, which is not 0, and sums.past to how many lie above.
    __device__ __forceinline__ void find(int wanted, Sums &sums) const {
        const u32 *const own = counts + place(lowest());
        u32 mine = 0, total;
#pragma unroll
        for (int i = 0; i < OWN; i++) mine += own[i];
        u32 past = sum_before(mine, total);
        if (threadIdx.x % 32 == 0) sums.of[0][0][threadIdx.x / 32] = total;
        __syncthreads();
        past += warps_before(sums.of[0][0], total);
        if (past < wanted && past + mine >= wanted) {
            int i = OWN - 1;
            while (past + own[i] < wanted) past += own[i--];
            sums.bin = lowest() + i, sums.past = past;
        }
        __syncthreads();
    }
};

// Which free columns of a run are drawn, counted from its first one, which is number `first` of the row; before: how many earlier.
struct Draws {
    int drawn, reach;
    i64 pace, length;
    u32 key;

    __device__ __forceinline__ Draws(const Rules &p, const Share &row, int number) : drawn(row.drawn) {
        const i64 free = row.free, draws = row.drawn;
        reach = draws > 0 ? (int)(2 + (RUN * draws + free - 1) / max(free, 1ll)) : 0;
        pace = (draws << 32) / max(free, 1ll);
        length = ((free << 32) + draws - 1) / max(draws, 1ll);
        key = mix(mix(p.seed ^ mix(p.site)) + (u32)p.clock[0]);
        key = mix(key + (u32)(p.first + number) * 0x9E3779B9u);
    }

    __device__ __forceinline__ u32 of(int first, int &before) const {
        int draw = (int)((first * pace) >> 32), begin = (int)((draw * length) >> 32);
        before = min(draw, drawn);
        u32 bits = 0;
        for (int i = 0; i < reach; i++) {
            const u32 hashed = mix(key + (u32)(draw + 1) * 0x9E3779B9u);
            draw++;
            const int end = (int)((draw * length) >> 32);
            const int ahead = begin + (int)__umulhi(hashed, (u32)(end - begin)) - first;
            if (draw <= drawn) {
                before += ahead < 0;
                if (ahead >= 0 && ahead < RUN) bits |= 1u << ahead;
            }
            begin = end;
        }
        return bits;
    }
};

// Bits of `from` that stand where the lowest of `places` do: bit n goes to the n-th bit that is set there.
__device__ __forceinline__ u32 spread(u32 from, u32 places) {
    u32 bits = 0;
    for (; from && places; from >>= 1, places &= places - 1) bits |= from & 1 ? places & -places : 0;
    return bits;
}

__device__ __forceinline__ u32 first_bits(u32 bits, int count) {
    for (int more = __popc(bits) - count; more > 0; more--) bits ^= 0x80000000u >> __clz(bits);
    return bits;
}

// Writes what the list of row `number` has of columns from `begin` to before `end`. bits_of(at): of the run at column `at`; above:
// how many pass the threshold; all: whether every column may be taken. others(mine) is called once a round with how many columns
// of it are larger and, 16 bits higher, equal: it returns how many those are that other blocks have before them.
template <class BitsOf, class Others>
__device__ __forceinline__ void write_columns(const Rules &p, const Share &row, int number, int above, bool all, Sums &sums,
                                              int begin, int end, BitsOf bits_of, Others others) {
    int *const list = p.lists + (i64)number * p.columns;
    const int ties = row.wanted - above, warp = threadIdx.x / 32;
    const Draws draws(p, row, number);
    int larger = 0, equal = 0, may = 0, turn = 0;  // in the runs of earlier rounds
    for (; begin < end; begin += THREADS * RUN, turn ^= 1) {
        const int at = begin + threadIdx.x * RUN;
        const Bits bits = bits_of(at);
        u32 both, present = 0;
        u32 before = sum_before(__popc(bits.larger) | __popc(bits.equal) << 16, both), present_before = 0;
        if (!all) present_before = sum_before(__popc(bits.may), present);
        if (threadIdx.x % 32 == 0) sums.of[turn][0][warp] = both, sums.of[turn][1][warp] = present;
        __syncthreads();
        u32 whole, all_present = 0;
        before += warps_before(sums.of[turn][0], whole);
        before += others(whole);
        if (!all) present_before += warps_before(sums.of[turn][1], all_present);
        const int ties_before = equal + (before >> 16), left = max(ties - ties_before, 0);
        const u32 taken = bits.larger | first_bits(bits.equal, left);
        const int taken_before = larger + (before & 65535) + min(ties_before, ties);
        const int may_before = all ? min(at, p.total) : may + present_before;
        int drawn_before;
        const u32 drawn = draws.of(may_before - taken_before, drawn_before);
        u32 chosen = taken | spread(drawn, bits.may & ~taken);
        for (int *to = list + taken_before + drawn_before; chosen; chosen &= chosen - 1) *to++ = at + __ffs(chosen) - 1;
        larger += whole & 65535, equal += whole >> 16, may += all_present;
    }
}

// Writes the list of row `number`, as a block does by itself; the rest as above.
template <class BitsOf>
__device__ __forceinline__ void write_list(const Rules &p, const Share &row, int number, int above, bool all, Sums &sums, BitsOf bits_of) {
    write_columns(p, row, number, above, all, sums, 0, p.total, bits_of, [](u32) { return 0u; });
    int *const list = p.lists + (i64)number * p.columns;
    for (int i = row.wanted + row.drawn + threadIdx.x; i < p.columns; i += THREADS) list[i] = p.total;
}
