// paged_decode_mma.cu: paged_decode on tensor cores, from sm_75 on; bf16 pools from sm_80 on.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/paged_decode.py; T queries of
// each sequence, the last ones of its keys):
//   out                        [B, T, HQ, D] Q_T
//   lse                        [B, T, HQ] float  log-sum-exp; may be null
//   workspace                  COUNTERS u32, 0 before and after; sums of values [slots, TILES, R, D]
//                              float; (maximum, sum of weights) [slots, TILES, R] float2. TILES =
//                              H * ceil(G * T / 8), R = min(G * T, 8) rows of a tile
//   q                   const  [B, T, HQ, D] Q_T, strides of B and T in elements
//   k_pool, v_pool      const  [N, P, H, D] in any order, strides of page, token and head in array
//                              elements: K_T, V_T
//   k_scales, v_scales  const  [N, P, H], likewise, stride 0 where they are shared; SCALE_T
//   page_table          const  [B, M] int32, read where the sequence has visible keys alone
//   lengths             const  [B] int32, clamped to 0 .. capacity
//   slopes, sinks       const  [HQ] float, with ALIBI and SINKS; tree const [B, T] u64 with TREE
// Scalars:  behind = T - 1 where query t sees the keys up to its own, 0 where all see all of them;
//           capacity = M * P; window = number of last keys seen, INT_MAX for all; piece_tiles = tiles
//           of a piece, 0 where blocks cut the keys among them; slots of the workspace; score_scale
//           = scale * log2(e), or with SOFT_CAP scale / cap; cap = cap * log2(e); lse_unit = ln 2
//           for natural logarithms, 1 for those of base 2
// Defines:  HEAD_DIM, a multiple of 16 up to 256 for which a lane's part of a row (Share) is made of
//           whole words; PAGE = P; Q_T = float, f16 or bf16; K_T, V_T = f16, bf16, i8, i4, e4m3 or
//           e5m2; SCALE_T = f16 or float; SOFT_CAP, ALIBI, SINKS, TREE = 0 or 1; ROW_SCALES = 0
//           where all tokens share a head's scales, else 1; ALONE = 1 for B = 1 and piece_tiles =
//           0, else 0; CLUSTER = 8, with ALONE from sm_90 on, or 1
// Launch:   grid (ceil(G * T / 8), H, ranges), at most COUNTERS blocks where ranges > 1; with CLUSTER
//           = 8 as many ranges, in clusters (1, 1, 8), and no workspace; block (128);
//           WARPS * (QUEUE_BYTES + Q_BYTES + R * (4 * PITCH + 8)) bytes of dynamic shared memory,
//           PITCH = D + 16 where D is a multiple of 32, else D; but below sm_80, for D up to 128,
//           WARPS * max(QUEUE_BYTES, R * (4 * PITCH + 8))
// Traffic:  K and V once for each tile of 8 query rows of a KV head, scales and page table; two
//           states of R * (D + 2) floats a block, written and read
// Stack: 80 bytes, from sm_80 on outside the loop over keys: of rows of 256 elements, whose sums
//           alone fill half of the registers, and there of codes with 16-bit queries, of which an SM
//           runs three blocks
// Order:    a counter decides which block merges a row, always in the order of its keys: same bits
//           for the same lengths and grid; with piece_tiles for any batch and grid
//
// A tile is up to eight query rows (heads of a group, times queries) of one KV head. The blocks of a
// tile share the keys of all sequences, laid end to end, evenly: each derives its range from the
// lengths. Within it a warp takes every fourth KEYS keys. Rows 0 to 7 of the matrix A of an mma are
// the query rows, or their probabilities, rounded; rows 8 to 15 are what rounding left, so that
// products are as good as those of floats. Lanes load what they need of B, and nothing else: any
// order of the keys and of the head's elements will do, as long as A follows it. So shared memory is
// a queue of each lane for itself, and warps meet at the end of a piece only.
#include "mma.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "vector.cuh"

#if !defined(HEAD_DIM) || !defined(PAGE) || !defined(Q_T) || !defined(K_T) || !defined(V_T) || \
    !defined(SCALE_T)
#error "paged_decode_mma.cu needs HEAD_DIM, PAGE, Q_T, K_T, V_T and SCALE_T"
#endif
#ifndef SOFT_CAP
#define SOFT_CAP 0
#endif
#ifndef ALIBI
#define ALIBI 0
#endif
#ifndef SINKS
#define SINKS 0
#endif
#ifndef TREE
#define TREE 0
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

constexpr int D = HEAD_DIM;
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = 8;  // of queries in a tile
constexpr bool K_HAS_CODES = LARGEST<K_T> > 0.0f, V_HAS_CODES = LARGEST<V_T> > 0.0f;
constexpr bool HAS_CODES = K_HAS_CODES || V_HAS_CODES;
constexpr bool K_ROW_SCALES = K_HAS_CODES && ROW_SCALES, V_ROW_SCALES = V_HAS_CODES && ROW_SCALES;
constexpr int KEYS = HAS_CODES && D <= 128 ? 32 : 16;  // of a tile; more would spill registers
constexpr int MIN_KEYS = 128;  // of a range; less is not worth a merge
constexpr int COUNTERS = 4096;
static_assert(D % 16 == 0 && D <= 256, "whole steps of mma, and sums that fit the registers");

// What one of N lanes holds of a row: COUNT pieces, piece i of lane l at (i * N + l) * BYTES.
template <typename T, int N> struct Fragment {
    static constexpr int LANES = N;
    static constexpr int ROW_BYTES = D / PACKED<T> * (int)sizeof(T) / N;
    static constexpr int BYTES = ROW_BYTES % 16 == 0 ? 16 : ROW_BYTES % 8 == 0 ? 8 : 4;
    static constexpr int COUNT = ROW_BYTES / BYTES;
    static constexpr int WORDS = BYTES / 4;
    static constexpr int ELEMENTS = WORDS * PER_WORD<T>;
    static_assert(ROW_BYTES % 4 == 0 && ELEMENTS * COUNT * N == D, "whole words");
};
using KFragment = Fragment<K_T, 4>;  // of one key for each lane / 4
using VFragment = Fragment<V_T, 8>;  // of four keys for each lane % 4

// Bytes from a row to the next in shared memory. No row of up to 128 bytes crosses a line there, or
// what it takes of one line of global memory would be two requests.
template <int ROW>
constexpr int PITCH_OF = ROW > 128 ? ROW : ROW > 64 ? 128 : ROW > 32 ? 64 : ROW > 16 ? 32 : 16;
constexpr int K_BYTES = KEYS * PITCH_OF<KFragment::ROW_BYTES * 4>;
constexpr int V_BYTES = KEYS * PITCH_OF<VFragment::ROW_BYTES * 8>;

