// prefill_mma.cu: prefill on tensor cores, from sm_75 on; bf16 pools from sm_80 on.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/prefill.py):
//   out                     [T, HQ, D]     Q_T
//   lse                     [T, HQ] float  natural log of the sum of exp(score); may be null
//   q                const  [T, HQ, D]     Q_T, token stride q_stride elements
//   k_pool, v_pool   const  [N, P, H, D] in any order, strides of page, token and head in array
//                           elements, multiples of 16 bytes: K_T, V_T
//   k_scales,        const  [N, P, H], likewise, stride 0 where they are shared; SCALE_T
//   v_scales
//   page_table       const  [B, M] int32   read where the sequence has visible keys alone
//   lengths          const  [B] int32      keys, the new ones included; clamped to 0 .. capacity
//   q_starts         const  [B + 1] int32  prefix sums of the query counts
// Scalars:  causal: query i of Lq with Lk keys stands at Lk - Lq + i, sees no key after that and
//           `window` keys up to it (INT_MAX: all); else every query sees all keys, window INT_MAX.
//           score_scale = scale * log2(e), or with LOGITS_SOFT_CAP scale / cap; cap = cap * log2(e)
// Defines:  HEAD_DIM, a multiple of 16 up to 256; Q_T = float, f16 or bf16; K_T, V_T = f16, bf16, i8,
//           i4, e4m3 or e5m2; SCALE_T = f16 or float; LOGITS_SOFT_CAP = 0 or 1; BLOCK = threads, ROWS =
//           query rows of a block, 64 or 128, KEYS of a tile and SHARED_BYTES of a block, as
//           pykv/ops/prefill_mma.py chooses them for the SM
// Launch:   grid ((T * G / ROWS + B) * H), block (BLOCK), SHARED_BYTES of dynamic shared memory. It
//           may start early, hence no pointer is __restrict__
// Traffic:  every ROWS rows read the keys they see; a sequence's K and V mostly hit the L2 cache
// Stack: 96 bytes, of rows of 128 elements or more, whose sums and scores take most registers
// Order:    no atomics; float accumulation in key order
//
// The queries of the G heads of one KV head are rows of one matrix, row = token * G + head, so that
// each key serves them all. A block holds ROWS rows, each warp 16 * ROW_TILES of them throughout,
// and walks tiles of KEYS keys: scores, online softmax, weights times values. The next tile is
// copied meanwhile: floats into a second stage, codes into a raw stage, from which the block
// dequantizes them once for all warps when the tile is free. Scales of keys multiply scores, scales
// of values weights. The remainder of rounding an operand of mma is kept in further terms where
// queries are more precise, so that products are as precise as those of floats.
#if !defined(V_T) || !defined(ROWS) || !defined(KEYS) || !defined(SHARED_BYTES)
#error "prefill_mma.cu needs V_T, ROWS, KEYS and SHARED_BYTES"
#endif

#include "attention.cuh"
#include "batch.cuh"
#include "prefill_config.cuh"
#include "prefill_operands.cuh"
#include "prefill_stage.cuh"
#include "prefill_steps.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "softmax.cuh"

