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
// Defines:  HEAD_DIM, a multiple of 8 up to 512; ROWS = query rows (heads of a group, times queries)
//           a block serves, 1 to 4, above 256 elements 1 or 2; Q_T = float, f16 or bf16; K_T, V_T =
//           float, f16, bf16, i8, i4, e4m3 or e5m2; SCALE_T = f16 or float; LOGITS_SOFT_CAP, ALIBI,
//           SINKS, TREE, POSITIONS = 0 or 1; BLOCK = threads; COUNTERS = words that the tensor-core kernel keeps in
//           front of a workspace
// Launch:   paged_decode: grid (B * H * ceil(G * T / ROWS) * splits), block (BLOCK)
//           paged_decode_merge: grid (B * T * HQ), block (BLOCK), where splits > 1
// Traffic:  K and V once for each tile of ROWS query rows of a KV head, of which the later ones hit
//           the L2 cache; 8 * (D + 2) bytes a query row and split
// Order:    no atomics; float accumulation in an order set by the sizes and the number of splits,
//           with split_keys by the sequence alone
//
// LANES lanes hold one key, eight elements each (above 256 twice eight), and the state of an online
// softmax in registers: running maximum m (base 2), weight sum l, unscaled output acc. The block's
// SLOTS lane groups take keys in turn; their states are merged at the end, over lanes, warps, then
// splits.
#include "attention_rows.cuh"
#include "batch.cuh"
#include "softmax.cuh"

#if !defined(V_T) || !defined(ROWS) || !defined(COUNTERS)
#error "paged_decode.cu needs V_T, ROWS and COUNTERS"
#endif
static_assert(ROWS >= 1 && ROWS <= (HEAD_DIM > 256 ? 2 : 4), "q and acc stay in registers");

constexpr int AHEAD = EIGHTS == 2 ? 2 : 4;    // keys a lane group loads at once; more would spill
constexpr bool K_HAS_CODES = LARGEST<K_T> > 0.0f, V_HAS_CODES = LARGEST<V_T> > 0.0f;

// Adds a row's sink to its maximum and weight sum; `rescale` is the factor of its other sums.
__device__ __forceinline__ void add_sink(float& m, float& l, float& rescale, const float* sinks,
                                         int head) {
    rescale = 1.0f;
    if (!SINKS) return;
    const float sink = sinks[head] * LOG2_E, peak = fmaxf(m, sink);
    rescale = exp2f(m - finite_base(peak));
    l = l * rescale + exp2f(sink - finite_base(peak));
    m = peak;
}

