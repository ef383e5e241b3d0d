// block_copy.cu: copy many ranges of bytes between addresses that tables name.
//
// Arrays (letters as in pykv/ops/block_copy.py):
//   src_ptrs, dst_ptrs  const  [C] u64    addresses of device or pinned host memory, any alignment
//   sizes               const  [C] i64    bytes of each pair; null: `size` for all
//   groups              const  [G+1, 2] i32  the first tile and the first pair of each group, and
//                              num_tiles and C; null with `sizes`. A group is one pair, or up to
//                              GROUP pairs that share one tile.
//   nearest             const  [ceil(num_tiles / 32)] i32  the group of tiles 0, 32, 64 ...; null
//                              with `sizes`
// Defines:  BLOCK = threads of a block, a multiple of 32; CTAS_PER_SM = blocks that share an SM;
//           UNROLL = loads that a thread has in flight; TILE = bytes of a tile, a multiple of 128;
//           GROUP = how many pairs may share a tile, a power of two up to 32
// Launch:   block (BLOCK), any grid, no shared memory. A pair of n bytes is ceil(n / TILE) tiles,
//           with `sizes` at least one; but small pairs, each of which would occupy a warp as long
//           as a tile, may share one. num_tiles in all, below 2^31. Warps take tiles in turn.
// Traffic:  2 * sum of sizes + 16 * C bytes; with `sizes` also 8 * C + 8 * G + num_tiles / 8. The
//           ceiling is a contiguous copy: 4270 GB/s on an H200; between host and device, where half
//           of it crosses the link, 55 GB/s each way.
// Order:    no atomics; bit-exact; undefined where a destination overlaps another range of the call
#include "common.cuh"

#if !defined(BLOCK) || !defined(CTAS_PER_SM) || !defined(UNROLL) || !defined(TILE) || \
    !defined(GROUP)
#error "block_copy.cu needs BLOCK, CTAS_PER_SM, UNROLL, TILE and GROUP"
#endif
constexpr int LINE = 128;  // bytes of a cache line, at which tiles meet
constexpr int WARPS = BLOCK / WARP;
static_assert(BLOCK % WARP == 0 && TILE % LINE == 0, "whole warps, whole lines");
static_assert((UNROLL & (UNROLL - 1)) == 0, "rows are halved");
static_assert(GROUP <= WARP && WARP % GROUP == 0, "a warp is teams of lanes, one for each pair");

// In what follows a team of LANES neighbouring lanes, a whole warp or a part of it, moves a range.

// A lane's share of ROWS rows of LANES elements: all loads are under way before the first store.
template <int LANES, int ROWS, typename V>
__device__ __forceinline__ void move_rows(V* to, const V* from) {
    V x[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) x[k] = from[k * LANES];
#pragma unroll
    for (int k = 0; k < ROWS; k++) to[k * LANES] = x[k];
}

// A lane's share of fewer than 2 * ROWS rows.
template <int LANES, int ROWS, typename V>
__device__ __forceinline__ void move_last_rows(V* to, const V* from, int rows) {
    if constexpr (ROWS > 0) {
        if (rows >= ROWS) {
            move_rows<LANES, ROWS>(to, from);
            to += ROWS * LANES, from += ROWS * LANES, rows -= ROWS;
        }
        move_last_rows<LANES, ROWS / 2>(to, from, rows);
    }
}

// n elements.
template <int LANES, typename V>
__device__ __forceinline__ void move(V* to, const V* from, int n) {
    const int lane = threadIdx.x % LANES;
    int rows = n / LANES;
    to += lane, from += lane;
    if (lane < n % LANES) to[rows * LANES] = from[rows * LANES];
#pragma unroll 1  // or registers run out
    for (; rows >= UNROLL; rows -= UNROLL) {
        move_rows<LANES, UNROLL>(to, from);
        to += UNROLL * LANES, from += UNROLL * LANES;
    }
    move_last_rows<LANES, UNROLL / 2>(to, from, rows);
}

// n bytes, fewer than MOST.
template <int LANES, int MOST>
__device__ __forceinline__ void move_few(u8* to, const u8* from, int n) {
#pragma unroll
    for (int i = threadIdx.x % LANES; i < MOST; i += LANES) {
        if (i < n) to[i] = from[i];
    }
}

