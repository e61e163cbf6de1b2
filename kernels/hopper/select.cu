// Which keys each row of codes takes, for sm_90a: the rules of kernels/triton/selection.py. A row is read three times: into a
// histogram of ranks, then of the ranks in the bin that holds the threshold, then to be written.
// Compiled at run time behind what selection.py writes, and lists.cuh:
//   BLOCKS  that a multiprocessor runs at once

constexpr int FINE = 16;  // ranks that one bin of the histogram holds
constexpr int BINS = 65536 / FINE;
constexpr u32 TOP = 65535;  // rank of a key that is always taken; codes lie below

struct Problem : Rules {
    const char *codes;        // [rows, total] of 2 bytes, rows `pitch` codes apart, each in whole runs
    const u8 *always;         // [always_rows, total] or null
    const u8 *valid;          // [batch entries, total] or null
    const int *spare;         // [spare_rows, always_rows] or null
    i64 pitch;
    int rows_a_batch, always_rows, spare_rows;
};

struct Row {
    const char *codes;
    const u8 *always, *valid;
};

struct Shared {
    Histogram<BINS> bins;
    u32 fine[FINE];
    Sums sums;
    int eligible, threshold, above;
};

// A bit for each of 16 bytes that are not 0.
__device__ __forceinline__ u32 set_bytes(const u8 *bytes, int left) {
    u32 bits = 0;
    if ((u64)bytes % 16 == 0 && left >= RUN) {
        const uint4 four = __ldg((const uint4 *)bytes);
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < RUN; i++) bits |= (words[i / 4] >> i % 4 * 8 & 255) ? 1u << i : 0;
        return bits;
    }
    for (int i = 0; i < min(left, RUN); i++) bits |= __ldg(bytes + i) ? 1u << i : 0;
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

    __device__ __forceinline__ Run(const Row &row, int at, int total) {
        const int left = total - at;
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

__device__ __forceinline__ Row row_of(const Problem &p, int number) {
    const int line = p.first + number;
    return {
        p.codes + (i64)number * p.pitch * 2,
        p.always ? p.always + (i64)(line % p.always_rows) * p.total : nullptr,
        p.valid ? p.valid + (i64)(line / p.rows_a_batch) * p.total : nullptr,
    };
}

__device__ __forceinline__ Share share_of(const Problem &p, const Row &row, int number, Shared &shared) {
    int eligible = p.total, wanted = p.columns - p.drawn;
    if (row.valid) {
        u32 found = 0;
        for (int at = threadIdx.x * RUN; at < p.total; at += THREADS * RUN) found += __popc(set_bytes(row.valid + at, p.total - at));
        if (threadIdx.x == 0) shared.eligible = 0;
        __syncthreads();
        atomicAdd(&shared.eligible, found);
        __syncthreads();
        eligible = shared.eligible;
    }
    if (p.spare) {
        const int line = p.first + number, entry = line / p.rows_a_batch;
        wanted -= p.spare[entry % p.spare_rows * p.always_rows + line % p.always_rows];
    }
    return Share(eligible, wanted, p.drawn);
}

// Sets `threshold`, the largest rank that at least `wanted` keys reach, and `above`, how many pass it.
__device__ __forceinline__ void find_threshold(const Problem &p, const Row &row, int wanted, Shared &shared) {
    shared.bins.clear();
    if (threadIdx.x < FINE) shared.fine[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.threshold = TOP, shared.above = 0;
    __syncthreads();
    if (wanted == 0) return;
    for (int at = threadIdx.x * RUN; at < p.total; at += THREADS * RUN) {
        const Run run(row, at, p.total);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            if (run.may >> i & 1) shared.bins.add(run.rank(i) / FINE);
        }
    }
    __syncthreads();
    shared.bins.find(wanted, shared.sums);
    const u32 bin = shared.sums.bin;
    for (int at = threadIdx.x * RUN; at < p.total; at += THREADS * RUN) {
        const Run run(row, at, p.total);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const u32 rank = run.rank(i);
            if (rank / FINE == bin && run.may >> i & 1) atomicAdd(&shared.fine[rank % FINE], 1);
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // a lane a rank, going down
        const int rank = FINE - 1 - threadIdx.x;
        const u32 mine = rank >= 0 ? shared.fine[rank] : 0;
        u32 total;
        const int past = shared.sums.past + sum_before(mine, total);
        if (past < wanted && past + (int)mine >= wanted) shared.threshold = bin * FINE + rank, shared.above = past;
    }
    __syncthreads();
}

__device__ __forceinline__ void select(const Problem &p, Shared &shared) {
    for (int number = blockIdx.x; number < p.rows; number += gridDim.x) {
        const Row row = row_of(p, number);
        const Share share = share_of(p, row, number, shared);
        find_threshold(p, row, share.wanted, shared);
        const u32 threshold = shared.threshold;
        write_list(p, share, number, shared.above, !row.valid, shared.sums,
                   [&](int at) { return Run(row, at, p.total).against(threshold); });
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) select_keys(const __grid_constant__ Problem p) {
    __shared__ Shared shared;
    select(p, shared);
}
