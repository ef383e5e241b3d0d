// compaction_look_back.cuh: the sums of compaction's counts before a tile, from the words of the
// tiles before it.
#include "ptx.cuh"
#include "reduce.cuh"

#if __CUDA_ARCH__ >= 700  // older SMs count, scan and scatter

// Words that say what tiles keep, all 0 at first. Each is the whole of its message, so relaxed order
// is enough. WARP tiles are a row, so that two words of each lane reach back over WARP rows.
struct Words {
    u64* tiles;  // of a tile: 1 + its count
    u64* rows;   // of a row: the sum of its counts so far, and above 32 bits how many they are;
                 // later WHOLE, and all that is kept up to its end
};

constexpr u64 WHOLE = 1ull << 63, COUNTED = (u64)WARP << 32;

// By one thread: a tile's count.
__device__ __forceinline__ void publish(const Words& of, int tile, int count) {
    store_relaxed(of.tiles + tile, (u64)count + 1);
    atomicAdd(of.rows + tile / WARP, 1ull << 32 | (u64)count);
}

// Words of a lane: of an earlier tile in the row, and of an earlier row.
struct Look {
    u64 tile, row;
};

__device__ __forceinline__ u64 row_before(const Words& of, int row) {
    return row < 0 ? WHOLE : load_relaxed(of.rows + row);
}

__device__ __forceinline__ Look look_at(const Words& of, int tile) {
    const int lane = threadIdx.x % WARP, row = tile / WARP;
    const u64 earlier = lane < tile % WARP ? load_relaxed(of.tiles + row * WARP + lane) : 1;
    return {earlier, row_before(of, row - 1 - lane)};
}

constexpr u64 UNKNOWN = ~0ull;

// What the rows of a look sum to, by a warp, and whether that is all there is before the tile;
// UNKNOWN while a count is missing.
__device__ __forceinline__ u64 sum_of(const Look& look, bool& is_all) {
    const u32 whole = __ballot_sync(FULL_MASK, look.row >= WHOLE);
    const u32 wanted = whole ? whole ^ (whole - 1) : FULL_MASK;  // rows to the nearest WHOLE
    const bool counts = (wanted & ~whole) >> threadIdx.x % WARP & 1;
    is_all = whole != 0;
    if (__any_sync(FULL_MASK, look.tile == 0 || (counts && look.row < COUNTED))) return UNKNOWN;
    const u64 nearest = __shfl_sync(FULL_MASK, look.row, __ffs((int)whole) - 1 & (WARP - 1));
    const u32 parts = warp_scan((u32)look.tile - 1 + (counts ? (u32)look.row : 0u));
    return __shfl_sync(FULL_MASK, parts, WARP - 1) + (whole ? nearest & ~WHOLE : 0ull);
}

// Kept elements before a tile, by a warp that waits for what is missing.
__device__ __forceinline__ u64 look_back(const Words& of, int tile) {
    u64 before = 0;
    for (int row = tile / WARP - 1, first = row;;) {
        const Look look = row == first ? look_at(of, tile)
                                       : Look{1, row_before(of, row - (int)threadIdx.x % WARP)};
        bool is_all;
        const u64 sum = sum_of(look, is_all);
        if (sum == UNKNOWN) continue;
        before += sum;
        if (is_all) return before;
        row -= WARP;
    }
}

#endif
