// quantize.cuh: row scales and quantized codes, bit for bit as pykv/kinds.py defines them.
#include "vector.cuh"

// The largest magnitude as an unsigned number that orders like the floats: a NaN exceeds infinity,
// infinity exceeds all else. as_float is the inverse; a NaN stays some NaN.
template <typename T> __device__ __forceinline__ u32 max_magnitude(const Eight<T>& eight) {
    u32 largest = 0;
#pragma unroll
    for (u32 word : eight.words) {  // the shift drops the sign; lower bits do not change the order
        largest = max(largest, word << 1);
        if (sizeof(T) == 2) largest = max(largest, word << 17);
    }
    return largest;
}

template <typename T> __device__ __forceinline__ float as_float(u32 magnitude) {
    if constexpr (SAME<T, float>) return __uint_as_float(magnitude >> 1);
    else return to_float(T{(u16)(magnitude >> 17)});  // f16 or bf16
}

// x / LARGEST<T>, to nearest even, for x of at least 1e-8: the remainder corrects the last place.
// Verified for every mantissa divided by 127 and by 7; 448 and 57344 are 7 times a power of two.
template <typename T> __device__ __forceinline__ float over_largest(float x) {
    constexpr float INVERSE = 1.0f / LARGEST<T>;
    const float y = __fmul_rn(x, INVERSE);
    return __fmaf_rn(__fmaf_rn(-y, LARGEST<T>, x), INVERSE, y);
}

// Dynamic scale of a row. `amax` holds the bits of its largest |x|; a row with a NaN or infinity
// gets a NaN scale.
template <typename T, typename SCALE> __device__ __forceinline__ SCALE row_scale(u32 amax) {
    const bool finite = amax < 0x7f800000u;
    const float scale = over_largest<T>(fmaxf(__uint_as_float(amax), 1e-8f));
    if constexpr (sizeof(SCALE) == 2) {
        return SCALE{finite ? float_to_f16_bits(fminf(scale, 65504.0f)) : (u16)0x7e00};
    } else {
        return finite ? scale : __uint_as_float(0x7fc00000u);
    }
}

// Factor from values to codes for this scale; 0, hence codes of 0, for a scale that is NaN or not
// positive.
template <typename SCALE> __device__ __forceinline__ float inverse_scale(SCALE scale) {
    const float x = to_float(scale);
    const float inverse = __frcp_rn(x > 0.0f ? x : 1.0f);
    return x > 0.0f ? inverse : 0.0f;
}

// y rounded to nearest even; the integer stands in the lower bits.
__device__ __forceinline__ u32 round_to_int(float y) {
    return __float_as_uint(__fadd_rn(y, 12582912.0f));  // 1.5 * 2^23, where the last place is 1
}

// Eight integer codes, to nearest even; y must round to -LARGEST .. LARGEST.
__device__ __forceinline__ void pack8(Eight<i8>& eight, const float (&y)[8]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 lower = __byte_perm(round_to_int(y[4 * i]), round_to_int(y[4 * i + 1]), 0x40);
        const u32 upper = __byte_perm(round_to_int(y[4 * i + 2]), round_to_int(y[4 * i + 3]), 0x40);
        eight.words[i] = __byte_perm(lower, upper, 0x5410);
    }
}

__device__ __forceinline__ void pack8(Eight<i4>& eight, const float (&y)[8]) {
    eight.words[0] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) eight.words[0] |= (round_to_int(y[i]) & 15u) << 4 * i;
}

// Byte `i` of x as a float, minus `bias`. The byte becomes the lowest bits of a float of 2^23,
// whose unit is the lowest bit; that runs at full rate, integer conversion at a quarter of it.
__device__ __forceinline__ float byte_to_float(u32 x, int i, float bias) {
    return __uint_as_float(__byte_perm(x, 0x4b000000u, 0x7440u | i)) - (8388608.0f + bias);
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<i8>& eight) {
#pragma unroll
    for (int i = 0; i < 8; i++) {  // + 128
        x[i] = byte_to_float(eight.words[i / 4] ^ 0x80808080u, i % 4, 128.0f);
    }
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<i4>& eight) {
    const u32 codes = eight.words[0] ^ 0x88888888u;                        // + 8
    const u32 words[2] = {codes & 0x0f0f0f0fu, codes >> 4 & 0x0f0f0f0fu};  // even, odd
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = byte_to_float(words[i % 2], i / 2, 8.0f);
}
