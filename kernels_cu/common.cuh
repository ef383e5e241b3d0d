// common.cuh: storage types, instructions, conversions, vector moves and warp sums shared by all
// kernels.
//
// Pasted into each .cu by pykv.cuda.source; includes nothing. Inline PTX stands only in the section
// "Instructions". Storage types hold bits; arithmetic is done in float.

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
struct e4m3 { u8 bits; };  // OCP FP8: no infinities, NaN is 0x7f and 0xff, largest 448
struct e5m2 { u8 bits; };  // OCP FP8: the upper byte of an f16, largest finite 57344
struct i4 { u8 bits; };    // two int4 in two's complement, the even element in the lower half

// --- Instructions: all the inline PTX, under the names of its manual's sections ------------------
//
// tests/simt/ptx.hpp holds a C++ twin of each wrapper, with the same result bit for bit.
#ifndef PYKV_SIMT

// [cvt] NaN becomes 0x7fffffff.
__device__ __forceinline__ float f16_bits_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// [cvt] To nearest even; NaN becomes 0x7fff.
__device__ __forceinline__ u16 float_to_f16_bits(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

#if __CUDA_ARCH__ >= 800
// [cvt] Two floats to nearest even, `lower` in the lower half; NaN becomes 0x7fff.
__device__ __forceinline__ u32 floats_to_f16x2(float lower, float upper) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(upper), "f"(lower));
    return y;
}

__device__ __forceinline__ u32 floats_to_bf16x2(float lower, float upper) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(upper), "f"(lower));
    return y;
}
#endif

#if __CUDA_ARCH__ >= 890
// [cvt] Two codes, `lower` in the lower byte, to nearest even. What exceeds the largest finite
// value, infinities too, becomes that value; NaN becomes 0x7f.
__device__ __forceinline__ u16 floats_to_e4m3x2(float lower, float upper) {
    u16 y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(upper), "f"(lower));
    return y;
}

__device__ __forceinline__ u16 floats_to_e5m2x2(float lower, float upper) {
    u16 y;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(y) : "f"(upper), "f"(lower));
    return y;
}

// [cvt] Two f16, exact; NaN becomes 0x7fff. (e5m2 needs no instruction: it is half an f16.)
__device__ __forceinline__ u32 e4m3x2_to_f16x2(u16 x) {
    u32 y;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(x));
    return y;
}

// [cvt] The four codes of a word, likewise; the instruction itself takes the upper half of one.
__device__ __forceinline__ void e4m3x4_to_f16x4(u32 (&pairs)[2], u32 word) {
    asm("{\n\t.reg .b16 lower, upper;\n\tmov.b32 {lower, upper}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, lower;\n\tcvt.rn.f16x2.e4m3x2 %1, upper;\n\t}"
        : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(word));
}
#endif

// [ld] 16 bytes, aligned to 16. Stays before the next __syncwarp, where other loads from memory that
// a kernel does not write sink to where their values are used.
__device__ __forceinline__ uint4 load16_now(const void* p) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}

// [st] 16 bytes to global memory, aligned to 16. What is made of parts is else at times stored by
// parts.
__device__ __forceinline__ void store16(void* p, const uint4& x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// [cp.async] Starts a copy of 16 bytes, both addresses aligned to 16, past L1. Below sm_80 an
// ordinary copy, and the two that follow do nothing.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
#else
    *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(global);
#endif
}

// The same for 4 or 8 bytes, aligned to as many; these pass through L1.
template <int BYTES> __device__ __forceinline__ void cp_async(void* shared, const void* global) {
    if constexpr (BYTES == 16) {
        cp_async16(shared, global);
    } else {
        static_assert(BYTES == 4 || BYTES == 8, "what the instruction copies");
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global), "n"(BYTES)
                     : "memory");
#else
        for (int i = 0; i < BYTES / 4; i++) ((u32*)shared)[i] = ((const u32*)global)[i];
#endif
    }
}

// [cp.async.commit_group] Closes this thread's group of copies started so far.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// [cp.async.wait_group] Waits until at most the N latest groups of this thread are under way; other
// threads' copies need a barrier after it.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

#if __CUDA_ARCH__ >= 750
// [ldmatrix] Four 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 * i + j gives the
// address of row j of matrix i, 16 bytes aligned to 16. Lane 4 * g + t gets in r[i] row g, columns
// 2t (lower half) and 2t + 1 of matrix i; with _trans, of its transpose.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}

