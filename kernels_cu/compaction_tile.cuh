// compaction_tile.cuh: compaction's tiles: from x to shared memory and registers, what is kept of
// them, gathered there, and from there to values and indices.
#include "ptx.cuh"
#include "reduce.cuh"
#include "vector.cuh"

constexpr int WARPS = BLOCK / WARP;
constexpr int E = 16 / sizeof(X_T);  // elements of a vector
constexpr int TILE = BLOCK * VECTORS * E;
constexpr int LINE = 128;  // bytes that a warp should store as a whole
static_assert(BLOCK % WARP == 0 && WARPS <= WARP, "a lane for the count of each warp");
static_assert(VECTORS % 2 == 0 && VECTORS <= 4 && TILE <= 1 << 16, "a mask and 16 bits");

__device__ __forceinline__ int tiles_of(i64 n) { return (int)((n + E - 1 + TILE - 1) / TILE); }

// Index of the first element of a tile; below 0 for the first tile of an x that is not aligned.
__device__ __forceinline__ i64 first_of(int tile, const X_T* x) {
    return (i64)tile * TILE - (i64)((u64)x % 16 / sizeof(X_T));
}

// Position in the tile of element 0 of vector j of this thread. A warp's vectors are consecutive,
// and those of its lanes in turn.
__device__ __forceinline__ int position_of(int j) {
    return ((threadIdx.x / WARP * VECTORS + j) * WARP + threadIdx.x % WARP) * E;
}

__device__ __forceinline__ X_T element_of(const uint4& vector, int e) {
    return reinterpret_cast<const Vector<X_T, E>&>(vector).elements[e];
}

// This thread's vectors of a tile. What lies outside of x becomes NaN, which is not kept.
__device__ __forceinline__ void load_tile(uint4 (&vectors)[VECTORS], const X_T* x, i64 first,
                                          i64 n) {
    if (first >= 0 && first + TILE <= n) {
#pragma unroll
        for (int j = 0; j < VECTORS; j++) vectors[j] = load16_eager(x + first + position_of(j));
        return;
    }
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        Vector<X_T, E> some;
#pragma unroll
        for (int e = 0; e < E; e++) {
            const i64 at = first + position_of(j) + e;
            some.elements[e] = at >= 0 && at < n ? x[at] : from_float<X_T>(__uint_as_float(~0u));
        }
        vectors[j] = *reinterpret_cast<const uint4*>(&some);
    }
}

// Start the copy of this thread's vectors of a tile to shared memory.
__device__ __forceinline__ void copy_tile(X_T* to, const X_T* x, int tile, int num_tiles, i64 n) {
    if (tile == num_tiles) return;
    const i64 first = first_of(tile, x);
    if (first >= 0 && first + TILE <= n) {
#pragma unroll
        for (int j = 0; j < VECTORS; j++) {
            cp_async16(to + position_of(j), x + first + position_of(j));
        }
        return;
    }
    uint4 vectors[VECTORS];
    load_tile(vectors, x, first, n);
#pragma unroll
    for (int j = 0; j < VECTORS; j++) *reinterpret_cast<uint4*>(to + position_of(j)) = vectors[j];
}

// This thread's vectors of a tile that it has copied.
__device__ __forceinline__ void load_own(uint4 (&vectors)[VECTORS], const X_T* elements) {
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        vectors[j] = *reinterpret_cast<const uint4*>(elements + position_of(j));
    }
}

// What this thread keeps of its vectors of a tile.
struct Share {
    u32 kept;                 // element e of vector j: bit 4 * j + e; of 16 bits: see bit_of
    u32 before[VECTORS / 2];  // kept elements of the warp before a vector; each word has two
};

// Where `kept >> 4 * j` has element e of vector j. Two elements of 16 bits stand in a word, and so do
// their bits in the halves of the mask.
__device__ constexpr int bit_of(int e) { return E == 4 ? e : e % 2 * 16 + e / 2; }

// A threshold, as elements are compared with it. Magnitudes of 16 bits are integers of 15 bits in
// the order of the numbers, which a sum carries to bit 15 if they are large enough, two at once.
struct Limit {
    float threshold;
    u32 above, is_nan;  // addends
};

template <typename T> __device__ __forceinline__ Limit limit_of(float threshold) {
    if constexpr (sizeof(T) == 4) {
        return {threshold, 0, 0};
    } else {
        constexpr u32 INFINITE = IS_BF16<T> ? 0x7f80u : 0x7c00u;
        const T nearest = from_float<T>(fabsf(threshold));
        const int most = threshold < 0.0f ? -1  // the largest magnitude that is not kept
                                          : nearest.bits - (to_float(nearest) > threshold);
        return {threshold, (u32)(0x7fff - most) * 0x10001u, (0x7fffu - INFINITE) * 0x10001u};
    }
}

