// kvtc_values.cuh: codes of ranges of coefficients to rows of them, bit for bit as the NumPy
// references of pykv/ops/kvtc_quantize.py.
//
// A thread has four columns of some rows: it stores 16 bytes a row, and loads the codes of eight rows
// before it uses the first.
// Defines: those of kvtc_codes.cuh
#include "kvtc_codes.cuh"

constexpr int VALUE_CTAS = 5;  // blocks that an SM has registers for

// Up to four bytes as loads leave them: a word, or each in a register of its own, so that nothing
// waits for the first before the last is on its way.
template <bool WORD> struct Bytes {
    u32 parts[WORD ? 1 : 4];
    __device__ void load(const u8* at, int n) {
        if constexpr (WORD) {
            parts[0] = *(const u32*)at;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) parts[i] = i < n ? at[i] : 0;
        }
    }
    __device__ u32 word() const {
        if constexpr (WORD) return parts[0];
        else return parts[0] | parts[1] << 8 | parts[2] << 16 | parts[3] << 24;
    }
};

// x / LAST to nearest even, by the two parts of the inverse: a test tries every mantissa.
template <int LAST> __device__ __forceinline__ float over(float x) {
    static_assert(LAST == 1 || LAST == 3 || LAST == 15 || LAST == 255, "those that were tried");
    constexpr float UPPER = 1.0f / LAST, LOWER = (float)(1.0 / LAST - (double)UPPER);
    return LAST == 1 ? x : __fmaf_rn(x, UPPER, __fmul_rn(x, LOWER));
}

// COUNT neighbouring columns of some rows, all of range r; `from` is where the first row lies. FLOATS:
// extremes are aligned. Bytes that are put together at once would have each row wait for memory
// before the next one's loads begin.
template <int COUNT, bool FLOATS>
__device__ __forceinline__ void dequantize_columns(float* to, i64 stride, const Place& from,
                                                   const Range& r, int column, int rows) {
    constexpr int AT_ONCE = FLOATS ? 4 : 2;  // rows whose loads are on their way together
    const int bits = r.bits ? r.bits : 8, bit = (column - r.start) * bits, shift = bit % 8;
    const int bytes = (shift + COUNT * bits + 7) / 8;
    const u32 last = (1u << bits) - 1;
    const float steps = (float)last, inverse = 1.0f / steps;
#pragma unroll 1
    for (int first = 0; first < rows; first += AT_ONCE) {
        Bytes<false> codes[AT_ONCE];
        Bytes<FLOATS> minima[AT_ONCE], maxima[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const Place at = from.down(min(first + i, rows - 1), r.row_bytes);
            codes[i].load(at.codes + bit / 8, bytes);
            if (r.bits) minima[i].load(at.minima, 4);
            if (r.bits) maxima[i].load(at.maxima, 4);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i == rows) return;
            const u32 word = codes[i].word() >> shift;
            float y[COUNT];
            if (r.bits) {
                const float low = __uint_as_float(minima[i].word());
                const float width = interval(low, __uint_as_float(maxima[i].word()));
#pragma unroll
                for (int k = 0; k < COUNT; k++) {
                    const float all = __fmul_rn((float)(word >> k * bits & last), width);
                    const bool is_finite = all <= LARGEST_FLOAT;  // else it stays as it is
                    y[k] = (is_finite ? quotient(all, steps, inverse) : all) + low;
                }
            } else {
#pragma unroll
                for (int k = 0; k < COUNT; k++) y[k] = to_float(e4m3{(u8)(word >> 8 * k)});
            }
            float* const row = to + (first + i) * stride;
            if constexpr (COUNT == 4) store4(row, y);
            else *row = y[0];
        }
    }
}

