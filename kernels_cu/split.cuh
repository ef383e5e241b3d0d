// split.cuh: activations as 16-bit numbers: a power of two for each token, and the order of elements.
#include "mma.cuh"

// A power of two that brings `largest`, the largest magnitude of a token, to 2^14 .. 2^15, and one
// over it; both are normal numbers.
struct PowerOfTwo {
    float value, inverse;

    __device__ __forceinline__ explicit PowerOfTwo(float largest) {
        const int exponent = (int)(__float_as_uint(largest) >> 23) - 127;
        const int power = min(max(14 - exponent, -113), 126);
        value = __uint_as_float((u32)(127 + power) << 23);
        inverse = __uint_as_float((u32)(127 - power) << 23);
    }
};

// Four elements as two pairs of halves, of elements 0 and SECOND, and of the other two; the elements
// become what these leave.
template <typename M, int SECOND>
__device__ __forceinline__ uint2 split_four(float (&v)[4]) {
    constexpr int THIRD = 3 - SECOND;
    float lower[2] = {v[0], v[SECOND]}, upper[2] = {v[THIRD], v[3]};
    const uint2 pairs = {split_halves<M>(lower), split_halves<M>(upper)};
    // What an infinity leaves is a NaN: the first piece says it all.
    v[0] = is_finite(lower[0]) ? lower[0] : 0.0f;
    v[SECOND] = is_finite(lower[1]) ? lower[1] : 0.0f;
    v[THIRD] = is_finite(upper[0]) ? upper[0] : 0.0f;
    v[3] = is_finite(upper[1]) ? upper[1] : 0.0f;
    return pairs;
}
