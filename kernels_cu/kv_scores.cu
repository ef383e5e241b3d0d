// kv_scores.cu: a score of each cached row, and means of runs of rows, for eviction.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/kv_scores.py):
//   scores             [B, R, C] float  C = M * P; R a multiple of H; 0 past the length
//   means              [B, H, runs, D] float, of `run` rows each, the last of fewer; 0 of none
//   pool        const  [N, P, H, D] in any order, strides of page, token and head in array
//                      elements: K_T
//   scales      const  [N, P, H], likewise, stride 0 where they are shared; SCALE_T
//   vectors     const  [B, R, D] float, of kv_squares, and with MEASURE COSINE and PRODUCT
//   factors     const  [B, R, T, D] float, of kv_squares
//   page_table  const  [B, M] int32, read up to the length alone
//   lengths     const  [B] int32, clamped to 0 .. capacity
// Scalars:  R, the rows of `vectors`: R / H for each head; T; runs = ceil(C / run); last = 1 where the
//           run of a sequence's last row alone is computed, else 0
// Defines:  HEAD_DIM, a multiple of 8 up to 512; Q_T = float; K_T = float, f16, bf16, i8, i4, e4m3 or
//           e5m2; SCALE_T = f16 or float; BLOCK = threads; KEYS, rows of a block of kv_scores and
//           kv_squares; of kv_scores AHEAD_BYTES, 64 at least, which a lane loads before it uses any,
//           and MEASURE = NORM 0, LARGEST 1, COSINE 2, PRODUCT 3; of kv_means NORMALIZE = 0 or 1:
//           rows are divided by their norms, and are zeros where these are 0 or not finite
// Launch:   kv_scores, kv_squares: grid (B * R * ceil(C / KEYS)), block (BLOCK)
//           kv_means: grid (B * H * runs), or with `last` (B * H), block (BLOCK)
// Traffic:  rows once, for R / H > 1 later ones hit the caches; 4 bytes a row and score; 4 * D
//           bytes a run; of factors all for each block, which its groups share in the L1 cache
// Order:    no atomics; sums in an order set by HEAD_DIM and BLOCK alone
//
// KEY_LANES lanes hold a row, eight elements each (above 256 twice eight). Squares of elements beyond
// 1.8e19 leave float, and below 1e-22 vanish: norms and cosines are of rows times a power of two.
#include "attention_rows.cuh"

#if !defined(KEYS) || !defined(AHEAD_BYTES)
#error "kv_scores.cu needs KEYS and AHEAD_BYTES"
#endif
#ifndef MEASURE
#define MEASURE 0
#endif
#ifndef NORMALIZE
#define NORMALIZE 0
#endif
constexpr bool IS_NORM = MEASURE == 0, IS_LARGEST = MEASURE == 1, IS_COSINE = MEASURE == 2,
               IS_PRODUCT = MEASURE == 3;
constexpr int TOGETHER = 2;      // rows that lanes of kv_squares hold at once, which share factors
static_assert(KEYS % (SLOTS * TOGETHER) == 0 && KEYS % THREADS == 0, "all warps take as many rows");

// Squares of elements may leave float: of f16 and of codes none do.
constexpr bool IS_WIDE = SAME<K_T, float> || SAME<K_T, bf16>;

// The power of two that brings numbers of up to this magnitude near 1.
__device__ __forceinline__ float unit_of(float largest) {
    const int exponent = 254 - (int)(__float_as_uint(largest) >> 23);
    return __uint_as_float((u32)min(max(exponent, 1), 254) << 23);
}

// Multiply a row that a group of lanes holds by a power of two that brings it near 1, and return that.
__device__ __forceinline__ float bring_near_1(float (&x)[EIGHTS][8]) {
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x[e][i]));
    }
    const float unit = unit_of(group_max<KEY_LANES>(largest));
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[e][i] *= unit;
    }
    return unit;
}

// This lane's part of a row, decoded.
__device__ __forceinline__ void load_row(float (&x)[EIGHTS][8], const K_T* row, float scale) {
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        load8(x[e], row + safe_column(e) / PACKED<K_T>);
#pragma unroll
        for (int i = 0; i < 8; i++) x[e][i] *= scale;
    }
}

// Where a row begins, in array elements, and its scale.
struct Place { i64 at; float scale; };

