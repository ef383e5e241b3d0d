// peaks.cuh: the largest key of a block.
#include "order.cuh"
#include "warps.cuh"

// The largest of a block's keys, for all threads. `of_warps` is in use until the next barrier.
__device__ __forceinline__ u64 block_peak(u64 key, u64* of_warps) {
    key = warp_max(key);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = key;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) key = key > of_warps[i] ? key : of_warps[i];
    return key;
}
