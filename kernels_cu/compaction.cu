// compaction.cu: the elements of an array whose magnitude exceeds a threshold, in order, and back.
//
// Arrays, contiguous (letters as in pykv/ops/compaction.py):
//   x        const [n] X_T         at any address that is a multiple of the element
//   values         [C] X_T         kept elements in the order of x
//   indices        [C] I_T         where each stands in x; null: not wanted
//   count          [1] i64         how many are kept, those that find no place in C included
//   words          [W] u64         scratch: a ticket, a word for each tile and for each row of 32
//   out            [n] X_T         of compaction_expand, whose indices ascend
// Scalars:  n; capacity = C; threshold: kept are elements with |x| > threshold, which NaN never is;
//           fill, of compaction_expand: all of out that no index names
// Defines:  X_T = float, f16 or bf16; I_T = int or i64; BLOCK = threads; VECTORS = 2 or 4 of 16 bytes
//           that a thread takes of a tile, which begins at a multiple of 16 bytes; STAGES = tiles
//           that a block holds, 3 or more; BLOCKS_PER_SM; PARTS = tiles of a block of
//           compaction_expand
// Launch:   block (BLOCK); tiles = ceil((n + 16 / sizeof(X_T) - 1) / elements of a tile)
//           compaction          grid (any number of blocks), words all zero, dynamic shared memory
//                               STAGES tiles and, where indices are wanted, 4 bytes for each
//                               element of a tile; from sm_70 on
//           compaction_count    grid (tiles): leaves each tile's count in its word
//           compaction_scan     grid (1): then the sums of the counts before each tile, and count
//           compaction_scatter  grid (tiles), dynamic shared memory a tile and, where indices are
//                               wanted, 2 bytes for each element: then values and indices
//           compaction_expand   grid (ceil(tiles / PARTS)), static shared memory alone
// Traffic:  compaction: n * sizeof(X_T) read + kept * (sizeof(X_T) + sizeof(I_T)) written, the least
//           there is, and 17 bytes a tile; its ceiling is that of a copy of as many bytes. count and
//           scatter read x once each. compaction_expand: the same least, read and written in turn
// Order:    integer counts alone decide where an element goes: the same bits in every run
//
// One pass with decoupled look-back (Merrill and Garland, 2016). Blocks take tiles by ticket, so
// that a tile waits only for tiles that running blocks hold: a block publishes the counts of its
// tiles in the order of their tickets and waits for nothing but counts, so the first count that is
// missing never waits. A tile is stored only after the next one of its block is counted: by then most
// blocks of the tiles before it have published theirs. Meanwhile it waits in shared memory: what is
// kept gathered at the front or, where indices are wanted, listed by position; and the tile behind
// the next is on its way. Counts are summed by rows of 32 tiles as they are published, so a look is
// 512 bytes; when it was a word of each tile in flight, 4 KiB, looks took a quarter of the time.
//
#if !defined(X_T) || !defined(I_T) || !defined(BLOCK) || !defined(VECTORS) || !defined(STAGES) || \
    !defined(BLOCKS_PER_SM) || !defined(PARTS)
#error "compaction.cu needs X_T, I_T, BLOCK, VECTORS, STAGES, BLOCKS_PER_SM and PARTS"
#endif
#include "batch.cuh"
#include "compaction_look_back.cuh"
#include "compaction_tile.cuh"

