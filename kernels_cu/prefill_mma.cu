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
//           score_scale = scale * log2(e), or with SOFT_CAP scale / cap; cap = cap * log2(e)
// Defines:  HEAD_DIM, a multiple of 16 up to 256; Q_T = float, f16 or bf16; K_T, V_T = f16, bf16, i8,
//           i4, e4m3 or e5m2; SCALE_T = f16 or float; SOFT_CAP = 0 or 1
// Launch:   grid ((T * G / ROWS + B) * H), block (128), SHARED_BYTES of dynamic shared memory; both
//           constants are those of pykv/ops/prefill_mma.py
// Traffic:  every ROWS rows read the keys they see; a sequence's K and V mostly hit the L2 cache
// Stack: 88 bytes, of rows of 128 elements or more, whose sums and scores take most registers
// Order:    no atomics; float accumulation in key order
//
// The queries of the G heads of one KV head are rows of one matrix, row = token * G + head, so that
// each key serves them all. A block holds ROWS rows, each warp 16 * ROW_TILES of them throughout, and
// walks tiles of KEYS keys: scores, online softmax, weights times values. The tile after the one at
// work is on its way into shared memory: floats into a second slot, codes into a queue, from which
// the block decodes them, once for all warps, when their tile is free. Scales of keys multiply
// scores, those of values weights. What an operand of mma rounds is kept in further terms where
// queries are finer: then products are as good as those of floats.
#include "batch.cuh"
#include "mma.cuh"
#include "ptx.cuh"
#include "quantize.cuh"
#include "reduce.cuh"
#include "softmax.cuh"

#if !defined(HEAD_DIM) || !defined(Q_T) || !defined(K_T) || !defined(V_T) || !defined(SCALE_T)
#error "prefill_mma.cu needs HEAD_DIM, Q_T, K_T, V_T and SCALE_T"
#endif
#ifndef SOFT_CAP
#define SOFT_CAP 0
#endif

constexpr int D = HEAD_DIM;
static_assert(D % 16 == 0 && D <= 256, "whole steps of mma, and sums that fit the registers");
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr bool K_HAS_CODES = LARGEST<K_T> > 0.0f, V_HAS_CODES = LARGEST<V_T> > 0.0f;
constexpr bool HAS_CODES = K_HAS_CODES || V_HAS_CODES;

// Terms of operands. Coarse queries are those of 16 bits: their result is rounded to as many, so
// sums may stay in the mma, which cuts off what is below their last place.
using KM = Operand<K_T>::Type;
using VM = Operand<V_T>::Type;
constexpr bool Q_IS_16BIT = sizeof(Q_T) == 2;
constexpr bool Q_IS_EXACT = Q_IS_16BIT && IS_BF16<Q_T> == IS_BF16<KM>;
constexpr int Q_TERMS = Q_IS_16BIT ? 1 + (IS_BF16<KM> && !IS_BF16<Q_T>) : 2 + IS_BF16<KM>;
constexpr int P_TERMS = Q_IS_16BIT ? 1 + (IS_BF16<VM> && !IS_BF16<Q_T>) : 2 + IS_BF16<VM>;

constexpr float SMALLEST = 1.1754944e-38f;  // normal number

// --- Sizes ---------------------------------------------------------------------------------------

// Shared memory of an SM, and what a block may have of it; 1 KiB of each block is the system's.
#if __CUDA_ARCH__ < 800
constexpr int SM_BYTES = 64 << 10, SYSTEM_BYTES = 0;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int SM_BYTES = 164 << 10, SYSTEM_BYTES = 1 << 10;
#elif __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int SM_BYTES = 228 << 10, SYSTEM_BYTES = 1 << 10;
#else
constexpr int SM_BYTES = 100 << 10, SYSTEM_BYTES = 1 << 10;
#endif

