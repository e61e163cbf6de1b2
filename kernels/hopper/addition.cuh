// What is left to do with a tile of the second product of an MLP: a consumer's part of it, HIGH rows by WIDE columns, is added to the
// result kept, 4 values a lane at a time. It is put aside row by row, 2 bytes a value, the 16 byte pieces of a row swizzled by row.
template <class Problem, int HIGH, int WIDE>
struct Addition {
    static constexpr int PIECES = WIDE / 4;             // of 4 values, in a row
    static constexpr int TIMES = HIGH * PIECES / 128;
    static constexpr int AT_ONCE = 8;                   // after the last tile: else each piece would wait for memory
    static_assert(TIMES % AT_ONCE == 0 && AT_ONCE * KEPT <= BUFFERS * STAGE, "");
    const Problem &p;
    u32 aside, table;      // the table has a row of the result for each of the part's, or -1
    int next;              // piece of the lane
    int column;            // of the result, the part's first
    i64 at;                // of the result, or -1
    Kept kept;

    __device__ __forceinline__ Addition(const Problem &p, const Shared &shared, int number)
        : p(p), kept(shared.kept), aside(shared.aside + number * ASIDE), table(shared.tables + number * (HIGH * 4)) {}

    // Where 16 bytes of a row lie that is put aside
    __device__ __forceinline__ u32 place(int row, int piece) const { return aside + row * (WIDE * 2) + (piece ^ row & 7) * 16; }

    // first: row of the tile's group, in the order of groups, that is the part's first
    __device__ __forceinline__ void begin(const Place &tile, int first, int column) {
        this->column = column;
        for (int row = threadIdx.x % 128; row < HIGH; row += 128) {
            const int of = first + row;
            const bool there = of < p.rows && column < p.width;
            put(table + row * 4, (u32)(there ? (p.order ? p.order[of] : of) + tile.batch * p.rows : -1));
        }
        next = threadIdx.x % 128;
    }

    __device__ __forceinline__ void fetch(int slot = 0) {
        at = -1;
        if (next >= HIGH * PIECES) return;
        const int row = (int)taken(table + next / PIECES * 4);
        if (row < 0) return;
        at = (i64)row * p.width + column + next % PIECES * 4;
        kept.fetch(p.out + at, slot);
    }

    __device__ __forceinline__ void add(int slot = 0) const {
        if (at < 0) return;
        const u64 d = taken8(place(next / PIECES, next % PIECES / 2) + next % 2 * 8);
        const uint4 old = kept.taken(slot);
        const float4 x = {__uint_as_float(old.x) + low((u32)d), __uint_as_float(old.y) + high((u32)d),
                          __uint_as_float(old.z) + low((u32)(d >> 32)), __uint_as_float(old.w) + high((u32)(d >> 32))};
        *(float4 *)(p.out + at) = x;
        store(p.result + at * 2, uint2{pack(x.x, x.y), pack(x.z, x.w)});
    }

    __device__ __forceinline__ void run() {
        wait_for_kept();
        add();
        next += 128;
        fetch();
    }

    // All of the last tile
    __device__ __forceinline__ void run_all(const Shared &shared) {
        kept = ring_for_kept(shared);
        for (int time = 0; time < TIMES; time += AT_ONCE) {
            i64 places[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++, next += 128) {
                fetch(i);
                places[i] = at;
            }
            next -= AT_ONCE * 128;
            wait_for_kept();
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++, next += 128) {
                at = places[i];
                add(i);
            }
        }
    }
};