// Four columns of some rows, AT_ONCE of them together; BITS 0: fp8. The codes of each row are one
// aligned load, from bit `shift` on; extremes are aligned. Returns how many rows are done: those
// before the first ones that are fewer, or whose widths are so large that products may overflow.
template <int BITS>
__device__ __forceinline__ int dequantize_fours(float* to, i64 stride, const Place& from,
                                                i64 row_bytes, int shift, int rows) {
    constexpr int AT_ONCE = 8, LAST = (1 << BITS) - 1;
    int done = 0;
    for (; done + AT_ONCE <= rows; done += AT_ONCE) {
        const Place at = from.down(done, row_bytes);
        u32 words[AT_ONCE];
        float low[AT_ONCE], width[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const u8* const codes = at.codes + i * row_bytes;
            if constexpr (BITS % 8 == 0) words[i] = *(const u32*)codes;
            else if constexpr (BITS == 4) words[i] = *(const u16*)codes;
            else words[i] = (u32)*codes >> shift;
            if constexpr (BITS > 0) low[i] = ((const float*)at.minima)[i];
            if constexpr (BITS > 0) width[i] = ((const float*)at.maxima)[i];
        }
        bool is_small = true;
#pragma unroll
        for (int i = 0; BITS > 0 && i < AT_ONCE; i++) {
            width[i] = interval(low[i], width[i]);
            is_small &= width[i] <= 1e30f;
        }
        if (!is_small) return done;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float y[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if constexpr (BITS == 0) {
                    y[k] = to_float(e4m3{(u8)(words[i] >> 8 * k)});
                } else {  // the second product is exact, so that the sum rounds code * width
                    const u32 code = words[i] >> k * BITS & (u32)LAST;
                    const float sum = __uint_as_float(code | __float_as_uint(INTEGERS));
                    const float all = __fmaf_rn(sum, width[i], -INTEGERS * width[i]);
                    y[k] = over<LAST>(all) + low[i];
                }
            }
            store4(to + (done + i) * stride, y);
        }
    }
    return done;
}

// The same of any codes and rows: by the widest loads that there are, and what that leaves by bytes.
__device__ __forceinline__ void dequantize_four(float* to, i64 stride, const Place& from,
                                                const Range& r, int column, int rows) {
    const int bits = r.bits ? r.bits : 8, bit = (column - r.start) * bits, shift = bit % 8;
    const int wide = max(bits / 2, 1);  // bytes of a load
    const bool floats = r.bits == 0 || ((u64)from.minima | (u64)from.maxima) % 4 == 0;
    const Place at{from.codes + bit / 8, from.minima, from.maxima};
    int done = 0;
    if (floats && shift % min(8, 4 * bits) == 0 && ((u64)at.codes | r.row_bytes) % wide == 0) {
        if (r.bits == 0) done = dequantize_fours<0>(to, stride, at, r.row_bytes, 0, rows);
        else if (r.bits == 1) done = dequantize_fours<1>(to, stride, at, r.row_bytes, shift, rows);
        else if (r.bits == 2) done = dequantize_fours<2>(to, stride, at, r.row_bytes, 0, rows);
        else if (r.bits == 4) done = dequantize_fours<4>(to, stride, at, r.row_bytes, 0, rows);
        else done = dequantize_fours<8>(to, stride, at, r.row_bytes, 0, rows);
    }
    const Place rest = from.down(done, r.row_bytes);
    to += done * stride, rows -= done;
    if (floats) dequantize_columns<4, true>(to, stride, rest, r, column, rows);
    else dequantize_columns<4, false>(to, stride, rest, r, column, rows);
}

// Four columns a thread, as far as they are in start .. end - 1, of some rows a block.
template <typename RangeAt, typename PlaceAt>
__device__ __forceinline__ void dequantize(float* out, i64 stride, int B, int C, int start, int end,
                                           int rows, int column_blocks, RangeAt range_at,
                                           PlaceAt place_at) {
    const int block = (int)(blockIdx.x % column_blocks);
    const i64 row = (i64)(blockIdx.x / column_blocks) * rows;
    const int column = start / 4 * 4 + (block * BLOCK + threadIdx.x) * 4;
    const int from = max(column, start), to = min(column + 4, end);
    if (from >= to) return;
    rows = (int)min((i64)rows, B - row);
    out += row * stride;
    Range r = range_at(from);
    if (to - from == 4 && to <= r.end && stride % 4 == 0 && C % 4 == 0) {
        dequantize_four(out + from, stride, place_at(r, row), r, from, rows);
        return;
    }
    for (int c = from; c < to; c++) {
        if (c >= r.end) r = range_at(c);
        dequantize_columns<1, false>(out + c, stride, place_at(r, row), r, c, rows);
    }
}
