// convert.cuh: conversions of single elements: exact to float, to nearest even from float.
//
// Conversions to fp8 saturate: infinities too become the largest finite value. From float a NaN
// becomes the NaN of NumPy and ml_dtypes; from f16 and fp8 it becomes 0x7fffffff.
#include "ptx.cuh"

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(f16 x) { return f16_bits_to_float(x.bits); }

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// For SMs without fp8 instructions: the bits of an e4m3 read as an f16 are 2^-8 of its value.
__device__ __forceinline__ float e4m3_to_float(e4m3 x) {
    if ((x.bits & 0x7fu) == 0x7fu) return __uint_as_float(0x7fffffffu);
    return f16_bits_to_float((u16)((x.bits & 0x80u) << 8 | (x.bits & 0x7fu) << 7)) * 256.0f;
}

__device__ __forceinline__ float to_float(e4m3 x) {
#if __CUDA_ARCH__ >= 890
    return f16_bits_to_float((u16)e4m3x2_to_f16x2(x.bits));
#else
    return e4m3_to_float(x);
#endif
}

__device__ __forceinline__ float to_float(e5m2 x) { return f16_bits_to_float((u16)(x.bits << 8)); }

template <typename T> __device__ __forceinline__ T from_float(float x);

template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

template <> __device__ __forceinline__ f16 from_float<f16>(float x) {
    const u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) {  // NaN keeps sign and upper payload, as in NumPy
        return f16{(u16)((u >> 16 & 0x8000u) | 0x7e00u | (u >> 13 & 0x3ffu))};
    }
    return f16{float_to_f16_bits(x)};
}

template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    const u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) {  // NaN keeps its sign, as in ml_dtypes
        return bf16{(u16)((u >> 16 & 0x8000u) | 0x7fc0u)};
    }
    return bf16{(u16)((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

// For SMs without fp8 instructions: the fp8 code of x, which is no NaN. The format has MANTISSA
// bits of mantissa, exponent bias BIAS, and LARGEST as its code of largest finite magnitude.
template <int MANTISSA, int BIAS, u32 LARGEST>
__device__ __forceinline__ u8 float_to_fp8(float x) {
    constexpr int DROPPED = 23 - MANTISSA;
    constexpr u32 NORMAL = (u32)(128 - BIAS) << 23;  // the smallest normal number, as a float
    constexpr u32 GRID = NORMAL + (DROPPED << 23);   // its last place is the smallest subnormal
    const u32 sign = __float_as_uint(x) >> 24 & 0x80u;
    const u32 a = __float_as_uint(x) & 0x7fffffffu;
    if (a < NORMAL) {  // a subnormal: the addition rounds it
        return (u8)(sign | (__float_as_uint(__uint_as_float(a) + __uint_as_float(GRID)) - GRID));
    }
    const u32 rounded = (a + (1u << (DROPPED - 1)) - 1u + (a >> DROPPED & 1u)) >> DROPPED;
    const u32 magnitude = rounded - ((u32)(127 - BIAS) << MANTISSA);
    return (u8)(sign | (magnitude < LARGEST ? magnitude : LARGEST));
}

// Two fp8 codes, `a` in the lower byte; every NaN becomes 0x7f.
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ u32 two_codes(float a, float b, e4m3) { return floats_to_e4m3x2(a, b); }
__device__ __forceinline__ u32 two_codes(float a, float b, e5m2) { return floats_to_e5m2x2(a, b); }
#else
__device__ __forceinline__ u32 code_of(float x, e4m3) { return float_to_fp8<3, 7, 0x7e>(x); }
__device__ __forceinline__ u32 code_of(float x, e5m2) { return float_to_fp8<2, 15, 0x7b>(x); }
template <typename T> __device__ __forceinline__ u32 two_codes(float a, float b, T) {
    return (a == a ? code_of(a, T{}) : 0x7fu) | (b == b ? code_of(b, T{}) : 0x7fu) << 8;
}
#endif

template <typename T, u32 NOT_A_NUMBER> __device__ __forceinline__ T fp8_from_float(float x) {
    if (x != x) return T{(u8)((__float_as_uint(x) >> 24 & 0x80u) | NOT_A_NUMBER)};
    return T{(u8)two_codes(x, 0.0f, T{})};
}

template <> __device__ __forceinline__ e4m3 from_float<e4m3>(float x) {
    return fp8_from_float<e4m3, 0x7f>(x);
}

template <> __device__ __forceinline__ e5m2 from_float<e5m2>(float x) {
    return fp8_from_float<e5m2, 0x7e>(x);
}

// Two f16 or bf16 in a word, equal to from_float for floats that are no NaN.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ u32 two_halves(float a, float b, f16) { return floats_to_f16x2(a, b); }
__device__ __forceinline__ u32 two_halves(float a, float b, bf16) { return floats_to_bf16x2(a, b); }
#else
template <typename T> __device__ __forceinline__ u32 two_halves(float a, float b, T) {
    return from_float<T>(a).bits | (u32)from_float<T>(b).bits << 16;
}
#endif
