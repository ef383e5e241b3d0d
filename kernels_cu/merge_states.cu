// merge_states.cu: one attention from several, each over keys of its own.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/merge_states.py):
//   out             [R, D]     X_T; R = T * HQ
//   out_lse         [R] float  log-sum-exp over all keys; may be null
//   values   const  [S, R, D]  X_T, stride of S in elements
//   lse      const  [S, R] float, stride of S in elements; an infinity: no keys, and values that do
//                   not count
// Scalars:  to_binary = log2 of the base of the logarithms, from_binary = its inverse
// Defines:  X_T = float, f16 or bf16; HEAD_DIM, a multiple of 8; BLOCK = threads
// Launch:   grid (ceil(R * D / 4 / BLOCK)), block (BLOCK); a thread makes four elements
// Traffic:  (S + 1) * R * (D * sizeof(X_T) + 4) bytes; logarithms hit the L1 cache after the first
// Order:    no atomics; sums in the order of the states
#include "softmax.cuh"
#include "vector.cuh"

#if !defined(X_T) || !defined(HEAD_DIM) || !defined(BLOCK)
#error "merge_states.cu needs X_T, HEAD_DIM and BLOCK"
#endif
static_assert(HEAD_DIM % 8 == 0, "threads take four elements");

constexpr int D = HEAD_DIM;

// Plus infinity is FlashAttention's for a row without keys.
__device__ __forceinline__ float known(float lse) { return lse == INF ? -INF : lse; }

extern "C" __global__ void __launch_bounds__(BLOCK)
merge_states(X_T* __restrict__ out, float* __restrict__ out_lse, const X_T* __restrict__ values,
             const float* __restrict__ lse, i64 values_stride, i64 lse_stride, int S, i64 R,
             float to_binary, float from_binary) {
    const i64 item = (i64)blockIdx.x * BLOCK + threadIdx.x;
    const i64 row = item / (D / 4);
    const int d = (int)(item % (D / 4)) * 4;
    if (row >= R) return;

    float peak = -INF;
#pragma unroll 4
    for (int s = 0; s < S; s++) peak = fmaxf(peak, known(lse[s * lse_stride + row]));
    const float base = finite_base(peak);
    float sum = 0.0f, x[4] = {};
#pragma unroll 4
    for (int s = 0; s < S; s++) {
        const float weight = exp2f((known(lse[s * lse_stride + row]) - base) * to_binary);
        float value[4];
        load4(value, values + s * values_stride + row * D + d);
        sum += weight;
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] += weight == 0.0f ? 0.0f : weight * value[i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = sum == 0.0f ? 0.0f : x[i] / sum;
    store4(out + row * D + d, x);
    if (out_lse && d == 0) out_lse[row] = sum == 0.0f ? -INF : peak + log2f(sum) * from_binary;
}