// [mma] D += A B, where A is 16 x K, B is K x 8 and D is 16 x 8. Products are exact; order and
// rounding of the sums are the hardware's, so bits are defined only where all sums are exact.
// [Matrix Fragments] Lane 4 * g + t holds, the lower index in the lower half of a register:
//   a[0], a[1]  rows g and g + 8 of A, columns 2t and 2t + 1
//   a[2], a[3]  the same rows, columns 2t + 8 and 2t + 9
//   b[0], b[1]  column g of B, rows 2t and 2t + 1, then 2t + 8 and 2t + 9
//   d[0..1]     row g of D, columns 2t and 2t + 1; d[2..3] row g + 8
__device__ __forceinline__ void mma_m16n8k8_f16(float (&d)[4], const u32 (&a)[2],
                                                const u32 (&b)[1]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
#endif

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4],
                                                 const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4],
                                                  const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#if __CUDA_ARCH__ >= 750
// [sub, fma] On two f16 at once, to nearest even.
__device__ __forceinline__ u32 sub_f16x2(u32 a, u32 b) {
    u32 y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
#endif

#if __CUDA_ARCH__ >= 700
// [atom.inc] atomicInc to which whoever counts later can tell what this thread has done, or seen done
// behind a barrier; and which tells this thread likewise. Two __threadfence around it would do so,
// but wait for longer.
__device__ __forceinline__ u32 atomic_inc_ordered(u32* at, u32 most) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old) : "l"(at), "r"(most) : "memory");
    return old;
}
#endif

#if __CUDA_ARCH__ >= 900
// [barrier.cluster] The first half of a barrier of all threads of the cluster's blocks: what this
// thread has done so far is there for whoever waits after it. Whole warps alone.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// The same where nothing that was written is to be seen by others.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Its second half: waits until all threads of the cluster that have not exited have arrived.
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// [mapa] Where the block of that rank of the cluster (x counts first) holds what this block holds at
// `shared`. It must have begun, and not end before it is read: a barrier on either side.
template <typename T> __device__ __forceinline__ const T* in_block(const T* shared, u32 rank) {
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return reinterpret_cast<const T*>(there);
}
#endif

// x itself, but the compiler does not know: what is made of it is made here, in each turn of a loop,
// and not kept in registers from before it.
__device__ __forceinline__ int made_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// x itself, 64 bits, but the compiler does not know: it stays in registers, and is not made again in
// each turn of a loop.
template <typename T> __device__ __forceinline__ T made_once(T x) {
    asm volatile("" : "+l"(x));
    return x;
}

