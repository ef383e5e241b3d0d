// block_queries.cu: what the choice of blocks of a cache starts from, KV head by KV head.
//
// Arrays, row-major (letters as in pykv/ops/block_queries.py; R = B * H, row b * H + h):
//   vectors         [R, D] float  the mean of the queries of a KV head
//   rows            [R] int       0, 1, ...: the page table of R sequences of a page each
//   old             [R] int       blocks that can be chosen
//   budgets         [R] int       `blocks`
//   zeros           [Z] float     become zeros; may be null where Z = 0
//   q        const  [B, HQ, D]    X_T; head h has the queries h * G ... h * G + G - 1
//   lengths  const  [B] int       rows of each sequence
// Scalars:  H; G = HQ / H; recent: the last rows, in which no block can be chosen; block: rows of one;
//           blocks: how many are to be chosen
// Defines:  X_T = float, f16 or bf16; BLOCK = threads
// Launch:   grid (R), block (BLOCK)
// Traffic:  B * HQ * D * sizeof(X_T) + R * (4 * D + 12) + 4 * Z bytes
// Order:    no atomics; float sums in the order of the queries
#include "convert.cuh"

#if !defined(X_T) || !defined(BLOCK)
#error "block_queries.cu needs X_T and BLOCK"
#endif

extern "C" __global__ void __launch_bounds__(BLOCK)
block_queries(float* __restrict__ vectors, int* __restrict__ rows, int* __restrict__ old,
              int* __restrict__ budgets, float* __restrict__ zeros, const X_T* __restrict__ q,
              const int* __restrict__ lengths, int H, int G, int D, int Z, int recent, int block,
              int blocks) {
    const int r = blockIdx.x;
    const X_T* const queries = q + (i64)r * G * D;
    for (int d = threadIdx.x; d < D; d += BLOCK) {
        float sum = 0.0f;
        for (int g = 0; g < G; g++) sum += to_float(queries[(i64)g * D + d]);
        vectors[(i64)r * D + d] = sum / G;
    }
    for (i64 i = (i64)r * BLOCK + threadIdx.x; i < Z; i += (i64)gridDim.x * BLOCK) zeros[i] = 0.0f;
    if (threadIdx.x == 0) {
        rows[r] = r;
        old[r] = max((i64)lengths[r / H] - recent, (i64)0) / block;
        budgets[r] = blocks;
    }
}
