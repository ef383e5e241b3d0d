// ptx.cuh: wrappers of PTX instructions, and fences of the compiler's scheduler.
//
// All inline PTX of the project but that of wgmma.cuh. The tag in brackets names the instruction's
// section of the PTX manual. tests/simt/ptx.hpp holds a C++ twin of each wrapper with the same result,
// bit for bit.
#include "types.cuh"

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

// [mov] Either half of a word, twice. Unlike what __byte_perm makes, it takes no instruction where it
// is an operand of f16x2.
__device__ __forceinline__ u32 lower_twice(u32 x) {
    u32 y;
    asm("{\n\t.reg .b16 lower, upper;\n\tmov.b32 {lower, upper}, %1;\n\t"
        "mov.b32 %0, {lower, lower};\n\t}" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ u32 upper_twice(u32 x) {
    u32 y;
    asm("{\n\t.reg .b16 lower, upper;\n\tmov.b32 {lower, upper}, %1;\n\t"
        "mov.b32 %0, {upper, upper};\n\t}" : "=r"(y) : "r"(x));
    return y;
}

// [ld] Eager load of an element of 2, 4 or 8 bytes; see load16_eager.
template <typename T> __device__ __forceinline__ T load_eager(const T* p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "what the instruction loads");
    T x;
    if constexpr (sizeof(T) == 2) {
        u16 bits;
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(p) : "memory");
        x = reinterpret_cast<const T&>(bits);
    } else if constexpr (sizeof(T) == 4) {
        u32 bits;
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
        x = reinterpret_cast<const T&>(bits);
    } else {
        u64 bits;
        asm volatile("ld.global.u64 %0, [%1];" : "=l"(bits) : "l"(p) : "memory");
        x = reinterpret_cast<const T&>(bits);
    }
    return x;
}

// [ld] Eager load of 16 bytes, aligned to 16: it stays above the next schedule_fence, while the
// compiler sinks ordinary loads of read-only memory to their first use.
__device__ __forceinline__ uint4 load16_eager(const void* p) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}

// [st] One store of 16 bytes to global memory, aligned to 16. The compiler may split an ordinary
// store of a vector that was assembled from parts.
__device__ __forceinline__ void store16(void* p, const uint4& x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// The same to shared memory.
__device__ __forceinline__ void store16_shared(void* p, const uint4& x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"((u32)__cvta_generic_to_shared(p)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

// [cp.async] Asynchronous copy of 16 bytes that bypasses L1, both addresses aligned to 16. Below
// sm_80 it is an ordinary copy, and commit and wait do nothing.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
#else
    *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(global);
#endif
}

// The same, or 16 bytes of zeros where the source does not exist.
__device__ __forceinline__ void cp_async16_or_zero(void* shared, const void* global, bool exists) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global), "r"(exists ? 16 : 0)
                 : "memory");
#else
    const uint4 zero = {0, 0, 0, 0};
    *reinterpret_cast<uint4*>(shared) = exists ? *reinterpret_cast<const uint4*>(global) : zero;
#endif
}

// The same for 4 or 8 bytes, aligned to their size; these go through L1.
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

// [cp.async.commit_group] Commits this thread's copies so far as one group.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// [cp.async.wait_group] Waits until at most the N latest groups of this thread are pending. Copies
// of other threads need a barrier after it.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

// [prefetch] Asks for the line of an address, for L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(global));
}

// [griddepcontrol] Lets the next kernel of the stream start that was launched to start early, once
// all blocks have come here or ended. It sees no writes of this kernel before await_previous.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernel before has ended and its writes are visible; at once in a kernel that was
// not launched to start early. All blocks of one that was must come here, so that what follows it
// may rely on all that was before.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 750
// [ldmatrix] Four 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 * i + j passes the
// address of row j of matrix i, 16 bytes aligned to 16. Lane 4 * g + t receives in r[i] row g,
// columns 2t (lower half) and 2t + 1, of matrix i, or of its transpose with _trans.
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

