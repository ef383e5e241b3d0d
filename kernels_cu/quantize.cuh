// quantize.cuh: row scales of quantized codes, bit for bit as pykv/kinds.py defines them.
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
        // In steps of 2^-24 below 2^-14: upwards, or the row's largest codes would be clamped.
        const u16 bits = scale < 0x1p-14f ? (u16)ceilf(scale * 0x1p24f)
                                          : float_to_f16_bits(fminf(scale, 65504.0f));
        return SCALE{finite ? bits : (u16)0x7e00};
    } else {
        return finite ? scale : __uint_as_float(0x7fc00000u);
    }
}

// The largest scale whose inverse is infinite.
constexpr float NO_SCALE = 0x1p-128f;

// Factor from values to codes for this scale; 0, hence codes of 0, for a scale that is NaN or not
// positive, or has no inverse.
template <typename SCALE> __device__ __forceinline__ float inverse_scale(SCALE scale) {
    const float x = to_float(scale);
    const float inverse = __frcp_rn(x > NO_SCALE ? x : 1.0f);
    return x > NO_SCALE ? inverse : 0.0f;
}
