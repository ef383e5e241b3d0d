// softmax.cuh: constants and the base of an online softmax.
//
// Tensor cores take weights 2^(score - b) of values as f16, or their products with the scales of
// rows that have one each. So the base b of a query row is the largest score of the keys that it
// sees, or the largest sum of score and exponent of the scale, less HEADROOM: its largest operand is
// at least 2^6, and at most 2^15 while b lags behind by up to 2^8. What f16 flushes is below 2^-25, half
// of its last place: 2^-31 of the row's own largest operand, less than a sum of floats loses. But
// values that are f16 themselves may exceed others by 2^30, so that a float32 result is a small weight
// times a large value: there decode takes remainders of operands times REMAINDER_FACTOR, and what is
// flushed is 2^-42 of the largest (prefill does not, see tools/results/h200/limits.md). Keys that the
// row does not see, or hardly weighs, do not enter.
#include "types.cuh"

constexpr float LOG2_E = 1.442695040888963f;
constexpr float LN_2 = 0.693147180559945f;

// The base that is subtracted from exponents when the running maximum is m: 0 while no key is
// visible, because -INF - -INF is NaN.
__device__ __forceinline__ float finite_base(float m) { return m == -INF ? 0.0f : m; }

// The weight of a score less the log-sum-exp of its row: at most 1, which the last place of a huge
// score may exceed by any factor. NaN stays.
__device__ __forceinline__ float weight_of(float rest) { return exp2f(rest > 0.0f ? 0.0f : rest); }

constexpr float HEADROOM = 7.0f;  // as a binary logarithm
constexpr float LAG = 8.0f;       // also a binary logarithm; with it, sums are seldom rescaled
constexpr float REMAINDER_FACTOR = 2048.0f;  // remainders of f16 up to 2^15 are at most 2^4

// The exponent of the power of two above |scale|, from -64 to 107: the base follows it, and sums of
// weights must stay floats of full precision. Larger scales, of values above 1e34, overflow f16.
__device__ __forceinline__ int power_above(float scale) {
    return max(-64, min((int)(__float_as_uint(scale) >> 23 & 255u) - 126, 107));
}
__device__ __forceinline__ float scale_exponent(float scale) {
    return (float)power_above(scale) - HEADROOM;
}

// The largest scales of a tile allow a test by scores alone: while no scale exceeds `bound`, a power
// of two, no product is too large for f16 where no score exceeds the base by score_lag(bound).
__device__ __forceinline__ float scale_bound(float largest_scale) {
    return __uint_as_float((u32)(power_above(largest_scale) + 127) << 23);
}
__device__ __forceinline__ float score_lag(float bound) {
    return LAG + HEADROOM - (float)((int)(__float_as_uint(bound) >> 23) - 127);
}

// Moves the base m of a row to the logarithm of its sum of weights l, to within a factor of 2, so
// that states of other keys may be merged with it; returns the factor of the row's other sums, 1 for
// a row that has seen no key: its sums are 0, which a large factor times a scale would make NaN.
// A large m moves by what its last place allows, and the sums by the same.
__device__ __forceinline__ float normalize_base(float& m, float& l) {
    const int exponent = l == 0.0f ? 127 : max(1, min((int)(__float_as_uint(l) >> 23), 253));
    const float moved = m + (float)(exponent - 127);
    const float factor = l == 0.0f ? 1.0f : exp2f(m - moved);
    l *= factor;
    m = moved;
    return factor;
}
