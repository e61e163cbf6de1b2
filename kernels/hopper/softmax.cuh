// The online softmax in the layout that products leave their results in: of a warp's 16 rows, a thread has columns
// 2 (lane % 4) and the next, in every 8, of rows lane / 4 and lane / 4 + 8.

constexpr float SLACK = 8.0f;  // the maximum may lag by 2^8 before results are rescaled

// Of the two rows, which a thread shares with three others.
struct Softmax {
    float top[2], total[2];  // maximum before scaling, perhaps an older one; the thread's part of the sum

    // s becomes 2^(scale (s - top)); fade: what earlier results are to be multiplied by. True where that is not 1.
    __device__ __forceinline__ bool advance(float (&s)[COLUMNS / 2], float scale, int live, float (&fade)[2]) {
        if (live < COLUMNS) {
            const int column = threadIdx.x % 4 * 2;
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++)
                if (i / 4 * 8 + column + i % 2 >= live) s[i] = none();
        }
        float shift[2];
        bool moved = false;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
            for (int i = 1; i < COLUMNS / 8; i++) most = fmaxf(most, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
            most = quad_max(most);
            const bool far = (most - top[r]) * scale > SLACK;
            fade[r] = far ? exp2_((top[r] - most) * scale) : 1.0f;
            top[r] = far ? most : top[r];
            moved |= far;
            shift[r] = top[r] * scale;
            total[r] *= fade[r];
        }
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) {
            s[i] = exp2_(fmaf(s[i], scale, -shift[i / 2 % 2]));
            total[i / 2 % 2] += s[i];
        }
        return __any_sync(~0u, moved);
    }
};

__device__ __forceinline__ void fade_result(float (&o)[WIDTH / 2], const float (&fade)[2]) {
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) o[i] *= fade[i / 2 % 2];
}

// Scores in the layout of a result are, 16 columns at a time, in that of a left operand.
__device__ __forceinline__ void pack_all(u32 (&weights)[COLUMNS / 4], const float (&s)[COLUMNS / 2]) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; i++) weights[i] = pack(s[2 * i], s[2 * i + 1]);
}
