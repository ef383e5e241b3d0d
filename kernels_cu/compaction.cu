// compaction.cu: the elements of an array whose magnitude exceeds a threshold, in order, and back.
//
// Arrays, contiguous (letters as in pykv/ops/compaction.py):
//   x        const [n] X_T         at any address that is a multiple of the element
//   values         [C] X_T         kept elements in the order of x
//   indices        [C] I_T         where each stands in x; null: not wanted
//   count          [1] i64         how many are kept, those that find no place in C included
//   words          [1 + tiles] u64 scratch: a ticket, then a word for each tile
//   out            [n] X_T         of compaction_expand, whose indices ascend
// Scalars:  n; capacity = C; threshold: kept are elements with |x| > threshold, which NaN never is;
//           fill, of compaction_expand: all of out that no index names
// Defines:  X_T = float, f16 or bf16; I_T = int or i64; BLOCK = threads; STAGES = tiles of a block in
//           shared memory, 1 or 2; BLOCKS_PER_SM. A tile is BLOCK * 64 bytes of x, from a multiple
//           of 16 bytes on
// Launch:   block (BLOCK); tiles = ceil((n + 16 / sizeof(X_T) - 1) / elements of a tile)
//           compaction          grid (any number of blocks), words all zero, dynamic shared memory
//                               STAGES * STAGE_BYTES; from sm_70 on
//           compaction_count    grid (tiles), STAGE_BYTES: leaves each tile's count in its word
//           compaction_scan     grid (1): then the sums of the counts before each tile, and count
//           compaction_scatter  grid (tiles), STAGE_BYTES: then values and indices
//           compaction_expand   grid (tiles), static shared memory alone
// Traffic:  compaction: n * sizeof(X_T) read + kept * (sizeof(X_T) + sizeof(I_T)) written, the least
//           there is, and 16 bytes a tile; its ceiling is that of a copy of as many bytes. count and
//           scatter read x once each. compaction_expand: the same least, read and written in turn
// Order:    integer counts alone decide where an element goes: the same bits in every run
//
// One pass with decoupled look-back (Merrill and Garland, 2016). Blocks take tiles by ticket, so
// that a tile waits only for tiles that running blocks hold: a block finishes its tiles in the
// order of their tickets, so the first unfinished tile of all never waits. The next tile is on its
// way to shared memory while this one is counted, waits for its place and is stored: three
// blocks of an SM keep 96 KiB in flight or more, where bandwidth times latency asks for 36 (H200:
// 4.8 TB/s at 1 us over 132 SMs). Kept elements are gathered in shared memory, so that each warp
// stores whole lines.
#include "batch.cuh"
#include "reduce.cuh"
#include "vector.cuh"

#if !defined(X_T) || !defined(I_T) || !defined(BLOCK) || !defined(STAGES) || \
    !defined(BLOCKS_PER_SM)
#error "compaction.cu needs X_T, I_T, BLOCK, STAGES and BLOCKS_PER_SM"
#endif
constexpr int WARPS = BLOCK / WARP;
constexpr int E = 16 / sizeof(X_T);  // elements of a vector
constexpr int VECTORS = 4;           // of a thread
constexpr int TILE = BLOCK * VECTORS * E;
constexpr int LINE = 128;  // bytes that a warp should store as a whole
constexpr int STAGE_BYTES = TILE * sizeof(X_T) + LINE;  // a line more, to begin anywhere in one
static_assert(WARPS <= WARP && BLOCK % WARP == 0, "a lane for each warp's count");
static_assert(STAGES == 1 || STAGES == 2, "the next tile, or none, beside this one");
static_assert(VECTORS * E <= 32 && WARP * E < 1 << 16 && TILE <= 1 << 16, "a mask and 16 bits");

using Elements = Vector<X_T, E>;

__device__ __forceinline__ int tiles_of(i64 n) { return (int)((n + E - 1 + TILE - 1) / TILE); }

// Index of the first element of a tile; below 0 for the first tile of an x that is not aligned.
__device__ __forceinline__ i64 first_of(int tile, const X_T* x) {
    return (i64)tile * TILE - (i64)((u64)x % 16 / sizeof(X_T));
}

// Begin to fetch a tile. What lies outside of x becomes NaN, which is not kept.
__device__ __forceinline__ void fetch(u8* stage, const X_T* x, i64 first, i64 n) {
    X_T* to = reinterpret_cast<X_T*>(stage);
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const int at = (j * BLOCK + threadIdx.x) * E;
        const i64 from = first + at;
        if (from >= 0 && from + E <= n) {
            cp_async16(to + at, x + from);
        } else {
#pragma unroll 1  // rare, so small rather than fast
            for (int e = 0; e < E; e++) {
                const bool exists = from + e >= 0 && from + e < n;
                to[at + e] = exists ? x[from + e] : from_float<X_T>(__uint_as_float(0x7fffffffu));
            }
        }
    }
    cp_async_commit();
}

