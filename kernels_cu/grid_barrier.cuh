// grid_barrier.cuh: blocks of a cooperative launch that wait for each other, from sm_70 on.
//
// `counters` are two words, zero before a launch and behind it. The first counts arrivals: all blocks
// have arrived n times when it has reached n times their number. Between arriving and waiting a block
// may do what needs nothing of the others, such as loading weights.
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 700

// All threads call it, behind a barrier of the block. Whoever has waited sees what they wrote before
// that.
__device__ __forceinline__ void grid_arrive(u32* counters) {
    if (threadIdx.x == 0) add_release(counters, 1);
}

// All threads call it, until all blocks have arrived so often.
__device__ __forceinline__ void grid_wait(const u32* counters, u32 arrivals) {
    if (threadIdx.x == 0) {
        while (load_acquire(counters) < arrivals * gridDim.x) {
        }
    }
    __syncthreads();
}

// All threads call it, behind their last wait: the block that leaves last sets the counters back.
__device__ __forceinline__ void grid_leave(u32* counters) {
    if (threadIdx.x == 0 && atomic_inc_acq_rel(counters + 1, gridDim.x - 1) == gridDim.x - 1) {
        counters[0] = 0;
    }
}

#endif
