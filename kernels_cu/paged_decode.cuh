// paged_decode.cuh: attention of a tile of query rows over a split of their keys, on CUDA cores; a
// part of paged_decode.cu and phase_program.cuh.
//
// KEY_LANES lanes hold one key, eight elements each (above 256 twice eight), and the state of an online
// softmax in registers: running maximum m (base 2), weight sum l, unscaled output acc. The block's
// SLOTS lane groups take keys in turn; their states are merged at the end, over lanes, warps, then
// splits.
#include "attention.cuh"
#include "attention_rows.cuh"
#include "batch.cuh"
#include "softmax.cuh"

#if !defined(V_T) || !defined(QUERY_ROWS) || !defined(COUNTERS)
#error "paged_decode.cuh needs V_T, QUERY_ROWS and COUNTERS"
#endif
static_assert(QUERY_ROWS >= 1 && QUERY_ROWS <= (HEAD_DIM > 256 ? 2 : 4),
              "q and acc stay in registers");

constexpr int AHEAD = EIGHTS == 2 ? 2 : 4;    // keys a lane group loads at once; more would spill
constexpr bool K_HAS_CODES = LARGEST<K_T> > 0.0f, V_HAS_CODES = LARGEST<V_T> > 0.0f;

// What an attention reads and writes: as the kernel paged_decode of paged_decode.cu takes it.
struct Attend {
    Q_T* out;
    float *lse, *workspace;
    const Q_T* q;
    const K_T* k_pool;
    const V_T* v_pool;
    const SCALE_T *k_scales, *v_scales;
    const int *page_table, *lengths;
    const float *alibi_slopes, *sinks;
    const u64* tree;
    const int* key_positions;
    i64 q_stride, q_token_stride;
    i64 k_pool_page, k_pool_token, k_pool_head, v_pool_page, v_pool_token, v_pool_head;
    i64 k_scales_page, k_scales_token, k_scales_head, v_scales_page, v_scales_token, v_scales_head;
    int T, causal_offset, HQ, H, P, M, capacity, window, split_keys, splits;
    float score_scale, cap, lse_unit;
};

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
    const float peak = group_max<WARP, KEY_LANES>(m);
    const float rescale = exp2f(m - finite_base(peak));
    l = group_sum<WARP, KEY_LANES>(l * rescale);
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
        for (int i = 0; i < 8; i++) acc[e][i] = group_sum<WARP, KEY_LANES>(acc[e][i] * rescale);
    }
    return peak;
}

// The states of a block's warps.
struct AttendShared {
    __align__(16) float acc[WARPS][QUERY_ROWS][D];
    float m[WARPS][QUERY_ROWS], l[WARPS][QUERY_ROWS];
};

// A block's share of an attention: a tile of query rows of a KV head, and keys begin to end - 1.
struct KeyShare { int b, kv_head, tile, split, begin, end, length; };

// `index` counts splits, then tiles of query rows, KV heads and sequences.
__device__ __forceinline__ KeyShare share_of(const Attend& p, int index) {
    const int tiles = (p.HQ / p.H * p.T + QUERY_ROWS - 1) / QUERY_ROWS;
    const int split = index % p.splits, block = index / p.splits;
    const int b = block / tiles / p.H;

    // This split's share of the visible keys, in whole steps of the block.
    const int length = max(0, min(p.lengths[b], p.capacity));
    const int* const positions = p.key_positions + (i64)b * p.capacity;
    int first_key = (int)max((i64)length - p.causal_offset - p.window, (i64)0);
    if (POSITIONS && length > 0) {
        const i64 hidden = (i64)positions[max(length - 1 - p.causal_offset, 0)] - p.window;
        first_key = last_up_to(positions, length, hidden);
        first_key += positions[first_key] <= hidden;
    }
    const int steps = (length - first_key + SLOTS * AHEAD - 1) / (SLOTS * AHEAD);
    const int keys =
        p.split_keys ? p.split_keys : (steps + p.splits - 1) / p.splits * (SLOTS * AHEAD);
    const int begin = (int)min(first_key + (i64)split * keys, (i64)length);
    const int end = (int)min(begin + (i64)keys, (i64)length);
    return {b, block / tiles % p.H, block % tiles, split, begin, end, length};
}

