// kv_scores.cu: a score of each cached row, and means of runs of rows, for eviction.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/kv_scores.py):
//   scores             [B, R, C] float  C = M * P; R a multiple of H; 0 past the length
//   means              [B, H, runs, D] float, of `run` rows each, the last of fewer; 0 of none
//   pool        const  [N, P, H, D] in any order, strides of page, token and head in array
//                      elements: K_T
//   scales      const  [N, P, H], likewise, stride 0 where they are shared; SCALE_T
//   vectors     const  [B, R, D] float, with MEASURE COSINE, PRODUCT and SQUARES
//   factors     const  [B, R, T, D] float, with SQUARES
//   page_table  const  [B, M] int32, read up to the length alone
//   lengths     const  [B] int32, clamped to 0 .. capacity
// Scalars:  R, the rows of `vectors`: R / H for each head; T; runs = ceil(C / run)
// Defines:  HEAD_DIM, a multiple of 8 up to 512; Q_T = float; K_T = float, f16, bf16, i8, i4, e4m3 or
//           e5m2; SCALE_T = f16 or float; BLOCK = threads; of kv_scores KEYS, rows of a block, and
//           MEASURE = NORM 0, LARGEST 1, COSINE 2, PRODUCT 3, SQUARES 4; of kv_means
//           NORMALIZE = 0 or 1: rows are divided by their norms
// Launch:   kv_scores: grid (B * R * ceil(C / KEYS)), block (BLOCK)
//           kv_means: grid (B * H * runs), block (BLOCK)
// Traffic:  rows once, for R / H > 1 later ones hit the caches; 4 bytes a row and score; 4 * D
//           bytes a run; of factors all for each block, which its groups share in the L1 cache
// Order:    no atomics; sums in an order set by HEAD_DIM and BLOCK alone
//
// LANES lanes hold a row, eight elements each (above 256 twice eight).
#include "attention_rows.cuh"

#ifndef KEYS
#error "kv_scores.cu needs KEYS"
#endif
#ifndef MEASURE
#define MEASURE 0
#endif
#ifndef NORMALIZE
#define NORMALIZE 0
#endif
constexpr bool IS_NORM = MEASURE == 0, IS_LARGEST = MEASURE == 1, IS_COSINE = MEASURE == 2,
               IS_PRODUCT = MEASURE == 3, IS_SQUARES = MEASURE == 4;
// Rows that lanes hold at once, which share each load of a factor.
constexpr int TOGETHER = IS_SQUARES ? 2 : 1;
static_assert(KEYS % (SLOTS * TOGETHER) == 0, "all lanes of a warp take as many rows");

// This lane's part of a row, decoded.
__device__ __forceinline__ void load_row(float (&x)[EIGHTS][8], const K_T* row, float scale) {
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        load8(x[e], row + safe_column(e) / PACKED<K_T>);
#pragma unroll
        for (int i = 0; i < 8; i++) x[e][i] *= scale;
    }
}

// The largest magnitude of a row; NaN wins.
__device__ __forceinline__ float largest_of(const float (&x)[EIGHTS][8]) {
    u32 peak[1] = {0};
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
        for (int i = 0; i < 8; i++) peak[0] = max(peak[0], __float_as_uint(fabsf(x[e][i])));
    }
    group_max<LANES>(peak);
    return __uint_as_float(peak[0]);
}