// From sm_80 on copies to shared memory run by themselves, into a queue of keys and one of values.
// Before, registers hold what was asked for until the one queue that there is has room for it.
constexpr bool HAS_CP_ASYNC = __CUDA_ARCH__ >= 800;
constexpr int MAX_BYTES = K_BYTES > V_BYTES ? K_BYTES : V_BYTES;
constexpr int STAGE_BYTES = HAS_CP_ASYNC ? K_BYTES + V_BYTES : MAX_BYTES;  // of a warp

// Blocks that share an SM: of codes more, because to convert them takes longer than to load them.
constexpr int BLOCKS = HAS_CODES && D <= 128 && sizeof(Q_T) == 2 && HAS_CP_ASYNC ? 3 : 2;

// What an mma's operands round is kept in further terms where queries are finer.
using KM = Operand<K_T>::Type;
using VM = Operand<V_T>::Type;
constexpr bool Q_IS_EXACT = sizeof(Q_T) == 2 && IS_BF16<Q_T> == IS_BF16<KM>;
constexpr bool Q_HAS_LOW = sizeof(Q_T) == 4 || (IS_BF16<KM> && !IS_BF16<Q_T>);
constexpr bool Q_HAS_REST = sizeof(Q_T) == 4 && IS_BF16<KM>;
constexpr bool P_HAS_REST = sizeof(Q_T) == 4 && IS_BF16<VM>;

// What the host gets is rounded to 16 bits: then sums may stay in the mma, which cuts off what is
// below their last place, and integer codes need not become floats one by one.
constexpr bool Q_IS_16BIT = sizeof(Q_T) == 2;
template <typename T, bool> struct Encoding { using Type = T; };
template <> struct Encoding<i8, true> { using Type = Subnormal<i8>; };
template <> struct Encoding<i4, true> { using Type = Subnormal<i4>; };
using KE = Encoding<K_T, Q_IS_16BIT>::Type;
using VE = Encoding<V_T, Q_IS_16BIT>::Type;
constexpr bool K_IS_SUBNORMAL = SUBNORMAL_ZERO<KE> > 0.0f, V_IS_SUBNORMAL = SUBNORMAL_ZERO<VE> > 0.0f;
constexpr float SUBNORMAL_UNIT = 16777216.0f;  // 2^24

// --- Work: which keys are whose ------------------------------------------------------------------

// The keys that the queries of a sequence see, in tiles of KEYS and in units, at least one, of which
// ranges are made.
struct Visible { int length, first, tile, tile_end, units; };

struct Batch {
    const int* lengths;
    int size, capacity, window, behind, unit_tiles;

    __device__ __forceinline__ Visible visible(int b) const {
        Visible s;
        s.length = max(0, min(lengths[b], capacity));
        s.first = (int)max((i64)s.length - behind - window, (i64)0);
        s.tile = s.first / KEYS;
        s.tile_end = s.length / KEYS + (s.length % KEYS != 0);
        s.units = max(1, (s.tile_end - s.tile + unit_tiles - 1) / unit_tiles);
        return s;
    }
};

// Units of the sequences from `first` on, of which each lane takes `some`: of its own, and of all up
// to them.
struct Scan {
    int units = 0, inclusive;

    __device__ __forceinline__ Scan(const Batch& batch, int first, int per_lane) {
        const int lane = threadIdx.x % WARP;
        const int from = first + lane * per_lane, end = min(from + per_lane, batch.size);
#pragma unroll 4  // so that loads do not wait for each other
        for (int b = from; b < end; b++) units += batch.visible(b).units;
        inclusive = units;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int below = __shfl_up_sync(FULL_MASK, inclusive, step);
            if (lane >= step) inclusive += below;
        }
    }

    __device__ __forceinline__ int total() const { return __shfl_sync(FULL_MASK, inclusive, WARP - 1); }
};

// Part of a range that lies in one sequence.
struct Piece {
    int b, start;     // the sequence, and the unit at which it begins
    int unit, count;  // the piece's first unit, and how many it has
    int tile, tile_end;
    Visible visible;
};

__device__ __forceinline__ Piece piece_at(const Batch& batch, int b, int start, int unit, int end,
                                          bool one_unit) {
    Piece p{b, start, unit, 1, 0, 0, batch.visible(b)};
    if (!one_unit) p.count = min(end, start + p.visible.units) - unit;
    p.tile = p.visible.tile + (unit - start) * batch.unit_tiles;
    p.tile_end = min(p.tile + p.count * batch.unit_tiles, p.visible.tile_end);
    return p;
}

// The first piece of a range, found by every warp for itself. `scan` is that of all sequences, `some`
// a lane: its lane is found, and then the sequence among those of that lane.
__device__ __forceinline__ Piece first_piece(const Batch& batch, Scan scan, int per_lane, int begin,
                                             int end, bool one_unit) {
    int first = 0, start = 0;
    for (;;) {
        const int found = __ffs(__ballot_sync(FULL_MASK, start + scan.inclusive > begin)) - 1;
        first += found * per_lane;
        start += __shfl_sync(FULL_MASK, scan.inclusive - scan.units, found);
        if (per_lane == 1) return piece_at(batch, first, start, begin, end, one_unit);
        per_lane = (per_lane + WARP - 1) / WARP;
        scan = Scan(batch, first, per_lane);
    }
}

// --- Copies: from pages to this lane's queue -----------------------------------------------------

constexpr bool TILES_IN_PAGES = PAGE % 16 == 0;  // sixteen keys from a multiple of 16 on share one
constexpr int PAGE_IDS = TILES_IN_PAGES ? KEYS / 16 : 1;

// One sequence's pages; of keys beyond `first` .. `last` these are found instead.
struct Table {
    const int* pages;
    int first, last;

    __device__ __forceinline__ u32 key(int k) const { return max(first, min(k, last)); }
    __device__ __forceinline__ int page(int k) const { return __ldg(pages + key(k) / PAGE); }

    __device__ __forceinline__ bool contains(int tile) const {
        return tile * KEYS >= first && tile * KEYS + KEYS - 1 <= last;
    }
    __device__ __forceinline__ bool contains_key(int k) const { return k >= first && k <= last; }

    // The pages of a tile: of each 16 keys, or else of this lane's key.
    __device__ __forceinline__ void find(int (&ids)[PAGE_IDS], int tile) const {
#pragma unroll
        for (int i = 0; i < PAGE_IDS; i++) {
            ids[i] = page(tile * KEYS + (TILES_IN_PAGES ? 16 * i : threadIdx.x % KEYS));
        }
    }
};

