// decode_range.cuh: a block's range of keys, piece by piece: all of paged_decode_mma.cu and, behind what
// it makes itself, of qkv_decode.cu.
#if !defined(V_T) || !defined(PAGE) || !defined(BLOCKS) || !defined(ROWS) || !defined(KEYS)
#error "decode_range.cuh needs V_T, PAGE, BLOCKS, ROWS and KEYS"
#endif
#if !defined(MIN_KEYS) || !defined(COUNTERS) || !defined(STAGE_BYTES) || !defined(Q_BYTES) || \
    !defined(STATE_PITCH)
#error "decode_range.cuh needs MIN_KEYS, COUNTERS, STAGE_BYTES, Q_BYTES and STATE_PITCH"
#endif
#ifndef ROW_SCALES
#define ROW_SCALES 1
#endif
#ifndef ALONE
#define ALONE 0
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif


#include "attention.cuh"
#include "decode_config.cuh"
#include "decode_merge.cuh"
#include "decode_pipeline.cuh"
#include "decode_products.cuh"
#include "decode_softmax.cuh"
#include "decode_stage.cuh"
#include "decode_work.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "warps.cuh"

// What both kernels are given, see their headers.
struct Decode {
    Q_T* out;
    float *lse, *workspace;
    const Q_T* q;
    const K_T* k_pool;
    const V_T* v_pool;
    const SCALE_T *k_scales, *v_scales;
    const int *page_table, *lengths;
    const float *alibi_slopes, *sinks;
    const u64* tree;
    i64 q_stride, q_token_stride, k_pool_head, v_pool_head, k_scales_head, v_scales_head;
    int k_pool_page, k_pool_token, v_pool_page, v_pool_token;
    int k_scales_page, k_scales_token, v_scales_page, v_scales_token;
    int B, T, causal_offset, G, M, capacity, window, piece_tiles, num_slots;
    float score_scale, cap, lse_unit;
};

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches
// Queries as they lie in memory, [B, T, HQ, D].
struct StoredQueries { static constexpr bool ARE_MADE = false; };

