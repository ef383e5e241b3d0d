// prefill.cu: causal attention of many query tokens over paged keys and values of any kind.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/prefill.py):
//   out                     [T, HQ, D]     Q_T
//   lse                     [T, HQ] float  natural log of the sum of exp(scale * q.k); may be null
//   q                const  [T, HQ, D]     Q_T, token stride q_stride elements
//   k_pool, v_pool   const  [N, P, H, D] in any order, strides of page, token and head in array
//                           elements: K_T, V_T
//   k_scales,        const  [N, P, H], likewise, stride 0 where they are shared; SCALE_T
//   v_scales
//   page_table       const  [B, M] int32   read where the sequence has visible keys alone
//   lengths          const  [B] int32      keys, the new ones included; clamped to 0 .. capacity
//   q_starts         const  [B + 1] int32  prefix sums of the query counts
// Scalars:  causal: query i of Lq with Lk keys stands at Lk - Lq + i, sees no key after that and
//           `window` keys up to it (INT_MAX: all); else every query sees all keys, window INT_MAX.
//           score_scale = scale * log2(e), or with LOGITS_SOFT_CAP scale / cap; cap = cap * log2(e)
// Defines:  HEAD_DIM, a multiple of 8 up to 512; ROWS, a multiple of 8; Q_T = float, f16 or bf16;
//           K_T, V_T = float, f16, bf16, i8, i4, e4m3 or e5m2; SCALE_T = f16 or float;
//           LOGITS_SOFT_CAP = 0 or 1; BLOCK = threads: 128, above 256 elements 64
// Launch:   grid (T * G / ROWS + B, H), block (BLOCK), static shared memory
//           below 48 KiB
// Traffic:  every ROWS rows read the keys they see; a sequence's K and V mostly hit the L2 cache
// Order:    no atomics; float accumulation in key order
//
// The queries of the G heads of one KV head are rows of one matrix, row = token * G + head, so that
// each key serves them all. A block holds ROWS rows and walks tiles of KEYS keys: scores, online
// softmax, weights times values; codes are decoded on their way into a tile. Thread (y, x) of Y x X
// owns rows y, y + Y, ... throughout, with the softmax state in registers; of the scores it
// computes keys x, x + X, ..., of the output the columns 4 (x + X j).
#include "attention.cuh"
#include "batch.cuh"
#include "head_dim.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "vector.cuh"
#include "warps.cuh"

#if !defined(V_T) || !defined(ROWS)
#error "prefill.cu needs V_T and ROWS"
#endif
static_assert(D % 8 == 0 && D >= 8 && D <= 512, "tiles move in eights");

constexpr int KEYS = D <= 128 ? 32 : D <= 256 ? 16 : 8;
constexpr int X = D <= 256 ? 16 : 8, Y = 8;
constexpr int MY_ROWS = ROWS / Y;
constexpr int MY_KEYS = KEYS / X;
constexpr int PART = D <= 256 ? D : 128;  // columns summed apart: a longer sum would lose bits
constexpr int MY_VECTORS = (D / 4 + X - 1) / X;  // vectors of four columns that a thread has

// Four floats of padding put consecutive rows on different banks for 16-byte reads.
constexpr int ROW_PITCH = D + 4;
constexpr int WEIGHT_PITCH = KEYS + 4;

static_assert(THREADS == X * Y, "a thread for each place of a tile");
static_assert(ROWS % Y == 0, "each thread owns whole rows");
static_assert(((ROWS + KEYS) * ROW_PITCH + ROWS * WEIGHT_PITCH) * 4 <= 48 << 10, "static shared");

// Rows of one KV head and their scales, with the strides of pages and tokens.
template <typename T> struct Rows {
    const T* pool;
    const SCALE_T* scales;
    i64 page, token, scale_page, scale_token;
};

// The KEYS rows from `first` on, as floats. From `end` on the last row repeats, to be masked later:
// loads without branches overlap.
template <typename T>
__device__ __forceinline__ void load_tile(float* tile, const Rows<T>& rows, const int* pages,
                                          int first, int end, int P) {
    constexpr int VECTORS = KEYS * (D / 8);
#pragma unroll
    for (int step = 0; step < (VECTORS + THREADS - 1) / THREADS; step++) {
        const int i = step * THREADS + threadIdx.x;
        if (VECTORS % THREADS && i >= VECTORS) break;
        const u32 key = min(first + i / (D / 8), end - 1);
        const int d = i % (D / 8) * 8;
        const i64 page = pages[key / P], token = key % P;
        float x[8];
        load8(x, rows.pool + page * rows.page + token * rows.token + d / PACKED<T>);
        if (LARGEST<T> > 0.0f) {
            const float scale =
                to_float(rows.scales[page * rows.scale_page + token * rows.scale_token]);
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] *= scale;
        }
        store8(tile + i / (D / 8) * ROW_PITCH + d, x);
    }
}

