// reduce.cuh: sums and maxima over lanes, warps and blocks; every lane gets the result.
#include "types.cuh"

// The sum over the lanes of an aligned group of WIDTH that are multiples of STEP apart.
template <int WIDTH, int STEP = 1> __device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int lane = WIDTH / 2; lane >= STEP; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
}

// Their maximum.
template <int WIDTH, int STEP = 1> __device__ __forceinline__ float group_max(float x) {
#pragma unroll
    for (int lane = WIDTH / 2; lane >= STEP; lane /= 2) {
        x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, lane));
    }
    return x;
}

__device__ __forceinline__ float warp_max(float x) { return group_max<WARP>(x); }

// N maxima at once over aligned groups of WIDTH lanes.
template <int WIDTH, int N> __device__ __forceinline__ void group_max(u32 (&x)[N]) {
#pragma unroll
    for (int lane = WIDTH / 2; lane > 0; lane /= 2) {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = max(x[i], __shfl_xor_sync(FULL_MASK, x[i], lane));
    }
}

// Lanes exchange half of their values, keep KEPT that are joined, and so on down to one: of 2 * KEPT
// values, lane l of an aligned group of as many lanes keeps in x[0] what the group's x[l % (2 * KEPT)]
// join to. A recursion, because the compiler does not unroll a loop of such loops in a large kernel,
// and x would lie on the stack.
template <int KEPT, typename T, typename Join> __device__ __forceinline__ void fold(T* x, Join join) {
    if constexpr (KEPT > 0) {
        const bool upper = threadIdx.x & KEPT;
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            const T given = upper ? x[i] : x[i + KEPT];
            const T kept = upper ? x[i + KEPT] : x[i];
            x[i] = join(kept, __shfl_xor_sync(FULL_MASK, given, KEPT));
        }
        fold<KEPT / 2>(x, join);
    }
}

template <int KEPT> __device__ __forceinline__ void fold_sums(float* x) {
    fold<KEPT>(x, [](float a, float b) { return a + b; });
}

// N sums at once, N a power of two up to 32: lane l gets the warp's sum of x[l % N], by N - 1 +
// log2(32 / N) shuffles, not 5 * N. Overwrites x.
template <int N> __device__ __forceinline__ float warp_sums(float (&x)[N]) {
    static_assert(N >= 1 && N <= WARP && (N & (N - 1)) == 0, "a power of two up to 32");
    fold_sums<N / 2>(x);
    float sum = x[0];
#pragma unroll
    for (int lane = N; lane < WARP; lane *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, lane);
    return sum;
}

// Sum of this lane's integer and those of the lanes before it.
template <typename T> __device__ __forceinline__ T warp_scan(T x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const T before = __shfl_up_sync(FULL_MASK, x, step);
        if (lane >= step) x += before;
    }
    return x;
}

// Sum over a block of THREADS threads, all of which call it. `scratch` holds THREADS / 32 floats
// and may be reused after a barrier.
template <int THREADS>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    static_assert(THREADS % WARP == 0, "whole warps");
    x = group_sum<WARP>(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / WARP; warp++) sum += scratch[warp];
    return sum;
}