// [mma] D += A B with A 16 x K, B K x 8 and D 16 x 8. Products are exact. The hardware decides
// order and rounding of the sums, so bits are defined only where all sums are exact. [Matrix
// Fragments] Lane 4 * g + t holds, the lower index in the lower half of a register:
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
// [sub, fma] Two f16 at once, to nearest even.
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
// [atom.inc] atomicInc with acquire-release order at GPU scope; cheaper than two __threadfence().
__device__ __forceinline__ u32 atomic_inc_acq_rel(u32* at, u32 most) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old) : "l"(at), "r"(most) : "memory");
    return old;
}

// [ld, st] One word that other blocks of the GPU store or load meanwhile, whole and at once; other
// accesses may pass it.
__device__ __forceinline__ u64 load_relaxed(u64* at) {
    u64 x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(at) : "memory");
    return x;
}

__device__ __forceinline__ void store_relaxed(u64* at, u64 x) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(at), "l"(x) : "memory");
}

// [red, ld] A counter by which blocks of the GPU wait for each other: what a thread knows before it
// adds, is known to whoever has loaded the sum.
__device__ __forceinline__ void add_release(u32* at, u32 x) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(at), "r"(x) : "memory");
}

__device__ __forceinline__ u32 load_acquire(const u32* at) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
    return x;
}
#endif

// [ld.volatile, st.volatile] One word of mapped memory of the host, whole and at once, as by
// ld.relaxed.sys; other accesses may pass it.
__device__ __forceinline__ u64 load_host(const u64* at) {
    u64 x;
    asm volatile("ld.volatile.global.u64 %0, [%1];" : "=l"(x) : "l"(at) : "memory");
    return x;
}

__device__ __forceinline__ void store_host(u64* at, u64 x) {
    asm volatile("st.volatile.global.u64 [%0], %1;" :: "l"(at), "l"(x) : "memory");
}

// [%globaltimer] Nanoseconds of a clock that all SMs share; it steps by up to a microsecond.
__device__ __forceinline__ u64 global_timer() {
    u64 x;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(x) :: "memory");
    return x;
}

#if __CUDA_ARCH__ >= 900
// [barrier.cluster] Arrive with release order: cluster_wait of any thread of the cluster sees what
// this thread wrote. Whole warps call it.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Arrive without memory order, for a barrier that publishes no writes.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Waits, with acquire order, until all threads of the cluster that have not exited have arrived.
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// [mapa] Distributed shared memory: the address of `shared` in the block of that rank of the
// cluster (x counts first). That block must have started and must not exit before the last read: a
// cluster barrier on either side.
template <typename T> __device__ __forceinline__ const T* map_shared_rank(const T* shared, u32 rank) {
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return reinterpret_cast<const T*>(there);
}
#endif

// Schedule fence: the compiler moves no memory access across it. It shapes the code for speed only;
// results must not depend on it, so its twin does nothing.
__device__ __forceinline__ void schedule_fence() { __syncwarp(); }

// Opaque copy: stops loop-invariant hoisting, so values derived from it are recomputed each
// iteration instead of being held in registers.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Opaque copy of 64 bits: stops rematerialisation, so the value stays in registers instead of being
// recomputed each iteration.
template <typename T> __device__ __forceinline__ T opaque_pointer(T x) {
    asm volatile("" : "+l"(x));
    return x;
}

// [ex2] 2^x with a relative error up to 2^-22. Subnormal arguments and results flush to zero, which
// saves the scaling that exp2f does for them.
__device__ __forceinline__ float exp2_ftz(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// [rcp] 1 / x with a relative error up to 2^-23. Subnormal arguments and results flush to zero.
__device__ __forceinline__ float inverse_ftz(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// [dp4a] c plus the dot product of the four signed bytes of a and b; wraps at 32 bits.
__device__ __forceinline__ int dp4a(int a, int b, int c) {
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

// [dp4a] The same of bytes of a that have no sign.
__device__ __forceinline__ int dp4a_unsigned(u32 a, u32 b, int c) {
#if __CUDA_ARCH__ >= 610
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
#pragma unroll
    for (int i = 0; i < 4; i++) c += (int)(a >> 8 * i & 255u) * (i8)(b >> 8 * i);
    return c;
#endif
}

#endif  // PYKV_SIMT
