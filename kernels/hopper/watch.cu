// Whether a cache of fp32 holds what can be built on, for sm_90a: sets `broken` where the first columns of any row hold nan or
// inf. Compiled at run time behind what watching.py writes:
//   THREADS  of a block, each with 4 neighbouring values at a time

struct Problem {
    const float4 *cache;  // [rows, width]
    unsigned char *broken;
    long long pieces;      // of 4 values, that are looked at
    int columns, width;    // pieces of a row that are looked at; and that there are
};

extern "C" __global__ void __launch_bounds__(THREADS) watch(const __grid_constant__ Problem p) {
    const float inf = __int_as_float(0x7F800000);
    bool finite = true;
    for (long long i = blockIdx.x * THREADS + threadIdx.x; i < p.pieces; i += gridDim.x * THREADS) {
        const float4 x = p.cache[i / p.columns * p.width + i % p.columns];
        finite &= fabsf(x.x) < inf && fabsf(x.y) < inf && fabsf(x.z) < inf && fabsf(x.w) < inf;  // false for nan
    }
    if (!finite) *p.broken = 1;
}
