// vector.cuh: two and four floats of any type, eight elements of any kind: load, store, convert.
//
// get8 and put8 move the bits of an Eight, pack8 and unpack8 convert them from and to float, load8
// and store8 do both. Addresses are aligned to the vector, at most to 16 bytes.
#include "convert.cuh"

// Lanes that share a row of `elements`, eight elements each: a power of two up to a warp.
__device__ constexpr int lanes_of_row(int elements) {
    int lanes = 1;
    while (lanes < WARP && lanes * 8 < elements) lanes *= 2;
    return lanes;
}

template <typename T, int N> struct alignas(N * sizeof(T)) Vector { T elements[N]; };

// Two elements, aligned to two elements.
template <typename T> __device__ __forceinline__ void store2(T* p, float a, float b) {
    *reinterpret_cast<Vector<T, 2>*>(p) = {from_float<T>(a), from_float<T>(b)};
}

// Four elements, aligned to four elements.
template <typename T> __device__ __forceinline__ void load4(float (&x)[4], const T* p) {
    const auto four = *reinterpret_cast<const Vector<T, 4>*>(p);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = to_float(four.elements[i]);
}

template <typename T> __device__ __forceinline__ void store4(T* p, const float (&x)[4]) {
    Vector<T, 4> four;
#pragma unroll
    for (int i = 0; i < 4; i++) four.elements[i] = from_float<T>(x[i]);
    *reinterpret_cast<Vector<T, 4>*>(p) = four;
}

// The bits of eight elements.
template <typename T> struct alignas(sizeof(T) == 1 ? 8 / PACKED<T> : 16) Eight {
    u32 words[2 * sizeof(T) / PACKED<T>];
};

template <typename T> __device__ __forceinline__ Eight<T> get8(const T* p) {
    return *reinterpret_cast<const Eight<T>*>(p);
}

// The same by eager loads (ptx.cuh), for kinds that hold floats.
template <typename T> __device__ __forceinline__ Eight<T> get8_eager(const T* p) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
        reinterpret_cast<uint4*>(eight.words)[i] =
            load16_eager(reinterpret_cast<const uint4*>(p) + i);
    }
    return eight;
}

template <typename T> __device__ __forceinline__ void put8(T* p, const Eight<T>& eight) {
    if constexpr (sizeof(T) == 1) {
        *reinterpret_cast<Eight<T>*>(p) = eight;
    } else {
#pragma unroll
        for (int i = 0; i < (int)sizeof(T) / 2; i++) {
            store16(reinterpret_cast<uint4*>(p) + i,
                    reinterpret_cast<const uint4*>(eight.words)[i]);
        }
    }
}

__device__ __forceinline__ void pack8(Eight<float>& eight, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) eight.words[i] = __float_as_uint(x[i]);
}

template <typename T>  // f16 or bf16, NaN as in two_halves
__device__ __forceinline__ void pack8_halves(Eight<T>& eight, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) eight.words[i] = two_halves(x[2 * i], x[2 * i + 1], T{});
}

template <typename T>  // f16, bf16 or fp8, whose NaN becomes 0x7f
__device__ __forceinline__ void pack8(Eight<T>& eight, const float (&x)[8]) {
    if constexpr (IS_FP8<T>) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            eight.words[i] = two_codes(x[4 * i], x[4 * i + 1], T{}) |
                             two_codes(x[4 * i + 2], x[4 * i + 3], T{}) << 16;
        }
    } else {
        bool has_nan = false;  // rare, so only then its bits are computed
#pragma unroll
        for (int i = 0; i < 8; i++) has_nan |= x[i] != x[i];
        pack8_halves(eight, x);
        if (!has_nan) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            eight.words[i] =
                from_float<T>(x[2 * i]).bits | (u32)from_float<T>(x[2 * i + 1]).bits << 16;
        }
    }
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<float>& eight) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __uint_as_float(eight.words[i]);
}

#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<e4m3>& eight) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        u32 pairs[2];
        e4m3x4_to_f16x4(pairs, eight.words[i / 4]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[i + j] = f16_bits_to_float((u16)(pairs[j / 2] >> j % 2 * 16));
        }
    }
}
#endif

template <typename T>  // f16, bf16 or fp8
__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<T>& eight) {
    using Bits = decltype(T::bits);
    constexpr int OF_WORD = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        x[i] = to_float(T{(Bits)(eight.words[i / OF_WORD] >> i % OF_WORD * (8 * sizeof(T)))});
    }
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
    for (int i = 0; i < 8; i++) {  // codes + 128
        x[i] = byte_to_float(eight.words[i / 4] ^ 0x80808080u, i % 4, 128.0f);
    }
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<i4>& eight) {
    const u32 codes = eight.words[0] ^ 0x88888888u;                        // + 8
    const u32 words[2] = {codes & 0x0f0f0f0fu, codes >> 4 & 0x0f0f0f0fu};  // even, odd
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = byte_to_float(words[i % 2], i / 2, 8.0f);
}

template <typename T> __device__ __forceinline__ void load8(float (&x)[8], const T* p) {
    unpack8(x, get8(p));
}

template <typename T> __device__ __forceinline__ void store8(T* p, const float (&x)[8]) {
    Eight<T> eight;
    pack8(eight, x);
    *reinterpret_cast<Eight<T>*>(p) = eight;
}

// Eight elements of another kind that holds floats; those of the same kind keep their bits.
template <typename To, typename From>
__device__ __forceinline__ Eight<To> convert8(const Eight<From>& from) {
    if constexpr (SAME<To, From>) return from;
    float x[8];
    unpack8(x, from);
    Eight<To> to;
    pack8(to, x);
    return to;
}
