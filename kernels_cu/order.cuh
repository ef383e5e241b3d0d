// order.cuh: floats as integers of the same order.
#include "types.cuh"

// NaN sinks below -inf, and -0 equals +0.
__device__ __forceinline__ u32 ordered(float x) {
    if (x != x) return 0;
    const u32 u = __float_as_uint(x + 0.0f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Orders tokens by logit, the lower index first among equals; 0 for one of probability zero.
__device__ __forceinline__ u64 key_of(float logit, int index) {
    const u32 order = ordered(logit);
    return order > ordered(-INF) ? (u64)order << 32 | ~(u32)index : 0;
}

__device__ __forceinline__ int index_of(u64 key) { return (int)~(u32)key; }

// The largest key over the lanes of a warp.
__device__ __forceinline__ u64 warp_max(u64 x) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) {
        const u64 other = __shfl_xor_sync(FULL_MASK, x, lane);
        x = x > other ? x : other;
    }
    return x;
}
