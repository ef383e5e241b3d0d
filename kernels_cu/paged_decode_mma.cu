// paged_decode_mma.cu: paged_decode on tensor cores, from sm_75 on; bf16 pools from sm_80 on.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/paged_decode.py; T queries of
// each sequence, the last ones of its keys):
//   out                        [B, T, HQ, D] Q_T
//   lse                        [B, T, HQ] float  log-sum-exp; may be null
//   workspace                  COUNTERS u32, 0 before and after; sums of values [S, TILES, R, D]
//                              float; (maximum, sum of weights) [S, TILES, R] float2. TILES =
//                              H * ceil(G * T / 8), R = min(G * T, 8) rows of a tile
//   q                   const  [B, T, HQ, D] Q_T, strides of B and T in elements
//   k_pool, v_pool      const  [N, P, H, D] in any order, strides of page, token and head in array
//                              elements: K_T, V_T
//   k_scales, v_scales  const  [N, P, H], likewise, stride 0 where they are shared; SCALE_T
//   page_table          const  [B, M] int32, read where the sequence has visible keys alone
//   lengths             const  [B] int32, clamped to 0 .. capacity
//   alibi_slopes, sinks const  [HQ] float, with ALIBI and SINKS; tree const [B, T] u64 with TREE
// Scalars:  causal_offset = T - 1 where query t sees the keys up to its own, 0 where all see all of
//           them; capacity = M * P; window = number of last keys seen, INT_MAX for all; piece_tiles
//           = tiles of a piece, 0 where blocks cut the keys among them; num_slots = S of the workspace;
//           score_scale = scale * log2(e), or with LOGITS_SOFT_CAP scale / cap; cap = cap * log2(e);
//           lse_unit = ln 2 for natural logarithms, 1 for those of base 2
// Defines:  HEAD_DIM, a multiple of 16 up to 256 for which a lane's fragment of a row is made of
//           whole words; PAGE = P; Q_T = float, f16 or bf16; K_T, V_T = f16, bf16, i8, i4, e4m3 or
//           e5m2; SCALE_T = f16 or float; LOGITS_SOFT_CAP, ALIBI, SINKS, TREE = 0 or 1; ROW_SCALES = 0
//           where all tokens share a head's scales, else 1; ALONE = 1 for B = 1 and piece_tiles =
//           0, else 0; CLUSTER = 8, with ALONE from sm_90 on, or 1. Sizes that
//           pykv/ops/paged_decode_mma.py chooses for the SM: BLOCK = threads, BLOCKS an SM, ROWS =
//           8 of a tile, KEYS of a unit, MIN_KEYS of a range, COUNTERS, and of each warp STAGE_BYTES
//           and Q_BYTES of shared memory, and STATE_PITCH floats from a row's state to the next
// Launch:   grid (ceil(G * T / ROWS), H, ranges), at most COUNTERS blocks where ranges > 1; with
//           CLUSTER = 8 as many ranges, in clusters (1, 1, 8), and no workspace; block (BLOCK);
//           WARPS * (STAGE_BYTES + Q_BYTES + R * (4 * STATE_PITCH + 8)) bytes of dynamic shared
//           memory; but below sm_80, for D up to 128, WARPS * max(STAGE_BYTES, R * (4 *
//           STATE_PITCH + 8))
// Traffic:  K and V once for each tile of 8 query rows of a KV head, scales and page table; two
//           states of R * (D + 2) floats a block, written and read
// Stack: 80 bytes, from sm_80 on outside the loop over keys: of rows of 256 elements, whose sums
//           alone fill half of the registers, and there of codes with 16-bit queries, of which an SM
//           runs three blocks
// Order:    a counter decides which block merges a row, always in the order of its keys: same bits
//           for the same lengths and grid; with piece_tiles for any batch and grid
//
// A tile is up to eight query rows (heads of a group, times queries) of one KV head. The blocks of
// a tile partition the keys of all sequences, laid end to end, evenly: each derives its range from
// the lengths. Within a range a warp takes every fourth tile of KEYS keys. Rows 0 to 7 of the
// matrix A of an mma are the query rows, or their probabilities, rounded; rows 8 to 15 are the
// remainders of rounding, so that products are as precise as those of floats. Keys and elements of
// a head may come in any order, as long as A has the same: so lanes load their fragments of B as
// they lie, without ldmatrix, and each warp has stages of its own. Warps synchronise at the end of
// a piece only.
#include "decode_range.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
paged_decode_mma(Q_T* __restrict__ out, float* __restrict__ lse, float* workspace,
                 const Q_T* __restrict__ q, const K_T* __restrict__ k_pool,
                 const V_T* __restrict__ v_pool, const SCALE_T* __restrict__ k_scales,
                 const SCALE_T* __restrict__ v_scales, const int* __restrict__ page_table,
                 const int* __restrict__ lengths, const float* __restrict__ alibi_slopes,
                 const float* __restrict__ sinks, const u64* __restrict__ tree, i64 q_stride,
                 i64 q_token_stride, i64 k_pool_head, i64 v_pool_head, i64 k_scales_head,
                 i64 v_scales_head, int k_pool_page, int k_pool_token, int v_pool_page,
                 int v_pool_token, int k_scales_page, int k_scales_token, int v_scales_page,
                 int v_scales_token, int B, int T, int causal_offset, int G, int M, int capacity,
                 int window, int piece_tiles, int num_slots, float score_scale, float cap,
                 float lse_unit) {
#if __CUDA_ARCH__ >= 750
    __shared__ int is_last;
    decode_range(Decode{out, lse, workspace, q, k_pool, v_pool, k_scales, v_scales, page_table,
                        lengths, alibi_slopes, sinks, tree, q_stride, q_token_stride, k_pool_head,
                        v_pool_head, k_scales_head, v_scales_head, k_pool_page, k_pool_token,
                        v_pool_page, v_pool_token, k_scales_page, k_scales_token, v_scales_page,
                        v_scales_token, B, T, causal_offset, G, M, capacity, window, piece_tiles,
                        num_slots, score_scale, cap, lse_unit},
                 is_last, StoredQueries{});
#endif
}
