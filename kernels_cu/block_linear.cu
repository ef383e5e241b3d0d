// block_linear.cu: products with weights as the blocks of a GGUF file or as floats, whose rows may be
// normalised before and gated behind.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/block_linear.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to
//   x          const  [T, I]  X_T at row stride x_stride; base and rows 16-byte aligned
//   w          const  [R, W] u8  rows of planes of KIND (pykv/planes.py) or of floats, W bytes each,
//                     16-byte aligned; R = O, or with a gate 2 * O: gates, then what they open
//   bias       const  [R]     B_T, or null
//   norm       const  [I] float or null: x is x / sqrt(mean(x^2) + eps) * norm, row by row
// Scalars:  gate = 0, or 1 and 2: out = silu(a) * b and gelu(a) * b, a and b rows j and O + j of
//           w times x, plus bias; what `out` holds is added behind that
// Defines:  KIND = Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS or
//           MXFP4, or F32, F16 or BF16; X_T, B_T = float, f16 or bf16; BLOCK = threads
//           ROWS = 1, 2, 4 or 8, and OUTS, rows of w of a warp, even, with ROWS * OUTS up to 32
// Launch:   gemv    grid (up to `tiles`, ceil(T / ROWS)), tiles = ceil(R / (OUTS * BLOCK / 32 /
//                   parts)), block (BLOCK); parts a power of two up to BLOCK / 32, held >= 1.
//                   Dynamic shared memory: held * parts * ROWS * 4608 bytes; from sm_80 on, but for
//                   F32 and 8 rows of 16 bits, also BLOCK * OUTS * 4 bytes for each bit of a code, and
//                   twice that where a block has more than a round of one tile
//           gemv may start early: before the kernel ahead has ended it reads w, bias and norm alone,
//           which are __restrict__; x and out are not, so that no load of them moves ahead of the
//           wait, or goes through the read-only path
// Traffic:  gemv    R * W bytes of w for each ROWS rows of x, which stay in L2
// Order:    gemv    codes times x as integers of 24 bits, by a power of two for each 32 elements: exact,
//                   then times their scales in float. Of floats, fused, over 32 elements of a lane. The
//                   order is fixed by the launch, so two runs agree in every bit
//           norm    x times norm is multiplied; the sum times the factor of the row, whose squares
//                   are summed in float; where they leave it, 0, whatever the sum is, as in norm.cu
// Stack: 48 bytes, of blocks of 512 threads, which leave a thread 128 registers
#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(BLOCK) || !defined(ROWS) || \
    !defined(OUTS)
#error "block_linear.cu needs KIND, X_T, B_T, BLOCK, ROWS and OUTS"
#endif

#include "block_gemv.cuh"
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
gemv(X_T* out, const X_T* x, const u8* __restrict__ w,
     const B_T* __restrict__ bias, const float* __restrict__ norm, int T, int O, int I, int W,
     i64 x_stride, i64 out_stride, int parts, int held, int tiles, int accumulate, int gate, float eps) {
    extern __shared__ __align__(128) float staged[];
    __shared__ WarpSums shared;
    let_next_start();
    gemv_tiles<KIND>(staged, shared, out, StoredRows{x, x_stride}, w, bias, norm, T, O, I, W,
                     out_stride, parts, held, accumulate, gate, eps,
                     Tiles{(int)blockIdx.x, (int)gridDim.x, tiles}, blockIdx.y * ROWS,
                     [] { await_previous(); });
}
