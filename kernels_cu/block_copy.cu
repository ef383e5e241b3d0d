// block_copy.cu: copy many ranges of bytes between addresses that tables name.
//
// Arrays (letters as in pykv/ops/block_copy.py):
//   src_ptrs, dst_ptrs  const  [C] u64    addresses of device or pinned host memory, of any alignment
//   sizes               const  [C] i64    bytes of each pair; null: `size` for all
//   first_tile          const  [C+1] i32  how many tiles the pairs before have; null with `sizes`
// Defines:  BLOCK = threads of a block, a multiple of 32; CTAS_PER_SM = blocks that share an SM;
//           UNROLL = loads that a thread has in flight; TILE = bytes of a tile, a multiple of 128
// Launch:   block (BLOCK), any grid, no shared memory. A pair of n bytes is ceil(n / TILE) tiles,
//           and one of no bytes has none; num_tiles in all, below 2^31. Warps take tiles in turn.
// Traffic:  2 * sum of sizes + 16 * C bytes. The ceiling is a contiguous copy: 4270 GB/s on an H200;
//           between host and device, where half of it crosses the link, 55 GB/s each way.
// Order:    no atomics; bit-exact; undefined where a destination overlaps another range of the call
#include "common.cuh"

#if !defined(BLOCK) || !defined(CTAS_PER_SM) || !defined(UNROLL) || !defined(TILE)
#error "block_copy.cu needs BLOCK, CTAS_PER_SM, UNROLL and TILE"
#endif
constexpr int LINE = 128;  // bytes of a cache line, at which tiles meet
constexpr int WARPS = BLOCK / WARP;
static_assert(BLOCK % WARP == 0 && TILE % LINE == 0, "whole warps, whole lines");
static_assert((UNROLL & (UNROLL - 1)) == 0, "rows are halved");

// A lane's share of ROWS rows of 32 elements: all loads are under way before the first store.
template <int ROWS, typename V>
__device__ __forceinline__ void move_rows(V* to, const V* from) {
    V x[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) x[k] = from[k * WARP];
#pragma unroll
    for (int k = 0; k < ROWS; k++) to[k * WARP] = x[k];
}

// A lane's share of fewer than 2 * ROWS rows.
template <int ROWS, typename V>
__device__ __forceinline__ void move_last_rows(V* to, const V* from, int rows) {
    if constexpr (ROWS > 0) {
        if (rows >= ROWS) {
            move_rows<ROWS>(to, from);
            to += ROWS * WARP, from += ROWS * WARP, rows -= ROWS;
        }
        move_last_rows<ROWS / 2>(to, from, rows);
    }
}

// One warp moves n elements.
template <typename V>
__device__ __forceinline__ void move(V* to, const V* from, int n) {
    const int lane = threadIdx.x % WARP;
    int rows = n / WARP;
    to += lane, from += lane;
    if (lane < n % WARP) to[rows * WARP] = from[rows * WARP];
#pragma unroll 1  // or registers run out
    for (; rows >= UNROLL; rows -= UNROLL) {
        move_rows<UNROLL>(to, from);
        to += UNROLL * WARP, from += UNROLL * WARP;
    }
    move_last_rows<UNROLL / 2>(to, from, rows);
}

// One warp moves n bytes: up to the first multiple of V by bytes, then by V, then the rest by bytes.
// `to` and `from` are equally far from a multiple of V.
template <typename V>
__device__ __forceinline__ void move_aligned(u8* to, const u8* from, int n) {
    constexpr int WIDTH = sizeof(V);
    const int lane = threadIdx.x % WARP;
    const int head = min(n, (int)(-(u64)to % WIDTH));
    const int body = (n - head) / WIDTH * WIDTH;
    if (lane < head) to[lane] = from[lane];
    move((V*)(to + head), (const V*)(from + head), body / WIDTH);
    const int at = head + body + lane;
    if (at < n) to[at] = from[at];
}

// One warp moves n bytes in the widest pieces that both addresses allow.
__device__ __forceinline__ void move_bytes(u8* to, const u8* from, int n) {
    const u32 apart = (u32)((u64)to - (u64)from);
    if (apart % 16 == 0) {
        move_aligned<uint4>(to, from, n);
    } else if (apart % 8 == 0) {
        move_aligned<u64>(to, from, n);
    } else if (apart % 4 == 0) {
        move_aligned<u32>(to, from, n);
    } else if (apart % 2 == 0) {
        move_aligned<u16>(to, from, n);
    } else {
        move_aligned<u8>(to, from, n);
    }
}

// The pair that a tile belongs to: the last one with first_tile[pair] <= tile. The whole warp asks;
// each round its lanes divide what is left by 32.
__device__ __forceinline__ int find_pair(const int* first_tile, int num_pairs, int tile) {
    const int lane = threadIdx.x % WARP;
    int low = 0, left = num_pairs;  // the pair is one of `left` from `low` on
    while (left > 1) {
        const int step = (left - 1) / WARP + 1;
        const i64 probe = (i64)lane * step;
        const bool before = probe < left && first_tile[low + probe] <= tile;
        const int passed = (__popc(__ballot_sync(FULL_MASK, before)) - 1) * step;
        low += passed;
        left = min(left - passed, step);
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(BLOCK, CTAS_PER_SM)
block_copy(const u64* __restrict__ src_ptrs, const u64* __restrict__ dst_ptrs,
           const i64* __restrict__ sizes, const int* __restrict__ first_tile,
           i64 size, int num_pairs, int num_tiles) {
    const u32 tiles_a_pair = (u32)((size - 1) / TILE + 1);  // of no meaning with `sizes`
    u64 src = 0, dst = 0;
    int first = 0, end = 0;  // tiles of the pair at hand
    // Tiles go round the blocks first, so that a few tiles still occupy as many SMs.
    for (u32 next = blockIdx.x + gridDim.x * (threadIdx.x / WARP); next < (u32)num_tiles;
         next += gridDim.x * WARPS) {
        const int tile = (int)next;
        if (tile >= end) {
            int pair;
            if (sizes) {
                pair = find_pair(first_tile, num_pairs, tile);
                first = first_tile[pair];
                end = first_tile[pair + 1];
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
        move_bytes((u8*)dst + start, (const u8*)src + start, (int)(stop - start));
    }
}