// The rows of one KV head, or their scales. The host keeps strides of pages and tokens below 2^32
// bytes: then an address takes two instructions, where that of 64-bit strides would take seven.
template <typename T> struct Rows {
    const u8* at;
    u32 page_bytes, token_bytes;

    __device__ __forceinline__ Rows(const T* pool, int page, int token, i64 head, int kv_head)
        : at((const u8*)(pool + kv_head * head)), page_bytes((u32)page * sizeof(T)),
          token_bytes((u32)token * sizeof(T)) {}

    __device__ __forceinline__ const T* row(int page, u32 key) const {
        return (const T*)(at + (u64)(u32)page * page_bytes + (u64)(key % PAGE) * token_bytes);
    }
};

// How the rows of a tile lie in shared memory. The lanes of a warp copy them together, so that what
// they ask for at once are whole lines: the L2 cache answers half lines at half the rate. Chunks of
// 16 bytes change places, by `turn`, so that lanes that read several rows at once use all banks.
template <typename S> struct StageLayout {
    static constexpr int ROW = S::ROW_BYTES * S::LANES;
    static constexpr int PITCH = PITCH_OF<ROW>;
    static constexpr int CHUNK = 16;
    static constexpr int CHUNKS = ROW / CHUNK;
    static constexpr int OF_LANE = KEYS * CHUNKS / WARP;  // chunks that a lane copies of a tile
    static constexpr bool HAS_SWIZZLE = PITCH >= 128 && (PITCH & (PITCH - 1)) == 0;
    static constexpr bool IS_KEYS = S::LANES == 4;
    static_assert(ROW % CHUNK == 0 && KEYS * CHUNKS % WARP == 0, "all lanes copy whole chunks");

    // Of the i-th of this lane's chunks.
    static __device__ __forceinline__ int row(int i) {
        const int lane = threadIdx.x % WARP;
        if (WARP % CHUNKS == 0) return i * (WARP / CHUNKS) + lane / CHUNKS;
        return (i * WARP + lane) / CHUNKS;
    }
    static __device__ __forceinline__ int chunk(int i) {
        const int lane = threadIdx.x % WARP;
        return WARP % CHUNKS == 0 ? lane % CHUNKS : (i * WARP + lane) % CHUNKS;
    }

    // Of keys lanes read READ chunks each of as many rows, one behind the other, as use all banks;
    // of values two chunks each of rows r, r + 2, r + 4 and r + 6.
    static constexpr int READ = S::BYTES / 4;
    static __device__ __forceinline__ int swizzle(int row) {
        return !HAS_SWIZZLE ? 0 : IS_KEYS ? row % (8 / READ) * READ : row / 2 % 4 * 2;
    }
    static __device__ __forceinline__ int place(int row, int chunk) {
        return row * PITCH + (chunk ^ swizzle(row)) * CHUNK;
    }
    // Piece i of lane `part`.
    static __device__ __forceinline__ int place_of(int row, int i, int part) {
        const int byte = (i * S::LANES + part) * S::BYTES;
        return place(row, byte / CHUNK) + byte % CHUNK;
    }
};

// Calls copy(i, place, from) for this lane's chunks of a tile, of which this is the i-th, or where
// copies run any. A key that the table does not hold is replaced by one that it does; or where copies
// do not run, may come as it is, for `put` to clear.
template <typename S, typename T, typename Copy>
__device__ __forceinline__ void copy_tile(const Rows<T>& rows, const Table& table,
                                          const int (&ids)[PAGE_IDS], int tile, Copy copy) {
    using At = StageLayout<S>;
    // A warp copies AT_ONCE whole rows by COPIES chunks a lane.
    constexpr int COPIES = At::CHUNKS / (At::CHUNKS & -At::CHUNKS);
    constexpr int AT_ONCE = WARP * COPIES / At::CHUNKS;
    constexpr bool BY_STEPS = TILES_IN_PAGES && AT_ONCE <= 16;
    const int lane = threadIdx.x % WARP;
    if constexpr (BY_STEPS) {
        if (!HAS_CP_ASYNC || table.contains(tile)) {  // with few instructions, which count
            const int row = lane / At::CHUNKS, chunk = lane % At::CHUNKS;
            const u64 offset = (u64)row * rows.token_bytes + chunk * At::CHUNK;
#pragma unroll
            for (int s = 0; s < KEYS / 16; s++) {
                const u8* from = (const u8*)rows.row(ids[s], tile * KEYS + 16 * s) + offset;
#pragma unroll
                for (int i = 16 * s; i < 16 * s + 16; i += AT_ONCE) {
                    copy(i / AT_ONCE * COPIES, At::place(i + row, chunk), from);
#pragma unroll
                    for (int j = 1; j < COPIES; j++) {
                        const int down = At::row(j) - row, right = At::chunk(j) - chunk;
                        const u64 beyond = (u64)down * rows.token_bytes + right * At::CHUNK;
                        copy(i / AT_ONCE * COPIES + j, At::place(i + row + down, chunk + right),
                             from + beyond);
                    }
                    from += (u64)rows.token_bytes * AT_ONCE;
                }
            }
            return;
        }
    }
    const auto copy_chunk = [&](int i, int n) {
        const int row = n / At::CHUNKS, chunk = n % At::CHUNKS;
        int page = ids[0];
        if (!TILES_IN_PAGES) {
            page = __shfl_sync(FULL_MASK, page, row);
        } else if (row >= 16) {
            page = ids[PAGE_IDS - 1];
        }
        const u8* from = (const u8*)rows.row(page, table.key(tile * KEYS + row));
        copy(i, At::place(row, chunk), from + chunk * At::CHUNK);
    };
    if constexpr (BY_STEPS) {
#pragma unroll 1
        for (int n = lane; n < KEYS * At::CHUNKS; n += WARP) copy_chunk(0, n);
    } else {
#pragma unroll
        for (int i = 0; i < At::OF_LANE; i++) copy_chunk(i, i * WARP + lane);
    }
}

template <int WORDS> __device__ __forceinline__ void load_words(u32 (&w)[WORDS], const u8* from) {
    if constexpr (WORDS == 4) {
        const uint4 x = *reinterpret_cast<const uint4*>(from);
        w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
    } else if constexpr (WORDS == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        w[0] = x.x, w[1] = x.y;
    } else {
        w[0] = *reinterpret_cast<const u32*>(from);
    }
}

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

// --- What is multiplied: queries, keys, values ---------------------------------------------------

// One query row, as pairs of A in the order in which `to_pairs` pairs the elements of K. Long ones
// wait in shared memory, in this lane's place, for want of registers.
constexpr int TERMS = 1 + Q_HAS_LOW + Q_HAS_REST;
constexpr bool Q_IN_SHARED = D > 128;
constexpr int Q_BYTES = Q_IN_SHARED ? TERMS * D * 16 : 0;  // of a warp