// The block's part of an attention; queries() is where those of the share's KV head begin, D elements
// each.
template <typename Queries>
__device__ __forceinline__ void attend_split(AttendShared& shared, const Attend& p,
                                             const KeyShare& share, Queries queries) {
    const auto [b, kv_head, tile, split, begin, end, length] = share;
    const int G = p.HQ / p.H, num_rows = min(QUERY_ROWS, G * p.T - tile * QUERY_ROWS);
    const int* const positions = p.key_positions + (i64)b * p.capacity;
    const int warp = threadIdx.x / WARP;
    const int slot = threadIdx.x / KEY_LANES;

    const Q_T* const q = queries();
    float query[QUERY_ROWS][EIGHTS][8], acc[QUERY_ROWS][EIGHTS][8] = {}, m[QUERY_ROWS], l[QUERY_ROWS];
    int row_position[QUERY_ROWS];  // position of a row's query in its sequence
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) {
        const int row = tile * QUERY_ROWS + min(r, num_rows - 1);
        m[r] = -INF;
        l[r] = 0.0f;
        row_position[r] = length - 1 - max(p.causal_offset - row / G, 0);
        if (POSITIONS && row_position[r] >= 0) row_position[r] = positions[row_position[r]];
        load_query(query[r], q + row / G * p.q_token_stride + row % G * D, p.score_scale);
    }

    const K_T* const k_at = p.k_pool + kv_head * p.k_pool_head;
    const V_T* const v_at = p.v_pool + kv_head * p.v_pool_head;
    for (int step = begin; step < end; step += SLOTS * AHEAD) {
        const int key = step + slot;  // of this lane group: key, key + SLOTS, ...
        Eight<K_T> k[AHEAD][EIGHTS];
        Eight<V_T> v[AHEAD][EIGHTS];
        float k_scale[AHEAD], v_scale[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            // Lanes past the end repeat the last key: loads without branches overlap.
            const u32 position = min(key + u * SLOTS, end - 1);
            const i64 page = p.page_table[(i64)b * p.M + position / p.P], token = position % p.P;
            const K_T* k_row = k_at + page * p.k_pool_page + token * p.k_pool_token;
            const V_T* v_row = v_at + page * p.v_pool_page + token * p.v_pool_token;
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                k[u][e] = get8(k_row + safe_column(e) / PACKED<K_T>);
                v[u][e] = get8(v_row + safe_column(e) / PACKED<V_T>);
            }
            k_scale[u] = v_scale[u] = 1.0f;
            if (K_HAS_CODES) {
                k_scale[u] = to_float(p.k_scales[page * p.k_scales_page + token * p.k_scales_token +
                                               kv_head * p.k_scales_head]);
            }
            if (V_HAS_CODES) {
                v_scale[u] = to_float(p.v_scales[page * p.v_scales_page + token * p.v_scales_token +
                                               kv_head * p.v_scales_head]);
            }
        }
        float score[QUERY_ROWS][AHEAD];
        u32 seen = 0;  // a bit for each score: a weight of 0 times a NaN is NaN
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            float x[EIGHTS][8];
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) unpack8(x[e], k[u][e]);
#pragma unroll
            for (int r = 0; r < QUERY_ROWS; r++) {
                const int position = key + u * SLOTS;
                const int stands = POSITIONS ? positions[min(position, end - 1)] : position;
                float product = dot(query[r], x);
                if (K_HAS_CODES) product *= k_scale[u];
                if (LOGITS_SOFT_CAP) product = tanhf(product) * p.cap;
                if (ALIBI) {
                    const int row = tile * QUERY_ROWS + min(r, num_rows - 1);
                    const float slope = p.alibi_slopes[kv_head * G + row % G] * LOG2_E;
                    product += slope * (stands - row_position[r]);
                }
                bool is_visible = position < end;
                const int branch = position - (length - 1 - p.causal_offset);
                if (TREE && branch >= 0) {
                    const int token = min((tile * QUERY_ROWS + r) / G, p.T - 1);
                    is_visible = is_visible && (p.tree[(i64)b * p.T + token] >> (branch & 63) & 1);
                } else if (TREE || POSITIONS || p.T > 1) {
                    is_visible = is_visible && (TREE || stands <= row_position[r]) &&
                                 row_position[r] - stands < p.window;
                }
                score[r][u] = is_visible ? product : -INF;
                seen |= (u32)is_visible << (r * AHEAD + u);
            }
        }
        float rescale[QUERY_ROWS];
