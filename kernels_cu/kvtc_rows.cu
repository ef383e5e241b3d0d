// kvtc_rows.cu: the tokens of a sequence between the pages of a cache and the rows of a codec.
//
// Of the T tokens of a call, the first S (sinks) go to and come from float16, the last X (window)
// int8 codes of Hadamard-rotated heads, and the C between them rows of all layers' features, of
// which the mean is subtracted, and of whose keys the rotation by their positions is undone.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/kvtc_rows.py); a dimension
// of 2 is K, then V. Without BACK pools are read and what stands above them here is written, with
// BACK the other way round:
//   rows                   [2, C, E, H, D] ROW_FLOAT, stride rows_side
//   sinks                  [S, 2, L, H, D] f16
//   window                 [X, 2, L, H, D] i8
//   window_scales          [X, 2, L, H] f16
//   kept_positions         [T] int; becomes a copy of `positions`, unless it is null
//   k_pools, v_pools       pages of K_T, V_T: strides layer, page, token, head
//   k_scales, v_scales     SCALE_T, dynamic or static, by SCALES: the same strides, 0 where they
//                          have no such dimension; null for kinds of floats
//   table           const  [num_pages] int   pages of the sequence, in order
//   positions       const  [T] int           position p lies in page table[p / PAGE]; outside of
//                                            the table, or in a negative page, it is read as zeros
//                                            and not written
//   places          const  [E, 2] int        layer of the pools, and row of inv_freq
//   mean            const  [2, E, H, D] f16, stride mean_side
//   inv_freq        const  [FREQS, PAIRS] float  radians a position; null where PAIRS is 0
// Scalars:  num_sinks = S, num_rows = C, num_window = X, num_pages; layers = E; all_layers = L;
//           hadamard = 1: heads of the pools are Hadamard-rotated
// Defines:  those of pool_write.cuh and head_row.cuh; BACK = 0 or 1; ROW_FLOAT = f16, or with BACK
//           float; FREQS; TOKENS of a block
// Launch:   grid (ceil(S / TOKENS) + ceil(C / TOKENS) + ceil(X / TOKENS), y, 2), block (BLOCK); z:
//           K, V; heads are shared among y
// Traffic:  T * E * H * (bytes of a row of K and V with scales, and of what it becomes)
// Order:    no atomics; floats from reading to storing; sums in an order that D decides
#include "head_row.cuh"
#include "pool_write.cuh"
#include "reduce.cuh"
#include "rotary.cuh"

#if !defined(ROW_FLOAT) || !defined(BACK) || !defined(FREQS) || !defined(TOKENS)
#error "kvtc_rows.cu needs ROW_FLOAT, BACK, FREQS and TOKENS"
#endif

enum Class { SINK, ROW, WINDOW };

// The tokens of a block: `count` of one class, from the first-th of the call and the nth of the
// class on.
struct Tokens { Class of; int first, nth, count; };

__device__ __forceinline__ Tokens tokens_of_block(int num_sinks, int num_rows, int num_window) {
    const int counts[3] = {num_sinks, num_rows, num_window};
    int tile = blockIdx.x, before = 0;
#pragma unroll
    for (int of = 0; of < 3; of++) {
        const int tiles = (counts[of] + TOKENS - 1) / TOKENS;
        if (tile < tiles) {
            const int nth = tile * TOKENS;
            return Tokens{(Class)of, before + nth, nth, min(TOKENS, counts[of] - nth)};
        }
        tile -= tiles;
        before += counts[of];
    }
    return Tokens{ROW, 0, 0, 0};  // not reached
}

// The pool of a layer.
template <typename T> struct Layers {
    Pool<T> pool;
    i64 layer, scale_layer;
    __device__ __forceinline__ Pool<T> at(int i) const {
        Pool<T> of_layer = pool;
        of_layer.rows += i * layer;
        if (LARGEST<T> > 0) of_layer.scales += i * scale_layer;
        return of_layer;
    }
};

template <typename T>
__device__ __forceinline__ Fragment<T> load_row(const T* from, bool exists) {
    Fragment<T> fragment = {};
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (exists && column(i) < D) fragment.pieces[i] = get8(from + column(i) / PACKED<T>);
    }
    return fragment;
}

// What the heads of a block share; see the arrays.
struct Call {
    ROW_FLOAT* rows;
    f16* sinks;
    i8* window;
    f16* window_scales;
    const int* places;
    const f16* mean;
    i64 rows_side, mean_side;
    int layers, all_layers, hadamard, is_v;
    Tokens tokens;
    Place at[TOKENS];

    __device__ __forceinline__ bool rotates() const {
        return PAIRS > 0 && !is_v && tokens.of == ROW;
    }
    __device__ __forceinline__ ROW_FLOAT* row(int t, int head) const {
        return rows + is_v * rows_side + ((i64)(tokens.nth + t) * layers * H + head) * D;
    }
    // The index of an exempt token's head of a layer.
    __device__ __forceinline__ i64 exempt(int t, int layer, int head) const {
        return ((i64)((tokens.nth + t) * 2 + is_v) * all_layers + layer) * H + head;
    }
    __device__ __forceinline__ Fragment<f16> mean_of(int head) const {
        return load_row(mean + is_v * mean_side + (i64)head * D, tokens.of == ROW);
    }
};