// Merges the states of a warp's lane groups for one row; returns the maximum of all.
__device__ __forceinline__ float merge_lane_groups(float (&acc)[EIGHTS][8], float& l, float m) {
    const float peak = group_max<WARP, LANES>(m);
    const float rescale = exp2f(m - finite_base(peak));
    l = group_sum<WARP, LANES>(l * rescale);
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
        for (int i = 0; i < 8; i++) acc[e][i] = group_sum<WARP, LANES>(acc[e][i] * rescale);
    }
    return peak;
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
paged_decode(Q_T* __restrict__ out, float* __restrict__ lse, float* __restrict__ workspace,
             const Q_T* __restrict__ q, const K_T* __restrict__ k_pool,
             const V_T* __restrict__ v_pool, const SCALE_T* __restrict__ k_scales,
             const SCALE_T* __restrict__ v_scales, const int* __restrict__ page_table,
             const int* __restrict__ lengths, const float* __restrict__ alibi_slopes,
             const float* __restrict__ sinks, const u64* __restrict__ tree,
             const int* __restrict__ key_positions, i64 q_stride, i64 q_token_stride, i64 k_pool_page, i64 k_pool_token, i64 k_pool_head,
             i64 v_pool_page, i64 v_pool_token, i64 v_pool_head, i64 k_scales_page,
             i64 k_scales_token, i64 k_scales_head, i64 v_scales_page, i64 v_scales_token,
             i64 v_scales_head, int T, int causal_offset, int HQ, int H, int P, int M, int capacity,
             int window, int split_keys, int splits, float score_scale, float cap, float lse_unit) {
    __shared__ __align__(16) float warp_acc[WARPS][ROWS][D];
    __shared__ float warp_m[WARPS][ROWS], warp_l[WARPS][ROWS];

    let_next_start();
    const int G = HQ / H;
    const int tiles = (G * T + ROWS - 1) / ROWS;
    const int split = blockIdx.x % splits, block = blockIdx.x / splits;
    const int tile = block % tiles;
    const int kv_head = block / tiles % H;
    const int b = block / tiles / H;
    const int num_rows = min(ROWS, G * T - tile * ROWS);

    // This split's share of the visible keys, in whole steps of the block.
    const int length = max(0, min(lengths[b], capacity));
    const int* const positions = key_positions + (i64)b * capacity;
    int first_key = (int)max((i64)length - causal_offset - window, (i64)0);
    if (POSITIONS && length > 0) {
        const i64 hidden = (i64)positions[max(length - 1 - causal_offset, 0)] - window;
        first_key = last_up_to(positions, length, hidden);
        first_key += positions[first_key] <= hidden;
    }
    const int steps = (length - first_key + SLOTS * AHEAD - 1) / (SLOTS * AHEAD);
    const int share = split_keys ? split_keys : (steps + splits - 1) / splits * (SLOTS * AHEAD);
    const int begin = (int)min(first_key + (i64)split * share, (i64)length);
    const int end = (int)min(begin + (i64)share, (i64)length);

    const int warp = threadIdx.x / WARP;
    const int slot = threadIdx.x / LANES;

    float query[ROWS][EIGHTS][8], acc[ROWS][EIGHTS][8] = {}, m[ROWS], l[ROWS];
    int row_position[ROWS];  // of the query in its sequence
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = tile * ROWS + min(r, num_rows - 1);
        m[r] = -INF;
        l[r] = 0.0f;
        row_position[r] = length - 1 - max(causal_offset - row / G, 0);
        if (POSITIONS && row_position[r] >= 0) row_position[r] = positions[row_position[r]];
        const Q_T* at = q + b * q_stride + row / G * q_token_stride +
                        (i64)(kv_head * G + row % G) * D;
        load_query(query[r], at, score_scale);
    }

    const K_T* const k_at = k_pool + kv_head * k_pool_head;
    const V_T* const v_at = v_pool + kv_head * v_pool_head;
    for (int step = begin; step < end; step += SLOTS * AHEAD) {
        const int key = step + slot;  // of this lane group: key, key + SLOTS, ...
        Eight<K_T> k[AHEAD][EIGHTS];
        Eight<V_T> v[AHEAD][EIGHTS];
        float k_scale[AHEAD], v_scale[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            // Lanes past the end repeat the last key: loads without branches overlap.
            const u32 position = min(key + u * SLOTS, end - 1);
            const i64 page = page_table[(i64)b * M + position / P], token = position % P;
            const K_T* k_row = k_at + page * k_pool_page + token * k_pool_token;
            const V_T* v_row = v_at + page * v_pool_page + token * v_pool_token;
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                k[u][e] = get8(k_row + safe_column(e) / PACKED<K_T>);
                v[u][e] = get8(v_row + safe_column(e) / PACKED<V_T>);
            }
            k_scale[u] = v_scale[u] = 1.0f;
            if (K_HAS_CODES) {
                k_scale[u] = to_float(k_scales[page * k_scales_page + token * k_scales_token +
                                               kv_head * k_scales_head]);
            }
            if (V_HAS_CODES) {
                v_scale[u] = to_float(v_scales[page * v_scales_page + token * v_scales_token +
                                               kv_head * v_scales_head]);
            }
        }
        float score[ROWS][AHEAD];
        u32 seen = 0;  // a bit for each score: a weight of 0 times a NaN is NaN
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            float x[EIGHTS][8];
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) unpack8(x[e], k[u][e]);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int position = key + u * SLOTS;
                const int stands = POSITIONS ? positions[min(position, end - 1)] : position;
                float product = dot(query[r], x);
                if (K_HAS_CODES) product *= k_scale[u];
                if (LOGITS_SOFT_CAP) product = tanhf(product) * cap;
                if (ALIBI) {
                    const int row = tile * ROWS + min(r, num_rows - 1);
                    const float slope = alibi_slopes[kv_head * G + row % G] * LOG2_E;
                    product += slope * (stands - row_position[r]);
                }
                bool is_visible = position < end;
                const int branch = position - (length - 1 - causal_offset);
                if (TREE && branch >= 0) {
                    const int token = min((tile * ROWS + r) / G, T - 1);
                    is_visible = is_visible && (tree[(i64)b * T + token] >> (branch & 63) & 1);
                } else if (TREE || POSITIONS || T > 1) {
                    is_visible = is_visible && (TREE || stands <= row_position[r]) &&
                                 row_position[r] - stands < window;
                }
                score[r][u] = is_visible ? product : -INF;
                seen |= (u32)is_visible << (r * AHEAD + u);
            }
        }
        float rescale[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float peak = m[r];
#pragma unroll
            for (int u = 0; u < AHEAD; u++) peak = fmaxf(peak, score[r][u]);
            const float base = finite_base(peak);
            rescale[r] = exp2f(m[r] - base);
            m[r] = peak;
            l[r] *= rescale[r];
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                score[r][u] = exp2f(score[r][u] - base);
                l[r] += score[r][u];
            }
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
                for (int i = 0; i < 8; i++) acc[r][e][i] *= rescale[r];
            }
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                float x[8];
                unpack8(x, v[u][e]);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    if (!(seen >> (r * AHEAD + u) & 1)) continue;
                    const float weight = V_HAS_CODES ? score[r][u] * v_scale[u] : score[r][u];
