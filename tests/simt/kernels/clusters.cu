// clusters.cu: blocks of a cluster read each other's shared memory.
//
// Arrays, row-major (B blocks, x first):
//   sum_ranks   in const [B, 64] int32 -> out [B, 64]: the sum over the cluster of rank + 1 times
//               the thread's number, plus that times the opposite thread's
//   pass_on     x [B, 64] int32, in place: what the block `rounds` ranks further in the cluster had
// Launch:   grid (any), block (64), cluster (sizes, up to 8 blocks); sum_ranks with 256 bytes of
//           dynamic shared memory
// Order:    no atomics, exact
#include "ptx.cuh"

__device__ __forceinline__ int block_number() {
    return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

__device__ __forceinline__ int rank_in_cluster(int x, int y, int z) {
    return blockIdx.x % x + x * (blockIdx.y % y + y * (blockIdx.z % z));
}

extern "C" __global__ void sum_ranks(int* out, const int* in, int x, int y, int z) {
    __shared__ int fixed[64];
    extern __shared__ int asked[];
    const int t = threadIdx.x, weight = rank_in_cluster(x, y, z) + 1;
    const int own = weight * in[block_number() * 64 + t];
    fixed[t] = own;
    asked[63 - t] = weight * own;
    cluster_arrive();
    cluster_wait();
    int sum = 0;
    for (int rank = 0; rank < x * y * z; rank++) {
        sum += map_shared_rank(fixed, rank)[t] + *map_shared_rank(asked + t, rank);
    }
    out[block_number() * 64 + t] = sum;
    cluster_arrive();
    cluster_wait();
}

// One barrier a round: a buffer is written again when all have read the other one.
extern "C" __global__ void pass_on(int* x, int size, int rounds) {
    __shared__ int buffers[2][64];
    const int t = threadIdx.x, next = (blockIdx.x % size + 1) % size;
    int mine = x[block_number() * 64 + t];
    for (int round = 0; round < rounds; round++) {
        buffers[round % 2][t] = mine;
        cluster_arrive();
        x[block_number() * 64 + t] = -1;  // work of its own between the halves
        cluster_wait();
        mine = map_shared_rank(buffers[round % 2], next)[t];
    }
    x[block_number() * 64 + t] = mine;
    cluster_arrive();
    if (t < WARP) cluster_wait();  // one warp keeps the block alive
}
