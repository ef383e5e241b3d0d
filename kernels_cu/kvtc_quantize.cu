// kvtc_quantize.cu: some columns of float32 rows to codes of 1, 2, 4 or 8 bits, and back.
//
// Kernels: quantize_range, dequantize_range
// Arrays (letters and formulas as in pykv/ops/kvtc_quantize.py):
//   x, out              [B, C] float, rows `x_stride` or `out_stride` elements apart
//   codes               [B, row_bytes] u8 of any alignment, in device or pinned host memory; null:
//                       extremes alone are asked for
//   min_vals, max_vals  [B] float, written if `find` is set, else read; null for fp8
// Scalars:  start, end = columns; bits of a code, 0 for fp8; team = lanes that share a row; rows of
//           a block and column_blocks to a row when dequantising
// Defines:  BLOCK = threads; SMALL, PIECE as in kvtc_codes.cuh
// Launch:   block (BLOCK). quantize_range: dynamic shared memory as kvtc_codes.cuh says, a block for
//           each row where team exceeds a warp, else for BLOCK / 32 rows, or 32 where team is 1.
//           dequantize_range: column_blocks blocks, of 4 * BLOCK columns, for each `rows` rows
// Traffic:  B * (4 * n + row_bytes + 8) bytes for n columns, without the 8 for fp8
// Order:    no sums of floats; bit for bit as NumPy
#include "kvtc_values.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, CODING_CTAS)
quantize_range(u8* __restrict__ codes, float* __restrict__ min_vals, float* __restrict__ max_vals,
               const float* __restrict__ x, int B, int C, i64 x_stride, int start, int end,
               int bits, int row_bytes, int team, int find) {
    extern __shared__ __align__(16) float tile[];
    __shared__ Extremes of_warps[WARPS];
    const Rows from{x, x_stride, B, C};
    const Range r{start, end, bits, 0, 0, 0, row_bytes, 0};
    const Mode mode = find ? ALL : GIVEN;
    auto place = [&](const Range&, i64 row) {
        return Place{codes ? codes + row * row_bytes : nullptr, (u8*)(min_vals + row),
                     (u8*)(max_vals + row)};
    };
    if (team > WARP) {
        quantize_wide(tile, of_warps, mode, from, r, place(r, blockIdx.x), blockIdx.x, nullptr);
    } else {
        const i64 row = (i64)blockIdx.x * (team == 1 ? WARP : WARPS);
        quantize_tile(tile, mode, from, 1, team, row, [&](int) { return r; }, place, nullptr);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, VALUE_CTAS)
dequantize_range(float* __restrict__ out, const u8* __restrict__ codes,
                 const float* __restrict__ min_vals, const float* __restrict__ max_vals, int B,
                 int C, i64 out_stride, int start, int end, int bits, int row_bytes, int rows,
                 int column_blocks) {
    const Range r{start, end, bits, 0, 0, 0, row_bytes, 0};
    auto place = [&](const Range&, i64 row) {
        return Place{const_cast<u8*>(codes) + row * row_bytes, (u8*)(min_vals + row),
                     (u8*)(max_vals + row)};
    };
    auto range_at = [&](int) { return r; };
    dequantize(out, out_stride, B, C, start, end, rows, column_blocks, range_at, place);
}
