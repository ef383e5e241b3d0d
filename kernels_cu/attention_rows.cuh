// attention_rows.cuh: rows of queries and keys that KEY_LANES lanes hold, eight elements each, above
// 256 twice eight.
#include "head_dim.cuh"
#include "reduce.cuh"
#include "vector.cuh"
#include "warps.cuh"

static_assert(D % 8 == 0 && D >= 8 && D <= 512, "lanes hold eight elements");
constexpr int KEY_LANES = lanes_of_row(D);
constexpr int SLOTS = THREADS / KEY_LANES;
constexpr int EIGHTS = D > 8 * WARP ? 2 : 1;  // eights of elements that a lane has of a row

// Where one of this lane's eights begins; safe_column: one of the row where that lies past it.
__device__ __forceinline__ int key_column(int e) { return (e * KEY_LANES + threadIdx.x % KEY_LANES) * 8; }
__device__ __forceinline__ int safe_column(int e) { return key_column(e) < D ? key_column(e) : 0; }

// This lane's part of a query times `factor`, zeros past the row.
__device__ __forceinline__ void load_query(float (&query)[EIGHTS][8], const Q_T* at, float factor) {
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        load8(query[e], at + safe_column(e));
#pragma unroll
        for (int i = 0; i < 8; i++) query[e][i] = key_column(e) < D ? query[e][i] * factor : 0.0f;
    }
}

// The product of a query and a key; every lane of the group gets it.
__device__ __forceinline__ float dot(const float (&query)[EIGHTS][8],
                                     const float (&key)[EIGHTS][8]) {
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        const bool is_active = (e * KEY_LANES + KEY_LANES) * 8 <= D || key_column(e) < D;
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) part += query[e][i] * key[e][i];
        sum += is_active ? part : 0.0f;
    }
    return group_sum<KEY_LANES>(sum);
}