// What a thread knows of its vectors of a tile.
struct Share {
    u32 kept;                 // bit j * E + e: element e of vector j is
    u32 before[VECTORS / 2];  // of two vectors each, in halves: kept elements of the warp before it
};

// Vector j of this thread, of a tile that has arrived. A warp's vectors are consecutive, and those of
// its lanes in turn.
__device__ __forceinline__ Elements vector_of(const u8* stage, int j) {
    return reinterpret_cast<const Elements*>(
        stage)[(threadIdx.x / WARP * VECTORS + j) * WARP + threadIdx.x % WARP];
}

// Find what is kept of a tile that has arrived; returns how many elements of the warp are.
__device__ __forceinline__ int take(Share& share, const u8* stage, float threshold) {
    share.kept = 0;
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const Elements vector = vector_of(stage, j);
#pragma unroll
        for (int e = 0; e < E; e++) {
            const bool is_kept = fabsf(to_float(vector.elements[e])) > threshold;
            share.kept |= (u32)is_kept << (j * E + e);
        }
    }
    const auto own = [&](int j) { return __popc(share.kept >> j * E & (1u << E) - 1u); };
    u32 total = 0;
#pragma unroll
    for (int j = 0; j < VECTORS; j += 2) {  // counts of two vectors are scanned at once
        const u32 counts = own(j) | own(j + 1) << 16, sums = warp_scan(counts);
        const u32 all = __shfl_sync(FULL_MASK, sums, WARP - 1), first = all & 0xffffu;
        share.before[j / 2] = sums - counts + (total | (total + first) << 16);
        total += first + (all >> 16);
    }
    return (int)total;
}

// Where the kept elements of a tile go.
struct Place {
    u64 prefix;               // kept elements of all tiles before
    int total;                // of this one
    int warps_before[WARPS];  // of the tile, before each warp
};

// From each warp's count to the sums before it, by the first warp; returns the total.
__device__ __forceinline__ int scan_warps(Place& place) {
    const int lane = threadIdx.x;
    const u32 own = lane < WARPS ? place.warps_before[lane] : 0, sum = warp_scan(own);
    if (lane < WARPS) place.warps_before[lane] = sum - own;
    return __shfl_sync(FULL_MASK, sum, WARP - 1);
}

// Gather in the stage what `element(j, e)` is for each kept element, in order, from `start` on.
template <typename Staged, typename Element>
__device__ __forceinline__ void gather(Staged* staged, int start, const Share& share,
                                       Element element) {
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const int kept = opaque((int)(share.kept >> j * E));  // or each bit would take a register
        int at = start + (int)(share.before[j / 2] >> j % 2 * 16 & 0xffffu);
#pragma unroll
        for (int e = 0; e < E; e++) {
            if (kept >> e & 1) staged[at++] = element(j, e);
        }
    }
    __syncthreads();
}

// Store entries shift .. end - 1 of the stage, as `convert` makes them. Both vectors are aligned.
template <typename Staged, typename Out, typename Convert>
__device__ __forceinline__ void store_staged(Out* to, const Staged* staged, int shift, int end,
                                             Convert convert) {
    constexpr int N = 16 / sizeof(Out);
    for (int i = threadIdx.x * N; i < end; i += BLOCK * N) {
        if (i >= shift && i + N <= end) {
            const auto some = *reinterpret_cast<const Vector<Staged, N>*>(staged + i);
            Vector<Out, N> made;
#pragma unroll
            for (int e = 0; e < N; e++) made.elements[e] = convert(some.elements[e]);
            __stcs(reinterpret_cast<uint4*>(to + i), *reinterpret_cast<const uint4*>(&made));
        } else {
#pragma unroll 1
            for (int e = i; e < i + N; e++) {
                if (e >= shift && e < end) to[e] = convert(staged[e]);
            }
        }
    }
}

