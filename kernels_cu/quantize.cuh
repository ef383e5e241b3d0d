// quantize.cuh: row scales and quantized codes, bit for bit as pykv/kinds.py defines them.
#include "vector.cuh"

// The largest magnitude as an unsigned number that orders like the floats: a NaN exceeds infinity,
// infinity exceeds all else. as_float is the inverse; a NaN stays some NaN.
template <typename T> __device__ __forceinline__ u32 max_magnitude(const Eight<T>& eight) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
        const uint4 a = eight.words[i];
        const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {  // the shift drops the sign; lower bits do not change the order
            largest = max(largest, words[j] << 1);
            if (sizeof(T) == 2) largest = max(largest, words[j] << 17);
        }
    }
    return largest;
}

__device__ __forceinline__ float as_float(u32 magnitude, float) {
    return __uint_as_float(magnitude >> 1);
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ float as_float(u32 magnitude, T) {
    return to_float(T{(u16)(magnitude >> 17)});
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

// Eight codes, to nearest even. For integer kinds y must round to -LARGEST .. LARGEST; fp8 kinds
// saturate, and every NaN becomes 0x7f.
__device__ __forceinline__ void store8(i8* p, const float (&y)[8]) {
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 lower = __byte_perm(round_to_int(y[4 * i]), round_to_int(y[4 * i + 1]), 0x40);
        const u32 upper = __byte_perm(round_to_int(y[4 * i + 2]), round_to_int(y[4 * i + 3]), 0x40);
        words[i] = __byte_perm(lower, upper, 0x5410);
    }
    *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
}

__device__ __forceinline__ void store8(i4* p, const float (&y)[8]) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) word |= (round_to_int(y[i]) & 15u) << 4 * i;
    *reinterpret_cast<u32*>(p) = word;
}

#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ u32 two_codes(float a, float b, e4m3) { return floats_to_e4m3x2(a, b); }
__device__ __forceinline__ u32 two_codes(float a, float b, e5m2) { return floats_to_e5m2x2(a, b); }
#else
template <typename T> __device__ __forceinline__ u32 two_codes(float a, float b, T) {
    const u32 lower = a == a ? from_float<T>(a).bits : 0x7fu;
    return lower | (b == b ? from_float<T>(b).bits : 0x7fu) << 8;
}
#endif

template <typename T> __device__ __forceinline__ void store8_fp8(T* p, const float (&y)[8]) {
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        words[i] = two_codes(y[4 * i], y[4 * i + 1], T{}) |
                   two_codes(y[4 * i + 2], y[4 * i + 3], T{}) << 16;
    }
    *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
}

__device__ __forceinline__ void store8(e4m3* p, const float (&y)[8]) { store8_fp8(p, y); }
__device__ __forceinline__ void store8(e5m2* p, const float (&y)[8]) { store8_fp8(p, y); }

// Byte `i` of x as a float, minus `bias`. The byte becomes the lowest bits of a float of 2^23,
// whose unit is the lowest bit; that runs at full rate, integer conversion at a quarter of it.
__device__ __forceinline__ float byte_to_float(u32 x, int i, float bias) {
    return __uint_as_float(__byte_perm(x, 0x4b000000u, 0x7440u | i)) - (8388608.0f + bias);
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<i8>& eight) {
    const u32 words[2] = {eight.words.x ^ 0x80808080u, eight.words.y ^ 0x80808080u};  // + 128
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = byte_to_float(words[i / 4], i % 4, 128.0f);
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<i4>& eight) {
    const u32 codes = eight.words ^ 0x88888888u;                                   // + 8
    const u32 words[2] = {codes & 0x0f0f0f0fu, codes >> 4 & 0x0f0f0f0fu};  // even, odd
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = byte_to_float(words[i % 2], i / 2, 8.0f);
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<e4m3>& eight) {
    const u32 words[2] = {eight.words.x, eight.words.y};
#pragma unroll
    for (int i = 0; i < 2; i++) {
#if __CUDA_ARCH__ >= 890
        u32 pairs[2];
        e4m3x4_to_f16x4(pairs, words[i]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[4 * i + j] = f16_bits_to_float((u16)(pairs[j / 2] >> j % 2 * 16));
        }
#else
#pragma unroll
        for (int j = 0; j < 4; j++) x[4 * i + j] = to_float(e4m3{(u8)(words[i] >> 8 * j)});
#endif
    }
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<e5m2>& eight) {
    const u32 words[2] = {eight.words.x, eight.words.y};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        x[i] = f16_bits_to_float((u16)((words[i / 4] >> i % 4 * 8) << 8));
    }
}

__device__ __forceinline__ void load8(float (&x)[8], const i8* p) { unpack8(x, get8(p)); }
__device__ __forceinline__ void load8(float (&x)[8], const i4* p) { unpack8(x, get8(p)); }
__device__ __forceinline__ void load8(float (&x)[8], const e4m3* p) { unpack8(x, get8(p)); }
__device__ __forceinline__ void load8(float (&x)[8], const e5m2* p) { unpack8(x, get8(p)); }