// [ex2] 2^x to within 2^-22 of itself; arguments and results that are subnormal count as 0, which
// spares exp2f's care for them.
__device__ __forceinline__ float exp2_flushed(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// [dp4a] c plus the products of the four signed bytes of a and b; wraps at 32 bits.
__device__ __forceinline__ int dot4(int a, int b, int c) {
#if __CUDA_ARCH__ >= 610
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    u32 sum = c;  // unsigned, so that wrapping is defined
#pragma unroll
    for (int i = 0; i < 32; i += 8) sum += (i8)(a >> i) * (i8)(b >> i);
    return (int)sum;
#endif
}

#endif  // PYKV_SIMT

// --- Conversions: exact to float, round to nearest even from float -------------------------------
//
// To the fp8 kinds what exceeds the largest finite value, infinities too, becomes that value. From
// float NaN becomes what NumPy and ml_dtypes make of it; from f16 and fp8 it becomes 0x7fffffff.

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(f16 x) { return f16_bits_to_float(x.bits); }

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// What an SM without fp8 instructions does: as an f16 the bits of an e4m3 mean 2^-8 of its value.
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

// What an SM without fp8 instructions does, NaN aside: a code with MANTISSA bits of mantissa and
// the exponent bias BIAS, whose largest finite magnitude is LARGEST.
template <int MANTISSA, int BIAS, u32 LARGEST>
__device__ __forceinline__ u8 float_to_fp8(float x) {
    constexpr int DROPPED = 23 - MANTISSA;
    constexpr u32 NORMAL = (u32)(128 - BIAS) << 23;  // the smallest normal number, as a float
    constexpr u32 GRID = NORMAL + (DROPPED << 23);   // its last place is the smallest subnormal
    const u32 sign = __float_as_uint(x) >> 24 & 0x80u;
    const u32 a = __float_as_uint(x) & 0x7fffffffu;
    if (a < NORMAL) {  // the addition rounds
        return (u8)(sign | (__float_as_uint(__uint_as_float(a) + __uint_as_float(GRID)) - GRID));
    }
    const u32 rounded = (a + (1u << (DROPPED - 1)) - 1u + (a >> DROPPED & 1u)) >> DROPPED;
    const u32 magnitude = rounded - ((u32)(127 - BIAS) << MANTISSA);
    return (u8)(sign | (magnitude < LARGEST ? magnitude : LARGEST));
}

template <> __device__ __forceinline__ e4m3 from_float<e4m3>(float x) {
    const u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return e4m3{(u8)((u >> 24 & 0x80u) | 0x7fu)};
#if __CUDA_ARCH__ >= 890
    return e4m3{(u8)floats_to_e4m3x2(x, 0.0f)};
#else
    return e4m3{float_to_fp8<3, 7, 0x7e>(x)};
#endif
}

template <> __device__ __forceinline__ e5m2 from_float<e5m2>(float x) {
    const u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return e5m2{(u8)((u >> 24 & 0x80u) | 0x7eu)};
#if __CUDA_ARCH__ >= 890
    return e5m2{(u8)floats_to_e5m2x2(x, 0.0f)};
#else
    return e5m2{float_to_fp8<2, 15, 0x7b>(x)};
#endif
}

// --- Angles --------------------------------------------------------------------------------------

// Sine and cosine of `angle` radians; both are off by less than 1e-7 for |angle| up to 2^31.
// The angle stays in double until it is within a quarter turn of zero. Then Taylor series serve:
// the first term left out is below 2e-9 at pi / 4.
__device__ __forceinline__ void sin_cos(double angle, float& sine, float& cosine) {
    constexpr double HALF_PI = 1.5707963267948966, HALF_PI_REST = 6.123233995736766e-17;
    const double turns = rint(angle * 0.6366197723675814);  // quarters of a turn: 2 / pi
    const float x = (float)fma(-turns, HALF_PI_REST, fma(-turns, HALF_PI, angle));
    const float y = x * x;
    float s = 1.0f / 362880;
    s = s * y - 1.0f / 5040;
    s = s * y + 1.0f / 120;
    s = s * y - 1.0f / 6;
    s = s * y * x + x;
    float c = -1.0f / 3628800;
    c = c * y + 1.0f / 40320;
    c = c * y - 1.0f / 720;
    c = c * y + 1.0f / 24;
    c = c * y - 0.5f;
    c = c * y + 1.0f;
    const int quarter = (int)((i64)turns & 3);
    sine = quarter & 1 ? c : s;
    cosine = quarter & 1 ? s : c;
    if (quarter & 2) sine = -sine;
    if (quarter == 1 || quarter == 2) cosine = -cosine;
}

// --- Vectors: eight elements, 16-byte aligned ----------------------------------------------------

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

// Two f16 or bf16 in a word, as `from_float` makes them of floats that are no NaN.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ u32 two_halves(float a, float b, f16) { return floats_to_f16x2(a, b); }
__device__ __forceinline__ u32 two_halves(float a, float b, bf16) { return floats_to_bf16x2(a, b); }
#else
template <typename T> __device__ __forceinline__ u32 two_halves(float a, float b, T) {
    return from_float<T>(a).bits | (u32)from_float<T>(b).bits << 16;
}
#endif

__device__ __forceinline__ void store8(float* p, const float (&x)[8]) {
    reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

template <typename T>  // f16 or bf16
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
    static_assert(sizeof(T) == 2, "f16 or bf16");
    u32 words[4];
    bool has_nan = false;  // rare, and its bits take longer than all else
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

// Eight elements from one array to another; bits stay as they are where the types agree.
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

// Eight elements as they are.
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

// The same by load16_now, for floats.
template <typename T> __device__ __forceinline__ Eight<T> get8_now(const T* p) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
        eight.words[i] = load16_now(reinterpret_cast<const uint4*>(p) + i);
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

// --- Codes, bit for bit as pykv/kinds.py defines them --------------------------------------------

template <typename T> constexpr float LARGEST = 0.0f;  // of the codes of a kind; 0: it holds floats
template <> constexpr float LARGEST<i8> = 127.0f;
template <> constexpr float LARGEST<i4> = 7.0f;
template <> constexpr float LARGEST<e4m3> = 448.0f;
template <> constexpr float LARGEST<e5m2> = 57344.0f;
template <typename T> constexpr int PACKED = 1;  // elements of one T
template <> constexpr int PACKED<i4> = 2;
template <typename T> constexpr bool IS_FP8 = false;
template <> constexpr bool IS_FP8<e4m3> = true;
template <> constexpr bool IS_FP8<e5m2> = true;

// How many lanes hold a row of `elements`, eight each at a time: a power of two up to a warp.
__device__ constexpr int lanes_of_row(int elements) {
    int lanes = 1;
    while (lanes < WARP && lanes * 8 < elements) lanes *= 2;
    return lanes;
}

// Magnitudes as unsigned numbers in the upper bits, whose order is theirs: a NaN exceeds infinity,
// and infinity all else. `as_float` undoes it; a NaN stays some NaN.
template <typename T> __device__ __forceinline__ u32 max_magnitude(const Eight<T>& eight) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
        const uint4 a = eight.words[i];
        const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {  // the shift drops the sign; bits below do no harm
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

// x / LARGEST<T>, to nearest even, for x from 1e-8 on: the remainder mends the last place, as
// division of every mantissa by 127 and by 7 has shown; the other two are 7 times a power of two.
template <typename T> __device__ __forceinline__ float over_largest(float x) {
    constexpr float INVERSE = 1.0f / LARGEST<T>;
    const float y = __fmul_rn(x, INVERSE);
    return __fmaf_rn(__fmaf_rn(-y, LARGEST<T>, x), INVERSE, y);
}

// The scale that a row is stored with. `amax` holds the bits of its largest |x|; compared as bits,
// a NaN exceeds infinity, and infinity all else.
template <typename T, typename SCALE> __device__ __forceinline__ SCALE row_scale(u32 amax) {
    const bool finite = amax < 0x7f800000u;
    const float scale = over_largest<T>(fmaxf(__uint_as_float(amax), 1e-8f));
    if constexpr (sizeof(SCALE) == 2) {
        return SCALE{finite ? float_to_f16_bits(fminf(scale, 65504.0f)) : (u16)0x7e00};
    } else {
        return finite ? scale : __uint_as_float(0x7fc00000u);
    }
}

// What a row with this scale is multiplied by; 0, for codes that are all 0, where there is no such.
template <typename SCALE> __device__ __forceinline__ float inverse_scale(SCALE scale) {
    const float x = to_float(scale);
    const float inverse = __frcp_rn(x > 0.0f ? x : 1.0f);
    return x > 0.0f ? inverse : 0.0f;
}

// y rounded to nearest even, in the lower bits.
__device__ __forceinline__ u32 round_to_int(float y) {
    return __float_as_uint(__fadd_rn(y, 12582912.0f));  // 1.5 * 2^23, where the last place is 1
}

// Eight codes, to nearest even. Integers take what rounds to between -LARGEST and LARGEST alone; fp8
// clamps, and makes 0x7f of every NaN.
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

// Byte `i` of x as a float, less `bias`. A float of 2^23 has its units in the lowest bit, so the
// byte goes there, at the full rate, where an SM converts integers at a quarter of it.
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

// --- Rows of pools: WIDTH lanes share one of N elements, and write it as its kind asks -----------

struct Place { int page, offset; };  // page is negative: nowhere

template <int TOKENS, typename T> __device__ __forceinline__ Place place_of_slot(T slot) {
    if (slot < 0) return Place{-1, 0};
    if (sizeof(slot) == 4) return Place{(int)((u32)slot / TOKENS), (int)((u32)slot % TOKENS)};
    return Place{(int)((u64)slot / TOKENS), (int)((u64)slot % TOKENS)};
}

// A lane's share of a row: piece i is the eight elements from column(i) on.
template <typename T, int N, int WIDTH> struct RowShare {
    static constexpr int PIECES = (N / 8 + WIDTH - 1) / WIDTH;
    Eight<T> pieces[PIECES];

    static __device__ __forceinline__ u32 column(int piece) {
        return (piece * WIDTH + threadIdx.x % WIDTH) * 8;
    }
};

template <int N, int WIDTH, typename T>
__device__ __forceinline__ RowShare<T, N, WIDTH> load_share(const T* from) {
    RowShare<T, N, WIDTH> share = {};  // zeros do not change a maximum
#pragma unroll
    for (int i = 0; i < share.PIECES; i++) {
        if (share.column(i) < N) share.pieces[i] = get8_now(from + share.column(i));
    }
    return share;
}

// The largest magnitude of a share; see max_magnitude.
template <typename T, int N, int WIDTH>
__device__ __forceinline__ u32 max_of(const RowShare<T, N, WIDTH>& share) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < share.PIECES; i++) largest = max(largest, max_magnitude(share.pieces[i]));
    return largest;
}

template <typename T, typename U> constexpr bool SAME = false;
template <typename T> constexpr bool SAME<T, T> = true;

// Write a share as it is, or rounded to another kind of floats.
template <typename To, typename T, int N, int WIDTH>
__device__ __forceinline__ void store_floats(To* to, const RowShare<T, N, WIDTH>& share) {
#pragma unroll
    for (int i = 0; i < share.PIECES; i++) {
        if (share.column(i) >= N) continue;
        if constexpr (SAME<To, T>) {
            put8(to + share.column(i), share.pieces[i]);
        } else {
            float x[8];
            Eight<To> eight;
            unpack8(x, share.pieces[i]);
            pack8(eight, x);
            put8(to + share.column(i), eight);
        }
    }
}

// Write a share as codes, with a scale that it FINDS from the row's largest magnitude, or is given.
template <bool FINDS, typename To, typename SCALE, typename T, int N, int WIDTH>
__device__ __forceinline__ void store_codes(To* to, SCALE* scale_at, RowShare<T, N, WIDTH> share,
                                            u32 largest) {
    float inverse;
    bool clamps = !IS_FP8<To>;  // which clamps by itself
    if constexpr (FINDS) {
        const float amax = as_float(largest, T{});
        const SCALE scale = row_scale<To, SCALE>(__float_as_uint(amax));
        if (threadIdx.x % WIDTH == 0) *scale_at = scale;
        inverse = inverse_scale(scale);
        if (inverse == 0.0f) share = RowShare<T, N, WIDTH>{};  // NaN and infinity too
        // A scale that is subnormal, or limited by its dtype, may be far below what was asked for.
        clamps = clamps && amax * inverse > LARGEST<To> + 0.25f;
    } else {
        inverse = inverse_scale(*scale_at);
        if (inverse == 0.0f) share = RowShare<T, N, WIDTH>{};
    }
#pragma unroll
    for (int i = 0; i < share.PIECES; i++) {
        if (share.column(i) >= N) continue;
        float x[8];
        unpack8(x, share.pieces[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            x[j] = __fmul_rn(x[j], inverse);
            if (!FINDS && !IS_FP8<To> && x[j] != x[j]) x[j] = 0.0f;
        }
        if (clamps) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = fminf(fmaxf(x[j], -LARGEST<To>), LARGEST<To>);
        }
        store8(to + share.column(i) / PACKED<To>, x);
    }
}

// Write a share of the row that goes to a place, and its scale; strides in elements.
template <bool FINDS, typename To, typename SCALE, typename T, int N, int WIDTH>
__device__ __forceinline__ void store_row(To* pool, i64 page_stride, i64 token_stride,
                                          i64 head_stride, SCALE* scales, i64 scale_page_stride,
                                          i64 scale_token_stride, i64 scale_head_stride,
                                          Place place, u32 head, const RowShare<T, N, WIDTH>& share,
                                          u32 largest) {
    const u32 page = place.page, offset = place.offset;
    To* to = pool + page * page_stride + offset * token_stride + head * head_stride;
    if constexpr (LARGEST<To> > 0) {
        scales += page * scale_page_stride + offset * scale_token_stride + head * scale_head_stride;
        store_codes<FINDS>(to, scales, share, largest);
    } else {
        store_floats(to, share);
    }
}

// --- Operands of mma: words of elements as pairs of f16, or of bf16 ------------------------------

template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;

// Elements of a 32-bit word, two, four or eight. `to_pairs` makes pairs of them: pair p holds elements
// 2p and 2p + 1 of an fp8 word, p and p + half a word of any other.
template <typename T> constexpr int IN_WORD = 4 / (int)sizeof(T) * PACKED<T>;

template <typename T> constexpr bool PAIRS_NEIGHBOURS = IS_FP8<T>;

template <typename T> __device__ constexpr int element_of_pair(int pair, int upper) {
    return PAIRS_NEIGHBOURS<T> ? 2 * pair + upper : pair + upper * IN_WORD<T> / 2;
}

// The value of a code 1 in pairs.
#if __CUDA_ARCH__ >= 890
template <typename T> constexpr float IN_PAIRS = 1.0f;
#else
template <typename T> constexpr float IN_PAIRS = 1.0f;
template <> constexpr float IN_PAIRS<e4m3> = 1.0f / 256.0f;
#endif

__device__ __forceinline__ void to_pairs(u32 (&pairs)[1], u32 word, f16) { pairs[0] = word; }
__device__ __forceinline__ void to_pairs(u32 (&pairs)[1], u32 word, bf16) { pairs[0] = word; }

#if __CUDA_ARCH__ >= 750
// An f16 of 1024 has its units in the lowest bit. A code c with its sign flipped is c + 128 there.
__device__ __forceinline__ void to_pairs(u32 (&pairs)[2], u32 word, i8) {
    constexpr u32 BIAS = 0x64806480u;  // 1024 + 128
    pairs[0] = sub_f16x2((word & 0x00ff00ffu) ^ BIAS, BIAS);
    pairs[1] = sub_f16x2((word >> 8 & 0x00ff00ffu) ^ BIAS, BIAS);
}

// The same for c + 8; one place higher codes count 16, hence a sixteenth of 1024 + 16 (c + 8).
__device__ __forceinline__ void to_pairs(u32 (&pairs)[4], u32 word, i4) {
    constexpr u32 BIAS = 0x64086408u, HIGH_BIAS = 0x64806480u;
    constexpr u32 SIXTEENTH = 0x2c002c00u, MINUS_72 = 0xd480d480u;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        pairs[i] = sub_f16x2((word & 0x000f000fu) ^ BIAS, BIAS);
        pairs[i + 1] = fma_f16x2((word & 0x00f000f0u) ^ HIGH_BIAS, SIXTEENTH, MINUS_72);
        word >>= 8;
    }
}

