// decode_work.cuh: how the blocks of paged_decode_mma partition the keys of a batch.
//
// A unit is `unit_tiles` tiles of KEYS keys of one sequence. The units of all sequences, laid end
// to end, are cut into ranges, one per block; a piece is the part of a range in one sequence.
#include "types.cuh"

// The keys of a sequence that its queries see, in keys, tiles and units, of which it has at least
// one.
struct Visible { int length, first, tile, tile_end, units; };

struct Batch {
    const int* lengths;
    int size, capacity, window, causal_offset, unit_tiles;

    __device__ __forceinline__ Visible visible(int b) const {
        Visible s;
        s.length = max(0, min(lengths[b], capacity));
        s.first = (int)max((i64)s.length - causal_offset - window, (i64)0);
        s.tile = s.first / KEYS;
        s.tile_end = s.length / KEYS + (s.length % KEYS != 0);
        s.units = max(1, (s.tile_end - s.tile + unit_tiles - 1) / unit_tiles);
        return s;
    }
};

// Inclusive prefix sum of units over the lanes of a warp; a lane has `per_lane` sequences, the
// first lane those from `first` on.
struct Scan {
    int units = 0, inclusive;

    __device__ __forceinline__ Scan(const Batch& batch, int first, int per_lane) {
        const int lane = threadIdx.x % WARP;
        const int from = first + lane * per_lane, end = min(from + per_lane, batch.size);
#pragma unroll 4  // independent loads overlap
        for (int b = from; b < end; b++) units += batch.visible(b).units;
        inclusive = units;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int below = __shfl_up_sync(FULL_MASK, inclusive, step);
            if (lane >= step) inclusive += below;
        }
    }

    __device__ __forceinline__ int total() const {
        return __shfl_sync(FULL_MASK, inclusive, WARP - 1);
    }
};

// Part of a range that lies in one sequence.
struct Piece {
    int b, start;     // the sequence, and the unit at which it begins
    int unit, count;  // the piece's first unit, and how many it has
    int tile, tile_end;
    Visible visible;
};

__device__ __forceinline__ Piece piece_at(const Batch& batch, int b, int start, int unit, int end,
                                          bool one_unit) {
    Piece p{b, start, unit, 1, 0, 0, batch.visible(b)};
    if (!one_unit) p.count = min(end, start + p.visible.units) - unit;
    p.tile = p.visible.tile + (unit - start) * batch.unit_tiles;
    p.tile_end = min(p.tile + p.count * batch.unit_tiles, p.visible.tile_end);
    return p;
}

// The first piece of a range; each warp searches on its own. `scan` covers all sequences,
// `per_lane` a lane. Each round finds the lane that holds the range's begin, then scans that lane's
// sequences.
__device__ __forceinline__ Piece first_piece(const Batch& batch, Scan scan, int per_lane, int begin,
                                             int end, bool one_unit) {
    int first = 0, start = 0;
    for (;;) {
        const int found = __ffs(__ballot_sync(FULL_MASK, start + scan.inclusive > begin)) - 1;
        first += found * per_lane;
        start += __shfl_sync(FULL_MASK, scan.inclusive - scan.units, found);
        if (per_lane == 1) return piece_at(batch, first, start, begin, end, one_unit);
        per_lane = (per_lane + WARP - 1) / WARP;
        scan = Scan(batch, first, per_lane);
    }
}