__device__ __forceinline__ Place place_of(const int* pages, u32 row, int P, const SCALE_T* scales,
                                          i64 pool_page, i64 pool_token, i64 pool_head,
                                          i64 scales_page, i64 scales_token, i64 scales_head) {
    const i64 page = pages[row / P], token = row % P;
    Place place = {page * pool_page + token * pool_token + pool_head, 1.0f};
    if (LARGEST<K_T> > 0.0f) {
        place.scale = to_float(scales[page * scales_page + token * scales_token + scales_head]);
    }
    return place;
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

// What a row is measured by, of a lane's share of it or of all: codes, which the row's scale follows.
struct Measured {
    float squares, product;  // the product is with the vector
    u32 peak;                // bits of the largest magnitude; those of NaN are larger
};

__device__ __forceinline__ void measure(Measured& found, const Eight<K_T>& eight,
                                        const float (&vector)[8]) {
    if constexpr (IS_NORM && SAME<K_T, i8>) {  // below 2^24, so exact
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) sum = dp4a((int)eight.words[i], (int)eight.words[i], sum);
        found.squares += (float)sum;
    } else {
        float x[8];
        unpack8(x, eight);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (IS_NORM || IS_COSINE) found.squares += x[i] * x[i];
            if (IS_COSINE || IS_PRODUCT) found.product += vector[i] * x[i];
            if (IS_LARGEST) found.peak = max(found.peak, __float_as_uint(fabsf(x[i])));
        }
    }
}

// The squares of a row times a power of two, which is returned, and its product with a vector times
// `of_vector`: by one lane, for the few rows whose squares left float.
__device__ __forceinline__ float measure_again(float& squares, float& product, const K_T* row,
                                               const float* vector, float of_vector) {
    float x[8], largest = 0.0f;
#pragma unroll 1
    for (int column = 0; column < D; column += 8) {
        load8(x, row + column);
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x[i]));
    }
    const float unit = unit_of(largest);
    squares = product = 0.0f;
#pragma unroll 1
    for (int column = 0; column < D; column += 8) {
        load8(x, row + column);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float element = x[i] * unit;
            squares += element * element;
            if (IS_COSINE) product += vector[column + i] * of_vector * element;
        }
    }
    return unit;
}

// A warp takes WARP rows at a time: lane l finds where row l is, each group of KEY_LANES loads as many
// rows, one a step, and the steps' shares are exchanged at once, so that lane l ends up with row l.
extern "C" __global__ void __launch_bounds__(THREADS, 5)
kv_scores(float* __restrict__ scores, const K_T* __restrict__ pool,
          const SCALE_T* __restrict__ scales, const float* __restrict__ vectors,
          const int* __restrict__ page_table, const int* __restrict__ lengths, i64 pool_page,
          i64 pool_token, i64 pool_head, i64 scales_page, i64 scales_token, i64 scales_head, int R,
          int H, int P, int M, int capacity) {
    constexpr int BATCH = AHEAD_BYTES / sizeof(Eight<K_T>) / EIGHTS < KEY_LANES
                              ? AHEAD_BYTES / sizeof(Eight<K_T>) / EIGHTS : KEY_LANES;
    const int chunks = capacity / KEYS + (capacity % KEYS != 0);
    const int begin = blockIdx.x % chunks * KEYS;
    const int r = blockIdx.x / chunks % R, b = blockIdx.x / chunks / R;
    const int kv_head = r / (R / H), lane = threadIdx.x % WARP;
    const int length = max(0, min(lengths[b], capacity));
    float* const out = scores + ((i64)b * R + r) * capacity;

    const float* const from = vectors + ((i64)b * R + r) * D;
    float vector[EIGHTS][8] = {}, of_vector = 1.0f, vector_unit = 1.0f;
    if (IS_COSINE || IS_PRODUCT) load_query(vector, from, 1.0f);
    if (IS_COSINE) {
        vector_unit = bring_near_1(vector);
        of_vector = sqrtf(dot(vector, vector));
    }
    for (int i = threadIdx.x - lane; i < KEYS; i += THREADS) {
        const int key = begin + i + lane;
        float score = 0.0f;
        if (begin + i < length) {
            const Place place =
                place_of(page_table + (i64)b * M, min(key, length - 1), P, scales, pool_page,
                         pool_token, kv_head * pool_head, scales_page, scales_token,
                         kv_head * scales_head);
            float squares[KEY_LANES], products[KEY_LANES];
            u32 peaks[KEY_LANES];
#pragma unroll
            for (int first = 0; first < KEY_LANES; first += BATCH) {
                Eight<K_T> row[BATCH][EIGHTS];
#pragma unroll
                for (int s = 0; s < BATCH; s++) {
                    const i64 at = __shfl_sync(FULL_MASK, place.at, first + s, KEY_LANES);
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++) {
                        row[s][e] = get8(pool + at + safe_column(e) / PACKED<K_T>);
                    }
                }
#pragma unroll
                for (int s = 0; s < BATCH; s++) {
                    Measured found = {};
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++) {
                        const bool is_active = (e * KEY_LANES + KEY_LANES) * 8 <= D || key_column(e) < D;
                        if (is_active) measure(found, row[s][e], vector[e]);
                    }
                    squares[first + s] = found.squares;
                    products[first + s] = found.product;
                    peaks[first + s] = found.peak;
                }
            }
            if (IS_NORM || IS_COSINE) fold_sums<KEY_LANES / 2>(squares);
            if (IS_COSINE || IS_PRODUCT) fold_sums<KEY_LANES / 2>(products);
            if (IS_LARGEST) fold<KEY_LANES / 2>(peaks, [](u32 a, u32 b) { return max(a, b); });
            float unit = 1.0f;
            const bool is_far = !(squares[0] >= 1e-20f && squares[0] <= 1e30f);
            if (IS_WIDE && (IS_NORM || IS_COSINE) && is_far) {
                unit = measure_again(squares[0], products[0], pool + place.at, from, vector_unit);
            }
            if (IS_NORM) score = sqrtf(squares[0]) / unit * place.scale;
            if (IS_LARGEST) score = __uint_as_float(peaks[0]) * place.scale;
            if (IS_PRODUCT) score = products[0] * place.scale;
            if (IS_COSINE) {  // which a scale does not change, but for 0 and NaN
                const float of_both = sqrtf(squares[0]) * of_vector;
                score = of_both == 0.0f || place.scale == 0.0f
                            ? 0.0f : products[0] / of_both * (place.scale / place.scale);
            }
        }
        if (key < capacity) out[key] = key < length ? score : 0.0f;
    }
}