template <typename T>
__device__ __forceinline__ void unpack(float (&x)[PIECES][8], const Fragment<T>& from,
                                       float scale) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        unpack8(x[i], from.pieces[i]);
        if (LARGEST<T> > 0) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[i][j] = __fmul_rn(x[i][j], scale);
        }
    }
}

__device__ __forceinline__ Fragment<float> pack(const float (&x)[PIECES][8]) {
    Fragment<float> fragment = {};
#pragma unroll
    for (int i = 0; i < PIECES; i++) pack8(fragment.pieces[i], x[i]);
    return fragment;
}

// x plus `sign` times the mean of a head.
__device__ __forceinline__ void add_mean(float (&x)[PIECES][8], const Fragment<f16>& mean,
                                         float sign) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        float m[8];
        unpack8(m, mean.pieces[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) x[i][j] += sign * m[j];
    }
}

// Rotates pairs of a row, which other lanes may overwrite in `exchange` afterwards.
__device__ __forceinline__ void rotate_row(float (&x)[PIECES][8], const Rotation* rotations,
                                           float* exchange) {
    rotate_pairs(x, rotations, exchange);
    if (!IN_LANE) __syncwarp();
}

using Rotations = const Rotation (*)[FREQS][PAIRS + 1];

#if BACK

// One head of all tokens of a block into pages.
template <typename T>
__device__ __forceinline__ void move_heads(const Call& c, const Layers<T>& pools, int index,
                                           bool wanted, Rotations rotations, float* exchange) {
    const int layer = c.places[index / H * 2], freq = c.places[index / H * 2 + 1], head = index % H;
    const Pool<T> pool = pools.at(layer);
    const Fragment<f16> mean = c.mean_of(index);
    Fragment<ROW_FLOAT> loaded[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {  // all loads before the first use
        loaded[t] = load_row(c.row(t, index), c.tokens.of == ROW && t < c.tokens.count);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        if (t >= c.tokens.count) break;
        float x[PIECES][8];
        const i64 at = c.exempt(t, layer, head);
        if (c.tokens.of == ROW) {
            unpack(x, loaded[t], 1.0f);
            add_mean(x, mean, 1.0f);
        } else if (c.tokens.of == SINK) {
            unpack(x, load_row<f16>(c.sinks + at * D, true), 1.0f);
        } else {
            unpack(x, load_row<i8>(c.window + at * D, true), to_float(c.window_scales[at]));
        }
        if (c.rotates()) rotate_row(x, rotations[t][freq], exchange);
        if (c.hadamard != (c.tokens.of == WINDOW)) hadamard_transform(x);
        const Fragment<float> row = pack(x);
        u32 largest[1] = {};
        if constexpr (HAS_DYNAMIC_SCALE<T>) {
            largest[0] = max_magnitude(row);
            group_max<LANES>(largest);
        }
        if (wanted && c.at[t].page >= 0) pool.store(c.at[t], head, row, largest[0]);
    }
}

#else

// One head of all tokens of a block from pages.
template <typename T>
__device__ __forceinline__ void move_heads(const Call& c, const Layers<T>& pools, int index,
                                           bool wanted, Rotations rotations, float* exchange) {
    const int layer = c.places[index / H * 2], freq = c.places[index / H * 2 + 1], head = index % H;
    const Pool<T> pool = pools.at(layer);
    const Fragment<f16> mean = c.mean_of(index);
    Fragment<T> loaded[TOKENS];
    float scales[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {  // all loads before the first use
        const bool exists = c.at[t].page >= 0;
        const i64 page = exists ? c.at[t].page : 0, offset = c.at[t].offset;
        const i64 at = page * pool.page + offset * pool.token + head * pool.head;
        const i64 scale_at = page * pool.scale_page + offset * pool.scale_token +
                             head * pool.scale_head;
        loaded[t] = load_row(pool.rows + at, exists);
        scales[t] = LARGEST<T> > 0 && exists ? to_float(pool.scales[scale_at]) : 1.0f;
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        if (t >= c.tokens.count) break;
        float x[PIECES][8];
        unpack(x, loaded[t], scales[t]);
        if (c.hadamard != (c.tokens.of == WINDOW)) hadamard_transform(x);
        if (c.rotates()) rotate_row(x, rotations[t][freq], exchange);
        if (c.tokens.of == ROW) add_mean(x, mean, -1.0f);
        const Fragment<float> row = pack(x);
        const i64 at = c.exempt(t, layer, head);
        if (c.tokens.of == ROW) {
            if (wanted) store_fragment(c.row(t, index), row);
        } else if (c.tokens.of == SINK) {
            if (wanted) store_fragment(c.sinks + at * D, row);
        } else {
            u32 largest[1] = {max_magnitude(row)};
            group_max<LANES>(largest);
            const f16 scale = row_scale<i8, f16>(largest[0] >> 1);
            if (!wanted) continue;
            if (threadIdx.x % LANES == 0) c.window_scales[at] = scale;
            store_codes<true>(c.window + at * D, scale, row, true);
        }
    }
}

#endif

template <typename T> __device__ __forceinline__ T pick(bool second, T a, T b) {
    return second ? b : a;
}

// One of two, field by field: a choice of whole structures would need a stack.
template <typename T>
__device__ __forceinline__ Layers<T> either(bool second, const Layers<T>& k, const Layers<T>& v) {
    const Pool<T>&a = k.pool, &b = v.pool;
    return {{pick(second, a.rows, b.rows), pick(second, a.page, b.page),
             pick(second, a.token, b.token), pick(second, a.head, b.head),
             pick(second, a.scales, b.scales), pick(second, a.scale_page, b.scale_page),
             pick(second, a.scale_token, b.scale_token), pick(second, a.scale_head, b.scale_head)},
            pick(second, k.layer, v.layer),
            pick(second, k.scale_layer, v.scale_layer)};
}

// A head of K or of V, by one code for both where they are of one kind.
template <typename A, typename B>
__device__ __forceinline__ void move_heads(const Call& c, const Layers<A>& k, const Layers<B>& v,
                                           int index, bool wanted, Rotations rotations,
                                           float* exchange) {
    if constexpr (SAME<A, B>) {
        const Layers<A> of_side = either(c.is_v, k, v);
        move_heads(c, of_side, index, wanted, rotations, exchange);
    } else if (c.is_v) {
        move_heads(c, v, index, wanted, rotations, exchange);
    } else {
        move_heads(c, k, index, wanted, rotations, exchange);
    }
}

// --- The kernel ----------------------------------------------------------------------------------

// Blocks on an SM that registers allow.
constexpr int RESIDENT = BACK && __CUDA_ARCH__ >= 750 ? 5 : 4;

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)
kvtc_rows(ROW_FLOAT* rows, f16* sinks, i8* window, f16* window_scales, int* kept_positions,
          K_T* k_pools, V_T* v_pools, SCALE_T* k_scales, SCALE_T* v_scales,
          const int* __restrict__ table, const int* __restrict__ positions,
          const int* __restrict__ places, const f16* __restrict__ mean,
          const float* __restrict__ inv_freq, i64 rows_side, i64 mean_side, int num_sinks,
          int num_rows, int num_window, int num_pages, int layers, int all_layers, int hadamard,
          i64 k_pool_layer, i64 k_pool_page, i64 k_pool_token, i64 k_pool_head,
          i64 v_pool_layer, i64 v_pool_page, i64 v_pool_token, i64 v_pool_head,
          i64 k_scales_layer, i64 k_scales_page, i64 k_scales_token, i64 k_scales_head,
          i64 v_scales_layer, i64 v_scales_page, i64 v_scales_token, i64 v_scales_head) {
    __shared__ Rotation rotations[TOKENS][FREQS][PAIRS + 1];
    __shared__ __align__(16) float exchange[IN_LANE ? 1 : GROUPS][D];
    const Tokens tokens = tokens_of_block(num_sinks, num_rows, num_window);
    const int is_v = blockIdx.z;
    Call c{rows, sinks, window, window_scales, places, mean, rows_side, mean_side, layers,
           all_layers, hadamard, is_v, tokens, {}};
    const bool keeps = !BACK && kept_positions && !is_v && blockIdx.y == 0 && threadIdx.x == 0;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = tokens.first + min(t, tokens.count - 1), position = positions[token];
        if (keeps) kept_positions[token] = position;
        const bool is_listed = position >= 0 && position / PAGE < num_pages && t < tokens.count;
        c.at[t] = Place{is_listed ? table[position / PAGE] : -1, position % PAGE};
    }
    if (c.rotates()) {
        for (int i = threadIdx.x; i < TOKENS * FREQS * PAIRS; i += BLOCK) {
            const int t = i / (FREQS * PAIRS), f = i / PAIRS % FREQS, j = i % PAIRS;
            const double position = positions[tokens.first + min(t, tokens.count - 1)];
            float sine, cosine;
            sin_cos(position * inv_freq[f * PAIRS + j], sine, cosine);
            rotations[t][f][j] = Rotation{cosine, BACK ? sine : -sine};
        }
        __syncthreads();
    }
    const Layers<K_T> of_k{{k_pools, k_pool_page, k_pool_token, k_pool_head,
                            k_scales, k_scales_page, k_scales_token, k_scales_head},
                           k_pool_layer, k_scales_layer};
    const Layers<V_T> of_v{{v_pools, v_pool_page, v_pool_token, v_pool_head,
                            v_scales, v_scales_page, v_scales_token, v_scales_head},
                           v_pool_layer, v_scales_layer};
    const int heads = layers * H, group = threadIdx.x / LANES;
    for (int first = blockIdx.y * GROUPS; first < heads; first += gridDim.y * GROUPS) {
        const bool wanted = first + group < heads;  // idle lanes stay with their warp
        const int head = min(first + group, heads - 1);
        float* const row = exchange[IN_LANE ? 0 : group];
        move_heads(c, of_k, of_v, head, wanted, rotations, row);
    }
}
