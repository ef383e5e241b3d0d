// parts.cuh: sums of blocks that have a part of I each.
#include "ptx.cuh"

// A lane's `sums` of all parts of a tile, in order, where this block is the last of them; else
// false. Block (tile, part) of the grid has part `blockIdx.y`; `partial` holds the sums of all,
// `counters` a zero for each tile, which is zero again afterwards.
template <int N>
__device__ __forceinline__ bool add_parts(float (&sums)[N], float* partial, u32* counters,
                                          int& is_last) {
    const int tile = blockIdx.x, parts = gridDim.y;
    const i64 of_part = (i64)gridDim.x * N * BLOCK;
    float* const own = partial + (i64)tile * N * BLOCK + threadIdx.x;
#pragma unroll
    for (int i = 0; i < N; i++) own[blockIdx.y * of_part + i * BLOCK] = sums[i];
    __syncthreads();
    if (threadIdx.x == 0) {  // releases what the block stored, acquires what the others did
        is_last = atomic_inc_acq_rel(counters + tile, parts - 1) == parts - 1;
    }
    __syncthreads();
    if (!is_last) return false;
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = 0.0f;
    for (int p = 0; p < parts; p++) {
#pragma unroll
        for (int i = 0; i < N; i++) sums[i] += own[p * of_part + i * BLOCK];
    }
    return true;
}