// With 32 rows a warp uses each word that it loads of a key twice: with 16 loads take as long as
// products. SMs of little shared memory have slower tensor cores, too, which 16 rows keep busy.
constexpr int ROW_TILES = Q_IS_16BIT && (D <= 64 || (D <= 128 && SM_BYTES > 100 << 10)) ? 2 : 1;
constexpr int WARP_ROWS = 16 * ROW_TILES;
constexpr int ROWS = WARPS * WARP_ROWS;

// Rows of BYTES in shared memory such that eight chunks of 16 bytes at one place of consecutive rows
// lie on different banks. Chunks change places within lines of 128 bytes, because a copy of a line
// into parts of two is made twice; rows of other sizes are padded.
template <int BYTES> struct Swizzled {
    static constexpr int CHUNKS = BYTES / 16;
    static constexpr bool HAS_SWIZZLE = CHUNKS % 8 == 0;
    static constexpr int PITCH = BYTES + (CHUNKS % 2 || HAS_SWIZZLE ? 0 : 16);
    static_assert(BYTES % 16 == 0 && PITCH / 16 % 2 + HAS_SWIZZLE > 0, "all banks serve eight rows");

    static __device__ __forceinline__ int place(int row, int chunk) {
        return row * PITCH + (HAS_SWIZZLE ? chunk ^ row % 8 : chunk) * 16;
    }
};
using Halves = Swizzled<2 * D>;

template <typename T> constexpr int RAW_BYTES = D / PACKED<T> * (int)sizeof(T);  // of a row

__device__ constexpr int shared_bytes(int keys) {
    const int tile = keys * Halves::PITCH;
    int bytes = Q_TERMS * ROWS * Halves::PITCH + 4 * ROWS * !Q_IS_EXACT + 8 * keys * HAS_CODES;
    bytes += K_HAS_CODES ? tile + keys * RAW_BYTES<K_T> : 2 * tile;
    bytes += V_HAS_CODES ? tile + keys * RAW_BYTES<V_T> : 2 * tile;
    return bytes;
}

// As many keys as leave room for a second block on the SM, or else for this one.
__device__ constexpr int tile_keys() {
    for (int blocks = 2; blocks > 0; blocks--) {
        for (int keys = D <= 128 ? 64 : 32; keys >= 16; keys /= 2) {
            if (blocks * (shared_bytes(keys) + SYSTEM_BYTES) <= SM_BYTES) return keys;
        }
    }
    return 16;  // the host launches no such kernel
}
constexpr int KEYS = tile_keys();
constexpr int SHARED_BYTES = shared_bytes(KEYS);
constexpr int WARP_KEYS = KEYS / WARPS;  // keys of a tile that a warp copies

constexpr int TILE_BYTES = KEYS * Halves::PITCH;
constexpr int Q_BYTES = Q_TERMS * WARP_ROWS * Halves::PITCH;  // of a warp
constexpr int K_AT = WARPS * Q_BYTES;
constexpr int V_AT = K_AT + (K_HAS_CODES ? 1 : 2) * TILE_BYTES;
constexpr int K_RAW_AT = V_AT + (V_HAS_CODES ? 1 : 2) * TILE_BYTES;
constexpr int V_RAW_AT = K_RAW_AT + (K_HAS_CODES ? KEYS * RAW_BYTES<K_T> : 0);
constexpr int SCALES_AT = V_RAW_AT + (V_HAS_CODES ? KEYS * RAW_BYTES<V_T> : 0);
constexpr int UNITS_AT = SCALES_AT + (HAS_CODES ? 8 * KEYS : 0);
static_assert(UNITS_AT + 4 * ROWS * !Q_IS_EXACT == SHARED_BYTES, "the parts are the whole");

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

// --- Copies --------------------------------------------------------------------------------------

constexpr int COPIES_AT_ONCE = Q_IS_16BIT ? 8 : 1;  // fine queries leave no registers for more