struct Query {
    uint2 steps[TERMS][Q_IN_SHARED ? 1 : D / 16];  // of four elements
    uint2* shared;
    float unit;  // of the pairs: f16 would not hold all that q may be
    float sum;   // of them

    __device__ __forceinline__ uint2 step(int term, int i) const {
        if constexpr (Q_IN_SHARED) return shared[(term * (D / 16) + i) * WARP];
        return steps[term][Q_IN_SHARED ? 0 : i];
    }
};

__device__ __forceinline__ void load_query(Query& q, const Q_T* row, bool is_row) {
    using S = KFragment;
    float x[D / 4];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < D / 4; i += 4) {
        const int d = i / S::ELEMENTS * S::ELEMENTS * 4 + threadIdx.x % 4 * S::ELEMENTS;
        float four[4] = {};
        if (is_row) load4(four, row + d + i % S::ELEMENTS);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[i + j] = four[j];
            largest = max(largest, __float_as_uint(four[j]) & 0x7fffffffu);
        }
    }
    float factor = 1.0f;
    q.unit = 1.0f;
    if constexpr (!Q_IS_EXACT) {  // the largest becomes 128 to 256
        largest = max(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
        largest = max(largest, __shfl_xor_sync(FULL_MASK, largest, 2));
        const u32 exponent = max(largest >> 23, 8u);
        factor = __uint_as_float((261u - exponent) << 23);
        q.unit = __uint_as_float((exponent - 7u) << 23);
    }
    q.sum = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        u32 pairs[TERMS][2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            constexpr int PAIRS = PER_WORD<K_T> / 2;
            const int p = 2 * i + j, word = p / PAIRS * PER_WORD<K_T>;
            float two[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                two[k] = x[word + element_of_pair<KE>(p % PAIRS, k)] * factor;
                two[k] *= 1.0f / subnormal_factor<KE>(p % PAIRS);
                q.sum += two[k] * subnormal_factor<KE>(p % PAIRS);
            }
#pragma unroll
            for (int term = 0; term < TERMS; term++) pairs[term][j] = split_halves<KM>(two);
            // What was rounded away is no part of the products.
            q.sum -= (two[0] + two[1]) * subnormal_factor<KE>(p % PAIRS);
        }
#pragma unroll
        for (int term = 0; term < TERMS; term++) {
            const uint2 step = make_uint2(pairs[term][0], pairs[term][1]);
            if constexpr (Q_IN_SHARED) q.shared[(term * (D / 16) + i) * WARP] = step;
            else q.steps[term][Q_IN_SHARED ? 0 : i] = step;
        }
    }
    if constexpr (K_IS_SUBNORMAL) {
        q.sum += __shfl_xor_sync(FULL_MASK, q.sum, 1);
        q.sum += __shfl_xor_sync(FULL_MASK, q.sum, 2);
    }
}

// What a lane holds of the keys of a tile, and of its values: out of shared memory, which the copies
// of the next tile may fill while this one is worked on.
struct Keys { u32 words[KEYS / 8][KFragment::COUNT][KFragment::WORDS]; };
struct Values { u32 words[KEYS / 4][VFragment::COUNT][VFragment::WORDS]; };

// Of key 8n + g.
__device__ __forceinline__ void load_keys(Keys& keys, const u8* stage) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < KFragment::COUNT; i++) {
            const int place = StageLayout<KFragment>::place_of(8 * n + lane / 4, i, lane % 4);
            load_words(keys.words[n][i], stage + place);
        }
    }
}

// Of keys 2t, 2t + 1, 2t + 8 and 2t + 9 of each sixteen.
__device__ __forceinline__ void load_values(Values& values, const u8* stage) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < KEYS / 4; n++) {
        const int row = n / 4 * 16 + n % 2 + n / 2 % 2 * 8;  // from 2t on; it takes the same turn
#pragma unroll
        for (int i = 0; i < VFragment::COUNT; i++) {
            const int place = StageLayout<VFragment>::place_of(lane % 4 * 2, i, lane / 4);
            load_words(values.words[n][i], stage + place + row * StageLayout<VFragment>::PITCH);
        }
    }
}

// --- Feed: a warp's tiles, one after the other ---------------------------------------------------

// Where they come from; and of the tile that is copied next its pages, and its scales as they are
// stored, since to convert them is to wait for them: those of this lane's key and value.
struct Source {
    Rows<K_T> keys;
    Rows<V_T> values;
    Rows<SCALE_T> key_scales, value_scales;
    int ids[PAGE_IDS] = {};
    SCALE_T k_scale{}, v_scale{};

    __device__ __forceinline__ void load_scales(const Table& table, int tile) {
        if constexpr (HAS_CODES && ROW_SCALES) {
            const int of_tile = threadIdx.x % WARP % KEYS;
            const int page = of_tile < 16 ? ids[0] : ids[PAGE_IDS - 1];
            const u32 key = table.key(tile * KEYS + of_tile);
            if (K_ROW_SCALES) k_scale = *key_scales.row(page, key);
            if (V_ROW_SCALES) v_scale = *value_scales.row(page, key);
        }
    }
};

// A piece begins by `start` with its first tile, whose pages are in `ids`. Then, for each tile,
// `take_keys` and `take_values` wait for its rows and ask for what comes next, and `find_pages` ends
// its turn. `end` is that of the piece's tiles.
#if __CUDA_ARCH__ >= 800
// When a tile's keys have been read, those of the next tile are copied; values likewise.
struct Pipeline : Source {
    template <typename S, typename T>
    __device__ __forceinline__ void copy(u8* stage, const Rows<T>& rows, const Table& table,
                                         int tile) {
        copy_tile<S>(rows, table, ids, tile, [stage](int, int place, const u8* from) {
            cp_async16(stage + place, from);
        });
    }

    __device__ __forceinline__ void start(u8* k_stage, u8* v_stage, const Table& table, int tile,
                                          int end) {
        const bool has_tile = tile < end;
        if (has_tile) {
            copy<KFragment>(k_stage, keys, table, tile);
            load_scales(table, tile);
        }
        cp_async_commit();
        if (has_tile) copy<VFragment>(v_stage, values, table, tile);
        cp_async_commit();
        find_pages(table, tile, end);
    }

    __device__ __forceinline__ void next_keys(Keys& taken, u8* stage, const Table& table, int tile,
                                              int end) {
        const int later = tile + WARPS;
        if (later < end) load_scales(table, later);
        cp_async_wait<1>();
        __syncwarp();  // what the others have copied too
        load_keys(taken, stage);
        __syncwarp();  // all have read what is copied over
        if (later < end) copy<KFragment>(stage, keys, table, later);
        cp_async_commit();
    }

