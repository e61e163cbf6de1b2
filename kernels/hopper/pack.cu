// Rows of x as the products of a sparse MLP step want them, and the mean row of each group, for sm_90a. A cluster takes a group:
// its blocks in turns ROWS rows each, which stay in registers from reading to writing, so that x is read once. Sums of columns
// stay there, too, and meet when the group is through: always in the same order.
// Compiled at run time behind what packing.py writes, and cluster.cuh:
//   ROWS      that a block holds at once
//   PASSES    pieces of each of them that a thread holds
//   THREADS   of a block
//   RESIDENT  blocks that a multiprocessor runs at once
//   BLOCK     rows of a block as it is packed; SPAN  bytes of each in one step
//   FP8       values become e4m3, with a scale for each row; else they stay what they are

typedef long long i64;

constexpr u32 ALL = ~0u;
constexpr int VALUES = 8;                   // of a piece, which a thread reads at once
constexpr int PIECE = FP8 ? 8 : 16;         // bytes that it takes when packed
constexpr int ACROSS = SPAN / PIECE;        // pieces in a line of a step
constexpr int CHUNK = THREADS * VALUES;     // columns that a pass takes
constexpr int WARPS = THREADS / 32;
constexpr float SMALL = 0x1p-100f, LIFT = 0x1p64f;
static_assert(BLOCK % ROWS == 0 && ROWS <= 32 && WARPS <= 32 && SPAN == 64, "rows at once lie in one block");

struct Problem {
    const uint4 *x;         // [batch, rows, width] of 2 bytes a value
    i64 x_batch;            // words of 16 bytes from one to the next
    const int *order;       // [rows] or null
    char *values;           // [batch x groups, parts, steps, BLOCK, SPAN bytes]
    unsigned short *means;  // [batch x groups, width]
    float *scales;          // [batch, rows] in the order of groups; in fp8
    u32 x_row;              // words from one to the next: of an entry 32 bits tell them
    int rows, width, groups, parts, steps, tiles;
};

// What a row's values are divided by. The product with the inverse, mended by its remainder, becomes the e4m3 that division to
// the nearest gives, for all of bf16; small values are lifted first, since the inverse would be infinite.
struct alignas(16) Scale {
    float lift, divisor, inverse;

    __device__ __forceinline__ explicit Scale(float scale) {
        lift = scale < SMALL ? LIFT : 1.0f;
        divisor = scale * lift;
        inverse = __frcp_rn(divisor);
        if (inverse == 0) divisor = 0;  // an infinite scale leaves 0 of what is finite, and NaN of the rest
    }

    __device__ __forceinline__ float under(float x) const {
        const float y = x * inverse;
        return fmaf(fmaf(-y, divisor, x), inverse, y);
    }

    __device__ __forceinline__ uint2 under(const uint4 &x) const {
        float y[VALUES] = {low(x.x), high(x.x), low(x.y), high(x.y), low(x.z), high(x.z), low(x.w), high(x.w)};
        if (__builtin_expect(lift != 1, 0)) {
#pragma unroll
            for (int i = 0; i < VALUES; i++) y[i] *= lift;
        }
        u32 z[4];
#pragma unroll
        for (int i = 0; i < 4; i++) z[i] = pack8(under(y[2 * i]), under(y[2 * i + 1]));
        return make_uint2(z[0] | z[1] << 16, z[2] | z[3] << 16);
    }
};

struct Shared {
    float sums[CHUNK];
    u32 largest[ROWS][WARPS];
    alignas(16) char scales[ROWS * sizeof(Scale)];

    __device__ __forceinline__ Scale &scale(int row) { return ((Scale *)scales)[row]; }
};

struct Group {
    const uint4 *x;  // of its batch entry
    char *values;
    float *scales;
    int first, height;  // in the order of groups; rows, fewer in a last group

    __device__ __forceinline__ Group(const Problem &p, int list) {
        const int batch = list / p.groups, group_rows = p.parts * BLOCK;
        first = list % p.groups * group_rows;
        height = min(group_rows, p.rows - first);
        x = p.x + batch * p.x_batch;
        values = p.values + (i64)list * p.parts * p.steps * (BLOCK * SPAN);
        scales = p.scales + (i64)batch * p.rows + first;
    }

    // Where the row at `place` begins in x, in words of 16 bytes.
    __device__ __forceinline__ u32 row(const Problem &p, int place) const {
        if (place >= height) return 0;
        return (p.order ? __ldg(p.order + first + place) : first + place) * p.x_row;
    }
};

using Held = uint4[ROWS][PASSES];

__device__ __forceinline__ int piece_of(int pass) { return pass * THREADS + threadIdx.x; }

// rows: where they begin, one a lane; live: how many there are, the others are 0
__device__ __forceinline__ void read(Held &x, const Problem &p, const Group &group, u32 rows, int live) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const uint4 *row = group.x + __shfl_sync(ALL, rows, r);
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const bool there = r < live && piece_of(i) * VALUES < p.width;
            x[r][i] = there ? __ldg(row + piece_of(i)) : make_uint4(0, 0, 0, 0);
        }
    }
}

