// block_rows.cu: the values of rows of a GGUF matrix, from its blocks.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/block_rows.py):
//   out         [T, I] X_T
//   w    const  [O, W] u8  rows of planes of KIND (pykv/planes.py), W bytes each, 16-byte aligned
//   ids  const  [T] int32, or null, which stands for 0 .. T-1; rows of w, outside 0 .. O-1: a row of
//               zeros
// Defines:  KIND = Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS or
//           MXFP4; X_T = float, f16 or bf16; BLOCK = threads
// Launch:   grid (T, ceil(I / 4 / BLOCK)), block (BLOCK); the next kernel may start early
// Traffic:  T * W + T * I * sizeof(X_T) bytes
// Order:    products and the sum rounded to float each, as the gguf package does, then the product
//           with scale, then once more to X_T
#include "block_rows.cuh"
#include "ptx.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(BLOCK)
#error "block_rows.cu needs KIND, X_T and BLOCK"
#endif

// A thread writes a quad.
extern "C" __global__ void __launch_bounds__(BLOCK)
block_rows(X_T* __restrict__ out, const u8* __restrict__ w, const int* __restrict__ ids, int O,
           int I, int W, float scale) {
    let_next_start();
    const int i = (blockIdx.y * BLOCK + threadIdx.x) * 4;
    if (i >= I) return;
    const int id = ids ? ids[blockIdx.x] : blockIdx.x;
    float values[4] = {};
    if (id >= 0 && id < O) {
        RowQuad<KIND>::load(values, w + (i64)id * W, i, I);
#pragma unroll
        for (int b = 0; b < 4; b++) values[b] = __fmul_rn(values[b], scale);
    }
    store4(out + (i64)blockIdx.x * I + i, values);
}
