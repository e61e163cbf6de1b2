// Which keys each row of codes takes, for sm_90a: the rules of kernels/triton/selection.py. A row is read three times: into a
// histogram of ranks, then of the ranks in the bin that holds the threshold, then to be written.
// Compiled at run time behind what selection.py writes:
//   THREADS  of a block, which works on one row at a time
//   BLOCKS   that a multiprocessor runs at once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned char u8;

constexpr int RUN = 16;      // neighbouring keys of a thread, of which it holds a bit each
constexpr int FINE = 16;     // ranks that one bin of the histogram holds
constexpr int BINS = 65536 / FINE;
constexpr int OWN = BINS / THREADS;  // bins of a thread
constexpr int WARPS = THREADS / 32;
constexpr u32 ALL = ~0u;
constexpr u32 TOP = 65535;   // rank of a key that is always taken; codes lie below

struct Problem {
    int *lists;               // [rows, columns]
    const char *codes;        // [rows, keys] of 2 bytes, rows `pitch` codes apart, each in whole runs
    const u8 *always;         // [always_rows, keys] or null
    const u8 *valid;          // [batch entries, keys] or null
    const int *spare;         // [spare_rows, always_rows] or null
    const i64 *clock;
    i64 pitch;
    int rows, columns, keys, drawn, first, rows_a_batch, always_rows, spare_rows;
    u32 seed, site;
};

struct Row {
    int *list;
    const char *codes;
    const u8 *always, *valid;
    int wanted, drawn, free;  // taken by rank, drawn of the others, how many others there are
};

// Of a run: keys that may be taken, and those of them with a rank above, or equal to, a threshold.
struct Bits {
    u32 may, larger, equal;
};

struct Shared {
    u32 bins[BINS];
    u32 fine[FINE];
    u32 sums[2][2][WARPS];  // of two quantities, in turns
    int bin, past, threshold, above;
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

// A bit for each of 16 bytes that are not 0.
__device__ __forceinline__ u32 set_bytes(const u8 *bytes, int keys) {
    u32 bits = 0;
    if ((u64)bytes % 16 == 0 && keys >= RUN) {
        const uint4 four = __ldg((const uint4 *)bytes);
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < RUN; i++) bits |= (words[i / 4] >> i % 4 * 8 & 255) ? 1u << i : 0;
        return bits;
    }
    for (int i = 0; i < min(keys, RUN); i++) bits |= __ldg(bytes + i) ? 1u << i : 0;
    return bits;
}

__device__ __forceinline__ u32 code_of(const uint4 (&codes)[2], int i) {
    const uint4 &half = codes[i / 8];
    const u32 words[4] = {half.x, half.y, half.z, half.w};
    return words[i % 8 / 2] >> i % 2 * 16 & 65535;
}

// The run that begins with key `at`: its codes, and which of its keys may be taken or have to be.
struct Run {
    uint4 codes[2];
    u32 may, must;

    __device__ __forceinline__ Run(const Row &row, int at, int keys) {
        const int left = keys - at;
        codes[0] = codes[1] = make_uint4(0, 0, 0, 0);
        may = must = 0;
        if (left <= 0) return;
        const uint4 *from = (const uint4 *)(row.codes + (i64)at * 2);
        codes[0] = __ldg(from), codes[1] = __ldg(from + 1);
        may = left >= RUN ? 65535 : (1u << left) - 1;
        if (row.valid) may &= set_bytes(row.valid + at, left);
        if (row.always) must = set_bytes(row.always + at, left) & may;
    }

    __device__ __forceinline__ u32 rank(int i) const { return must >> i & 1 ? TOP : code_of(codes, i); }

    __device__ __forceinline__ Bits against(u32 threshold) const {
        Bits bits = {may, 0, 0};
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const u32 code = code_of(codes, i);
            bits.larger |= code > threshold ? 1u << i : 0;
            bits.equal |= code == threshold ? 1u << i : 0;
        }
        bits.larger = (bits.larger | must) & may;
        bits.equal &= may & ~must;
        if (threshold == TOP) bits.equal = must, bits.larger = 0;
        return bits;
    }
};

__device__ __forceinline__ Row row_of(const Problem &p, int number, Shared &shared) {
    const int line = p.first + number, entry = line / p.rows_a_batch, group = line % p.always_rows;
    Row row;
    row.list = p.lists + (i64)number * p.columns;
    row.codes = p.codes + (i64)number * p.pitch * 2;
    row.always = p.always ? p.always + (i64)group * p.keys : nullptr;
    row.valid = p.valid ? p.valid + (i64)entry * p.keys : nullptr;
    int eligible = p.keys;
    if (row.valid) {
        u32 found = 0;
        for (int at = threadIdx.x * RUN; at < p.keys; at += THREADS * RUN) found += __popc(set_bytes(row.valid + at, p.keys - at));
        if (threadIdx.x == 0) shared.past = 0;
        __syncthreads();
        atomicAdd(&shared.past, found);
        __syncthreads();
        eligible = shared.past;
    }
    int wanted = p.columns - p.drawn;
    if (p.spare) wanted -= p.spare[entry % p.spare_rows * p.always_rows + group];
    wanted = max(min(wanted, eligible), 0);
    const bool spent = p.drawn >= eligible - wanted;  // all others would be drawn
    row.wanted = spent ? eligible : wanted;
    row.drawn = spent ? 0 : p.drawn;
    row.free = eligible - row.wanted;
    return row;
}