#if __CUDA_ARCH__ >= 700
extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM)
compaction(X_T* __restrict__ values, I_T* __restrict__ indices, i64* __restrict__ count,
           u64* __restrict__ words, const X_T* __restrict__ x, i64 n, i64 capacity,
           float threshold) {
    extern __shared__ __align__(128) u8 staged[];  // STAGES tiles, then positions of two
    constexpr int TICKETS = 8;
    static_assert(STAGES >= 3 && STAGES < TICKETS, "one is on its way, one counted, one stored");
    __shared__ int counts[WARPS];
    __shared__ u64 prefix;
    __shared__ int tickets[TICKETS];  // tiles of this round and those around it; num_tiles: none
    const int warp = threadIdx.x / WARP, num_tiles = tiles_of(n);
    const Limit limit = limit_of<X_T>(threshold);
    const Words of = {words + 1, words + 1 + num_tiles};
    const auto elements_of = [&](int stage) {
        return reinterpret_cast<X_T*>(staged) + (stage < STAGES ? stage : stage - STAGES) * TILE;
    };
    const auto positions_of = [&](int round) {
        return reinterpret_cast<u16*>(staged + STAGES * TILE * sizeof(X_T)) + round % 2 * TILE;
    };
    const auto ask = [&]() {
        return (int)min(atomicAdd(reinterpret_cast<u32*>(words), 1u), (u32)num_tiles);
    };

    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) tickets[i] = ask();
        tickets[TICKETS - 1] = num_tiles;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STAGES - 2; i++) {
        copy_tile(elements_of(i), x, tickets[i], num_tiles, n);
        cp_async_commit();
    }
    int last_total = 0;
    for (int round = 0, stage = 0;; round++, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        const auto tile_of = [&](int distance) { return tickets[(round + distance) % TICKETS]; };
        const int tile = tile_of(0), last = tile_of(TICKETS - 1);
        if (tile == num_tiles && last == num_tiles) break;
        int asked = 0;
        if (threadIdx.x == 0) asked = ask();
        const bool looks_back = warp == 0 && last < num_tiles;

        cp_async_wait<STAGES - 3>();
        X_T* elements = elements_of(stage);
        uint4 vectors[VECTORS];
        Share share;
        int kept = 0;
        if (tile < num_tiles) {
            load_own(vectors, elements);
            kept = take(share, vectors, limit);
        }
        if (threadIdx.x % WARP == 0) counts[warp] = kept;
        __syncthreads();
        copy_tile(elements_of(stage + STAGES - 2), x, tile_of(STAGES - 2), num_tiles, n);
        cp_async_commit();
        const Start start = start_of(counts);
        if (threadIdx.x == 0) {
            if (tile < num_tiles) publish(of, tile, start.total);
            tickets[(round + STAGES - 1) % TICKETS] = asked;
        }
        // The words arrive while this tile is gathered; asked for sooner, they miss more counts.
        Look look;
        if (looks_back) look = look_at(of, last);
        if (tile < num_tiles) {
            if (indices == nullptr) {
                gather(elements, start.before, share, vectors);
            } else {
                gather_positions(positions_of(round), start.before, share);
            }
        }
        if (looks_back) {
            bool is_all = false;
            u64 before = sum_of(look, is_all);
            if (before == UNKNOWN || !is_all) before = look_back(of, last);
            if (threadIdx.x % WARP == 0) {
                prefix = before;
                if (last % WARP == 0 && last > 0) {
                    store_relaxed(of.rows + last / WARP - 1, WHOLE | before);
                }
                if (last == num_tiles - 1) *count = (i64)(before + last_total);
            }
        }
        __syncthreads();
        if (last < num_tiles) {
            store_tile(values, indices, elements_of(stage + STAGES - 1), positions_of(round + 1),
                       (i64)prefix, last_total, capacity, first_of(last, x));
        }
        last_total = start.total;
    }
}
#endif

