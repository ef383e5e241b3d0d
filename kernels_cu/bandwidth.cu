// bandwidth.cu: read, write and copy device memory as fast as it goes.
//
// Arrays, contiguous (letters as in pykv/ops/bandwidth.py); num_vectors = V vectors of 16 bytes:
//   bandwidth_read    sums [G], x const [V, 4]   u32; sums[g]: the words of tiles g, g + G, ...
//   bandwidth_write   out [V, 4]                 u32; word i becomes seed + i
//   bandwidth_copy    out [V, 4], x const [V, 4] u32
// Defines:  VECTORS = vectors that a thread may have in flight; BLOCK = threads; a tile is
//           BLOCK * VECTORS vectors
// Launch:   block (BLOCK); grid (G) to read, (ceil(V / tile)) to write and to copy
// Traffic:  16 * V bytes to read (and 4 * G written) or to write, 32 * V to copy; nothing is used
//           twice, so loads and stores ask the caches to let go of it first
// Order:    sums wrap at 32 bits, so that any order gives the same bits
#include "types.cuh"

#if !defined(VECTORS) || !defined(BLOCK)
#error "bandwidth.cu needs VECTORS and BLOCK"
#endif
constexpr int TILE = BLOCK * VECTORS;

// How many vectors of the tile that starts at `first` exist.
__device__ __forceinline__ int tile_size(i64 first, i64 num_vectors) {
    return num_vectors - first < TILE ? (int)(num_vectors - first) : TILE;
}

// Independent loads, all in flight at once.
__device__ __forceinline__ void load_tile(uint4 (&v)[VECTORS], const u32* x, i64 first, int size) {
    const uint4* from = reinterpret_cast<const uint4*>(x) + first;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = i * BLOCK + threadIdx.x;
        v[i] = at < size ? __ldcs(from + at) : make_uint4(0, 0, 0, 0);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
bandwidth_read(u32* __restrict__ sums, const u32* __restrict__ x, i64 num_vectors) {
    __shared__ u32 total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();

    u32 sum = 0;
    const i64 step = (i64)gridDim.x * TILE;
    for (i64 first = (i64)blockIdx.x * TILE; first < num_vectors; first += step) {
        uint4 v[VECTORS];
        load_tile(v, x, first, tile_size(first, num_vectors));
#pragma unroll
        for (int i = 0; i < VECTORS; i++) sum += v[i].x + v[i].y + v[i].z + v[i].w;
    }
    atomicAdd(&total, sum);
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
bandwidth_write(u32* __restrict__ out, i64 num_vectors, u32 seed) {
    const i64 first = (i64)blockIdx.x * TILE;
    const int size = tile_size(first, num_vectors);
    uint4* to = reinterpret_cast<uint4*>(out) + first;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = i * BLOCK + threadIdx.x;
        const u32 word = seed + (u32)(4 * (first + at));
        if (at < size) __stcs(to + at, make_uint4(word, word + 1, word + 2, word + 3));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
bandwidth_copy(u32* __restrict__ out, const u32* __restrict__ x, i64 num_vectors) {
    const i64 first = (i64)blockIdx.x * TILE;
    const int size = tile_size(first, num_vectors);
    uint4 v[VECTORS];
    load_tile(v, x, first, size);
    uint4* to = reinterpret_cast<uint4*>(out) + first;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = i * BLOCK + threadIdx.x;
        if (at < size) __stcs(to + at, v[i]);
    }
}