__device__ __forceinline__ void to_pairs(u32 (&pairs)[2], u32 word, e5m2) {
    pairs[0] = __byte_perm(word, 0, 0x1404);
    pairs[1] = __byte_perm(word, 0, 0x3424);
}

__device__ __forceinline__ void to_pairs(u32 (&pairs)[2], u32 word, e4m3) {
#if __CUDA_ARCH__ >= 890
    e4m3x4_to_f16x4(pairs, word);
#else
    // Upper and lower bytes of all four: a code moves down by one bit, but for its sign.
    const u32 magnitude = word & 0x7f7f7f7fu;
    const u32 is_nan = (magnitude + 0x01010101u) & 0x80808080u;  // makes the exponent 31
    const u32 upper = ((magnitude | is_nan) >> 1 & 0x7f7f7f7fu) | (word & 0x80808080u);
    const u32 lower = word << 7 & 0x80808080u;
    pairs[0] = __byte_perm(lower, upper, 0x5140);
    pairs[1] = __byte_perm(lower, upper, 0x7362);
#endif
}
#endif

// Half a word of a and half a word of b, such that `to_pairs` pairs element i of one with element i
// of the other, in order.
template <typename T> __device__ __forceinline__ u32 zip(u32 a, u32 b, int upper) {
    if (PAIRS_NEIGHBOURS<T>) return __byte_perm(a, b, upper ? 0x7362 : 0x5140);
    return __byte_perm(a, b, upper ? 0x7632 : 0x5410);
}