// n bytes: up to the first multiple of V by bytes, then by V, then the rest by bytes. `to` and
// `from` are equally far from a multiple of V.
template <int LANES, typename V>
__device__ __forceinline__ void move_aligned(u8* to, const u8* from, int n) {
    constexpr int WIDTH = sizeof(V);
    const int head = min(n, (int)(-(u64)to % WIDTH));
    const int body = (n - head) / WIDTH * WIDTH;
    move_few<LANES, WIDTH>(to, from, head);
    move<LANES>((V*)(to + head), (const V*)(from + head), body / WIDTH);
    const int done = head + body;
    move_few<LANES, WIDTH>(to + done, from + done, n - done);
}

// n bytes in the widest pieces that both addresses allow.
template <int LANES>
__device__ __forceinline__ void move_bytes(u8* to, const u8* from, int n) {
    const u32 apart = (u32)((u64)to - (u64)from);
    if (apart % 16 == 0) {
        move_aligned<LANES, uint4>(to, from, n);
    } else if (apart % 8 == 0) {
        move_aligned<LANES, u64>(to, from, n);
    } else if (apart % 4 == 0) {
        move_aligned<LANES, u32>(to, from, n);
    } else if (apart % 2 == 0) {
        move_aligned<LANES, u16>(to, from, n);
    } else {
        move_aligned<LANES, u8>(to, from, n);
    }
}

// The group that a tile belongs to: the last one that begins at or before it. The whole warp asks.
// Every group has a tile, so that of 32 tiles the last belongs to one of the 32 groups from that of
// the first on.
__device__ __forceinline__ int find_group(const int* groups, const int* nearest, int num_groups,
                                          int tile) {
    const int low = nearest[tile / WARP];
    const int probe = low + threadIdx.x % WARP;
    const bool begun = probe < num_groups && groups[2 * (i64)probe] <= tile;
    return low + __popc(__ballot_sync(FULL_MASK, begun)) - 1;
}

extern "C" __global__ void __launch_bounds__(BLOCK, CTAS_PER_SM)
block_copy(const u64* __restrict__ src_ptrs, const u64* __restrict__ dst_ptrs,
           const i64* __restrict__ sizes, const int* __restrict__ groups,
           const int* __restrict__ nearest, i64 size, int num_groups, int num_tiles) {
    const u32 tiles_a_pair = (u32)((size - 1) / TILE + 1);  // of no meaning with `sizes`
    u64 src = 0, dst = 0;
    int first = 0, end = 0;  // tiles of the group at hand
    // Tiles go round the blocks first, so that a few tiles still occupy as many SMs.
    for (u32 next = blockIdx.x + gridDim.x * (threadIdx.x / WARP); next < (u32)num_tiles;
         next += gridDim.x * WARPS) {
        const int tile = (int)next;
        if (tile >= end) {
            int pair;
            if (sizes) {
                const int* group = groups + 2 * (i64)find_group(groups, nearest, num_groups, tile);
                first = group[0], end = group[2];
                pair = group[1];
                const int end_pair = group[3];
                if (end_pair - pair > 1) {
                    constexpr int TEAM = WARP / GROUP;
                    pair += threadIdx.x % WARP / TEAM;
                    if (pair < end_pair) {
                        src = src_ptrs[pair];
                        dst = dst_ptrs[pair];
                        size = sizes[pair];
                        move_bytes<TEAM>((u8*)dst, (const u8*)src, (int)size);
                    }
                    continue;
                }
                size = sizes[pair];
            } else {
                pair = (int)(next / tiles_a_pair);
                first = pair * (int)tiles_a_pair;
                end = first + (int)tiles_a_pair;
            }
            src = src_ptrs[pair];
            dst = dst_ptrs[pair];
        }
        // Tiles meet where a line of the destination begins, so that only a pair's ends are narrow.
        const int shift = (int)(dst % LINE);
        const i64 start = tile == first ? 0 : (i64)(tile - first) * TILE - shift;
        const i64 stop = tile + 1 == end ? size : (i64)(tile + 1 - first) * TILE - shift;
        move_bytes<WARP>((u8*)dst + start, (const u8*)src + start, (int)(stop - start));
    }
}