#pragma unroll
        for (int r = 0; r < QUERY_ROWS; r++) {
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
                for (int r = 0; r < QUERY_ROWS; r++) {
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
    for (int r = 0; r < QUERY_ROWS; r++) {
        const float peak = merge_lane_groups(acc[r], l[r], m[r]);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            if (threadIdx.x % WARP < KEY_LANES && key_column(e) < D) {
                store8(&shared.acc[warp][r][key_column(e)], acc[r][e]);
            }
        }
        if (threadIdx.x % WARP == 0) {
            shared.m[warp][r] = peak;
            shared.l[warp][r] = l[r];
        }
    }
    __syncthreads();

    // Merge the warps, one output element per thread.
    for (int i = threadIdx.x; i < num_rows * D; i += THREADS) {
        const int r = i / D, row = tile * QUERY_ROWS + r, head = kv_head * G + row % G;
        float peak = -INF, sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, shared.m[w][r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float rescale = exp2f(shared.m[w][r] - finite_base(peak));
            sum += rescale * shared.l[w][r];
            value += rescale * shared.acc[w][r][i % D];
        }
        const i64 at = ((i64)b * p.T + row / G) * p.HQ + head;
        if (p.splits > 1) {
            float* partial = p.workspace + COUNTERS + (at * p.splits + split) * (D + 2);
            partial[i % D] = value;
            if (i % D == 0) {
                partial[D] = peak;
                partial[D + 1] = sum;
            }
        } else {
            float rescale;
            add_sink(peak, sum, rescale, p.sinks, head);
            p.out[at * D + i % D] = from_float<Q_T>(sum == 0.0f ? 0.0f : value * rescale / sum);
            if (p.lse && i % D == 0) p.lse[at] = sum == 0.0f ? -INF : (peak + log2f(sum)) * p.lse_unit;
        }
    }
}

// Where the queries of a share begin in memory.
__device__ __forceinline__ const Q_T* stored_queries(const Attend& p, const KeyShare& share) {
    return p.q + share.b * p.q_stride + (i64)(share.kv_head * (p.HQ / p.H)) * D;
}

// Merges the splits of one query row.
__device__ __forceinline__ void merge_splits(const Attend& p, i64 row) {
    const float* partial = p.workspace + COUNTERS + row * p.splits * (D + 2);

    float peak = -INF;
    for (int s = 0; s < p.splits; s++) peak = fmaxf(peak, partial[s * (D + 2) + D]);
    const float base = finite_base(peak);
    for (int d = threadIdx.x; d < D; d += THREADS) {
        float sum = 0.0f, value = 0.0f, m = peak, rescale;
        for (int s = 0; s < p.splits; s++) {
            const float* state = partial + s * (D + 2);
            const float weight = exp2f(state[D] - base);
            sum += weight * state[D + 1];
            value += weight * state[d];
        }
        add_sink(m, sum, rescale, p.sinks, (int)(row % p.HQ));
        p.out[row * D + d] = from_float<Q_T>(sum == 0.0f ? 0.0f : value * rescale / sum);
        if (p.lse && d == 0) p.lse[row] = sum == 0.0f ? -INF : (m + log2f(sum)) * p.lse_unit;
    }
}
