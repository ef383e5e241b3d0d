// throughput.cu: chains of arithmetic without memory, the ceilings of what computes.
//
// Arrays:   x [n] float, overwritten; each element is a chain of its own
// Scalars:  n; steps of each chain; a and b of throughput_fma, which takes x to a * x + b
// Defines:  CHAINS = of a thread, independent of each other; BLOCK = threads
// Launch:   grid (ceil(n / (BLOCK * CHAINS))), block (BLOCK)
// Traffic:  8 * n bytes, next to nothing beside many steps
// Work:     throughput_fma executes n * steps fused multiply-adds of two operations each;
//           throughput_exp2 n * steps instructions of the special-function units, x to 2^-x. Chains
//           past the end of x are none of these
// Order:    chains do not meet; every step is rounded to nearest even (fma), or as ex2.approx
#include "ptx.cuh"

#if !defined(CHAINS) || !defined(BLOCK)
#error "throughput.cu needs CHAINS and BLOCK"
#endif

// Take each chain of this thread `steps` further, all of them in turn.
template <typename Step>
__device__ __forceinline__ void run_chains(float* x, i64 n, int steps, Step step) {
    const i64 first = (i64)blockIdx.x * (BLOCK * CHAINS) + threadIdx.x;
    float y[CHAINS];
#pragma unroll
    for (int c = 0; c < CHAINS; c++) y[c] = first + c * BLOCK < n ? x[first + c * BLOCK] : 0.0f;
#pragma unroll 4
    for (int i = 0; i < steps; i++) {
#pragma unroll
        for (int c = 0; c < CHAINS; c++) y[c] = step(y[c]);
    }
#pragma unroll
    for (int c = 0; c < CHAINS; c++) {
        if (first + c * BLOCK < n) x[first + c * BLOCK] = y[c];
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
throughput_fma(float* __restrict__ x, i64 n, int steps, float a, float b) {
    run_chains(x, n, steps, [=](float y) { return __fmaf_rn(y, a, b); });
}

extern "C" __global__ void __launch_bounds__(BLOCK)
throughput_exp2(float* __restrict__ x, i64 n, int steps) {
    run_chains(x, n, steps, [](float y) { return exp2_ftz(-y); });
}