    __device__ __forceinline__ void next_values(Values& taken, u8* stage, const Table& table,
                                                int tile, int end) {
        const int later = tile + WARPS;
        cp_async_wait<1>();
        __syncwarp();
        load_values(taken, stage);
        __syncwarp();
        if (later < end) copy<VFragment>(stage, values, table, later);
        cp_async_commit();
    }

    __device__ __forceinline__ void find_pages(const Table& table, int tile, int end) {
        if (tile + WARPS < end) table.find(ids, tile + WARPS);
    }
};
#else
// While a tile's keys are worked on, its values are on their way to registers; while these are, the
// keys of the next tile. What arrived is stored when all that was in the queue has been read.
struct Pipeline : Source {
    static constexpr int K_CHUNKS = StageLayout<KFragment>::OF_LANE, V_CHUNKS = StageLayout<VFragment>::OF_LANE;
    uint4 held[K_CHUNKS > V_CHUNKS ? K_CHUNKS : V_CHUNKS];

    template <typename S, typename T>
    __device__ __forceinline__ void fetch(const Rows<T>& rows, const Table& table, int tile) {
        copy_tile<S>(rows, table, ids, tile, [&](int i, int, const u8* from) {
            held[i] = load16_eager(from);
        });
    }

    template <typename S>
    __device__ __forceinline__ void store_held(u8* stage, const Table& table, int tile) {
        using At = StageLayout<S>;
        __syncwarp();  // all have read what is stored over
#pragma unroll
        for (int i = 0; i < At::OF_LANE; i++) {
            *(uint4*)(stage + At::place(At::row(i), At::chunk(i))) = held[i];
        }
        if (!table.contains(tile)) {  // no weight of 0 shall meet a NaN
#pragma unroll 1
            for (int i = 0; i < At::OF_LANE; i++) {
                if (table.contains_key(tile * KEYS + At::row(i))) continue;
                *(uint4*)(stage + At::place(At::row(i), At::chunk(i))) = make_uint4(0, 0, 0, 0);
            }
        }
        __syncwarp();
    }

    __device__ __forceinline__ void start(u8*, u8*, const Table& table, int tile, int end) {
        if (tile >= end) return;
        fetch<KFragment>(keys, table, tile);
        load_scales(table, tile);
    }

    __device__ __forceinline__ void next_keys(Keys& taken, u8* stage, const Table& table, int tile,
                                              int end) {
        store_held<KFragment>(stage, table, tile);
        fetch<VFragment>(values, table, tile);
        if (tile + WARPS < end) table.find(ids, tile + WARPS);
        load_keys(taken, stage);
    }

    __device__ __forceinline__ void next_values(Values& taken, u8* stage, const Table& table,
                                                int tile, int end) {
        store_held<VFragment>(stage, table, tile);
        start(stage, stage, table, tile + WARPS, end);
        load_values(taken, stage);
    }

    __device__ __forceinline__ void find_pages(const Table&, int, int) {}  // take_keys did
};
#endif

// --- Products of a tile --------------------------------------------------------------------------

// Row g times the keys 8n + 2t and 8n + 2t + 1 of a tile, in units of the query.
__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 4], const Query& q,
                                              const Keys& keys) {
    using S = KFragment;
    constexpr int PAIRS = PER_WORD<K_T> / 2;
    constexpr int FIT = 32 / (KEYS / 8 * PAIRS);  // words whose pairs occupy 32 registers
    constexpr int AT_ONCE = S::WORDS < FIT ? S::WORDS : FIT;
    static_assert(AT_ONCE * PAIRS > 1 && S::WORDS % AT_ONCE == 0, "a step of mma takes two pairs");
    float d[KEYS / 8][4] = {}, odd[KEYS / 8][4] = {};
#pragma unroll
    for (int word = 0; word < S::COUNT * S::WORDS; word += AT_ONCE) {
        u32 pairs[KEYS / 8][AT_ONCE][PAIRS];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int w = 0; w < AT_ONCE; w++) {
                const int at = word + w;
                to_pairs(pairs[n][w], keys.words[n][at / S::WORDS][at % S::WORDS], KE{});
            }
        }
#pragma unroll
        for (int p = 0; p < AT_ONCE * PAIRS; p += 2) {
            // One term leaves rows 8 to 15 free: they hold the next step of it, which gives two
            // steps the registers of one, and each takes the half of the sums that is its own.
            const int step = (word * PAIRS + p) / 2;
            const int even = TERMS == 1 ? step / 2 * 2 : step;
            const int next = TERMS == 1 ? min(even + 1, D / 16 - 1) : step;
            const uint2 upper = q.step(0, even), lower = q.step(TERMS > 1 ? 1 : 0, next);
            const uint2 rest = Q_HAS_REST ? q.step(TERMS - 1, step) : make_uint2(0, 0);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                const u32 b0 = pairs[n][p / PAIRS][p % PAIRS];
                const u32 b1 = pairs[n][(p + 1) / PAIRS][(p + 1) % PAIRS];
                mma_16x16<KM>(step == even ? d[n] : odd[n], upper.x, lower.x, upper.y, lower.y, b0,
                             b1);
                if constexpr (Q_HAS_REST) mma_16x16<KM>(d[n], rest.x, 0, rest.y, 0, b0, b1);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        scores[i] = d[i / 2][i % 2] + (TERMS == 1 ? odd : d)[i / 2][i % 2 + 2];
    }
}

// Sums of values, by the columns of the fragments of mma: those of row g first, and in the other two
// what is to be added to them. `weights` are sums of the weights, which raw codes need.
__device__ __forceinline__ float (&pick(float (&x)[4], float (&)[4]))[4] { return x; }
__device__ __forceinline__ float (&pick(float (&)[2], float (&x)[4]))[4] { return x; }

struct Sums { float x[D / 8][Q_IS_16BIT ? 4 : 2], weights[4]; };

// Adds the tile's values, weighted by `weights` of the keys 8n + 2t and 8n + 2t + 1. Lane 4g + t
// holds of row g the elements with which lanes 2t and 2t + 1 of a row's eight began.
__device__ __forceinline__ void add_values(Sums& sums, const float (&weights)[KEYS / 4],
                                           const Values& values) {
    using S = VFragment;
    constexpr int PAIRS = PER_WORD<V_T> / 2;
    u32 high[KEYS / 8], low[KEYS / 8], rest[KEYS / 8];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        float two[2] = {weights[2 * n], weights[2 * n + 1]};
        high[n] = split_halves<VM>(two);
        low[n] = split_halves<VM>(two);
        if constexpr (P_HAS_REST) rest[n] = split_halves<VM>(two);
    }
    if constexpr (V_IS_SUBNORMAL) {
        constexpr u32 ONES = 0x3c003c00u;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            mma_16x16<VM>(sums.weights, high[n], low[n], high[n + 1], low[n + 1], ONES, ONES);
        }
    }