// Integer codes as they come, but from 0 on: as bits of an f16 they are that many times 2^-24, which
// mma takes. Pair p of an i4 word holds 16 times its codes where p is odd.
template <typename T> struct Raw {};
template <typename T> constexpr float RAW_ZERO = 0.0f;  // what the code 0 becomes, times 2^24
template <> constexpr float RAW_ZERO<Raw<i8>> = 128.0f;
template <> constexpr float RAW_ZERO<Raw<i4>> = 8.0f;
template <typename T> __device__ constexpr float raw_factor(int pair) { return 1.0f; }
template <> __device__ constexpr float raw_factor<Raw<i4>>(int pair) {
    return pair % 2 ? 16.0f : 1.0f;
}
template <> constexpr int IN_WORD<Raw<i8>> = 4;
template <> constexpr int IN_WORD<Raw<i4>> = 8;
template <> constexpr bool PAIRS_NEIGHBOURS<Raw<i8>> = true;

__device__ __forceinline__ void to_pairs(u32 (&pairs)[2], u32 word, Raw<i8>) {
    word ^= 0x80808080u;
    pairs[0] = __byte_perm(word, 0, 0x4140);
    pairs[1] = __byte_perm(word, 0, 0x4342);
}

__device__ __forceinline__ void to_pairs(u32 (&pairs)[4], u32 word, Raw<i4>) {
    word ^= 0x88888888u;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        pairs[i] = word & 0x000f000fu;
        pairs[i + 1] = word & 0x00f000f0u;
        word >>= 8;
    }
}