// Above 200 lines, because the compiler orders instructions another way where the products of keys
// or of values are functions of their own.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
prefill_mma(Q_T* out, float* lse, const Q_T* q, const K_T* k_pool, const V_T* v_pool,
            const SCALE_T* k_scales, const SCALE_T* v_scales, const int* page_table,
            const int* lengths, const int* q_starts, i64 q_stride, i64 k_pool_page, i64 k_pool_token,
            i64 k_pool_head, i64 v_pool_page, i64 v_pool_token, i64 v_pool_head, i64 k_scales_page,
            i64 k_scales_token, i64 k_scales_head, i64 v_scales_page, i64 v_scales_token,
            i64 v_scales_head, int B, int HQ, int H, int P, int M, int capacity, int causal,
            int window, float score_scale, float cap) {
#if __CUDA_ARCH__ >= 750
    extern __shared__ __align__(128) u8 shared[];  // see Swizzled
    let_next_start();
    await_previous();
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int g = lane / 4, t = lane % 4;  // as in the fragments of mma

    // Long rows start first, so that no block runs alone at the end.
    const int G = HQ / H;
    const int block = gridDim.x - 1 - blockIdx.x;
    const int kv_head = block % H;
    const RowBlock rows = row_block<ROWS>(q_starts, B, G, block / H);
    if (rows.num_rows <= 0) return;
    const int length = max(0, min(lengths[rows.b], capacity));

    // Row r sees the keys up to last_of(r), `window` of them.
    const int last_of_all = length - (causal ? rows.num_queries : 1);
    const auto last_of = [&](int row) {
        const int token = (rows.first_row + min(row, rows.num_rows - 1)) / G;
        return max(last_of_all + (causal ? token : 0), -1);
    };
    const auto first_of = [&](int row) { return max(last_of(row) - window + 1, 0); };
    const int begin = first_of(0), end = last_of(ROWS - 1) + 1;  // the keys that the block reads
    const int warp_row = warp * WARP_ROWS;
    const int full_begin = first_of(warp_row + WARP_ROWS - 1);  // keys that the whole warp sees
    const int full_end = warp_row < rows.num_rows ? last_of(warp_row) + 1 : 0;
    const int shared_begin = first_of(ROWS - 1), shared_end = last_of(0) + 1;  // keys that all see

    float* const tile_scales = (float*)(shared + SCALES_AT);  // scales of keys, then of values
    const bool pages_are_even = P % WARP_KEYS == 0;  // no page ends between a warp's rows

    // Page and token of this warp's row lane % WARP_KEYS in the next tile, and the scale of its
    // key, or in upper lanes of its value.
    int page = 0, token = 0;
    float next_scale = 1.0f;
    const auto find = [&](int tile) {
        const int key = tile * KEYS + warp * WARP_KEYS + lane % WARP_KEYS;
        const u32 in_range = max(begin, min(key, end - 1));
        page = page_table[(i64)rows.b * M + in_range / P];
        token = in_range % P;
    };
    const auto copy = [&](int tile, int slot) {
        const int first = tile * KEYS + warp * WARP_KEYS;
        const bool even = pages_are_even && first >= begin && first + WARP_KEYS <= end;
        u8* k_to = shared + (K_HAS_CODES ? K_RAW_AT : K_AT + slot * TILE_BYTES);
        u8* v_to = shared + (V_HAS_CODES ? V_RAW_AT : V_AT + slot * TILE_BYTES);
        copy_rows(k_to, k_pool,
                  page * k_pool_page + token * k_pool_token + kv_head * k_pool_head,
                  k_pool_token, even);
        copy_rows(v_to, v_pool,
                  page * v_pool_page + token * v_pool_token + kv_head * v_pool_head,
                  v_pool_token, even);
        cp_async_commit();
        if (K_HAS_CODES && lane < WARP_KEYS) {
            next_scale = to_float(k_scales[page * k_scales_page + token * k_scales_token +
                                           kv_head * k_scales_head]);
        }
        if (V_HAS_CODES && lane >= WARP_KEYS && lane < 2 * WARP_KEYS) {
            next_scale = to_float(v_scales[page * v_scales_page + token * v_scales_token +
                                           kv_head * v_scales_head]);
        }
    };
    const int first_tile = begin / KEYS;
    const int tile_end = end > begin ? (end - 1) / KEYS + 1 : first_tile;
    if (first_tile < tile_end) {
        find(first_tile);
        copy(first_tile, first_tile % 2);
        if (first_tile + 1 < tile_end) find(first_tile + 1);
    }

    u8* const queries = shared + warp * Q_BYTES;
    float* const units = (float*)(shared + UNITS_AT);
    load_queries(queries, units, q, q_stride, G, kv_head, rows, score_scale < 0.0f ? -1.0f : 1.0f);
    __syncwarp();

    // This lane's rows: 8 * r + g of the warp's. Scores times factor_of(r) are exponents of 2,
    // relative to m, the base of softmax.cuh. l: the sum of the weights of this lane's keys.
    float m[R], l[R], sums[ROW_TILES][D / 8][4] = {};
#pragma unroll
    for (int r = 0; r < R; r++) {
        m[r] = -INF;
        l[r] = 0.0f;
    }
    const auto factor_of = [&](int r) {
        float factor = fabsf(score_scale) * (1.0f / PAIR_UNIT<K_T>);
        if constexpr (!Q_IS_EXACT) factor *= units[warp_row + 8 * r + g];
        return fmaxf(factor, SMALLEST);  // or hidden scores times 0 would be NaN
    };
    float bound = scale_bound(0.0f);  // of the scales of values, while V_HAS_CODES

    const Reader of_queries(queries, lane % 16, lane / 16);

#pragma unroll 1
    for (int tile = first_tile; tile < tile_end; tile++) {
        const int slot = tile % 2;
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived, and all warps have read the last one
        if constexpr (HAS_CODES) {
            decode_tile<K_T>(shared + K_AT, shared + K_RAW_AT);
            decode_tile<V_T>(shared + V_AT, shared + V_RAW_AT);
            if (lane < 2 * WARP_KEYS) {
                const int key = warp * WARP_KEYS + lane % WARP_KEYS;
                tile_scales[lane / WARP_KEYS * KEYS + key] = next_scale;
            }
            __syncthreads();
        }
        if (tile + 1 < tile_end) {
            copy(tile + 1, slot ^ 1);
            if (tile + 2 < tile_end) find(tile + 2);
        }
        const int first = tile * KEYS;
        u8* const v_tile = shared + V_AT + (V_HAS_CODES ? 0 : slot * TILE_BYTES);
        float* const v_scales = tile_scales + KEYS;
        if (first < shared_begin || first + KEYS > shared_end) {
            if (__syncthreads_or(has_special_values(v_tile, v_scales))) {
                int last[R];
#pragma unroll
                for (int r = 0; r < R; r++) last[r] = last_of(warp_row + 8 * r + g);
                add_special_values(sums, v_tile, v_scales, first, last, window);
                __syncthreads();  // all warps have added their part
                clear_special_values(v_tile, v_scales);
                __syncthreads();
            }
        }
        const bool is_full = first >= full_begin && first + KEYS <= full_end;
        if (!is_full) {  // skip tiles that no row of the warp sees
            if (warp_row >= rows.num_rows || first > last_of(warp_row + WARP_ROWS - 1)) continue;
            if (first + KEYS <= first_of(warp_row)) continue;
        }

        const u8* k_tile = shared + K_AT + (K_HAS_CODES ? 0 : slot * TILE_BYTES);
        const Reader of_keys(k_tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
        const Reader of_values(v_tile, lane % 16, lane / 16);

        // Scores. Further terms are summed apart, so that what the mma truncates stays small.
        float x[ROW_TILES][KEYS / 8][4] = {}, low[ROW_TILES][KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            u32 a[Q_TERMS][ROW_TILES][4];
#pragma unroll
            for (int term = 0; term < Q_TERMS; term++) {
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    const int row = term * WARP_ROWS + 16 * i;
                    ldmatrix_x4(a[term][i], of_queries.at(step) + row * Halves::PITCH);
                }
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                u32 b[4];
                ldmatrix_x4(b, of_keys.at(step) + 8 * n * Halves::PITCH);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
                    for (int term = Q_TERMS - 1; term >= 0; term--) {
                        const u32(&f)[4] = a[term][i];
                        auto& d = !Q_IS_16BIT && term ? low[i] : x[i];
                        mma_16x16<KM>(d[n], f[0], f[1], f[2], f[3], b[0], b[1]);
                        mma_16x16<KM>(d[n + 1], f[0], f[1], f[2], f[3], b[2], b[3]);
                    }
                }
            }
        }

        float factor[R];
#pragma unroll
        for (int r = 0; r < R; r++) factor[r] = factor_of(r);
        scale_scores(x, low, factor, tile_scales);
#if LOGITS_SOFT_CAP
#pragma unroll
        for (float& unit : factor) unit = cap;
#endif
        if (!is_full) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                const int last = last_of(warp_row + 8 * r + g);
#pragma unroll
                for (int i = 0; i < KEYS / 4; i++) {
                    const int key = first + i / 2 * 8 + 2 * t + i % 2;
                    if (key > last || key <= last - window) x[r / 2][i / 2][r % 2 * 2 + i % 2] = -INF;
                }
            }
        }

        float largest[R];
        const float lag = V_HAS_CODES ? score_lag(bound) : LAG + P_HEADROOM;
        bool grows = largest_scores(largest, x, m, factor, lag);
        round_large_scores(x, factor, largest);
        float v_scale = 0.0f;
        if constexpr (V_HAS_CODES) {
#pragma unroll
            for (int i = 0; i < KEYS; i += WARP) {
                v_scale = fmaxf(v_scale, fabsf(v_scales[i + lane % min(KEYS, WARP)]));
            }
            grows |= v_scale > bound;
        }
        if (__any_sync(FULL_MASK, grows)) {
            if constexpr (V_HAS_CODES) {
                bound = scale_bound(warp_max(v_scale));
                largest_products(largest, x, factor, v_scales);
            } else {
#pragma unroll
                for (float& score : largest) score -= P_HEADROOM;
            }
            rescale_sums(sums, m, l, largest);
        }
        scores_to_weights(x, m, l, factor);

        // Values. Sums of 32-bit queries leave the mma at every step, before it truncates anything.
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            if (!Q_IS_16BIT) schedule_fence();  // or too many steps at once would spill registers
            u32 a[P_TERMS][ROW_TILES][4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float2 scale;
                if (V_HAS_CODES) scale = *(const float2*)(v_scales + 8 * (n + j) + 2 * t);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
                    for (int c = 0; c < 4; c += 2) {
                        float two[2] = {x[i][n + j][c], x[i][n + j][c + 1]};
                        if (V_HAS_CODES) two[0] *= scale.x, two[1] *= scale.y;
#pragma unroll
                        for (int term = 0; term < P_TERMS; term++) {
                            a[term][i][2 * j + c / 2] = split_halves<VM>(two);
                        }
                    }
                }
            }