#pragma unroll
    for (int i = 0; i < S::COUNT; i++) {
#pragma unroll
        for (int w = 0; w < 2 * S::WORDS; w++) {  // half words
            u32 b[KEYS / 8][PAIRS];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                const u32 two = zip<VE>(values.words[2 * n][i][w / 2],
                                        values.words[2 * n + 1][i][w / 2], w % 2);
                to_pairs(b[n], two, VE{});
            }
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                float of_tile[4] = {};  // unless they stay: a sum of floats cuts nothing off
                float (&x)[Q_IS_16BIT ? 4 : 2] = sums.x[i * S::ELEMENTS + w * PAIRS + p];
                float (&d)[4] = pick(x, of_tile);
#pragma unroll
                for (int n = 0; n < KEYS / 8; n += 2) {
                    mma_16x16<VM>(d, high[n], low[n], high[n + 1], low[n + 1], b[n][p], b[n + 1][p]);
                    if constexpr (P_HAS_REST) {
                        mma_16x16<VM>(d, rest[n], 0, rest[n + 1], 0, b[n][p], b[n + 1][p]);
                    }
                }
                if constexpr (!Q_IS_16BIT) x[0] += d[0] + d[2], x[1] += d[1] + d[3];
            }
        }
    }
}

// --- States of the softmax -----------------------------------------------------------------------

// Four elements of a row's weighted sum of values, relative to 2^m, and the sum of its weights.
struct State { float m, l, x[4]; };

// Joins the states whose (maximum, sum) and elements `at` names. BATCH of them are loaded before the
// first is used: a row may have a state of every SM, and a turn to the L2 cache takes longer than
// all that is done with what it brings.
template <int BATCH, typename At> __device__ __forceinline__ State merge(int count, At at) {
    State s{-INF, 0.0f, {}};
#pragma unroll 1
    for (int first = 0; first < count; first += BATCH) {
        float2 stat[BATCH];
        float4 x[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const auto from = at(min(first + i, count - 1));
            stat[i] = *from.stat, x[i] = *from.x;
            if (first + i >= count) stat[i].x = -INF;  // the last one again, without weight
        }
        float peak = s.m;
#pragma unroll
        for (int i = 0; i < BATCH; i++) peak = fmaxf(peak, stat[i].x);
        const float base = finite_base(peak), before = exp2_ftz(s.m - base);
        s.m = peak;
        s.l *= before;
#pragma unroll
        for (int j = 0; j < 4; j++) s.x[j] *= before;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const float rescale = exp2_ftz(stat[i].x - base);
            s.l += rescale * stat[i].y;
            s.x[0] += rescale * x[i].x, s.x[1] += rescale * x[i].y;
            s.x[2] += rescale * x[i].z, s.x[3] += rescale * x[i].w;
        }
    }
    return s;
}

// Where a row's (maximum, sum) and four of its elements are kept.
struct StateRef { const float2* stat; const float4* x; };

#if CLUSTER > 1
// Joins the states of CLUSTER neighbouring lanes, each of which gets the result.
__device__ __forceinline__ State merge_lanes(State s) {
    float peak = s.m;
#pragma unroll
    for (int step = 1; step < CLUSTER; step *= 2) {
        peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, step));
    }
    const float rescale = exp2_ftz(s.m - finite_base(peak));
    s.m = peak;
    s.l *= rescale;
#pragma unroll
    for (float& x : s.x) x *= rescale;
#pragma unroll
    for (int step = 1; step < CLUSTER; step *= 2) {
        s.l += __shfl_xor_sync(FULL_MASK, s.l, step);
#pragma unroll
        for (float& x : s.x) x += __shfl_xor_sync(FULL_MASK, x, step);
    }
    return s;
}
#endif

#endif