// Rows times the vector, and the squares of rows times factors. Lanes hold TOGETHER rows at once.
extern "C" __global__ void __launch_bounds__(THREADS, 5)
kv_squares(float* __restrict__ scores, const K_T* __restrict__ pool,
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

    float vector[EIGHTS][8];
    load_query(vector, vectors + ((i64)b * R + r) * D, 1.0f);
    const int slot = threadIdx.x / KEY_LANES, slot_of_warp = threadIdx.x / WARP * WARP / KEY_LANES;
#pragma unroll 1
    for (int i = slot; i < KEYS; i += SLOTS * TOGETHER) {
        float score[TOGETHER] = {};
        if (begin + i - slot + slot_of_warp < length) {  // a warp takes this branch as one
            float x[TOGETHER][EIGHTS][8];
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
                const Place place =
                    place_of(page_table + (i64)b * M, min(begin + i + t * SLOTS, length - 1), P,
                             scales, pool_page, pool_token, kv_head * pool_head, scales_page,
                             scales_token, kv_head * scales_head);
                load_row(x[t], pool + place.at, place.scale);
                score[t] = dot(vector, x[t]);
            }
            add_squares(score, x, factors + ((i64)b * R + r) * T * D, T);
        }
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int key = begin + i + t * SLOTS;
            if (threadIdx.x % KEY_LANES == 0 && key < capacity) {
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
         int runs, int run, int last) {
    __shared__ __align__(16) float sums[SLOTS][D];
    const int of_head = last ? 1 : runs;  // thread blocks
    const int kv_head = blockIdx.x / of_head % H, b = blockIdx.x / of_head / H;
    const int length = max(0, min(lengths[b], capacity));
    const int i = last ? max(length - 1, 0) / run : blockIdx.x % runs;
    const int begin = i * run, rows = max(0, min(run, length - begin));

    const int slot = threadIdx.x / KEY_LANES;
    float sum[EIGHTS][8] = {};
#pragma unroll 4
    for (int first = 0; first < rows; first += SLOTS) {  // all lanes of a warp turn equally often
        const u32 safe = begin + min(first + slot, rows - 1);
        const i64 page = page_table[(i64)b * M + safe / P], token = safe % P;
        float scale = 1.0f, x[EIGHTS][8];
        if (LARGEST<K_T> > 0.0f) {
            scale = to_float(scales[page * scales_page + token * scales_token +
                                    kv_head * scales_head]);
        }
        load_row(x, pool + page * pool_page + token * pool_token + kv_head * pool_head, scale);
        float factor = 1.0f;
        bool counts = first + slot < rows;
        if (NORMALIZE) {  // NaN and infinities have no direction
            bring_near_1(x);
            const float norm = sqrtf(dot(x, x));
            counts &= norm > 0.0f && norm < INF;
            factor = 1.0f / norm;
        }
        if (!counts) continue;
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum[e][i] += x[e][i] * factor;
        }
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        if (key_column(e) < D) store8(&sums[slot][key_column(e)], sum[e]);
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += THREADS) {
        float total = 0.0f;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) total += sums[s][d];
        means[(((i64)b * H + kv_head) * runs + i) * D + d] = rows ? total / rows : 0.0f;
    }
}
