// head_row.cuh: heads that lanes hold as floats, piece by piece as in pool_row.cuh: rotation of
// pairs, Hadamard rotation of all elements.
#include "pool_row.cuh"

#define HALF 0
#define ADJACENT 1
#if !defined(PAIRS) || !defined(PAIRING)
#error "head_row.cuh needs PAIRS and PAIRING"
#endif
static_assert(2 * PAIRS <= D, "pairs of one head");

// Whether both elements of every pair lie in one lane; adjacent ones do.
constexpr bool IN_LANE = PAIRING == ADJACENT || (PIECES == 2 && PAIRS == LANES * 8);

struct Rotation { float cosine, sine; };

__device__ __forceinline__ void rotate(float& a, float& b, Rotation by) {
    const float first = a * by.cosine - b * by.sine;
    b = a * by.sine + b * by.cosine;
    a = first;
}

// Rotates pair j by rotations[j]. Where a pair lies in two lanes, they exchange elements in `row`.
__device__ __forceinline__ void rotate_pairs(float (&x)[PIECES][8], const Rotation* rotations,
                                             float* row) {
    if constexpr (PAIRING == ADJACENT) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int pair = column(i) / 2;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (pair + j < PAIRS) rotate(x[i][2 * j], x[i][2 * j + 1], rotations[pair + j]);
            }
        }
    } else if constexpr (IN_LANE) {
#pragma unroll
        for (int j = 0; j < 8; j++) rotate(x[0][j], x[1][j], rotations[column(0) + j]);
    } else {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (column(i) < D) store8(row + column(i), x[i]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int at = column(i) + j;
                if (at >= 2 * PAIRS) continue;
                const bool is_first = at < PAIRS;
                float other = row[is_first ? at + PAIRS : at - PAIRS];
                const Rotation by = rotations[is_first ? at : at - PAIRS];
                if (is_first) rotate(x[i][j], other, by); else rotate(other, x[i][j], by);
            }
        }
    }
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
}

// Hadamard rotation of every SIZE elements, SIZE the largest power of two that divides D: it
// spreads an outlier over SIZE elements, so that the row's scale no longer follows it. Fast
// transform: for each bit of the column, two elements that differ in it become their sum and
// difference. The lowest three bits are the element of a piece, the next the lane, the last the
// piece. Lanes past D exchange zeros.
__device__ __forceinline__ void hadamard_transform(float (&x)[PIECES][8]) {
    constexpr int SIZE = D & -D;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if ((j & bit) == 0) butterfly(x[i][j], x[i][j | bit]);
            }
        }
    }
#pragma unroll
    for (int lane = 1; lane < LANES && lane * 8 < SIZE; lane *= 2) {
        const bool is_second = threadIdx.x & lane;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float other = __shfl_xor_sync(FULL_MASK, x[i][j], lane);
                x[i][j] = other + (is_second ? -x[i][j] : x[i][j]);
            }
        }
    }
#pragma unroll
    for (int piece = 1; piece * LANES * 8 < SIZE; piece *= 2) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (i & piece) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) butterfly(x[i][j], x[i | piece][j]);
        }
    }
    const float scale = 1.0f / sqrtf((float)SIZE);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) x[i][j] *= scale;
    }
}