// --- Kernel --------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
paged_decode_mma(Q_T* __restrict__ out, float* __restrict__ lse, float* workspace,
                 const Q_T* __restrict__ q, const K_T* __restrict__ k_pool,
                 const V_T* __restrict__ v_pool, const SCALE_T* __restrict__ k_scales,
                 const SCALE_T* __restrict__ v_scales, const int* __restrict__ page_table,
                 const int* __restrict__ lengths, const float* __restrict__ slopes,
                 const float* __restrict__ sinks, const u64* __restrict__ tree, i64 q_stride,
                 i64 q_token_stride, i64 k_head, i64 v_head, i64 ks_head, i64 vs_head, int k_page,
                 int k_token, int v_page, int v_token, int ks_page, int ks_token, int vs_page,
                 int vs_token, int B, int T, int behind, int G, int M, int capacity,
                 int window, int piece_tiles, int slots, float score_scale, float cap,
                 float lse_unit) {
#if __CUDA_ARCH__ >= 750
    extern __shared__ __align__(128) u8 shared[];  // or copies of lines are cut, and read twice
    __shared__ int is_last;
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int g = lane / 4, t = lane % 4;  // as in the fragments of mma

    const int tile_of_head = blockIdx.x, kv_head = blockIdx.y, range = blockIdx.z;
    const int tiles = gridDim.x * gridDim.y, ranges = gridDim.z;
    const int head_tile = kv_head * gridDim.x + tile_of_head;
    const int max_rows = min(G * T, ROWS);
    const int num_rows = min(ROWS, G * T - tile_of_head * ROWS);

    // This block's range of units.
    const bool fixed = !ALONE && piece_tiles > 0;
    const Batch batch{lengths, B, capacity, window, behind, fixed ? piece_tiles : 1};
#if ALONE
    const int total = batch.visible(0).units;
#else
    const int per_lane = (B + WARP - 1) / WARP;
    const Scan scan(batch, 0, per_lane);
    const int total = scan.total();
#endif
    int range_units = (total + ranges - 1) / ranges;
    // Ranges are even for warps, and worth a merge; short sequences are not put together for that.
    if (!fixed && (ALONE || total > (MIN_KEYS / KEYS - 1) * B)) {
        range_units = (max(range_units, MIN_KEYS / KEYS) + WARPS - 1) / WARPS * WARPS;
    }
    const int begin = range * range_units, end = min(begin + range_units, total);
    if (CLUSTER == 1 && begin >= end) return;  // in a cluster it has a share of the joining

    // This lane's query row, for all pieces.
    const int row_of_group = tile_of_head * ROWS + min(g, num_rows - 1);
    const int token = row_of_group / G, head = kv_head * G + row_of_group % G;
    const Q_T* query_row = q + token * q_token_stride + (i64)head * D;

    u8* const stage = shared + warp * (STAGE_BYTES + Q_BYTES);
    u8* const k_stage = stage;
    u8* const v_stage = HAS_CP_ASYNC ? stage + K_BYTES : stage;
    Pipeline pipeline{{{k_pool, k_page, k_token, k_head, kv_head},
               {v_pool, v_page, v_token, v_head, kv_head},
               {k_scales, ks_page, ks_token, ks_head, kv_head},
               {v_scales, vs_page, vs_token, vs_head, kv_head}}};

    // Scales that the head's rows share.
    float head_k_scale = 1.0f, head_v_scale = 1.0f;
    if (K_HAS_CODES && !ROW_SCALES) head_k_scale = to_float(k_scales[kv_head * ks_head]);
    if (V_HAS_CODES && !ROW_SCALES) head_v_scale = to_float(v_scales[kv_head * vs_head]);

    // The states of the warps, which may take the place of queues; and those of pieces.
    constexpr int PITCH = D % 32 == 0 ? D + 16 : D;  // floats; two rows fall on different banks
    constexpr bool REUSES_STAGES = !HAS_CP_ASYNC && !Q_IN_SHARED;
    constexpr int STATES_AT = REUSES_STAGES ? 0 : WARPS * (STAGE_BYTES + Q_BYTES);
    float* const warp_x = (float*)(shared + STATES_AT);
    float2* const warp_stats = (float2*)(warp_x + WARPS * max_rows * PITCH);
    u32* const counters = (u32*)workspace;
    float* const piece_x = workspace + COUNTERS;
    float2* const piece_stats = (float2*)(piece_x + (i64)slots * tiles * max_rows * D);

    // A piece's first tiles are under way before the piece before it comes to its end; its queries
    // are awaited together with the pages of those.
    Query query;
    query.shared = (uint2*)(stage + STAGE_BYTES) + lane;
    const auto start = [&](const Piece& piece) {
        const Table table{page_table + (i64)piece.b * M, piece.visible.first, piece.visible.length - 1};
        const int tile = piece.tile + warp;
        if (tile < piece.tile_end) table.find(pipeline.ids, tile);
        load_query(query, query_row + piece.b * q_stride, g < num_rows);
        pipeline.start(k_stage, v_stage, table, tile, piece.tile_end);
    };

#if ALONE
    Piece piece = piece_at(batch, 0, 0, begin, end, false);
#else
    Piece piece = first_piece(batch, scan, per_lane, begin, end, fixed);
#endif
    start(piece);
    for (;;) {
        const int b = piece.b, length = piece.visible.length;
        const Table table{opaque_pointer(page_table + (i64)b * M), piece.visible.first, length - 1};
        float factor = score_scale * head_k_scale * query.unit / PAIR_UNIT<K_T>, zero_score = 0.0f;
        if constexpr (K_IS_SUBNORMAL) {
            zero_score = SUBNORMAL_ZERO<KE> * query.sum * factor;
            factor *= SUBNORMAL_UNIT;
        }

        // Keys row_first .. position are seen, and all of `full_tiles` tiles from full_first on.
        const int position = length - 1 - max(behind - token, 0);
        const int row_first = (int)max((i64)position + 1 - window, (i64)0);
        const int full_first = (int)max((i64)length - window + KEYS - 1, (i64)0) / KEYS;  // tiles
        const int full_tiles = max(length - behind - TREE, 0) / KEYS - full_first;
#if ALIBI
        const float slope = slopes[head] * LOG2_E;
#endif
#if TREE
        const u64 ancestors = tree[(i64)b * T + token];
#endif

        Sums sums = {};
        float m = -INF, l = 0.0f;  // l: of this lane's keys
        // Values are weighted relative to `scale_unit`, a power of two above all their scales so
        // far, because f16 would not hold what the scales themselves may be.
        float scale_unit = V_ROW_SCALES ? __uint_as_float(27u << 23) : 1.0f;
        float inverse_unit = V_ROW_SCALES ? __uint_as_float(227u << 23) : 1.0f;

        for (int tile = piece.tile + warp; tile < piece.tile_end; tile += WARPS) {
            const float k_scale = to_float(pipeline.k_scale);
            float v_scale = to_float(pipeline.v_scale);
            Keys keys;
            pipeline.next_keys(keys, k_stage, table, tile, piece.tile_end);
            float scores[KEYS / 4];
            multiply_keys(scores, query, keys);

#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                const int k = i / 2 * 8 + 2 * t + i % 2;
                float& s = scores[i];
                s = s * factor - zero_score;
                if (K_ROW_SCALES) s *= __shfl_sync(FULL_MASK, k_scale, k);
#if SOFT_CAP
                s = tanhf(s) * cap;
#endif
#if ALIBI
                s += slope * (tile * KEYS + k - position);
#endif
            }
            if (tile < full_first || tile >= full_first + full_tiles) {
                schedule_fence();  // or the compiler makes this a part of every tile
#pragma unroll
                for (int i = 0; i < KEYS / 4; i++) {
                    const int key = tile * KEYS + i / 2 * 8 + 2 * t + i % 2;
                    bool is_visible = key >= row_first && key <= position;
#if TREE
                    const int branch = key - (length - 1 - behind);
                    if (branch >= 0) is_visible = key < length && (ancestors >> (branch & 63) & 1);
#endif
                    if (!is_visible) scores[i] = -INF;
                }
            }
            float largest = -INF;
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) largest = fmaxf(largest, scores[i]);

            // m is the maximum to within a factor of 2^8 of the weights, so that it seldom moves.
            const bool grows = largest > m + 8.0f || (V_ROW_SCALES && fabsf(v_scale) > scale_unit);
            if (__any_sync(FULL_MASK, grows)) {
                largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 2));
                const float peak = fmaxf(m, largest);
                float rescale = exp2_ftz(m - finite_base(peak));
                m = peak;
                l *= rescale;
                if (V_ROW_SCALES) {
                    const float above = warp_max(fabsf(v_scale));
                    const u32 exponent = min(__float_as_uint(above) >> 23, 252u) + 1;
                    const float before = scale_unit;
                    scale_unit = fmaxf(before, __uint_as_float(exponent << 23));
                    inverse_unit = __uint_as_float((254u << 23) - __float_as_uint(scale_unit));
                    rescale *= before * inverse_unit;
                }
