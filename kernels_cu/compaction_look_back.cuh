// compaction_look_back.cuh: the sums of compaction's counts before a tile, from the words of the
// tiles before it.
#include "compaction_tile.cuh"
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 700  // older SMs count, scan and scatter

static_assert(LOOK * WARPS <= WARP, "a lane for what each warp saw");

// A tile's word: 0 until its count is known; then that, marked as PART; then all that is kept up to
// its end, marked as WHOLE. A word is the whole message, so relaxed order is enough.
constexpr u64 PART = 1ull << 62, WHOLE = 2ull << 62, NUMBER = PART - 1;

// What words of consecutive tiles say, from the last tile backwards.
struct Seen {
    u64 sum;      // of the counts back to the nearest WHOLE, inclusive
    bool is_whole, is_known;  // a WHOLE was found; no word up to it is missing
};

// Of one word of each lane; lanes count backwards.
__device__ __forceinline__ Seen see(u64 word) {
    const u32 known = __ballot_sync(FULL_MASK, word != 0);
    const u32 whole = __ballot_sync(FULL_MASK, word >= WHOLE);
    const u32 wanted = whole ? whole ^ (whole - 1) : FULL_MASK;  // words up to the nearest WHOLE
    const bool counts = (wanted & ~whole) >> threadIdx.x % WARP & 1;
    const u32 parts = __shfl_sync(FULL_MASK, warp_scan(counts ? (u32)word : 0u), WARP - 1);
    const u64 nearest = __shfl_sync(FULL_MASK, word, __ffs((int)whole) - 1 & (WARP - 1));
    return {parts + (whole ? nearest & NUMBER : 0ull), whole != 0, (known & wanted) == wanted};
}

__device__ __forceinline__ u64 word_before(u64* words, int tile, int distance) {
    const int at = tile - 1 - distance;
    return at < 0 ? WHOLE : load_relaxed(words + at);
}

// Kept elements before a tile, by a warp that waits for what is missing.
__device__ __forceinline__ u64 look_back(u64* words, int tile) {
    u64 before = 0;
    for (int distance = threadIdx.x % WARP;;) {
        const Seen seen = see(word_before(words, tile, distance));
        if (!seen.is_known) continue;
        before += seen.sum;
        if (seen.is_whole) return before;
        distance += WARP;
    }
}

// Kept elements before a tile, by a warp, from what the block saw of WARP words each.
__device__ __forceinline__ u64 resolve(const Seen (&seen)[LOOK * WARPS], u64* words, int tile) {
    const int lane = threadIdx.x % WARP;
    const Seen own = lane < LOOK * WARPS ? seen[lane] : Seen{0, false, true};
    const u32 known = __ballot_sync(FULL_MASK, own.is_known);
    const u32 whole = __ballot_sync(FULL_MASK, own.is_whole);
    const u32 wanted = whole ^ (whole - 1);
    if (!whole || (known & wanted) != wanted) return look_back(words, tile);
    const u64 sum = warp_scan(wanted >> lane & 1 ? own.sum : 0ull);
    return __shfl_sync(FULL_MASK, sum, WARP - 1);
}

#endif