// Starts the copies of this warp's rows of a tile, of codes as they are. `offset` is where lane i
// says row i % MINE begins, in elements; `even`: all at equal steps.
template <typename T>
__device__ __forceinline__ void copy_rows(u8* to, const T* pool, i64 offset, i64 stride, bool even) {
    constexpr bool IS_RAW = LARGEST<T> > 0.0f;
    constexpr int CHUNK = RAW_BYTES<T> % 16 == 0 ? 16 : 8, CHUNKS = RAW_BYTES<T> / CHUNK;
    constexpr int COUNT = WARP_KEYS * CHUNKS;
    const int lane = opaque(threadIdx.x % WARP), mine = threadIdx.x / WARP * WARP_KEYS;
    const auto copy = [&](int row, int chunk, const T* from) {
        const int place = IS_RAW ? (mine + row) * RAW_BYTES<T> + chunk * CHUNK
                                 : Halves::place(mine + row, chunk);
        cp_async<CHUNK>(to + place, (const u8*)from + chunk * CHUNK);
    };
    if (WARP % CHUNKS == 0 && even) {  // the usual case, by steps: products would take registers
        const int row = lane / CHUNKS, chunk = lane % CHUNKS;
        const T* from = pool + (offset + (row - lane % WARP_KEYS) * stride);
#pragma unroll COPIES_AT_ONCE
        for (int step = 0; step < COUNT; step += WARP) {
            if (COUNT % WARP == 0 || step + lane < COUNT) copy(row + step / CHUNKS, chunk, from);
            from += WARP / CHUNKS * stride;
        }
    } else {
#pragma unroll 1
        for (int step = 0; step < COUNT; step += WARP) {
            const int row = (step + lane) / CHUNKS, chunk = (step + lane) % CHUNKS;
            const T* from = pool + __shfl_sync(FULL_MASK, offset, row % WARP_KEYS);
            if (COUNT % WARP == 0 || step + lane < COUNT) copy(row, chunk, from);
        }
    }
}

// Eight codes as f16, in their order.
template <typename T> __device__ __forceinline__ void word_to_halves(u32* to, u32 word) {
    constexpr int PAIRS = PER_WORD<T> / 2;
    u32 pairs[PAIRS];
    to_pairs(pairs, word, T{});
#pragma unroll
    for (int p = 0; p < PAIRS; p += 2) {
        if constexpr (PAIRS_ADJACENT<T>) {
            to[p] = pairs[p], to[p + 1] = pairs[p + 1];
        } else {
            to[p / 2] = __byte_perm(pairs[p], pairs[p + 1], 0x5410);
            to[(p + PAIRS) / 2] = __byte_perm(pairs[p], pairs[p + 1], 0x7632);
        }
    }
}