#pragma unroll
                for (int i = 0; i < D / 8; i++) {
                    for (float& x : sums.x[i]) x *= rescale;
                }
                for (float& x : sums.weights) x *= rescale;
            }
            const float base = finite_base(m);
            v_scale *= inverse_unit;
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                const float weight = exp2_ftz(scores[i] - base);
                l += weight;
                scores[i] = weight;
                if (V_ROW_SCALES) {
                    scores[i] *= __shfl_sync(FULL_MASK, v_scale, i / 2 * 8 + 2 * t + i % 2);
                }
            }

            Values values;
            pipeline.next_values(values, v_stage, table, tile, piece.tile_end);
            add_values(sums, scores, values);
            pipeline.find_pages(table, tile + WARPS, piece.tile_end);
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

        // Made here, or what follows from them would be kept in registers while keys are read.
        const int rows_kept = opaque(max_rows), thread = opaque(threadIdx.x);

        // This warp's states.
        if (REUSES_STAGES) __syncthreads();  // or others would still read theirs
        l += __shfl_xor_sync(FULL_MASK, l, 1);
        l += __shfl_xor_sync(FULL_MASK, l, 2);
        if (g < num_rows) {
            const float unit = scale_unit * head_v_scale / PAIR_UNIT<V_T>;
            const float zero = SUBNORMAL_ZERO<VE> * (sums.weights[0] + sums.weights[2]);
            const auto value = [&](int column, int c) {
                float x = sums.x[column][c];
                if constexpr (Q_IS_16BIT) x += sums.x[column][c + 2];
                if constexpr (V_IS_SUBNORMAL) {
                    x = x * (SUBNORMAL_UNIT / subnormal_factor<VE>(column % (PER_WORD<V_T> / 2))) - zero;
                }
                return x * unit;
            };
            float* row = warp_x + (warp * rows_kept + g) * PITCH;
            if (t == 0) warp_stats[warp * rows_kept + g] = make_float2(m, l);
#pragma unroll
            for (int i = 0; i < D / 8; i += 2) {
                *(float4*)(row + i / 2 * 16 + 4 * t) =
                    make_float4(value(i, 0), value(i + 1, 0), value(i, 1), value(i + 1, 1));
            }
        }
        // Element p of a row's state: those of lane t, from two columns each, stand together.
        const auto write = [&](State s, int row, int p) {
            const int in_group = tile_of_head * ROWS + row;
            const int q_head = kv_head * G + in_group % G;
#if SINKS
            const float sink = sinks[q_head] * LOG2_E, peak = fmaxf(s.m, sink);
            const float rescale = exp2_ftz(s.m - finite_base(peak));
            s.m = peak;
            s.l = s.l * rescale + exp2_ftz(sink - finite_base(peak));
#pragma unroll
            for (int i = 0; i < 4; i++) s.x[i] *= rescale;
#endif
            const i64 at = ((i64)done.b * T + in_group / G) * (gridDim.y * G) + q_head;
            const float inverse = s.l == 0.0f ? 0.0f : 1.0f / s.l;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s.x[i] = Q_IS_16BIT ? s.x[i] * inverse : s.l == 0.0f ? 0.0f : s.x[i] / s.l;
            }
            constexpr int E = VFragment::ELEMENTS;
            const int i = p / 16 * 2, d = (i / E * 8 + p / 4 % 4 * 2) * E + i % E;
            store2(out + at * D + d, s.x[0], s.x[1]);
            store2(out + at * D + d + E, s.x[2], s.x[3]);
            if (lse && p == 0) lse[at] = s.l == 0.0f ? -INF : (s.m + log2f(s.l)) * lse_unit;
        };
        const auto place = [&](int slot, int row) {
            return (i64)slot * (tiles * rows_kept) + head_tile * rows_kept + row;
        };
        const auto in_workspace = [&](int slot, int row, int p) {
            const i64 at = place(slot, row);
            return StateRef{piece_stats + at, (const float4*)(piece_x + at * D + p)};
        };
        const auto publish = [&](const State& s, int slot, int row, int p) {
            const i64 at = place(slot, row);
            *(float4*)(piece_x + at * D + p) = make_float4(s.x[0], s.x[1], s.x[2], s.x[3]);
            if (p == 0) piece_stats[at] = make_float2(s.m, s.l);
        };
        // Whether this block is the last one that has published.
        const auto is_last_of = [&](int arrivals, u32* counter) {
            __syncthreads();
            if (thread == 0) {  // tells what the barrier gathered, and the next one what it is told
                is_last = arrivals == 1 || atomic_inc_acq_rel(counter, arrivals - 1) == arrivals - 1;
            }
            __syncthreads();
            return is_last;
        };

#if CLUSTER > 1
        // A lane joins the states of one block's warps, CLUSTER lanes those of all, and a block does
        // so for every CLUSTER-th share of the elements.
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
        cluster_arrive_relaxed();  // this block no longer reads others' memory
        cluster_wait();
#else
        __syncthreads();

        // What is known of a row: the ranges it lies in, and its states, one a piece. A row of one
        // state is done; else it is merged by the last of its blocks.
        const int units = done.visible.units;
        const bool is_whole = done.start >= begin && done.start + units <= end;
        const int first_range = is_whole ? range : done.start / range_units;
        const int arrivals = is_whole ? 1 : (done.start + units - 1) / range_units - first_range + 1;
        const int states = fixed ? units : arrivals;
        const int first_slot = fixed ? done.start : 2 * first_range;
        // Whether the first of them is the second part of its range.
        const bool begins_within = !fixed && done.start != first_range * range_units;
        const auto slot_of = [&](int i) {
            return first_slot + (fixed ? i : 2 * i) + (i == 0 && begins_within);
        };
        for (int i = thread; i < num_rows * (D / 4); i += THREADS) {
            const int row = i / (D / 4), p = i % (D / 4) * 4;
            const State s = merge<WARPS>(WARPS, [&](int w) {
                const int at = w * rows_kept + row;
                return StateRef{warp_stats + at, (const float4*)(warp_x + at * PITCH + p)};
            });
            const int number = fixed ? done.unit - done.start : range - first_range;
            if (states == 1) write(s, row, p);
            else publish(s, slot_of(number), row, p);
        }
        // A row that leaves a range is the only one that does.
        if (states > 1 && (!has_next || piece.b != b) &&
            is_last_of(arrivals, counters + first_range * tiles + head_tile)) {
            for (int i = thread; i < num_rows * (D / 4); i += THREADS) {
                const int row = i / (D / 4), p = i % (D / 4) * 4;
                const auto kept = [&](int n) { return in_workspace(slot_of(n), row, p); };
                write(states <= 4 ? merge<4>(states, kept) : merge<16>(states, kept), row, p);
            }
        }
#endif
        if (!has_next) break;
        __syncthreads();  // before the states of the next piece
    }
#endif
}