// Find what is kept of a tile; returns how many elements of the warp are.
__device__ __forceinline__ int take(Share& share, const uint4 (&vectors)[VECTORS],
                                    const Limit& limit) {
    share.kept = 0;
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const u32 words[4] = {vectors[j].x, vectors[j].y, vectors[j].z, vectors[j].w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            if constexpr (E == 4) {
                const bool is_kept = fabsf(__uint_as_float(words[w])) > limit.threshold;
                share.kept |= (u32)is_kept << (4 * j + w);
            } else {
                const u32 magnitudes = words[w] & 0x7fff7fffu;
                const u32 above = magnitudes + limit.above, is_nan = magnitudes + limit.is_nan;
                share.kept |= (above & ~is_nan & 0x80008000u) >> (15 - 4 * j - w);
            }
        }
    }
    const auto own = [&](int j) {
        return __popc(share.kept >> 4 * j & (E == 4 ? 0xfu : 0x000f000fu));
    };
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

// Of the warps' counts: the sum before this thread's warp, and of all.
struct Start {
    int before, total;
};

__device__ __forceinline__ Start start_of(const int (&counts)[WARPS]) {
    const int lane = threadIdx.x % WARP;
    const u32 sum = warp_scan(lane < WARPS ? (u32)counts[lane] : 0u);
    const u32 upto = __shfl_sync(FULL_MASK, sum, threadIdx.x / WARP);
    return {(int)upto - counts[threadIdx.x / WARP], (int)__shfl_sync(FULL_MASK, sum, WARP - 1)};
}

// Call put(place among what the tile keeps, vector, element) for each that this thread keeps; `start`:
// kept elements of the warps before.
template <typename Put>
__device__ __forceinline__ void place_share(int start, const Share& share, Put put) {
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const int kept = opaque((int)(share.kept >> 4 * j));  // else each bit takes a register
        int at = start + (int)(share.before[j / 2] >> j % 2 * 16 & 0xffffu);
#pragma unroll
        for (int e = 0; e < E; e++) {
            if (kept >> bit_of(e) & 1) put(at++, j, e);
        }
    }
}

// Put a tile's kept elements where its first ones were, in order.
__device__ __forceinline__ void gather(X_T* elements, int start, const Share& share,
                                       const uint4 (&vectors)[VECTORS]) {
    place_share(start, share,
                [&](int at, int j, int e) { elements[at] = element_of(vectors[j], e); });
}

// List where a tile's kept elements are.
__device__ __forceinline__ void gather_positions(u16* positions, int start, const Share& share) {
    place_share(start, share,
                [&](int at, int j, int e) { positions[at] = (u16)(position_of(j) + e); });
}

// Store entry i of a tile as `entry(i)` at to[i], a line by each warp.
template <typename Out, typename Entry>
__device__ __forceinline__ void store_run(Out* to, int count, Entry entry) {
    if (count == 0) return;  // there is no entry 0
    const int shift = (int)((u64)to % LINE / sizeof(Out));
    if constexpr (sizeof(Out) >= 4) {
#pragma unroll 4
        for (int i = (int)threadIdx.x - shift; i < count; i += BLOCK) {
            if (i >= 0) __stcs(to + i, entry(i));
        }
    } else {  // two elements at once
#pragma unroll 4
        for (int i = 2 * (int)threadIdx.x - shift; i < count; i += 2 * BLOCK) {
            if (i >= 0 && i + 1 < count) {
                const u32 pair = entry(i).bits | (u32)entry(i + 1).bits << 16;
                __stcs(reinterpret_cast<u32*>(to + i), pair);
            } else if (i >= 0) {
                to[i] = entry(i);
            } else if (i == -1) {
                to[0] = entry(0);
            }
        }
    }
}

// Values and indices of a tile whose first kept element is number `prefix` of all.
__device__ __forceinline__ void store_tile(X_T* values, I_T* indices, const X_T* elements,
                                           const u16* positions, i64 prefix, int total,
                                           i64 capacity, i64 first) {
    const int stored = (int)max(min((i64)total, capacity - prefix), 0ll);
    if (indices == nullptr) {
        store_run(values + prefix, stored, [&](int i) { return elements[i]; });
    } else {
        store_run(values + prefix, stored, [&](int i) { return elements[positions[i]]; });
        store_run(indices + prefix, stored, [&](int i) { return (I_T)(first + positions[i]); });
    }
}