// The float type of an mma that takes T.
template <typename T> struct Operand { using Type = f16; };
template <> struct Operand<bf16> { using Type = bf16; };

#if __CUDA_ARCH__ >= 750
// D += A B, where A is 16 x 16 and B is 16 x 8, of elements M; fragments as of mma_m16n8k16_f16.
template <typename M>
__device__ __forceinline__ void mma_16x16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1) {
#if __CUDA_ARCH__ >= 800
    if constexpr (IS_BF16<M>) {
        mma_m16n8k16_bf16(d, {a0, a1, a2, a3}, {b0, b1});
    } else {
        mma_m16n8k16_f16(d, {a0, a1, a2, a3}, {b0, b1});
    }
#else
    mma_m16n8k8_f16(d, {a0, a1}, {b0});
    mma_m16n8k8_f16(d, {a2, a3}, {b1});
#endif
}
#endif

// x rounded to two f16 or bf16; what is left of x, exactly, takes its place.
template <typename T> __device__ __forceinline__ u32 take_halves(float (&x)[2]) {
    const u32 pair = two_halves(x[0], x[1], T{});
    x[0] -= to_float(T{(u16)pair});
    x[1] -= to_float(T{(u16)(pair >> 16)});
    return pair;
}

// --- Tables --------------------------------------------------------------------------------------

