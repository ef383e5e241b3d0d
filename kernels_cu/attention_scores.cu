// attention_scores.cu: how much of the attention each key of a paged cache got.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/attention_scores.py):
//   scores               [B, H, C] float  C = M * P; sum of the weights that the query rows of a KV
//                                         head gave to a key; 0 where none sees it
//   q             const  [B, T, HQ, D]    Q_T, strides of B and T in elements
//   k_pool        const  [N, P, H, D] in any order, strides of page, token and head in array
//                        elements: K_T
//   k_scales      const  [N, P, H], likewise, stride 0 where they are shared; SCALE_T
//   page_table    const  [B, M] int32, read where the sequence has visible keys alone
//   lengths       const  [B] int32, clamped to 0 .. C
//   lse           const  [B, T, HQ] float, log-sum-exp of each query row
//   alibi_slopes  const  [HQ] float, with ALIBI; tree const [B, T] u64 with TREE
// Scalars:  causal_offset = T - 1 where query t sees the keys up to its own, 0 where all see all of
//           them; window = number of last keys seen, INT_MAX for all; accumulate = 1: the weights
//           are added to `scores`; score_scale = scale * log2(e), or with LOGITS_SOFT_CAP scale /
//           cap; cap = cap * log2(e); lse_unit = what turns lse into binary logarithms
// Defines:  HEAD_DIM, a multiple of 8 up to 512; Q_T = float, f16 or bf16; K_T = float, f16, bf16,
//           i8, i4, e4m3 or e5m2; SCALE_T = f16 or float; LOGITS_SOFT_CAP, ALIBI, TREE = 0 or 1;
//           BLOCK = threads, and KEYS of a block
// Launch:   grid (B * H * ceil(C / KEYS)), block (BLOCK)
// Traffic:  K once, later query rows hit the caches; 4 bytes a key of `scores`
// Order:    no atomics; sums in the order of the query rows
//
// KEY_LANES lanes hold one key and score it against ROWS query rows at a time.
#include "attention.cuh"
#include "attention_rows.cuh"
#include "softmax.cuh"

#ifndef KEYS
#error "attention_scores.cu needs KEYS"
#endif
constexpr int ROWS = EIGHTS == 2 ? 2 : 4;  // rows whose queries stay in registers

extern "C" __global__ void __launch_bounds__(THREADS, 4)
attention_scores(float* __restrict__ scores, const Q_T* __restrict__ q,
                 const K_T* __restrict__ k_pool, const SCALE_T* __restrict__ k_scales,
                 const int* __restrict__ page_table, const int* __restrict__ lengths,
                 const float* __restrict__ lse, const float* __restrict__ alibi_slopes,
                 const u64* __restrict__ tree, i64 q_stride, i64 q_token_stride, i64 k_pool_page,
                 i64 k_pool_token, i64 k_pool_head, i64 k_scales_page, i64 k_scales_token,
                 i64 k_scales_head, int T, int causal_offset, int HQ, int H, int P, int M,
                 int capacity, int window, int accumulate, float score_scale, float cap,
                 float lse_unit) {
    const int G = HQ / H;
    const int chunks = capacity / KEYS + (capacity % KEYS != 0);
    const int begin = blockIdx.x % chunks * KEYS;
    const int kv_head = blockIdx.x / chunks % H;
    const int b = blockIdx.x / chunks / H;
    const int length = max(0, min(lengths[b], capacity));
    const int first_key = (int)max((i64)length - causal_offset - window, (i64)0);
    const int slot = threadIdx.x / KEY_LANES;
    const bool has_seen = begin < length && begin + KEYS > first_key;

    __shared__ float sums[KEYS];  // each written by the first lane of one group
    const bool is_first = threadIdx.x % KEY_LANES == 0;
    for (int i = slot; is_first && i < KEYS; i += SLOTS) sums[i] = 0.0f;
    for (int tile = 0; has_seen && tile < G * T; tile += ROWS) {
        float query[ROWS][EIGHTS][8], row_lse[ROWS], slope[ROWS];
        int position[ROWS];
        u64 branches[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = min(tile + r, G * T - 1), token = row / G, head = kv_head * G + row % G;
            position[r] = length - 1 - max(causal_offset - token, 0);
            // A row past the last one gets no weight: nothing exceeds infinity.
            row_lse[r] = tile + r < G * T ? lse[((i64)b * T + token) * HQ + head] * lse_unit : INF;
            slope[r] = ALIBI ? alibi_slopes[head] * LOG2_E : 0.0f;
            branches[r] = TREE ? tree[(i64)b * T + token] : 0;
            const Q_T* at = q + b * q_stride + token * q_token_stride + (i64)head * D;
            load_query(query[r], at, score_scale);
        }
#pragma unroll(KEY_LANES <= 8 ? 2 : 4)
        for (int i = slot; i < KEYS; i += SLOTS) {
            const int key = begin + i;
            const u32 safe = max(first_key, min(key, length - 1));
            const i64 page = page_table[(i64)b * M + safe / P], token = safe % P;
            const K_T* row =
                k_pool + page * k_pool_page + token * k_pool_token + kv_head * k_pool_head;
            float x[EIGHTS][8];
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) load8(x[e], row + safe_column(e) / PACKED<K_T>);
            float k_scale = 1.0f, weight = 0.0f;
            if (LARGEST<K_T> > 0.0f) {
                k_scale = to_float(k_scales[page * k_scales_page + token * k_scales_token +
                                            kv_head * k_scales_head]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float score = dot(query[r], x) * k_scale;
                if (LOGITS_SOFT_CAP) score = tanhf(score) * cap;
                score += slope[r] * (key - position[r]);
                bool is_visible = key <= position[r] && position[r] - key < window;
                const int branch = key - (length - 1 - causal_offset);
                if (TREE && branch >= 0) {
                    is_visible = key < length && branches[r] >> (branch & 63) & 1;
                }
                if (is_visible && row_lse[r] != -INF) weight += weight_of(score - row_lse[r]);
            }
            if (is_first) sums[i] += weight;
        }
    }
    __syncthreads();
    float* const row = scores + ((i64)b * H + kv_head) * capacity + begin;
    for (int i = threadIdx.x; i < min(KEYS, capacity - begin); i += THREADS) {
        row[i] = accumulate ? row[i] + sums[i] : sums[i];
    }
}
