// common.cuh: storage types, conversions, vector moves and warp sums shared by all kernels.
//
// Pasted into each .cu by pykv.cuda.source; includes nothing. Inline PTX stands only here, in small
// named wrappers. Storage types hold bits; arithmetic is done in float.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i64 = long long;

constexpr int WARP = 32;
constexpr u32 FULL_MASK = 0xffffffffu;
#define INF __uint_as_float(0x7f800000u)

struct f16 { u16 bits; };
struct bf16 { u16 bits; };

// --- Conversions: exact to float, round to nearest even from float --------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

template <typename T> __device__ __forceinline__ T from_float(float x);

template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

template <> __device__ __forceinline__ f16 from_float<f16>(float x) {
    const u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) {  // NaN keeps sign and upper payload, as in NumPy
        return f16{(u16)((u >> 16 & 0x8000u) | 0x7e00u | (u >> 13 & 0x3ffu))};
    }
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    const u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) {  // NaN keeps its sign, as in ml_dtypes
        return bf16{(u16)((u >> 16 & 0x8000u) | 0x7fc0u)};
    }
    return bf16{(u16)((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

// --- Vectors: eight elements, 16-byte aligned -----------------------------------------------------

__device__ __forceinline__ void load8(float (&x)[8], const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0];
    const float4 b = reinterpret_cast<const float4*>(p)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void load8(float (&x)[8], const T* p) {
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
__device__ __forceinline__ void store8(T* p, const float (&x)[8]) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        words[i] = from_float<T>(x[2 * i]).bits | (u32)from_float<T>(x[2 * i + 1]).bits << 16;
    }
    *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Four elements, aligned to four elements.
__device__ __forceinline__ void store4(float* p, const float (&x)[4]) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ void store4(T* p, const float (&x)[4]) {
    uint2 words;
    words.x = from_float<T>(x[0]).bits | (u32)from_float<T>(x[1]).bits << 16;
    words.y = from_float<T>(x[2]).bits | (u32)from_float<T>(x[3]).bits << 16;
    *reinterpret_cast<uint2*>(p) = words;
}

// Eight elements from one array to another; bits stay as they are where the types agree.
template <typename T> __device__ __forceinline__ void move8(T* to, const T* from) {
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

// --- Sums and maxima: every lane gets the result --------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, lane));
    return x;
}

// N sums at once, N a power of two up to 32: lane l gets the warp's sum of x[l % N]. Lanes trade
// half of their values at each step: N - 1 + log2(32 / N) shuffles, not 5 * N. Uses up x.
template <int N> __device__ __forceinline__ float warp_sums(float (&x)[N]) {
    static_assert(N >= 1 && N <= WARP && (N & (N - 1)) == 0, "a power of two up to 32");
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
        const bool upper = threadIdx.x & half;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float given = upper ? x[i] : x[i + half];
            const float kept = upper ? x[i + half] : x[i];
            x[i] = kept + __shfl_xor_sync(FULL_MASK, given, half);
        }
    }
    float sum = x[0];
#pragma unroll
    for (int lane = N; lane < WARP; lane *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, lane);
    return sum;
}

// Sum over a block of THREADS threads, which all call it; `scratch` holds THREADS / 32 floats and
// may be used again at once.
template <int THREADS>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    static_assert(THREADS % WARP == 0, "whole warps");
    x = warp_sum(x);
    __syncthreads();  // an earlier use of scratch is over
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / WARP; warp++) sum += scratch[warp];
    return sum;
}
