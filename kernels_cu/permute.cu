// permute.cu: move KV blocks between layouts.
//
// Arrays (letters and layouts as in pykv/layout.py):
//   dst_ptrs, src_ptrs  const  u64  addresses of allocations, in device or pinned host memory, at
//                                   any alignment; chunk c of block b is that at
//                                   b * entries + (entries > 1 ? c : 0)
// Scalars, of which dst and src have their own; strides and offsets in bytes:
//   entries        allocations of a block: 1, or at least its chunks
//   offset, chunk  chunk c begins at offset + c * chunk of its allocation
//   outer, inner   a chunk is two loops over runs, contiguous on both sides; strides of the loops
// Scalars of both, below 2^31; those that divide come with magic and shift, see divide.cuh:
//   run, num_inner, tiles, num_chunks  bytes of a run, runs of an inner loop, tiles of a chunk,
//                                      chunks of a block
//   chunk_bytes    moved bytes of a chunk
//   tile_bytes     how many of them, in the order of the loops, are a tile; a multiple of 16
//   num_tiles      in all
//   alignment      `run` and the strides of the loops, or-ed; with the addresses it tells how wide
//                  a piece may be
// Defines:  BLOCK = threads of a block, at most 1024; UNROLL = loads that a thread has in flight,
//           of 16 bytes where addresses, strides and runs allow, else of 8, 4, 2 or 1
// Launch:   grid (at most num_tiles; blocks take tiles in turn), block (BLOCK), no shared memory
// Traffic:  2 * bytes moved + 16 a chunk for the tables, read and written once; the ceiling is a
//           contiguous copy. Loops in the destination's order let stores fill whole sectors; loads
//           of runs that are no multiple of 32 bytes share sectors by way of L1 and L2.
// Order:    no atomics; bit-exact; undefined where a destination overlaps another one or a source
#include "divide.cuh"

#if !defined(BLOCK) || !defined(UNROLL)
#error "permute.cu needs BLOCK and UNROLL"
#endif

// The two loops of a chunk on one side; strides in bytes.
struct Loops { i64 outer, inner; };

// Bytes begin .. end - 1 of a chunk, in pieces of T. All loads of an iteration are issued before
// its first store.
template <typename T>
__device__ __forceinline__ void move(u8* dst, const u8* src, u32 begin, u32 end,
                                     Divisor run, Divisor num_inner, Loops to, Loops from) {
    constexpr u32 STEP = BLOCK * sizeof(T);
    for (u32 at = begin + threadIdx.x * sizeof(T); at < end; at += UNROLL * STEP) {
        T x[UNROLL];
        u8* target[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const u32 byte = at + i * STEP;
            if (byte >= end) continue;
            const u32 row = divide(byte, run), outer = divide(row, num_inner);
            const u32 inner = row - outer * num_inner.n, in_run = byte - row * run.n;
            target[i] = dst + (outer * to.outer + inner * to.inner + in_run);
            x[i] = __ldg((const T*)(src + (outer * from.outer + inner * from.inner + in_run)));
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            if (at + i * STEP < end) *(T*)target[i] = x[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
permute(const u64* __restrict__ dst_ptrs, const u64* __restrict__ src_ptrs,
        int dst_entries, i64 dst_offset, i64 dst_chunk, i64 dst_outer, i64 dst_inner,
        int src_entries, i64 src_offset, i64 src_chunk, i64 src_outer, i64 src_inner,
        u32 run, u32 run_magic, u32 run_shift,
        u32 num_inner, u32 num_inner_magic, u32 num_inner_shift,
        u32 tiles, u32 tiles_magic, u32 tiles_shift,
        u32 num_chunks, u32 num_chunks_magic, u32 num_chunks_shift,
        u32 chunk_bytes, u32 tile_bytes, u32 num_tiles, u32 alignment) {
    const Divisor by_run{run, run_magic, run_shift};
    const Divisor by_inner{num_inner, num_inner_magic, num_inner_shift};
    const Divisor by_tiles{tiles, tiles_magic, tiles_shift};
    const Divisor by_chunks{num_chunks, num_chunks_magic, num_chunks_shift};
    const Loops to{dst_outer, dst_inner}, from{src_outer, src_inner};
    for (u32 tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const u32 nth = divide(tile, by_tiles);  // the chunk's number among all
        const u32 block = divide(nth, by_chunks);
        const u32 c = nth - block * num_chunks;
        u8* dst = (u8*)dst_ptrs[(i64)block * dst_entries + (dst_entries > 1 ? c : 0)];
        const u8* src = (const u8*)src_ptrs[(i64)block * src_entries + (src_entries > 1 ? c : 0)];
        dst += dst_offset + c * dst_chunk;
        src += src_offset + c * src_chunk;

        const u32 begin = (tile - nth * tiles) * tile_bytes;
        const u32 end = min(begin + tile_bytes, chunk_bytes);
        const u32 bits = alignment | (u32)(u64)dst | (u32)(u64)src;
        if (bits % 16 == 0) move<uint4>(dst, src, begin, end, by_run, by_inner, to, from);
        else if (bits % 8 == 0) move<uint2>(dst, src, begin, end, by_run, by_inner, to, from);
        else if (bits % 4 == 0) move<u32>(dst, src, begin, end, by_run, by_inner, to, from);
        else if (bits % 2 == 0) move<u16>(dst, src, begin, end, by_run, by_inner, to, from);
        else move<u8>(dst, src, begin, end, by_run, by_inner, to, from);
    }
}