__device__ __forceinline__ void add(float (&sums)[PASSES][VALUES], const Held &x) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const u32 words[4] = {x[r][i].x, x[r][i].y, x[r][i].z, x[r][i].w};
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][2 * j] += low(words[j]), sums[i][2 * j + 1] += high(words[j]);
        }
    }
}

// Magnitudes of bf16 order as their bits do, NaN above all.
__device__ __forceinline__ u32 largest_of(const uint4 (&x)[PASSES]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const u32 words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) most = __vmaxu2(most, words[j] & 0x7FFF7FFF);
    }
    return __reduce_max_sync(ALL, max(most >> 16, most & 0xFFFF));
}

// scales: where those of the rows held are written
__device__ __forceinline__ void find_scales(const Held &x, Shared &shared, float *scales, int live) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const u32 most = largest_of(x[r]);
        if (lane == 0) shared.largest[r][warp] = most;
    }
    __syncthreads();
    for (int r = warp; r < ROWS; r += WARPS) {
        const u32 most = __reduce_max_sync(ALL, lane < WARPS ? shared.largest[r][lane] : 0);
        const float scale = __uint_as_float(most << 16) * (1 / 448.0f);
        if (lane != 0) continue;
        shared.scale(r) = Scale(scale == 0 ? 1.0f : scale);
        if (r < live) scales[r] = scale == 0 ? 1.0f : scale;
    }
    __syncthreads();
}

// place: of the first row in its group
__device__ __forceinline__ void write(const Held &x, const Problem &p, const Group &group, Shared &shared, int place, int live) {
    char *block = group.values + (i64)(place / BLOCK) * p.steps * (BLOCK * SPAN) + place % BLOCK * SPAN;
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        char *line = block + (i64)(piece_of(i) / ACROSS) * (BLOCK * SPAN);
        const int inner = piece_of(i) % ACROSS * PIECE, lines = piece_of(i) * VALUES < p.width ? live : 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int swizzle = ((ROWS % 8 ? place : 0) + r >> 1 & 3) * 16;  // place is a multiple of ROWS
            char *to = line + (inner ^ swizzle) + r * SPAN;
            if constexpr (FP8) {
                const uint2 packed = shared.scale(r).under(x[r][i]);
                if (r < lines) *(uint2 *)to = packed;
            } else if (r < lines) {
                *(uint4 *)to = x[r][i];
            }
        }
    }
}

// To all blocks of the cluster: sums of a pass's columns.
__device__ __forceinline__ void show(const float (&sums)[VALUES], Shared &shared) {
    float4 *mine = (float4 *)shared.sums + threadIdx.x * 2;
    mine[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    mine[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
    __syncwarp();  // lanes arrive as one
    arrive_in_cluster();
}

// Each block adds up what all of them show of its share of the columns; those of the first pass are shown already.
__device__ __forceinline__ void write_means(
    const float (&sums)[PASSES][VALUES], const Problem &p, int list, int height, Shared &shared
) {
    constexpr int SHARE = (CHUNK + CLUSTER - 1) / CLUSTER;
    unsigned short *means = p.means + (i64)list * p.width;
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        if (i > 0) show(sums[i], shared);
        wait_for_cluster();
#pragma unroll
        for (int j = 0; j < SHARE; j += THREADS) {
            const int mine = j + threadIdx.x, place = rank_in_cluster() * SHARE + mine, column = i * CHUNK + place;
            if (mine >= SHARE || place >= CHUNK || column >= p.width) continue;
            float sum = 0;
#pragma unroll
            for (u32 rank = 0; rank < CLUSTER; rank++) sum += taken_from(rank, shared.sums + place);
            means[column] = (unsigned short)pack(sum / height, 0.0f);
        }
        __syncwarp();
        meet_in_cluster();  // before sums are overwritten, or the block is gone
    }
}

__device__ __forceinline__ void pack_group(const Problem &p, int list, Shared &shared) {
    const Group group(p, list);
    const int turn = CLUSTER * ROWS, lane = threadIdx.x % ROWS;
    float sums[PASSES][VALUES] = {};
    int place = rank_in_cluster() * ROWS;
    u32 rows = group.row(p, place + lane);
    bool last;
#pragma unroll 1
    do {  // at least once, though a block may have no row of a short group
        const int live = group.height - place;
        Held x;
        read(x, p, group, rows, live);
        last = live <= turn;
        rows = group.row(p, place + turn + lane);  // of the next turn: it comes beside x
        add(sums, x);
        if (last) show(sums[0], shared);  // before the last rows are written: to arrive waits for what has been
        if constexpr (FP8) find_scales(x, shared, group.scales + place, live);
        write(x, p, group, shared, place, live);
        place += turn;
    } while (!last);
    write_means(sums, p, list, group.height, shared);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    pack_rows(const __grid_constant__ Problem p) {
    __shared__ Shared shared;
    for (int list = blockIdx.x / CLUSTER; list < p.tiles; list += gridDim.x / CLUSTER) pack_group(p, list, shared);
}