// Add the squares of x.f for T factors f [T, D] to `scores` of rows x; all lanes of the group do.
__device__ __forceinline__ void add_squares(float (&scores)[TOGETHER],
                                            const float (&x)[TOGETHER][EIGHTS][8],
                                            const float* factors, int T) {
    for (int t = 0; t < T; t++) {
        float factor[EIGHTS][8];
        load_query(factor, factors + (i64)t * D, 1.0f);
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const float product = dot(factor, x[i]);
            scores[i] += product * product;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, IS_SQUARES ? 6 : 0)
kv_scores(float* __restrict__ scores, const K_T* __restrict__ pool,
          const SCALE_T* __restrict__ scales, const float* __restrict__ vectors,
          const float* __restrict__ factors, const int* __restrict__ page_table,
          const int* __restrict__ lengths, i64 pool_page, i64 pool_token, i64 pool_head,
          i64 scales_page, i64 scales_token, i64 scales_head, int R, int T, int H, int P, int M,
          int capacity) {
    const int chunks = capacity / KEYS + (capacity % KEYS != 0);
    const int begin = blockIdx.x % chunks * KEYS;
    const int r = blockIdx.x / chunks % R, b = blockIdx.x / chunks / R;
    const int kv_head = r / (R / H);
    const int length = max(0, min(lengths[b], capacity));
    float* const out = scores + ((i64)b * R + r) * capacity;

    float vector[EIGHTS][8], of_vector = 1.0f;
    if (IS_COSINE || IS_PRODUCT || IS_SQUARES) {
        load_query(vector, vectors + ((i64)b * R + r) * D, 1.0f);
        if (IS_COSINE) of_vector = sqrtf(dot(vector, vector));
    }
    const int slot = threadIdx.x / LANES, slot_of_warp = threadIdx.x / WARP * WARP / LANES;
#pragma unroll(IS_SQUARES ? 1 : LANES <= 8 ? 2 : 4)
    for (int i = slot; i < KEYS; i += SLOTS * TOGETHER) {
        float score[TOGETHER] = {};
        // A warp takes this branch as one. But for SQUARES all of a block do, so that loads of
        // several rows may overlap.
        const int first = IS_SQUARES ? begin + i - slot + slot_of_warp : begin;
        if (first < length) {
            float x[TOGETHER][EIGHTS][8];
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
                const u32 safe = min(begin + i + t * SLOTS, length - 1);
                const i64 page = page_table[(i64)b * M + safe / P], token = safe % P;
                float scale = 1.0f;
                if (LARGEST<K_T> > 0.0f) {
                    scale = to_float(scales[page * scales_page + token * scales_token +
                                            kv_head * scales_head]);
                }
                const K_T* row =
                    pool + page * pool_page + token * pool_token + kv_head * pool_head;
                load_row(x[t], row, scale);
                if (IS_LARGEST) score[t] = largest_of(x[t]);
                if (IS_NORM) score[t] = sqrtf(dot(x[t], x[t]));
                if (IS_COSINE) {
                    const float of_both = sqrtf(dot(x[t], x[t])) * of_vector;
                    score[t] = dot(vector, x[t]);
                    score[t] = of_both == 0.0f ? 0.0f : score[t] / of_both;
                }
                if (IS_PRODUCT || IS_SQUARES) score[t] = dot(vector, x[t]);
            }
            if (IS_SQUARES) add_squares(score, x, factors + ((i64)b * R + r) * T * D, T);
        }
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int key = begin + i + t * SLOTS;
            if (threadIdx.x % LANES == 0 && key < capacity) {
                out[key] = key < length ? score[t] : 0.0f;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 8)
kv_means(float* __restrict__ means, const K_T* __restrict__ pool,
         const SCALE_T* __restrict__ scales, const int* __restrict__ page_table,
         const int* __restrict__ lengths, i64 pool_page, i64 pool_token, i64 pool_head,
         i64 scales_page, i64 scales_token, i64 scales_head, int H, int P, int M, int capacity,
         int runs, int run) {
    __shared__ __align__(16) float sums[SLOTS][D];
    const int begin = blockIdx.x % runs * run;
    const int kv_head = blockIdx.x / runs % H, b = blockIdx.x / runs / H;
    const int length = max(0, min(lengths[b], capacity));
    const int rows = max(0, min(run, length - begin));

    const int slot = threadIdx.x / LANES;
    float sum[EIGHTS][8] = {};
#pragma unroll 4
    for (int first = 0; first < rows; first += SLOTS) {  // as often for all lanes of a warp
        const u32 safe = begin + min(first + slot, rows - 1);
        const i64 page = page_table[(i64)b * M + safe / P], token = safe % P;
        float scale = 1.0f, x[EIGHTS][8];
        if (LARGEST<K_T> > 0.0f) {
            scale = to_float(scales[page * scales_page + token * scales_token +
                                    kv_head * scales_head]);
        }
        load_row(x, pool + page * pool_page + token * pool_token + kv_head * pool_head, scale);
        float factor = 1.0f;
        if (NORMALIZE) {
            const float norm = sqrtf(dot(x, x));
            factor = norm == 0.0f ? 0.0f : 1.0f / norm;
        }
        if (first + slot >= rows) continue;
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum[e][i] += x[e][i] * factor;
        }
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        if (column(e) < D) store8(&sums[slot][column(e)], sum[e]);
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += THREADS) {
        float total = 0.0f;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) total += sums[s][d];
        means[(((i64)b * H + kv_head) * runs + blockIdx.x % runs) * D + d] =
            rows ? total / rows : 0.0f;
    }
}