// The last of n ascending entries, n above 0, that is at most x; 0 where none is.
__device__ __forceinline__ int last_up_to(const int* entries, int n, i64 x) {
    int low = 0;
    for (int end = n; end - low > 1;) {
        const int middle = low + (end - low) / 2;
        if (entries[middle] <= x) low = middle; else end = middle;
    }
    return low;
}

// Rows of a ragged batch, in blocks of SIZE: sequence b has (starts[b + 1] - starts[b]) * G of them,
// and the blocks from starts[b] * G / SIZE + b on, at least as many as it needs.
struct RowBlock {
    int b, start, num_queries;  // the sequence, its first query and how many it has
    int first_row, num_rows;    // of the sequence's; num_rows may be below 1
};

// All lanes look at once: as few loads that wait for each other as can be.
template <int SIZE>
__device__ __forceinline__ RowBlock row_block(const int* starts, int B, int G, int block) {
    const auto first_block = [&](int b) { return (int)((i64)starts[b] * G / SIZE) + b; };
    int b = 0;
    for (int left = B; left > 1;) {
        const int step = (left + WARP - 1) / WARP, ahead = threadIdx.x % WARP * step;
        const bool begins = ahead < left && first_block(b + ahead) <= block;
        const int passed = (__popc(__ballot_sync(FULL_MASK, begins)) - 1) * step;
        b += passed;
        left = min(step, left - passed);
    }
    const int start = starts[b], num_queries = starts[b + 1] - start;
    const int first_row = (block - first_block(b)) * SIZE;
    return {b, start, num_queries, first_row, min(SIZE, num_queries * G - first_row)};
}

// What exponents are taken relative to where the maximum so far is m: 0 while no key has been seen.
__device__ __forceinline__ float finite_base(float m) { return m == -INF ? 0.0f : m; }

// --- Sums and maxima: every lane gets the result -------------------------------------------------

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

// N maxima at once over aligned groups of WIDTH lanes.
template <int WIDTH, int N> __device__ __forceinline__ void group_max(u32 (&x)[N]) {
#pragma unroll
    for (int lane = WIDTH / 2; lane > 0; lane /= 2) {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = max(x[i], __shfl_xor_sync(FULL_MASK, x[i], lane));
    }
}

// The sum over each aligned group of WIDTH lanes.
template <int WIDTH> __device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int lane = WIDTH / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
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
// may be used again after a barrier.
template <int THREADS>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    static_assert(THREADS % WARP == 0, "whole warps");
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / WARP; warp++) sum += scratch[warp];
    return sum;
}