// `is_last` is in shared memory. `queries` are stored, or made by the block, as the last key and value
// of a sequence are then. Above 200 lines, because the compiler orders the instructions of the loop
// over keys another way where the range of units is a function of its own.
template <typename Queries>
__device__ __forceinline__ void decode_range(const Decode& call, int& is_last,
                                             const Queries& queries) {
    extern __shared__ __align__(128) u8 shared[];  // a copy of a line stays in one line
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int g = lane / 4, t = lane % 4;  // as in the fragments of mma
    let_next_start();

    const int tile_of_head = blockIdx.x, kv_head = blockIdx.y, range = blockIdx.z;
    const int tiles = gridDim.x * gridDim.y, ranges = gridDim.z;
    const int head_tile = kv_head * gridDim.x + tile_of_head;
    const int max_rows = min(call.G * call.T, ROWS);
    const int num_rows = min(ROWS, call.G * call.T - tile_of_head * ROWS);

    // This block's range of units.
    const bool fixed = !ALONE && call.piece_tiles > 0;
    const Batch batch{call.lengths, call.B, call.capacity, call.window, call.causal_offset,
                      fixed ? call.piece_tiles : 1};
#if ALONE
    const int total = batch.visible(0).units;
#else
    const int per_lane = (call.B + WARP - 1) / WARP;
    const Scan scan(batch, 0, per_lane);
    const int total = scan.total();
#endif
    int range_units = (total + ranges - 1) / ranges;
    // Even for warps, and worth a merge.
    if (!fixed && (ALONE || total > (MIN_KEYS / KEYS - 1) * call.B)) {
        range_units = (max(range_units, MIN_KEYS / KEYS) + WARPS - 1) / WARPS * WARPS;
    }
    const int begin = range * range_units, end = min(begin + range_units, total);
    if (CLUSTER == 1 && begin >= end) return;  // in a cluster it helps to merge

    // This lane's query row, for all pieces.
    const int row_of_group = tile_of_head * ROWS + min(g, num_rows - 1);
    const int token = row_of_group / call.G, head = kv_head * call.G + row_of_group % call.G;
    const Q_T* query_row = call.q + token * call.q_token_stride + (i64)head * D;

    u8* const stage = shared + warp * (STAGE_BYTES + Q_BYTES);
    u8* const k_stage = stage;
    u8* const v_stage = HAS_CP_ASYNC ? stage + K_BYTES : stage;
    Pipeline pipeline{
        {{call.k_pool, call.k_pool_page, call.k_pool_token, call.k_pool_head, kv_head},
         {call.v_pool, call.v_pool_page, call.v_pool_token, call.v_pool_head, kv_head},
         {call.k_scales, call.k_scales_page, call.k_scales_token, call.k_scales_head, kv_head},
         {call.v_scales, call.v_scales_page, call.v_scales_token, call.v_scales_head, kv_head}}};

    // Scales shared by all rows of the head.
    float head_k_scale = 1.0f, head_v_scale = 1.0f;
    if (K_HAS_CODES && !ROW_SCALES) {
        head_k_scale = to_float(call.k_scales[kv_head * call.k_scales_head]);
    }
    if (V_HAS_CODES && !ROW_SCALES) {
        head_v_scale = to_float(call.v_scales[kv_head * call.v_scales_head]);
    }

    // The states of the warps, which may reuse the stages, and those of pieces.
    constexpr int STATES_AT = REUSES_STAGES ? 0 : WARPS * (STAGE_BYTES + Q_BYTES);
    float* const warp_x = (float*)(shared + STATES_AT);
    float2* const warp_stats = (float2*)(warp_x + WARPS * max_rows * PITCH);
    u32* const counters = (u32*)call.workspace;
    float* const piece_x = call.workspace + COUNTERS;
    float2* const piece_stats = (float2*)(piece_x + (i64)call.num_slots * tiles * max_rows * D);

    // The first tiles of a piece are loaded before the previous piece ends. Its queries are loaded
    // behind the pages of those tiles, so that both latencies overlap.
    Query query;
    query.shared = (uint2*)(stage + STAGE_BYTES) + lane;
    const auto start = [&](const Piece& piece) {
        const Table table{call.page_table + (i64)piece.b * call.M, piece.visible.first,
                          piece.visible.length - 1};
        const int tile = piece.tile + warp;
        if (tile < piece.tile_end) table.find(pipeline.ids, tile);
        if constexpr (Queries::ARE_MADE) {
            // A tile with the last key is copied behind it, others meanwhile.
            const bool has_last = tile == piece.visible.tile_end - 1;
            const bool before = HAS_CP_ASYNC && !has_last;  // else registers would hold it
            if (before) pipeline.start(k_stage, v_stage, table, tile, piece.tile_end);
            load_query(query, queries.make(piece, kv_head, g), g < num_rows);
            if (!before) pipeline.start(k_stage, v_stage, table, tile, piece.tile_end);
        } else {
            load_query(query, query_row + piece.b * call.q_stride, g < num_rows);
            pipeline.start(k_stage, v_stage, table, tile, piece.tile_end);
        }
    };

#if ALONE
    Piece piece = piece_at(batch, 0, 0, begin, end, false);
#else
    Piece piece = first_piece(batch, scan, per_lane, begin, end, fixed);
#endif
    start(piece);
    for (;;) {
        const int b = piece.b, length = piece.visible.length;
        const Table table{opaque_pointer(call.page_table + (i64)b * call.M), piece.visible.first,
                          length - 1};
        float factor = call.score_scale * head_k_scale * query.unit / PAIR_UNIT<K_T>;
        float zero_score = 0.0f;
        if constexpr (K_IS_SUBNORMAL) {
            zero_score = SUBNORMAL_ZERO<KE> * query.sum * factor;
            factor *= SUBNORMAL_UNIT;
        }

        // Every row sees `full_tiles` tiles from full_first. In others some rows may see keys that
        // are hidden from the rest, unless all rows stand at one position.
        const int position = length - 1 - max(call.causal_offset - token, 0);
        const int full_first = (int)max((i64)length - call.window + KEYS - 1, (i64)0) / KEYS;
        const int full_tiles = max(length - call.causal_offset - TREE, 0) / KEYS - full_first;
        const bool differ = TREE || call.causal_offset > 0;
        Sight sight{(int)max((i64)position + 1 - call.window, (i64)0), position, length,
                    length - 1 - call.causal_offset, 0};
        float slope = 0.0f;
#if ALIBI
        slope = call.alibi_slopes[head] * LOG2_E;
#endif
#if TREE
        sight.ancestors = call.tree[(i64)b * call.T + token];
#endif

        Sums sums = {};
        float m = -INF, l = 0.0f;
        float bound = scale_bound(0.0f), lag = V_ROW_SCALES ? score_lag(bound) : LAG + P_HEADROOM;
        for (int tile = piece.tile + warp; tile < piece.tile_end; tile += WARPS) {
            const float k_scale = to_float(pipeline.k_scale);
            float v_scale = to_float(pipeline.v_scale);
            Keys keys;
            pipeline.next_keys(keys, k_stage, table, tile, piece.tile_end);
            float scores[KEYS / 4];
            multiply_keys(scores, query, keys);
            scale_scores(scores, tile, factor, zero_score, k_scale, call.cap, slope, position);
            const bool is_full = tile >= full_first && tile < full_first + full_tiles;
            bool has_special = false;
            if (!is_full) {
                schedule_fence();  // or the compiler makes the mask a part of every tile
                mask_scores(scores, tile, sight);
                if (V_ROW_SCALES && differ && !is_finite(v_scale)) {
                    v_scale = 0.0f, has_special = true;
                }
            }
            float largest = largest_of(scores);
            const bool grows = largest > m + lag || (V_ROW_SCALES && fabsf(v_scale) > bound);
            if (__any_sync(FULL_MASK, grows)) {
                if (V_ROW_SCALES) {
                    bound = scale_bound(warp_max(fabsf(v_scale)));
                    lag = score_lag(bound);
                    largest = largest_product(scores, v_scale);
                } else {
                    largest -= P_HEADROOM;
                }
                scale_sums(sums, raise_maximum(m, l, largest));
            }
            scores_to_weights(scores, m, l, v_scale);

            Values values;
            pipeline.next_values(values, v_stage, table, tile, piece.tile_end);
            if (!is_full && differ) has_special |= clear_special_values(values);
            add_values(sums, scores, values);
            pipeline.find_pages(table, tile + WARPS, piece.tile_end);
            if (!is_full && __any_sync(FULL_MASK, has_special)) {
                add_special_values(sums, pipeline, table, tile, sight);
            }
        }

        const Piece done = piece;
        const int next = piece.unit + piece.count;
        const bool has_next = !ALONE && next < end;
        if (has_next) {
            const bool same = next < piece.start + piece.visible.units;
            const int next_start = same ? piece.start : piece.start + piece.visible.units;
            piece = piece_at(batch, same ? b : b + 1, next_start, next, end, fixed);
            start(piece);
        }

        // Opaque, or values derived from them would be held in registers throughout the loop over
        // keys.
        const int rows_kept = opaque(max_rows), thread = opaque(threadIdx.x);

        // This warp's states.
        if (REUSES_STAGES) __syncthreads();  // all warps have read their stages
        l += __shfl_xor_sync(FULL_MASK, l, 1);
        l += __shfl_xor_sync(FULL_MASK, l, 2);
        if (g < num_rows) {
            float unit = normalize_base(m, l) * head_v_scale / PAIR_UNIT<V_T>;
            if (l == 0.0f) unit = 0.0f;  // of no keys, whatever scale they would have
            const float zero = SUBNORMAL_ZERO<VE> * (sums.weights[0] + sums.weights[2]);
            float* row = warp_x + (warp * rows_kept + g) * PITCH;
            if (t == 0) warp_stats[warp * rows_kept + g] = make_float2(m, l);
            store_sums(row, sums, unit, zero);
        }
        const auto write = [&](State s, int row, int p) {
            const int row_of_group = tile_of_head * ROWS + row;
            store_output(call.out, call.lse, call.sinks, s, done.b, call.T, call.G, row_of_group,
                         kv_head, p, call.lse_unit);
        };
        const auto place = [&](int slot, int row) {  // in the call.workspace
            return (i64)slot * (tiles * rows_kept) + head_tile * rows_kept + row;
        };
        const auto state_at = [&](int slot, int row, int p) {
            const i64 at = place(slot, row);
            return StateRef{piece_stats + at, (const float4*)(piece_x + at * D + p)};
        };

#if CLUSTER > 1
        // A lane merges the states of one block's warps, CLUSTER lanes those of the cluster. Every
        // block does so for a CLUSTER-th of the elements.
        cluster_arrive();
        cluster_wait();
        const int from = thread % CLUSTER;
        const float* const their_x = map_shared_rank(warp_x, from);
        const float2* const their_stats = map_shared_rank(warp_stats, from);
        for (int i = (range * THREADS + thread) / CLUSTER; i < num_rows * (D / 4); i += THREADS) {
            const int row = i / (D / 4), p = i % (D / 4) * 4;
            const State s = merge_lanes(merge<WARPS>(WARPS, [&](int w) {
                const int at = w * rows_kept + row;
                return StateRef{their_stats + at, (const float4*)(their_x + at * PITCH + p)};
            }));
            if (from == 0) write(s, row, p);
        }
        cluster_arrive_relaxed();  // this block has read the others' memory
        cluster_wait();
#else
        __syncthreads();

        // A row with one state is complete; the last of its blocks merges any other.
        const RowStates states(done, range, begin, end, range_units, fixed);
        for (int i = thread; i < num_rows * (D / 4); i += THREADS) {
            const int row = i / (D / 4), p = i % (D / 4) * 4;
            const State s = merge<WARPS>(WARPS, [&](int w) {
                const int at = w * rows_kept + row;
                return StateRef{warp_stats + at, (const float4*)(warp_x + at * PITCH + p)};
            });
            if (states.count == 1) write(s, row, p);
            else store_state(piece_stats, piece_x, s, place(states.own_slot(done, range), row), p);
        }
        // At most one sequence of a range continues in the next one.
        if (states.count > 1 && (!has_next || piece.b != b) &&
            is_last_block(is_last, thread, states.arrivals,
                          counters + states.first_range * tiles + head_tile)) {
            for (int i = thread; i < num_rows * (D / 4); i += THREADS) {
                const int row = i / (D / 4), p = i % (D / 4) * 4, count = states.count;
                const auto at = [&](int n) { return state_at(states.slot(n), row, p); };
                write(count <= 4 ? merge<4>(count, at) : merge<16>(count, at), row, p);
            }
        }
#endif
        if (!has_next) break;
        __syncthreads();  // before the states of the next piece
    }
}
#endif
