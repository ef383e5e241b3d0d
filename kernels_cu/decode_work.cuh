// decode_work.cuh: paged_decode_mma's work: how blocks share the keys of a batch.
#include "decode_config.cuh"

// The keys that the queries of a sequence see, in tiles of KEYS and in units, at least one, of which
// ranges are made.
struct Visible { int length, first, tile, tile_end, units; };

struct Batch {
    const int* lengths;
    int size, capacity, window, behind, unit_tiles;

    __device__ __forceinline__ Visible visible(int b) const {
        Visible s;
        s.length = max(0, min(lengths[b], capacity));
        s.first = (int)max((i64)s.length - behind - window, (i64)0);
        s.tile = s.first / KEYS;
        s.tile_end = s.length / KEYS + (s.length % KEYS != 0);
        s.units = max(1, (s.tile_end - s.tile + unit_tiles - 1) / unit_tiles);
        return s;
    }
};

// Units of the sequences from `first` on, of which each lane takes `some`: of its own, and of all up
// to them.
struct Scan {
    int units = 0, inclusive;

    __device__ __forceinline__ Scan(const Batch& batch, int first, int per_lane) {
        const int lane = threadIdx.x % WARP;
        const int from = first + lane * per_lane, end = min(from + per_lane, batch.size);
#pragma unroll 4  // so that loads do not wait for each other
        for (int b = from; b < end; b++) units += batch.visible(b).units;
        inclusive = units;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int below = __shfl_up_sync(FULL_MASK, inclusive, step);
            if (lane >= step) inclusive += below;
        }
    }

    __device__ __forceinline__ int total() const { return __shfl_sync(FULL_MASK, inclusive, WARP - 1); }
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

// The first piece of a range, found by every warp for itself. `scan` is that of all sequences, `some`
// a lane: its lane is found, and then the sequence among those of that lane.
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