// Sets `threshold`, the largest rank that at least `wanted` keys reach, and `above`, how many pass it.
__device__ __forceinline__ void find_threshold(const Problem &p, const Row &row, Shared &shared) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.bins[i] = 0;
    if (threadIdx.x < FINE) shared.fine[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.threshold = TOP, shared.above = 0;
    __syncthreads();
    if (row.wanted == 0) return;
    for (int at = threadIdx.x * RUN; at < p.keys; at += THREADS * RUN) {
        const Run run(row, at, p.keys);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            if (run.may >> i & 1) atomicAdd(&shared.bins[run.rank(i) / FINE], 1);
        }
    }
    __syncthreads();
    // bins of a thread go down from the highest, so that sums before it are of larger ranks
    u32 mine = 0, whole;
    for (int i = 0; i < OWN; i++) mine += shared.bins[BINS - 1 - threadIdx.x * OWN - i];
    u32 past = sum_before(mine, whole);
    if (threadIdx.x % 32 == 0) shared.sums[0][0][threadIdx.x / 32] = whole;
    __syncthreads();
    for (int i = 0; i < threadIdx.x / 32; i++) past += shared.sums[0][0][i];
    if (past < row.wanted && past + mine >= row.wanted) {
        int bin = BINS - 1 - threadIdx.x * OWN;
        while (past + shared.bins[bin] < row.wanted) past += shared.bins[bin--];
        shared.bin = bin, shared.past = past;
    }
    __syncthreads();
    const u32 bin = shared.bin;
    for (int at = threadIdx.x * RUN; at < p.keys; at += THREADS * RUN) {
        const Run run(row, at, p.keys);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const u32 rank = run.rank(i);
            if (rank / FINE == bin && run.may >> i & 1) atomicAdd(&shared.fine[rank % FINE], 1);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int rank = FINE - 1, above = shared.past;
        while (above + (int)shared.fine[rank] < row.wanted) above += shared.fine[rank--];
        shared.threshold = bin * FINE + rank, shared.above = above;
    }
    __syncthreads();
}

// Which free keys of a run are drawn, counted from its first one, which is number `first` of the row; before: how many earlier.
struct Draws {
    int drawn, reach;
    i64 pace, length;
    u32 key;

    __device__ __forceinline__ Draws(const Problem &p, const Row &row, int number) : drawn(row.drawn) {
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

__device__ __forceinline__ void write(const Problem &p, const Row &row, int number, Shared &shared) {
    const u32 threshold = shared.threshold;
    const int ties = row.wanted - shared.above, warp = threadIdx.x / 32;
    const Draws draws(p, row, number);
    int larger = 0, equal = 0, may = 0, turn = 0;  // in the runs of earlier rounds
    for (int begin = 0; begin < p.keys; begin += THREADS * RUN, turn ^= 1) {
        const int at = begin + threadIdx.x * RUN;
        const Bits bits = Run(row, at, p.keys).against(threshold);
        u32 both, present = 0;
        u32 before = sum_before(__popc(bits.larger) | __popc(bits.equal) << 16, both), present_before = 0;
        if (row.valid) present_before = sum_before(__popc(bits.may), present);
        if (threadIdx.x % 32 == 0) shared.sums[turn][0][warp] = both, shared.sums[turn][1][warp] = present;
        __syncthreads();
        u32 all = 0, all_present = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            if (i == warp) before += all, present_before += all_present;
            all += shared.sums[turn][0][i];
            if (row.valid) all_present += shared.sums[turn][1][i];
        }
        const int ties_before = equal + (before >> 16), left = max(ties - ties_before, 0);
        const u32 taken = bits.larger | first_bits(bits.equal, left);
        const int taken_before = larger + (before & 65535) + min(ties_before, ties);
        const int may_before = row.valid ? may + present_before : min(at, p.keys);
        int drawn_before;
        const u32 drawn = draws.of(may_before - taken_before, drawn_before);
        u32 chosen = taken | spread(drawn, bits.may & ~taken);
        for (int *to = row.list + taken_before + drawn_before; chosen; chosen &= chosen - 1) *to++ = at + __ffs(chosen) - 1;
        larger += all & 65535, equal += all >> 16, may += all_present;
    }
    for (int i = row.wanted + row.drawn + threadIdx.x; i < p.columns; i += THREADS) row.list[i] = p.keys;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) select_keys(const __grid_constant__ Problem p) {
    __shared__ Shared shared;
    for (int number = blockIdx.x; number < p.rows; number += gridDim.x) {
        const Row row = row_of(p, number, shared);
        find_threshold(p, row, shared);
        write(p, row, number, shared);
        __syncthreads();
    }
}
