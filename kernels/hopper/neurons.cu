// Which neurons each group computes anew, for sm_90a: those whose mean has moved the most, by the rules of
// kernels/triton/selection.py. A cluster of blocks holds a row of ranks in registers; histograms of fewer and fewer of their bits
// find the threshold.
// Compiled at run time behind what selection.py writes, cluster.cuh and lists.cuh:
//   THREADS  of a block: RUN neurons or fewer to each thread
//   CLUSTER  blocks of one

constexpr int BITS = 30;  // of a rank: of magnitudes in fp32 the bits order as they do; the lowest is left out
constexpr int LARGEST = (1 << BITS) - 2;
constexpr int DIGIT = 10;  // bits that a histogram tells apart

struct Problem : Rules {
    const float *means, *mean;  // [rows, total]: now, and when each neuron was last computed
};

constexpr int PART = THREADS * RUN;  // neurons of a block

using Bins = Histogram<1 << DIGIT>;

struct Shared {
    Bins bins[2], all;  // of the block, in turns: others read them while the next are counted; of the cluster
    Sums sums;
    u32 taken;
};

// A thread adds up the bins that it looks at next.
__device__ __forceinline__ void add_up(const Bins &bins, Bins &all) {
    const int first = Bins::place(Bins::lowest());
#pragma unroll
    for (int i = first; i < first + Bins::OWN; i++) {
        u32 sum = 0;
#pragma unroll
        for (int rank = 0; rank < CLUSTER; rank++) sum += taken_from(rank, bins.counts + i);
        all.counts[i] = sum;
    }
}

struct Run {
    int ranks[RUN];  // -1 past the end
    u32 may;

    __device__ __forceinline__ Run(const Problem &p, int number, int at) : may(0) {
        const i64 place = (i64)number * p.total + at;
#pragma unroll
        for (int i = 0; i < RUN; i += 4) {
            const bool whole = at + i + 4 <= p.total && p.total % 4 == 0;
            float now[4], before[4];
            if (whole) {
                *(float4 *)now = *(const float4 *)(p.means + place + i);
                *(float4 *)before = *(const float4 *)(p.mean + place + i);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const bool there = at + i + j < p.total;
                if (!whole && there) now[j] = p.means[place + i + j], before[j] = p.mean[place + i + j];
                // a NaN may have either sign, and counts as the largest
                ranks[i + j] = there ? min(max(__float_as_int(fabsf(now[j] - before[j])) >> 1, 0), LARGEST) : -1;
                may |= there ? 1u << (i + j) : 0;
            }
        }
    }

    __device__ __forceinline__ Bits against(int threshold) const {
        Bits bits = {may, 0, 0};
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            bits.larger |= ranks[i] > threshold ? 1u << i : 0;
            bits.equal |= ranks[i] == threshold ? 1u << i : 0;
        }
        return bits;
    }
};

struct Threshold {
    int rank, above;  // the largest rank that at least `wanted` neurons reach; how many pass it

    __device__ __forceinline__ Threshold(const Run &run, int wanted, Shared &shared) : rank(0), above(0) {
        if (wanted == 0) rank = LARGEST + 1;
        int turn = 0;
#pragma unroll 1
        for (int shift = BITS - DIGIT; shift >= 0 && wanted > 0; shift -= DIGIT, turn ^= 1) {
            shared.bins[turn].clear();
            __syncthreads();
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                const u32 bin = (u32)(run.ranks[i] - rank) >> shift;  // what lies below is far above
                if (bin < 1 << DIGIT) shared.bins[turn].add(bin);
            }
            meet_in_cluster();
            add_up(shared.bins[turn], shared.all);
            shared.all.find(wanted - above, shared.sums);
            rank += shared.sums.bin << shift;
            above += shared.sums.past;
        }
    }
};

__device__ __forceinline__ void select(const Problem &p, Shared &shared) {
    if (p.clock[1] == 0) return;  // lists are kept
    const Share row(p.total, p.columns - p.drawn, p.drawn);
    const int rank = rank_in_cluster(), begin = rank * PART;
    for (int number = blockIdx.x / CLUSTER; number < p.rows; number += gridDim.x / CLUSTER) {
        const Run run(p, number, begin + threadIdx.x * RUN);
        const Threshold threshold(run, row.wanted, shared);
        auto bits_of = [&](int) { return run.against(threshold.rank); };
        auto others = [&](u32 mine) {
            if (threadIdx.x == 0) shared.taken = mine;
            meet_in_cluster();
            u32 before = 0;
            for (int other = 0; other < rank; other++) before += taken_from(other, &shared.taken);
            return before;
        };
        write_columns(p, row, number, threshold.above, true, shared.sums, begin, begin + PART, bits_of, others);
        meet_in_cluster();  // others have read what this block has
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) select_neurons(const __grid_constant__ Problem p) {
    __shared__ Shared shared;
    select(p, shared);
}