// Values and indices of a tile, whose place all threads see. They are gathered from where the
// output stands in its line on, so that warps store whole lines; indices as positions in the tile.
__device__ __forceinline__ void store(X_T* values, I_T* indices, u8* stage, const Place& place,
                                      i64 capacity, const Share& share, i64 first) {
    const i64 prefix = (i64)place.prefix, left = capacity - prefix;
    const int stored = (int)max(min((i64)place.total, left), 0ll);
    const int start = place.warps_before[threadIdx.x / WARP];

    Elements vectors[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; j++) vectors[j] = vector_of(stage, j);
    __syncthreads();
    X_T* elements = reinterpret_cast<X_T*>(stage);
    const int shift = (int)((u64)(values + prefix) % LINE / sizeof(X_T));
    gather(elements, shift + start, share, [&](int j, int e) { return vectors[j].elements[e]; });
    store_staged(values + (prefix - shift), elements, shift, shift + stored,
                 [](X_T x) { return x; });
    if (indices == nullptr) return;

    __syncthreads();
    u16* positions = reinterpret_cast<u16*>(stage);
    const int index_shift = (int)((u64)(indices + prefix) % LINE / sizeof(I_T));
    const int base = (threadIdx.x / WARP * VECTORS * WARP + threadIdx.x % WARP) * E;
    gather(positions, index_shift + start, share,
           [&](int j, int e) { return (u16)(base + j * WARP * E + e); });
    store_staged(indices + (prefix - index_shift), positions, index_shift, index_shift + stored,
                 [&](u16 position) { return (I_T)(first + position); });
}

#if __CUDA_ARCH__ >= 700
// A tile's word: 0 until its count is known; then that, marked as PART; then all that is kept up to
// its end, marked as WHOLE. A word is the whole message, so relaxed order is enough.
constexpr u64 PART = 1ull << 62, WHOLE = 2ull << 62, NUMBER = PART - 1;
constexpr int WINDOWS = 4;  // of a warp's lanes, that are read at once