extern "C" __global__ void __launch_bounds__(BLOCK)
compaction_count(u64* __restrict__ words, const X_T* __restrict__ x, i64 n, float threshold) {
    __shared__ int counts[WARPS];
    Share share;
    uint4 vectors[VECTORS];
    load_tile(vectors, x, first_of(blockIdx.x, x), n);
    const int kept = take(share, vectors, limit_of<X_T>(threshold));
    if (threadIdx.x % WARP == 0) counts[threadIdx.x / WARP] = kept;
    __syncthreads();
    const Start start = start_of(counts);
    if (threadIdx.x == 0) words[1 + blockIdx.x] = start.total;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
compaction_scan(u64* __restrict__ words, i64* __restrict__ count, i64 num_tiles) {
    constexpr int OWN = 8;  // consecutive words that a thread takes
    __shared__ u64 sums[WARPS];
    const int warp = threadIdx.x / WARP;
    u64 before = 0;
    for (i64 first = 0; first < num_tiles; first += BLOCK * OWN) {
        const i64 at = 1 + first + threadIdx.x * OWN;
        u64 own[OWN], sum = 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) own[i] = at + i <= num_tiles ? words[at + i] : 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) sum += own[i];
        const u64 upto = warp_scan(sum);
        if (threadIdx.x % WARP == WARP - 1) sums[warp] = upto;
        __syncthreads();
        u64 place = before + upto - sum;
        for (int i = 0; i < WARPS; i++) {
            if (i < warp) place += sums[i];
            before += sums[i];
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (at + i <= num_tiles) words[at + i] = place;
            place += own[i];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) *count = (i64)before;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
compaction_scatter(X_T* __restrict__ values, I_T* __restrict__ indices, const X_T* __restrict__ x,
                   const u64* __restrict__ words, i64 n, i64 capacity, float threshold) {
    extern __shared__ __align__(128) u8 staged[];  // the tile, then positions
    X_T* elements = reinterpret_cast<X_T*>(staged);
    u16* positions = reinterpret_cast<u16*>(staged + TILE * sizeof(X_T));
    __shared__ int counts[WARPS];
    Share share;
    uint4 vectors[VECTORS];
    copy_tile(elements, x, blockIdx.x, gridDim.x, n);
    cp_async_commit();
    cp_async_wait<0>();
    load_own(vectors, elements);
    const int kept = take(share, vectors, limit_of<X_T>(threshold));
    if (threadIdx.x % WARP == 0) counts[threadIdx.x / WARP] = kept;
    __syncthreads();
    const Start start = start_of(counts);
    if (indices == nullptr) {
        gather(elements, start.before, share, vectors);
    } else {
        gather_positions(positions, start.before, share);
    }
    __syncthreads();
    store_tile(values, indices, elements, positions, (i64)words[1 + blockIdx.x], start.total,
               capacity, first_of(blockIdx.x, x));
}

// Each block finds the values of its tiles of `out` by searching the ascending indices: first
// among all, then among those that the next tile can have. The first OWN of a thread's entries of a
// tile are loaded before the last tile is stored.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
compaction_expand(X_T* __restrict__ out, const X_T* __restrict__ values,
                  const I_T* __restrict__ indices, const i64* __restrict__ count, i64 n,
                  i64 capacity, float fill) {
    constexpr int OWN = 8;
    __shared__ __align__(16) X_T tile[TILE];
    __shared__ i64 bounds[3];  // starts of the first two tiles' indices, and of a later one's
    const i64 kept = count == nullptr ? capacity : max(min(*count, capacity), 0ll);
    const int begin = blockIdx.x * PARTS, end = min(begin + PARTS, tiles_of(n));
    const int warp = threadIdx.x / WARP;
    Vector<X_T, E> empty;
#pragma unroll
    for (int e = 0; e < E; e++) empty.elements[e] = from_float<X_T>(fill);
    const auto own = [&](int j) {
        return reinterpret_cast<Vector<X_T, E>*>(tile + (j * BLOCK + threadIdx.x) * E);
    };
    const auto put = [&](i64 at, X_T value) {
        if (at >= 0 && at < TILE) tile[at] = value;  // always true where indices ascend
    };
#pragma unroll
    for (int j = 0; j < VECTORS; j++) *own(j) = empty;
    if (warp < 2) {
        const i64 limit = first_of(begin + warp, out);
        const i64 found =
            count_passing<WARP>(kept, [&](i64 i) { return (i64)indices[i] < limit; });
        if (threadIdx.x % WARP == 0) bounds[warp] = found;
    }
    __syncthreads();

    X_T some[OWN];
    I_T places[OWN];
    i64 from = bounds[0], to = bounds[1];
    const auto load_own = [&]() {
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const i64 i = from + threadIdx.x + k * BLOCK;
            if (i < to) places[k] = load_eager(indices + i), some[k] = load_eager(values + i);
        }
    };
    load_own();
    for (int part = begin; part < end; part++) {
        const i64 first = first_of(part, out);
        if (warp == WARPS - 1 && part + 1 < end) {
            const i64 limit = first_of(part + 2, out);
            const int most = (int)max(min(kept - to, (i64)TILE), 0ll);
            const int found =
                count_passing<WARP>(most, [&](int i) { return (i64)indices[to + i] < limit; });
            if (threadIdx.x % WARP == 0) bounds[2] = to + found;
        }
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            if (from + threadIdx.x + k * BLOCK < to) put((i64)places[k] - first, some[k]);
        }
        for (i64 i = from + threadIdx.x + OWN * BLOCK; i < to; i += BLOCK) {
            put((i64)indices[i] - first, values[i]);
        }
        __syncthreads();
        from = to;
        if (part + 1 < end) {
            to = bounds[2];
            load_own();
        }
#pragma unroll
        for (int j = 0; j < VECTORS; j++) {
            const i64 at = first + (j * BLOCK + threadIdx.x) * E;
            if (at >= 0 && at + E <= n) {
                __stcs(reinterpret_cast<uint4*>(out + at), *reinterpret_cast<const uint4*>(own(j)));
            } else {
#pragma unroll 1
                for (int e = 0; e < E; e++) {
                    if (at + e >= 0 && at + e < n) out[at + e] = own(j)->elements[e];
                }
            }
            *own(j) = empty;
        }
        __syncthreads();
    }
}