#pragma unroll
            for (int column = 0; column < D / 8; column += 2) {
                u32 b[4];
                ldmatrix_x4_trans(b, of_values.at(column / 2) + 8 * n * Halves::PITCH);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float step_sums[4] = {};
                        float(&sum)[4] = sums[i][column + j];
                        float(&d)[4] = Q_IS_16BIT ? sum : step_sums;
#pragma unroll
                        for (int term = P_TERMS - 1; term >= 0; term--) {
                            const u32(&f)[4] = a[term][i];
                            mma_16x16<VM>(d, f[0], f[1], f[2], f[3], b[2 * j], b[2 * j + 1]);
                        }
                        if constexpr (!Q_IS_16BIT) {
#pragma unroll
                            for (int c = 0; c < 4; c++) sum[c] += d[c];
                        }
                    }
                }
            }
        }
    }

    // Results replace the warp's queries in shared memory, so that stores to `out` are whole lines.
    __syncwarp();  // all lanes have read their queries
#pragma unroll
    for (int r = 0; r < R; r++) {
        l[r] += __shfl_xor_sync(FULL_MASK, l[r], 1);
        l[r] += __shfl_xor_sync(FULL_MASK, l[r], 2);
        float unit = normalize_base(m[r], l[r]) / PAIR_UNIT<V_T>;
        const int row = 8 * r + g, in_group = rows.first_row + warp_row + row;
        if (lse && t == 0 && warp_row + row < rows.num_rows) {
            const i64 at = (i64)(rows.start + in_group / G) * HQ + kv_head * G + in_group % G;
            lse[at] = l[r] == 0.0f ? -INF : m[r] * LN_2 + logf(l[r]);
        }
        if (l[r] == 0.0f) unit = 0.0f;
        const float weights = l[r] == 0.0f ? 1.0f : l[r], inverse = unit / weights;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float two[2];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float sum = sums[r / 2][n][r % 2 * 2 + c];
                two[c] = Q_IS_16BIT ? sum * inverse : sum * unit / weights;
            }
            if constexpr (Q_IS_16BIT) {
                *(u32*)(queries + Outputs::place(row, n) + 4 * t) =
                    two_halves(two[0], two[1], Operand<Q_T>::Type{});
            } else {
                *(float2*)(queries + Outputs::place(row, 2 * n + t / 2) + t % 2 * 8) =
                    make_float2(two[0], two[1]);
            }
        }
    }
    __syncwarp();
    store_rows(out, queries, rows, warp_row, HQ, G, kv_head);
#endif
}