// Kept elements before a tile, by a warp: sums counts backwards up to the nearest WHOLE.
__device__ __forceinline__ u64 look_back(u64* words, int tile) {
    u64 before = 0;
    for (int last = tile - 1;;) {
        u64 word[WINDOWS];
#pragma unroll
        for (int w = 0; w < WINDOWS; w++) {
            const int at = last - w * WARP - (int)(threadIdx.x % WARP);
            word[w] = at < 0 ? WHOLE : load_relaxed(words + at);
        }
#pragma unroll
        for (int w = 0; w < WINDOWS; w++) {
            const u32 known = __ballot_sync(FULL_MASK, word[w] != 0);
            const u32 whole = __ballot_sync(FULL_MASK, word[w] >= WHOLE);
            const u32 wanted = whole ? (whole ^ (whole - 1)) : FULL_MASK;  // up to the nearest
            if ((known & wanted) != wanted) break;                        // wait for these
            const bool counts = wanted >> threadIdx.x % WARP & 1;
            const u64 sum = warp_scan(counts ? word[w] & NUMBER : 0ull);
            before += __shfl_sync(FULL_MASK, sum, WARP - 1);
            if (whole) return before;
            last -= WARP;
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM)
compaction(X_T* __restrict__ values, I_T* __restrict__ indices, i64* __restrict__ count,
           u64* __restrict__ words, const X_T* __restrict__ x, i64 n, i64 capacity,
           float threshold) {
    extern __shared__ __align__(128) u8 stages[];
    __shared__ Place place;
    __shared__ int tickets[2];
    const int num_tiles = tiles_of(n);
    u64* of_tiles = words + 1;

    // The first thread asks for a ticket long before the block needs it.
    u32* ticket = reinterpret_cast<u32*>(words);
    u32 asked = threadIdx.x == 0 ? atomicAdd(ticket, 1u) : 0;
    const auto next_tile = [&](int turn) {
        if (threadIdx.x == 0) tickets[turn] = (int)asked;
        __syncthreads();
        if (threadIdx.x == 0) asked = atomicAdd(ticket, 1u);
        return tickets[turn];
    };
    const auto fetch_if_any = [&](u8* stage, int tile) {
        if (tile < num_tiles) fetch(stage, x, first_of(tile, x), n);
        else cp_async_commit();
    };

    int tile = next_tile(1);
    fetch_if_any(stages, tile);
    for (int turn = 0; tile < num_tiles; turn ^= 1) {
        const int next = next_tile(turn);
        u8* stage = stages + (STAGES == 2 ? turn * STAGE_BYTES : 0);
        if constexpr (STAGES == 2) fetch_if_any(stages + (turn ^ 1) * STAGE_BYTES, next);
        cp_async_wait<STAGES - 1>();
        __syncthreads();

        Share share;
        const int kept = take(share, stage, threshold);
        if (threadIdx.x % WARP == 0) place.warps_before[threadIdx.x / WARP] = kept;
        __syncthreads();
        if (threadIdx.x < WARP) {
            const u64 total = scan_warps(place);
            if (threadIdx.x == 0) store_relaxed(of_tiles + tile, PART | total);
            const u64 before = look_back(of_tiles, tile);
            if (threadIdx.x == 0) {
                store_relaxed(of_tiles + tile, WHOLE | (before + total));
                place.prefix = before, place.total = (int)total;
                if (tile == num_tiles - 1) *count = (i64)(before + total);
            }
        }
        __syncthreads();
        store(values, indices, stage, place, capacity, share, first_of(tile, x));
        if constexpr (STAGES == 1) {
            __syncthreads();
            fetch_if_any(stages, next);
        }
        tile = next;
    }
}
#endif

// The tile of this block: take its share and leave the warps' counts in `place`.
__device__ __forceinline__ void take_block(Share& share, Place& place, u8* stage, const X_T* x,
                                           i64 n, float threshold) {
    fetch(stage, x, first_of(blockIdx.x, x), n);
    cp_async_wait<0>();
    __syncthreads();
    const int kept = take(share, stage, threshold);
    if (threadIdx.x % WARP == 0) place.warps_before[threadIdx.x / WARP] = kept;
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(BLOCK)
compaction_count(u64* __restrict__ words, const X_T* __restrict__ x, i64 n, float threshold) {
    extern __shared__ __align__(128) u8 stage[];
    __shared__ Place place;
    Share share;
    take_block(share, place, stage, x, n, threshold);
    if (threadIdx.x >= WARP) return;
    const int total = scan_warps(place);
    if (threadIdx.x == 0) words[1 + blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
compaction_scan(u64* __restrict__ words, i64* __restrict__ count, i64 num_tiles) {
    __shared__ u64 sums[WARPS];
    const int warp = threadIdx.x / WARP;
    u64 before = 0;
    for (i64 first = 0; first < num_tiles; first += BLOCK) {
        const i64 at = 1 + first + threadIdx.x;
        const u64 own = at <= num_tiles ? words[at] : 0;
        const u64 sum = warp_scan(own);
        if (threadIdx.x % WARP == WARP - 1) sums[warp] = sum;
        __syncthreads();
        u64 warps = 0, total = 0;
        for (int i = 0; i < WARPS; i++) {
            if (i < warp) warps += sums[i];
            total += sums[i];
        }
        if (at <= num_tiles) words[at] = before + warps + sum - own;
        before += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) *count = (i64)before;
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM)
compaction_scatter(X_T* __restrict__ values, I_T* __restrict__ indices, const X_T* __restrict__ x,
                   const u64* __restrict__ words, i64 n, i64 capacity, float threshold) {
    extern __shared__ __align__(128) u8 stage[];
    __shared__ Place place;
    Share share;
    take_block(share, place, stage, x, n, threshold);
    if (threadIdx.x < WARP) {
        const int total = scan_warps(place);
        if (threadIdx.x == 0) place.prefix = words[1 + blockIdx.x], place.total = total;
    }
    __syncthreads();
    store(values, indices, stage, place, capacity, share, first_of(blockIdx.x, x));
}

// Each block finds the values of its part of `out` by searching the ascending indices.
extern "C" __global__ void __launch_bounds__(BLOCK)
compaction_expand(X_T* __restrict__ out, const X_T* __restrict__ values,
                  const I_T* __restrict__ indices, const i64* __restrict__ count, i64 n,
                  i64 capacity, float fill) {
    __shared__ __align__(16) X_T tile[TILE];
    __shared__ i64 bounds[2];
    const i64 kept = count == nullptr ? capacity : max(min(*count, capacity), 0ll);
    const i64 first = first_of(blockIdx.x, out);
    if (threadIdx.x < 2 * WARP) {  // two warps find the first index of this tile and of the next
        const int which = threadIdx.x / WARP;
        const i64 limit = first + which * TILE;
        const i64 found =
            count_passing<WARP>(kept, [&](i64 i) { return (i64)indices[i] < limit; });
        if (threadIdx.x % WARP == 0) bounds[which] = found;
    }
    for (int at = threadIdx.x; at < TILE; at += BLOCK) tile[at] = from_float<X_T>(fill);
    __syncthreads();
    for (i64 i = bounds[0] + threadIdx.x; i < bounds[1]; i += BLOCK) {
        const i64 at = (i64)indices[i] - first;
        if (at >= 0 && at < TILE) tile[at] = values[i];  // always, where indices ascend
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const int at = (j * BLOCK + threadIdx.x) * E;
        const i64 to = first + at;
        if (to >= 0 && to + E <= n) {
            __stcs(reinterpret_cast<uint4*>(out + to), *reinterpret_cast<const uint4*>(tile + at));
        } else {
#pragma unroll 1
            for (int e = 0; e < E; e++) {
                if (to + e >= 0 && to + e < n) out[to + e] = tile[at + e];
            }
        }
    }
}
