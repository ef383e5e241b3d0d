// kvtc_ranges.cu: float32 rows of coefficients to a v0 stream of all their ranges, and back.
//
// Kernels: quantize_ranges, dequantize_ranges
// Arrays (letters as in pykv/ops/kvtc_ranges.py; pykv/kvtc/stream_v0.py has the format):
//   x, out           [B, C] float, rows `x_stride` or `out_stride` elements apart
//   stream           u8 of any alignment, in device or pinned host memory
//   nonfinite        [B] int or null: the NaNs and infinities of intx ranges are added to it
//   ranges    const  [R, 8] int, by rising start: start, end, bits (0: fp8), int_bits of the
//                    header, which of the stream, bytes that a row takes in those before, row
//                    bytes, 0
//   tiles     const  [tiles, 4] int: first range, ranges, team, 0; wide ones, medium, then small
// Scalars:  wide_tiles, medium_tiles, small_tiles; num_ranges; rows of a block and column_blocks to
//           a row when dequantising
// Defines:  BLOCK = threads; SMALL, PIECE as in kvtc_codes.cuh
// Launch:   block (BLOCK). quantize_ranges: dynamic shared memory as kvtc_codes.cuh says, a block for
//           each wide tile and row, medium tile and BLOCK / 32 rows, small tile and 32 rows.
//           dequantize_ranges: column_blocks blocks, of 4 * BLOCK columns, for each `rows` rows
// Traffic:  4 * B * C + 40 * R + B * (sum over ranges of ceil(n * bits / 8), and 8 for intx) bytes,
//           read or written once; the tables come from L2
// Order:    no sums of floats; counts of nonfinite in any order; bit for bit as NumPy
#include "kvtc_values.cuh"

constexpr int HEADER = 40;  // bytes

__device__ __forceinline__ Place place_in_stream(u8* stream, const Range& r, int B, i64 row) {
    u8* minima = stream + (HEADER * (r.index + 1) + (i64)B * r.before);
    u8* maxima = minima + (r.bits ? 4 * (i64)B : 0);
    u8* codes = maxima + (r.bits ? 4 * (i64)B : 0);
    return {codes + row * r.row_bytes, minima + 4 * row, maxima + 4 * row};
}

extern "C" __global__ void __launch_bounds__(BLOCK, CODING_CTAS)
quantize_ranges(u8* __restrict__ stream, int* __restrict__ nonfinite, const float* __restrict__ x,
                const int* __restrict__ ranges, const int* __restrict__ tiles, int B, int C,
                i64 x_stride, int wide_tiles, int medium_tiles, int small_tiles) {
    extern __shared__ __align__(16) float tile[];
    __shared__ Extremes of_warps[WARPS];
    u32 block = blockIdx.x;
    int first = 0, count = wide_tiles, rows = 1;
    if (block >= (u32)wide_tiles * B) {
        block -= (u32)wide_tiles * B;
        first = wide_tiles, count = medium_tiles, rows = WARPS;
        const u32 of_medium = (u32)medium_tiles * ((B + WARPS - 1) / WARPS);
        if (block >= of_medium) {
            block -= of_medium;
            first += medium_tiles, count = small_tiles, rows = WARP;
        }
    }
    const int4 job = ((const int4*)tiles)[first + block % count];
    const i64 row = (i64)(block / count) * rows;
    const Range* some = (const Range*)ranges + job.x;
    const Rows from{x, x_stride, B, C};

    for (int i = threadIdx.x; row == 0 && i < job.y * HEADER; i += BLOCK) {
        const Range r = some[i / HEADER];
        const int byte = i % HEADER;
        const u64 field = byte < 8    ? (u64)r.int_bits << 32 | (r.bits > 0)
                          : byte < 16 ? (u64)r.start
                          : byte < 24 ? (u64)r.end
                          : byte < 32 ? (u64)B * r.row_bytes
                                      : 8ull * (r.bits > 0) * B;
        stream[HEADER * r.index + (i64)B * r.before + byte] = (u8)(field >> byte % 8 * 8);
    }
    if (rows == 1) {
        const Range r = *some;
        quantize_wide(tile, of_warps, FINITE, from, r, place_in_stream(stream, r, B, row), row, nonfinite);
    } else {
        quantize_tile(
            tile, FINITE, from, job.y, job.z, row, [&](int i) { return some[i]; },
            [&](const Range& r, i64 at) { return place_in_stream(stream, r, B, at); }, nonfinite);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, VALUE_CTAS)
dequantize_ranges(float* __restrict__ out, const u8* __restrict__ stream,
                  const int* __restrict__ ranges, int B, int C, i64 out_stride, int num_ranges,
                  int rows, int column_blocks) {
    const Range* all = (const Range*)ranges;
    auto range_at = [&](int column) {
        int first = 0;
        for (int end = num_ranges; end - first > 1;) {
            const int middle = (first + end) / 2;
            if (all[middle].start <= column) first = middle;
            else end = middle;
        }
        return all[first];
    };
    auto place = [&](const Range& r, i64 row) {
        return place_in_stream(const_cast<u8*>(stream), r, B, row);
    };
    dequantize(out, out_stride, B, C, 0, C, rows, column_blocks, range_at, place);
}