template <typename T> __device__ __forceinline__ uint4 to_halves(const Eight<T>& eight) {
    u32 words[4];
    if constexpr (PACKED<T> == 2) {
        word_to_halves<T>(words, eight.words);
    } else {
        word_to_halves<T>(words, eight.words.x);
        word_to_halves<T>(words + 2, eight.words.y);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T> __device__ __forceinline__ void decode_tile(u8* tile, const u8* raw) {
    if constexpr (LARGEST<T> > 0.0f) {
        constexpr int EIGHTS = D / 8;
#pragma unroll 2
        for (int i = threadIdx.x; i < KEYS * EIGHTS; i += THREADS) {
            const Eight<T> eight = get8((const T*)raw + i * (8 / PACKED<T>));
            *(uint4*)(tile + Halves::place(i / EIGHTS, i % EIGHTS)) = to_halves<T>(eight);
        }
    }
}

// --- Operands ------------------------------------------------------------------------------------

// Where a lane points ldmatrix: at row `row` of some rows, chunk `upper` of pairs of chunks. Rows of
// other matrices are constants away.
struct Reader {
    const u8* row;
    u32 step;

    __device__ __forceinline__ Reader(const u8* rows, int row, int upper)
        : row(rows + row * Halves::PITCH), step((Halves::HAS_SWIZZLE ? upper ^ row % 8 : upper) * 16) {}

    __device__ __forceinline__ const u8* at(int pair) const {
        return Halves::HAS_SWIZZLE ? row + (pair % 4 * 32 ^ step) + pair / 4 * 128 : row + step + pair * 32;
    }
};

// Rounds this warp's queries into shared memory, in terms; their factor makes up for the sign of
// the scale and, where f16 would not hold what q may be, makes the largest of a row 128 to 256:
// `units` then is what a 1 stands for.
__device__ __forceinline__ void load_queries(u8* to, float* units, const Q_T* q, i64 q_stride, int G,
                                             int kv_head, const RowBlock& rows, float sign) {
    constexpr int LANES = D <= 16 ? 2 : D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32;  // of a row
    const int chunk = threadIdx.x % LANES;
    const bool has_chunk = chunk < D / 8;
    const Q_T* first = q + rows.start * q_stride + (i64)kv_head * G * D + (has_chunk ? chunk * 8 : 0);
#pragma unroll 4
    for (int step = 0; step < WARP_ROWS * LANES / WARP; step++) {
        const int row = step * (WARP / LANES) + threadIdx.x % WARP / LANES;
        const int in_block = threadIdx.x / WARP * WARP_ROWS + row;
        const int in_group = rows.first_row + min(in_block, rows.num_rows - 1);
        float x[8];
        load8(x, first + in_group / G * q_stride + in_group % G * D);
        float factor = sign;
        if constexpr (!Q_IS_EXACT) {
            u32 largest[1] = {0};
#pragma unroll
            for (int i = 0; i < 8; i++) largest[0] = max(largest[0], __float_as_uint(x[i]) << 1 >> 1);
            group_max<LANES>(largest);
            const u32 exponent = max(largest[0] >> 23, 8u);
            factor *= __uint_as_float((261u - exponent) << 23);
            if (chunk == 0) units[in_block] = __uint_as_float((exponent - 7u) << 23);
        }
        u32 words[Q_TERMS][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float two[2] = {x[2 * i] * factor, x[2 * i + 1] * factor};
#pragma unroll
            for (int term = 0; term < Q_TERMS; term++) words[term][i] = split_halves<KM>(two);
        }
#pragma unroll
        for (int term = 0; term < Q_TERMS; term++) {
            const u32(&w)[4] = words[term];
            if (has_chunk) {
                *(uint4*)(to + Halves::place(term * WARP_ROWS + row, chunk)) =
                    make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
}
#endif

// --- Kernel --------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
prefill_mma(Q_T* __restrict__ out, float* __restrict__ lse, const Q_T* __restrict__ q,
            const K_T* __restrict__ k_pool, const V_T* __restrict__ v_pool,
            const SCALE_T* __restrict__ k_scales, const SCALE_T* __restrict__ v_scales,
            const int* __restrict__ page_table, const int* __restrict__ lengths,
            const int* __restrict__ q_starts, i64 q_stride, i64 k_page, i64 k_token, i64 k_head,
            i64 v_page, i64 v_token, i64 v_head, i64 ks_page, i64 ks_token, i64 ks_head, i64 vs_page,
            i64 vs_token, i64 vs_head, int B, int HQ, int H, int P, int M, int capacity, int causal,
            int window, float score_scale, float cap) {
#if __CUDA_ARCH__ >= 750
    extern __shared__ __align__(128) u8 shared[];  // see Spread
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int g = lane / 4, t = lane % 4;  // as in the fragments of mma

    // Long rows start first, so that they do not run alone at the end.
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
    const int begin = first_of(0), end = last_of(ROWS - 1) + 1;  // of the block
    const int warp_row = warp * WARP_ROWS;
    const int full_begin = first_of(warp_row + WARP_ROWS - 1);  // keys that all of a warp see
    const int full_end = warp_row < rows.num_rows ? last_of(warp_row) + 1 : 0;

    float* const tile_scales = (float*)(shared + SCALES_AT);  // of keys, then of values
    const bool pages_are_even = P % WARP_KEYS == 0;  // no page ends between a warp's rows

    // The page and token of row lane % MINE of this warp's in the tile that is copied next, and the
    // scale of its key, or in upper lanes of its value.
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
        copy_rows(k_to, k_pool, page * k_page + token * k_token + kv_head * k_head, k_token, even);
        copy_rows(v_to, v_pool, page * v_page + token * v_token + kv_head * v_head, v_token, even);
        cp_async_commit();
        if (K_HAS_CODES && lane < WARP_KEYS) {
            next_scale = to_float(k_scales[page * ks_page + token * ks_token + kv_head * ks_head]);
        }
        if (V_HAS_CODES && lane >= WARP_KEYS && lane < 2 * WARP_KEYS) {
            next_scale = to_float(v_scales[page * vs_page + token * vs_token + kv_head * vs_head]);
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

    // This lane's rows: 8 * r + g of the warp's. Scores times factor_of(r) are exponents of 2; they
    // are taken relative to m, the maximum to within a factor of 2^8 of the weights, so that it
    // seldom moves. l: the sum of the weights of this lane's keys.
    constexpr int R = 2 * ROW_TILES;
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
    // Values are weighted relative to `scale_unit`, a power of two above all their scales so far,
    // because f16 would not hold what the scales themselves may be.
    float scale_unit = V_HAS_CODES ? __uint_as_float(27u << 23) : 1.0f;
    const auto inverse_unit = [&] {
        return __uint_as_float((254u << 23) - __float_as_uint(scale_unit));
    };

    const Reader of_queries(queries, lane % 16, lane / 16);

#pragma unroll 1
    for (int tile = first_tile; tile < tile_end; tile++) {
        const int slot = tile % 2;
        cp_async_wait<0>();
        __syncthreads();  // this tile is here, and the last one is used up
        if constexpr (HAS_CODES) {
            decode_tile<K_T>(shared + K_AT, shared + K_RAW_AT);
            decode_tile<V_T>(shared + V_AT, shared + V_RAW_AT);
            if (lane < 2 * WARP_KEYS) {
                tile_scales[lane / WARP_KEYS * KEYS + warp * WARP_KEYS + lane % WARP_KEYS] = next_scale;
            }
            __syncthreads();
        }
        if (tile + 1 < tile_end) {
            copy(tile + 1, slot ^ 1);
            if (tile + 2 < tile_end) find(tile + 2);
        }
        const int first = tile * KEYS;
        const bool is_full = first >= full_begin && first + KEYS <= full_end;
        if (!is_full) {  // perhaps no row sees any
            if (warp_row >= rows.num_rows || first > last_of(warp_row + WARP_ROWS - 1)) continue;
            if (first + KEYS <= first_of(warp_row)) continue;
        }

        const u8* k_tile = shared + K_AT + (K_HAS_CODES ? 0 : slot * TILE_BYTES);
        const u8* v_tile = shared + V_AT + (V_HAS_CODES ? 0 : slot * TILE_BYTES);
        const Reader of_keys(k_tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
        const Reader of_values(v_tile, lane % 16, lane / 16);

        // Scores: of further terms apart, so that what the mma cuts off stays small.
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
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            float2 scale;
            if (K_HAS_CODES) scale = *(const float2*)(tile_scales + 8 * n + 2 * t);
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float& score = x[i][n][c];
                    if (!Q_IS_16BIT) score += low[i][n][c];
                    if (K_HAS_CODES) score *= c % 2 ? scale.y : scale.x;
#if SOFT_CAP
                    score = tanhf(score * factor[2 * i + c / 2]);
#endif
                }
            }
        }
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

        bool grows = false;
        float largest[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            float peak = -INF;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                const float(&four)[4] = x[r / 2][n];
                peak = fmaxf(peak, fmaxf(four[r % 2 * 2], four[r % 2 * 2 + 1]));
            }
            largest[r] = peak * (SOFT_CAP ? cap : factor[r]);
            grows |= largest[r] > m[r] + 8.0f;
        }
        float v_scale = 0.0f;
        if constexpr (V_HAS_CODES) {
#pragma unroll
            for (int i = 0; i < KEYS; i += WARP) {
                v_scale = fmaxf(v_scale, fabsf(tile_scales[KEYS + i + lane % min(KEYS, WARP)]));
            }
            grows |= v_scale > scale_unit;
        }
        if (__any_sync(FULL_MASK, grows)) {
            float rescale_values = 1.0f;
            if constexpr (V_HAS_CODES) {
                const u32 exponent = min(__float_as_uint(warp_max(v_scale)) >> 23, 252u) + 1;
                rescale_values = scale_unit;
                scale_unit = fmaxf(scale_unit, __uint_as_float(exponent << 23));
                rescale_values *= inverse_unit();
            }
#pragma unroll
            for (int r = 0; r < R; r++) {
                float peak = fmaxf(m[r], largest[r]);
                peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, 1));
                peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, 2));
                const float rescale = exp2_ftz(m[r] - finite_base(peak));
                m[r] = peak;
                l[r] *= rescale;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    float(&four)[4] = sums[r / 2][n];
                    four[r % 2 * 2] *= rescale * rescale_values;
                    four[r % 2 * 2 + 1] *= rescale * rescale_values;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float base = finite_base(m[r]);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int c = r % 2 * 2; c < r % 2 * 2 + 2; c++) {
                    float& weight = x[r / 2][n][c];
                    weight = exp2_ftz(fmaf(weight, SOFT_CAP ? cap : factor[r], -base));
                    l[r] += weight;
                }
            }
        }

        // Values. Fine sums leave the mma at every step, before it cuts off anything.
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            if (!Q_IS_16BIT) schedule_fence();  // or too many steps at once would spill registers
            u32 a[P_TERMS][ROW_TILES][4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float2 scale;
                if constexpr (V_HAS_CODES) {
                    scale = *(const float2*)(tile_scales + KEYS + 8 * (n + j) + 2 * t);
                    scale.x *= inverse_unit(), scale.y *= inverse_unit();
                }
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

    // The warp's rows take the place of its queries, so that whole lines leave.
    using Outputs = Swizzled<D * (int)sizeof(Q_T)>;
    static_assert(WARP_ROWS * Outputs::PITCH <= Q_BYTES, "they fit");
    __syncwarp();  // all have read their queries
#pragma unroll
    for (int r = 0; r < R; r++) {
        l[r] += __shfl_xor_sync(FULL_MASK, l[r], 1);
        l[r] += __shfl_xor_sync(FULL_MASK, l[r], 2);
        const int row = 8 * r + g, in_group = rows.first_row + warp_row + row;
        if (lse && t == 0 && warp_row + row < rows.num_rows) {
            const i64 at = (i64)(rows.start + in_group / G) * HQ + kv_head * G + in_group % G;
            lse[at] = l[r] == 0.0f ? -INF : m[r] * LN_2 + logf(l[r]);
        }
        const float unit = l[r] == 0.0f ? 0.0f : scale_unit / PAIR_UNIT<V_T>;
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
#pragma unroll 4
    for (int i = lane; i < WARP_ROWS * Outputs::CHUNKS; i += WARP) {
        const int row = i / Outputs::CHUNKS, chunk = i % Outputs::CHUNKS;
        const int in_group = rows.first_row + warp_row + row;
        if (warp_row + row < rows.num_rows) {
            const i64 at = (i64)(rows.start + in_group / G) * HQ + kv_head * G + in_group % G;
            *(uint4*)((u8*)(out + at * D) + chunk * 16) =
                *(const uint4*)(queries + Outputs::place(row, chunk));
        }
    }
#endif
}
