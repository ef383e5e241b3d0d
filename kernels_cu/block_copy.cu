// block_copy.cu: copy many ranges of bytes between addresses that tables name.
//
// Kernels: block_copy      pairs that come as up to four runs of equal sizes
//          block_copy_any  pairs of any sizes
// Arrays (letters as in pykv/ops/block_copy.py):
//   src_ptrs, dst_ptrs  const  [C] u64    addresses of device or pinned host memory, any alignment
//   sizes               const  [C] i64    bytes of each pair (block_copy_any)
//   first_tile          const  [C+1] i32  how many tiles the pairs before have (block_copy_any)
// Defines:  BLOCK = threads of a block, a multiple of 32; CTAS_PER_SM = blocks that share an SM;
//           UNROLL = loads that a thread has in flight; TILE = bytes of a tile, a multiple of 128;
//           GROUP = how many small pairs share a tile, a power of two up to 32
// Launch:   block (BLOCK), any grid, no shared memory. A pair of n bytes is ceil(n / TILE) tiles,
//           and one of no bytes has none; but each run whose first tile is below `shared_tiles` has
//           GROUP pairs in a tile. num_tiles in all, below 2^31. Warps take tiles in turn.
// Traffic:  2 * sum of sizes + 16 * C bytes; block_copy_any also reads 12 * C. The ceiling is a
//           contiguous copy: 4270 GB/s on an H200; between host and device, where half of it
//           crosses the link, 55 GB/s each way.
// Order:    no atomics; bit-exact; undefined where a destination overlaps another range of the call
#include "batch.cuh"
#include "types.cuh"

#if !defined(BLOCK) || !defined(CTAS_PER_SM) || !defined(UNROLL) || !defined(TILE) || \
    !defined(GROUP)
#error "block_copy.cu needs BLOCK, CTAS_PER_SM, UNROLL, TILE and GROUP"
#endif
constexpr int LINE = 128;  // bytes of a cache line, at which tiles meet
constexpr int WARPS = BLOCK / WARP;
static_assert(BLOCK % WARP == 0 && TILE % LINE == 0, "whole warps, whole lines");
static_assert((UNROLL & (UNROLL - 1)) == 0, "rows are halved");
static_assert(GROUP <= WARP && WARP % GROUP == 0, "a warp is teams of lanes, one for each pair");

// 0 as a constant for blocks of one warp, which the compiler does not derive.
__device__ __forceinline__ u32 warp_of_block() {
    return WARPS > 1 ? threadIdx.x / WARP : 0;
}

// In what follows a team of LANES neighbouring lanes, a whole warp or a part of it, moves a range.

// A lane's part of ROWS rows of LANES elements: all loads are issued before the first store.
template <int LANES, int ROWS, typename V>
__device__ __forceinline__ void move_rows(V* to, const V* from) {
    V x[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) x[k] = from[k * LANES];
#pragma unroll
    for (int k = 0; k < ROWS; k++) to[k * LANES] = x[k];
}

// A lane's part of fewer than 2 * ROWS rows.
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
#pragma unroll 1  // unrolled, it would run out of registers
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
    for (int i = threadIdx.x % LANES; i < MOST - 1; i += LANES) {
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
    if (apart % 16 == 0) move_aligned<LANES, uint4>(to, from, n);
    else if (apart % 8 == 0) move_aligned<LANES, uint2>(to, from, n);
    else if (apart % 4 == 0) move_aligned<LANES, u32>(to, from, n);
    else if (apart % 2 == 0) move_aligned<LANES, u16>(to, from, n);
    else move_aligned<LANES, u8>(to, from, n);
}

// One warp moves one tile of a pair, the `tile`-th of `tiles`.
__device__ __forceinline__ void move_tile(u64 dst, u64 src, i64 size, u32 tile, u32 tiles) {
    // Tiles meet where a line of the destination begins, so that only a pair's ends are narrow.
    const int shift = (int)(dst % LINE);
    const i64 start = tile == 0 ? 0 : (i64)tile * TILE - shift;
    const i64 stop = tile + 1 == tiles ? size : (i64)(tile + 1) * TILE - shift;
    move_bytes<WARP>((u8*)dst + start, (const u8*)src + start, (int)(stop - start));
}

// Neighbouring pairs of equal sizes, and their first tile: a warp finds its pair without a load.
struct Run {
    u32 first_tile, first_pair, end_pair;
    i64 size;
};

// Runs stand in the order of their tiles, which need not be that of their pairs; those that are
// missing begin at num_tiles. Those whose pairs share tiles come first: each of these small tiles
// takes a warp about as long as a large one, which at the end would have others wait.
extern "C" __global__ void __launch_bounds__(BLOCK, CTAS_PER_SM)
block_copy(const u64* __restrict__ src_ptrs, const u64* __restrict__ dst_ptrs,
           u32 pair_0, u32 end_0, i64 size_0, u32 tile_1, u32 pair_1, u32 end_1, i64 size_1,
           u32 tile_2, u32 pair_2, u32 end_2, i64 size_2, u32 tile_3, u32 pair_3, u32 end_3,
           i64 size_3, u32 shared_tiles, u32 num_tiles) {
    // Tiles go round the blocks first, so that a few tiles still occupy as many SMs.
    for (u32 tile = blockIdx.x + gridDim.x * warp_of_block(); tile < num_tiles;
         tile += gridDim.x * WARPS) {
        const Run run = tile < tile_1   ? Run{0, pair_0, end_0, size_0}
                        : tile < tile_2 ? Run{tile_1, pair_1, end_1, size_1}
                        : tile < tile_3 ? Run{tile_2, pair_2, end_2, size_2}
                                        : Run{tile_3, pair_3, end_3, size_3};
        const u32 of_run = tile - run.first_tile;
        if (tile < shared_tiles) {
            constexpr int TEAM = WARP / GROUP;
            const u32 pair = run.first_pair + of_run * GROUP + threadIdx.x % WARP / TEAM;
            if (pair < run.end_pair) {
                move_bytes<TEAM>((u8*)dst_ptrs[pair], (const u8*)src_ptrs[pair], (int)run.size);
            }
        } else {
            const u32 tiles = (u32)((u64)(run.size - 1) / TILE) + 1;  // tiles of a pair
            const u32 pair = run.first_pair + of_run / tiles;
            move_tile(dst_ptrs[pair], src_ptrs[pair], run.size, of_run % tiles, tiles);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, CTAS_PER_SM)
block_copy_any(const u64* __restrict__ src_ptrs, const u64* __restrict__ dst_ptrs,
               const i64* __restrict__ sizes, const int* __restrict__ first_tile,
               int num_pairs, u32 num_tiles) {
    for (u32 tile = blockIdx.x + gridDim.x * warp_of_block(); tile < num_tiles;
         tile += gridDim.x * WARPS) {
        const int pair =
            count_passing<WARP>(num_pairs, [&](int i) { return first_tile[i] <= (int)tile; }) - 1;
        const int first = first_tile[pair], end = first_tile[pair + 1];
        move_tile(dst_ptrs[pair], src_ptrs[pair], sizes[pair], tile - first, end - first);
    }
}