#pragma unroll
                    for (int i = 0; i < 8; i++) acc[r][e][i] += weight * x[i];
                }
            }
        }
    }

    // Merge the lane groups of a warp into one state in shared memory.
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float peak = merge_lane_groups(acc[r], l[r], m[r]);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            if (threadIdx.x % WARP < LANES && column(e) < D) {
                store8(&warp_acc[warp][r][column(e)], acc[r][e]);
            }
        }
        if (threadIdx.x % WARP == 0) {
            warp_m[warp][r] = peak;
            warp_l[warp][r] = l[r];
        }
    }
    __syncthreads();

    // Merge the warps, one output element per thread.
    for (int i = threadIdx.x; i < num_rows * D; i += THREADS) {
        const int r = i / D, row = tile * ROWS + r, head = kv_head * G + row % G;
        float peak = -INF, sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, warp_m[w][r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float rescale = exp2f(warp_m[w][r] - finite_base(peak));
            sum += rescale * warp_l[w][r];
            value += rescale * warp_acc[w][r][i % D];
        }
        const i64 at = ((i64)b * T + row / G) * HQ + head;
        if (splits > 1) {
            float* partial = workspace + COUNTERS + (at * splits + split) * (D + 2);
            partial[i % D] = value;
            if (i % D == 0) {
                partial[D] = peak;
                partial[D + 1] = sum;
            }
        } else {
            float rescale;
            add_sink(peak, sum, rescale, sinks, head);
            out[at * D + i % D] = from_float<Q_T>(sum == 0.0f ? 0.0f : value * rescale / sum);
            if (lse && i % D == 0) lse[at] = sum == 0.0f ? -INF : (peak + log2f(sum)) * lse_unit;
        }
    }
}

// Merges the splits of one query row.
extern "C" __global__ void __launch_bounds__(THREADS)
paged_decode_merge(Q_T* __restrict__ out, float* __restrict__ lse,
                   const float* __restrict__ workspace, const float* __restrict__ sinks, int HQ,
                   int splits, float lse_unit) {
    const i64 row = blockIdx.x;
    const float* partial = workspace + COUNTERS + row * splits * (D + 2);

    float peak = -INF;
    for (int s = 0; s < splits; s++) peak = fmaxf(peak, partial[s * (D + 2) + D]);
    const float base = finite_base(peak);
    for (int d = threadIdx.x; d < D; d += THREADS) {
        float sum = 0.0f, value = 0.0f, m = peak, rescale;
        for (int s = 0; s < splits; s++) {
            const float* p = partial + s * (D + 2);
            const float weight = exp2f(p[D] - base);
            sum += weight * p[D + 1];
            value += weight * p[d];
        }
        add_sink(m, sum, rescale, sinks, (int)(row % HQ));
        out[row * D + d] = from_float<Q_T>(sum == 0.0f ? 0.0f : value * rescale / sum);
        if (lse && d == 0) lse[row] = sum == 0.0f ? -INF : (m + log2f(sum)) * lse_unit;
    }
}