// Adds the tile's values to the sums of this thread's rows. Unless ALL are seen by all rows, row r
// skips those it does not see: a weight of 0 times a NaN is NaN.
template <bool ALL>
__device__ __forceinline__ void add_values(float (&acc)[MY_ROWS][MY_VECTORS][4],
                                           const float* weights, const float* tile, int first,
                                           const int (&first_key)[MY_ROWS],
                                           const int (&last_key)[MY_ROWS]) {
    const int x = threadIdx.x % X, y = threadIdx.x / X;
#pragma unroll 2
    for (int key = 0; key < KEYS; key += 4) {
        float weight[MY_ROWS][4];
#pragma unroll
        for (int r = 0; r < MY_ROWS; r++) {
            load4(weight[r], weights + (y + r * Y) * WEIGHT_PITCH + key);
        }
#pragma unroll
        for (int j = 0; j < MY_VECTORS; j++) {
            const int column = min(4 * (x + j * X), D - 4);  // idle threads repeat the last
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int at = first + key + u;
                float v[4];
                load4(v, tile + (key + u) * ROW_PITCH + column);
#pragma unroll
                for (int r = 0; r < MY_ROWS; r++) {
                    if (!ALL && (at < first_key[r] || at > last_key[r])) continue;
#pragma unroll
                    for (int c = 0; c < 4; c++) acc[r][j][c] += weight[r][u] * v[c];
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, D > 128 ? 4 : 3)
prefill(Q_T* __restrict__ out, float* __restrict__ lse, const Q_T* __restrict__ q,
        const K_T* __restrict__ k_pool, const V_T* __restrict__ v_pool,
        const SCALE_T* __restrict__ k_scales, const SCALE_T* __restrict__ v_scales,
        const int* __restrict__ page_table, const int* __restrict__ lengths,
        const int* __restrict__ q_starts, i64 q_stride, i64 k_pool_page, i64 k_pool_token,
        i64 k_pool_head, i64 v_pool_page, i64 v_pool_token, i64 v_pool_head, i64 k_scales_page,
        i64 k_scales_token, i64 k_scales_head, i64 v_scales_page, i64 v_scales_token,
        i64 v_scales_head, int B, int HQ, int H, int P, int M, int capacity, int causal, int window,
        float score_scale, float cap) {
    __shared__ __align__(16) float queries[ROWS * ROW_PITCH];
    __shared__ __align__(16) float tile[KEYS * ROW_PITCH];  // keys, then values
    __shared__ __align__(16) float weights[ROWS * WEIGHT_PITCH];

    // Long rows start first, so that no block runs alone at the end.
    const int G = HQ / H;
    const RowBlock rows = row_block<ROWS>(q_starts, B, G, gridDim.x - 1 - blockIdx.x);
    const int b = rows.b, num_queries = rows.num_queries;
    const int first_row = rows.first_row, num_rows = rows.num_rows;
    if (num_rows <= 0) return;

    const int kv_head = blockIdx.y;
    const int length = max(0, min(lengths[b], capacity));
    const int* pages = page_table + (i64)b * M;
    const Rows<K_T> k_rows = {k_pool + kv_head * k_pool_head, k_scales + kv_head * k_scales_head,
                              k_pool_page, k_pool_token, k_scales_page, k_scales_token};
    const Rows<V_T> v_rows = {v_pool + kv_head * v_pool_head, v_scales + kv_head * v_scales_head,
                              v_pool_page, v_pool_token, v_scales_page, v_scales_token};
    const int x = threadIdx.x % X;
    const int y = threadIdx.x / X;

    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        const int row = i / (D / 8);
        const int d = i % (D / 8) * 8;
        float values[8] = {};
        if (row < num_rows) {
            const int token = (first_row + row) / G;
            const int head = kv_head * G + (first_row + row) % G;
            load8(values, q + (i64)(rows.start + token) * q_stride + (i64)head * D + d);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] *= score_scale;
        store8(queries + row * ROW_PITCH + d, values);
    }

    // Row r sees the keys first_key[r] .. last_key[r].
    int first_key[MY_ROWS], last_key[MY_ROWS];
    float m[MY_ROWS], l[MY_ROWS], acc[MY_ROWS][MY_VECTORS][4] = {};
#pragma unroll
    for (int r = 0; r < MY_ROWS; r++) {
        const int token = (first_row + min(y + r * Y, num_rows - 1)) / G;
        last_key[r] = causal ? max(length - num_queries + token, -1) : length - 1;
        first_key[r] = max(last_key[r] - window + 1, 0);
        m[r] = -INF;
        l[r] = 0.0f;
    }
    const int first_token = first_row / G;
    const int last_token = (first_row + num_rows - 1) / G;
    const int begin =
        causal ? max(max(length - num_queries + first_token, -1) - window + 1, 0) : 0;
    const int end = causal ? length - num_queries + last_token + 1 : length;
    // Keys that all rows see.
    const int shared_begin =
        causal ? max(max(length - num_queries + last_token, -1) - window + 1, 0) : 0;
    const int shared_end = causal ? length - num_queries + first_token + 1 : length;

    for (int first = begin; first < end; first += KEYS) {
        __syncthreads();  // all have read the last tile's values; at first: queries are written
        load_tile(tile, k_rows, pages, first, end, P);
        __syncthreads();

        float score[MY_ROWS][MY_KEYS] = {};
        for (int part = 0; part < D; part += PART) {
            float sum[MY_ROWS][MY_KEYS] = {};
#pragma unroll 4
            for (int d = part; d < min(part + PART, D); d += 4) {
                float k[MY_KEYS][4];
#pragma unroll
                for (int j = 0; j < MY_KEYS; j++) load4(k[j], tile + (x + j * X) * ROW_PITCH + d);
#pragma unroll
                for (int r = 0; r < MY_ROWS; r++) {
                    float a[4];
                    load4(a, queries + (y + r * Y) * ROW_PITCH + d);
#pragma unroll
                    for (int j = 0; j < MY_KEYS; j++) {
#pragma unroll
                        for (int c = 0; c < 4; c++) sum[r][j] += a[c] * k[j][c];
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < MY_ROWS; r++) {
#pragma unroll
                for (int j = 0; j < MY_KEYS; j++) score[r][j] += sum[r][j];
            }
        }
        __syncthreads();  // all have read the keys
        load_tile(tile, v_rows, pages, first, end, P);

#pragma unroll
        for (int r = 0; r < MY_ROWS; r++) {
            float peak = m[r];
#pragma unroll
            for (int j = 0; j < MY_KEYS; j++) {
                const int key = first + x + j * X;
                if (LOGITS_SOFT_CAP) score[r][j] = tanhf(score[r][j]) * cap;
                if (key < first_key[r] || key > last_key[r]) score[r][j] = -INF;
                peak = fmaxf(peak, score[r][j]);
            }
            peak = group_max<X>(peak);
            const float base = finite_base(peak);
            const float rescale = exp2f(m[r] - base);
            m[r] = peak;
            l[r] *= rescale;  // sum over this thread's keys; the end adds those of all x
#pragma unroll
            for (int j = 0; j < MY_KEYS; j++) {
                const float weight = exp2f(score[r][j] - base);
                l[r] += weight;
                weights[(y + r * Y) * WEIGHT_PITCH + x + j * X] = weight;
            }
#pragma unroll
            for (int j = 0; j < MY_VECTORS; j++) {
#pragma unroll
                for (int c = 0; c < 4; c++) acc[r][j][c] *= rescale;
            }
        }
        __syncthreads();  // values and weights are written

        if (first >= shared_begin && first + KEYS <= shared_end) {
            add_values<true>(acc, weights, tile, first, first_key, last_key);
        } else {
            add_values<false>(acc, weights, tile, first, first_key, last_key);
        }
    }

#pragma unroll
    for (int r = 0; r < MY_ROWS; r++) {
        l[r] = group_sum<X>(l[r]);
        const int row = y + r * Y;
        if (row < num_rows) {
            const int token = rows.start + (first_row + row) / G;
            const int head = kv_head * G + (first_row + row) % G;
            const i64 at = (i64)token * HQ + head;
#pragma unroll
            for (int j = 0; j < MY_VECTORS; j++) {
                const int column = 4 * (x + j * X);
                float values[4];
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    values[c] = l[r] == 0.0f ? 0.0f : acc[r][j][c] / l[r];
                }
                if (column < D) store4(out + at * D + column, values);
            }
            if (lse && x == 0) lse[at] = l[r] == 0.0f ? -INF : m[r] * LN_2 + logf(l[r]);
        }
    }
}
