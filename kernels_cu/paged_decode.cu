// paged_decode.cu: attention of the last queries of each sequence over its paged keys and values,
// on CUDA cores: any kind, head size and SM.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/paged_decode.py):
//   out                     [B, T, HQ, D] Q_T
//   lse                     [B, T, HQ] float, log-sum-exp; may be null
//   workspace               COUNTERS floats that are left alone, then [B, T, HQ, splits, D + 2]: a
//                           split's weighted sum of values, maximum (base 2) and weight sum; touched
//                           where splits > 1 alone
//   q                const  [B, T, HQ, D] Q_T, strides of B and T in elements
//   k_pool, v_pool   const  [N, P, H, D] in any order, strides of page, token and head in array
//                           elements: K_T, V_T
//   k_scales,        const  [N, P, H], likewise, stride 0 where they are shared; SCALE_T
//   v_scales
//   page_table       const  [B, M] int32, read where the sequence has visible keys alone
//   lengths          const  [B] int32, clamped to 0 .. capacity
//   alibi_slopes,    const  [HQ] float, with ALIBI and SINKS; tree const [B, T] u64 with TREE
//   sinks
//   key_positions    const  [B, C] int32 with POSITIONS: ascending positions of keys, for windows and
//                           ALiBi; C = M * P
// Scalars:  causal_offset = T - 1 where query t sees the keys up to its own, 0 where all see all of
//           them; capacity = M * P; window = number of last keys seen, INT_MAX for all; split_keys
//           = keys of a split, 0 where `splits` share those that are visible; score_scale = scale *
//           log2(e), or with LOGITS_SOFT_CAP scale / cap; cap = cap * log2(e); lse_unit = ln 2 for
//           natural logarithms, 1 for those of base 2
// Defines:  HEAD_DIM, a multiple of 8 up to 512; QUERY_ROWS = query rows (heads of a group, times queries)
//           a block serves, 1 to 4, above 256 elements 1 or 2; Q_T = float, f16 or bf16; K_T, V_T =
//           float, f16, bf16, i8, i4, e4m3 or e5m2; SCALE_T = f16 or float; LOGITS_SOFT_CAP, ALIBI,
//           SINKS, TREE, POSITIONS = 0 or 1; BLOCK = threads; COUNTERS = words that the tensor-core kernel keeps in
//           front of a workspace
// Launch:   paged_decode: grid (B * H * ceil(G * T / QUERY_ROWS) * splits), block (BLOCK)
//           paged_decode_merge: grid (B * T * HQ), block (BLOCK), where splits > 1
// Traffic:  K and V once for each tile of QUERY_ROWS query rows of a KV head, of which the later ones hit
//           the L2 cache; 8 * (D + 2) bytes a query row and split
// Order:    no atomics; float accumulation in an order set by the sizes and the number of splits,
//           with split_keys by the sequence alone
#include "paged_decode.cuh"
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 3)
paged_decode(Q_T* __restrict__ out, float* __restrict__ lse, float* __restrict__ workspace,
             const Q_T* __restrict__ q, const K_T* __restrict__ k_pool,
             const V_T* __restrict__ v_pool, const SCALE_T* __restrict__ k_scales,
             const SCALE_T* __restrict__ v_scales, const int* __restrict__ page_table,
             const int* __restrict__ lengths, const float* __restrict__ alibi_slopes,
             const float* __restrict__ sinks, const u64* __restrict__ tree,
             const int* __restrict__ key_positions, i64 q_stride, i64 q_token_stride,
             i64 k_pool_page, i64 k_pool_token, i64 k_pool_head, i64 v_pool_page, i64 v_pool_token,
             i64 v_pool_head, i64 k_scales_page, i64 k_scales_token, i64 k_scales_head,
             i64 v_scales_page, i64 v_scales_token, i64 v_scales_head, int T, int causal_offset,
             int HQ, int H, int P, int M, int capacity, int window, int split_keys, int splits,
             float score_scale, float cap, float lse_unit) {
    __shared__ AttendShared shared;
    let_next_start();
    const Attend p{out, lse, workspace, q, k_pool, v_pool, k_scales, v_scales, page_table,
                   lengths, alibi_slopes, sinks, tree, key_positions, q_stride, q_token_stride,
                   k_pool_page, k_pool_token, k_pool_head, v_pool_page, v_pool_token, v_pool_head,
                   k_scales_page, k_scales_token, k_scales_head, v_scales_page, v_scales_token,
                   v_scales_head, T, causal_offset, HQ, H, P, M, capacity, window, split_keys,
                   splits, score_scale, cap, lse_unit};
    const KeyShare share = share_of(p, blockIdx.x);
    attend_split(shared, p, share, [&] { return stored_queries(p, share); });
}

extern "C" __global__ void __launch_bounds__(THREADS)
paged_decode_merge(Q_T* __restrict__ out, float* __restrict__ lse, float* __restrict__ workspace,
                   const float* __restrict__ sinks, int HQ, int splits, float lse_unit) {
    Attend p{out, lse, workspace};
    p.sinks = sinks;
    p.HQ = HQ;
    p.splits = splits;
    p.lse_unit = lse_unit;
    merge_splits(p, blockIdx.x);
}
