// paged_qkv.cu: split rows of Q, K and V; normalise and rotate heads of Q and K; Hadamard-rotate
// all heads; write K and V into the pages of a pool, in its kinds.
//
// Arrays (letters as in pykv/ops/paged_qkv.py); strides are counted in elements of an array:
//   q_out                      [T, HQ, D] NEW_T: strides token, head
//   k_pool, v_pool             pages of K_T, V_T, updated in place: strides page, token, head; the
//                              elements of a row are contiguous
//   k_scales, v_scales         SCALE_T, dynamic (written) or static (read), by SCALES: strides
//                              page, token, head, 0 where they have no such dimension. Null for
//                              float kinds
//   qkv                 const  [T, HQ + 2H, D] NEW_T: stride token; heads of Q, then K, then V
//   slots               const  [T] ROW_T  page * PAGE + offset; negative: K and V are not written
//   positions           const  [T] int; null where PAIRS is 0
//   inv_freq            const  [PAIRS] float  radians per position; null where PAIRS is 0
//   q_norm, k_norm      const  [D] W_T, 16-byte aligned; null where NORM is 0
// Scalars:  eps of the norm
// Defines:  NEW_T, W_T = float, f16 or bf16; K_T, V_T = those or i8, i4, e4m3, e5m2; SCALE_T = f16
//           or float; HEAD_DIM = D, a multiple of 8; Q_HEADS = HQ; HEADS = H; PAGE = tokens a page;
//           ROW_T = int or i64; SCALES = DYNAMIC or STATIC; NORM = 0 or 1, x / sqrt(mean(x^2) +
//           eps) * weight of each head; PAIRS = pairs that are rotated, 2 * PAIRS <= D; PAIRING =
//           HALF, elements (j, j + PAIRS), or ADJACENT, (2j, 2j + 1); HADAMARD = 0 or 1, heads of
//           Q, K and V times Hadamard's matrix, last; BLOCK = threads; LANES = how many of them
//           share a head, a power of two up to 32
// Launch:   grid (T, (HQ + 2H) / (BLOCK / LANES) rounded up), block (BLOCK), no dynamic shared
//           memory: a block has heads of one token, which share sines and cosines. It may start
//           early, hence no pointer is __restrict__: no load moves ahead of the wait
// Traffic:  T * ((2 * HQ + 2H) * D * sizeof(NEW_T) + H * bytes of a row of K and V with its scales)
// Order:    no atomics; floats from reading to storing, sums in an order that D decides; where
//           HADAMARD is 0, V, and all where there is neither norm nor rotation, is bit-exact; two
//           tokens for one slot leave either row, or a mixture
#include "paged_qkv.cuh"
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
paged_qkv(NEW_T* q_out, K_T* k_pool, V_T* v_pool,
          SCALE_T* k_scales, SCALE_T* v_scales,
          const NEW_T* qkv, const ROW_T* slots,
          const int* positions, const float* inv_freq,
          const W_T* q_norm, const W_T* k_norm,
          i64 k_pool_page, i64 k_pool_token, i64 k_pool_head,
          i64 v_pool_page, i64 v_pool_token, i64 v_pool_head,
          i64 k_scales_page, i64 k_scales_token, i64 k_scales_head,
          i64 v_scales_page, i64 v_scales_token, i64 v_scales_head,
          i64 q_token, i64 q_head, i64 qkv_token, float eps) {
    __shared__ AppendShared shared;
    let_next_start();
    await_previous();
    append_heads(shared,
                 Append{q_out, k_pool, v_pool, k_scales, v_scales, qkv, slots, positions, inv_freq,
                        q_norm, k_norm, k_pool_page, k_pool_token, k_pool_head, v_pool_page,
                        v_pool_token, v_pool_head, k_scales_page, k_scales_token, k_scales_head,
                        v_scales_page, v_scales_token, v_scales_head, q_token, q_head, qkv_token,
                        eps},
                 blockIdx.x, blockIdx.y);
}
