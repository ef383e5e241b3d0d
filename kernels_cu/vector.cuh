// vector.cuh: vectors of two, four and eight floats, f16 or bf16: load, store, pack and unpack.
//
// load8 and store8 convert from and to float; get8 and put8 move the bits of an Eight. Addresses
// are aligned to the vector, at most to 16 bytes.
#include "convert.cuh"

// Lanes that share a row of `elements`, eight elements each: a power of two up to a warp.
__device__ constexpr int lanes_of_row(int elements) {
    int lanes = 1;
    while (lanes < WARP && lanes * 8 < elements) lanes *= 2;
    return lanes;
}

__device__ __forceinline__ void load8(float (&x)[8], const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0];
    const float4 b = reinterpret_cast<const float4*>(p)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void load8(float (&x)[8], const T* p) {
    static_assert(sizeof(T) == 2, "f16 or bf16");
    const uint4 a = *reinterpret_cast<const uint4*>(p);
    const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = to_float(T{(u16)words[i]});
        x[2 * i + 1] = to_float(T{(u16)(words[i] >> 16)});
    }
}

__device__ __forceinline__ void store8(float* p, const float (&x)[8]) {
    reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
    static_assert(sizeof(T) == 2, "f16 or bf16");
    u32 words[4];
    bool has_nan = false;  // rare, so only then its bits are computed
#pragma unroll
    for (int i = 0; i < 8; i++) has_nan |= x[i] != x[i];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = two_halves(x[2 * i], x[2 * i + 1], T{});
    if (has_nan) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i] = from_float<T>(x[2 * i]).bits | (u32)from_float<T>(x[2 * i + 1]).bits << 16;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void store8(T* p, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(p) = pack8<T>(x);
}

// Four elements, aligned to four elements.
__device__ __forceinline__ void load4(float (&x)[4], const float* p) {
    const float4 a = *reinterpret_cast<const float4*>(p);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void load4(float (&x)[4], const T* p) {
    static_assert(sizeof(T) == 2, "f16 or bf16");
    const uint2 a = *reinterpret_cast<const uint2*>(p);
    x[0] = to_float(T{(u16)a.x}), x[1] = to_float(T{(u16)(a.x >> 16)});
    x[2] = to_float(T{(u16)a.y}), x[3] = to_float(T{(u16)(a.y >> 16)});
}

__device__ __forceinline__ void store4(float* p, const float (&x)[4]) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void store4(T* p, const float (&x)[4]) {
    static_assert(sizeof(T) == 2, "f16 or bf16");
    uint2 words;
    words.x = from_float<T>(x[0]).bits | (u32)from_float<T>(x[1]).bits << 16;
    words.y = from_float<T>(x[2]).bits | (u32)from_float<T>(x[3]).bits << 16;
    *reinterpret_cast<uint2*>(p) = words;
}

// Two elements, aligned to two elements.
__device__ __forceinline__ void store2(float* p, float a, float b) {
    *reinterpret_cast<float2*>(p) = make_float2(a, b);
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void store2(T* p, float a, float b) {
    static_assert(sizeof(T) == 2, "f16 or bf16");
    *reinterpret_cast<u32*>(p) = from_float<T>(a).bits | (u32)from_float<T>(b).bits << 16;
}

// Eight elements from one array to another; equal types keep their bits.
template <typename T> __device__ __forceinline__ void move8(T* to, const T* from) {
    static_assert(sizeof(T) >= 2, "pieces of 16 bytes");
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
}

template <typename To, typename From>
__device__ __forceinline__ void move8(To* to, const From* from) {
    float x[8];
    load8(x, from);
    store8(to, x);
}

// The bits of eight elements.
template <typename T> struct Eight { uint4 words[sizeof(T) / 2]; };
template <> struct Eight<i8> { uint2 words; };
template <> struct Eight<i4> { u32 words; };
template <> struct Eight<e4m3> { uint2 words; };
template <> struct Eight<e5m2> { uint2 words; };

template <typename T> __device__ __forceinline__ Eight<T> get8(const T* p) {
    Eight<T> eight;
    if constexpr (sizeof(T) == 1) {
        eight.words = *reinterpret_cast<const decltype(eight.words)*>(p);
    } else {
#pragma unroll
        for (int i = 0; i < (int)sizeof(T) / 2; i++) {
            eight.words[i] = reinterpret_cast<const uint4*>(p)[i];
        }
    }
    return eight;
}

// The same by eager loads (ptx.cuh), for kinds that hold floats.
template <typename T> __device__ __forceinline__ Eight<T> get8_eager(const T* p) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
        eight.words[i] = load16_eager(reinterpret_cast<const uint4*>(p) + i);
    }
    return eight;
}

template <typename T> __device__ __forceinline__ void put8(T* p, const Eight<T>& eight) {
    if constexpr (sizeof(T) == 1) {
        *reinterpret_cast<Eight<T>*>(p) = eight;
    } else {
#pragma unroll
        for (int i = 0; i < (int)sizeof(T) / 2; i++) {
            store16(reinterpret_cast<uint4*>(p) + i, eight.words[i]);
        }
    }
}

__device__ __forceinline__ void pack8(Eight<float>& eight, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        eight.words[i] = make_uint4(__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]),
                                    __float_as_uint(x[4 * i + 2]), __float_as_uint(x[4 * i + 3]));
    }
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void pack8(Eight<T>& eight, const float (&x)[8]) {
    eight.words[0] = pack8<T>(x);
}

__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<float>& eight) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 a = eight.words[i];
        x[4 * i] = __uint_as_float(a.x), x[4 * i + 1] = __uint_as_float(a.y);
        x[4 * i + 2] = __uint_as_float(a.z), x[4 * i + 3] = __uint_as_float(a.w);
    }
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void unpack8(float (&x)[8], const Eight<T>& eight) {
    const uint4 a = eight.words[0];
    const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = to_float(T{(u16)words[i]});
        x[2 * i + 1] = to_float(T{(u16)(words[i] >> 16)});
    }
}
