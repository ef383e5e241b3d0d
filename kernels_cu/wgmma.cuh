// wgmma.cuh: wrappers of the PTX instructions of warpgroups (four warps), which cubins of sm_90 alone
// have, and of the barriers and copies by which operands reach them; as in ptx.cuh, with twins in
// tests/simt/ptx.hpp.
#include "types.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(PYKV_SIMT)
// [wgmma.fence, wgmma.commit_group, wgmma.wait_group] Before the first wgmma of a group,
// behind the last, and until at most the N latest groups run.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// [fence.proxy] What this thread wrote to shared memory, by cp.async too, is there for wgmma behind
// the next barrier.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// [wgmma matrix descriptor] Rows of 128 bytes, eight together, in 128-byte swizzle: chunk c of 16
// bytes of row r lies at c ^ r % 8. `leading` = bytes between 64 columns, where rows are columns.
struct WgmmaMatrix { u64 descriptor; };

__device__ __forceinline__ WgmmaMatrix wgmma_matrix(const void* shared, u32 leading) {
    const u32 at = (u32)__cvta_generic_to_shared(shared) & 0x3ffffu;
    return {(u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)(leading >> 4) << 16 | at >> 4};
}

// The same so many bytes on.
__device__ __forceinline__ WgmmaMatrix wgmma_matrix(WgmmaMatrix from, u32 bytes) {
    return {from.descriptor + (bytes >> 4)};  // the start has the lowest 14 bits
}

// Registers of D in the text of an instruction, and as its operands.
#define PYKV_D_4 "%0, %1, %2, %3"
#define PYKV_D_8 PYKV_D_4 ", %4, %5, %6, %7"
#define PYKV_D_16 PYKV_D_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PYKV_D_32                                                                                  \
    PYKV_D_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYKV_D_64                                                                                  \
    PYKV_D_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
              "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYKV_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYKV_SUMS_8(d, i) PYKV_SUMS_4(d, i), PYKV_SUMS_4(d, i + 4)
#define PYKV_SUMS_16(d, i) PYKV_SUMS_8(d, i), PYKV_SUMS_8(d, i + 8)
#define PYKV_SUMS_32(d, i) PYKV_SUMS_16(d, i), PYKV_SUMS_16(d, i + 16)
#define PYKV_SUMS_64(d, i) PYKV_SUMS_32(d, i), PYKV_SUMS_32(d, i + 32)
// `sums` of a lane are half the `columns`; `rest` of the text stands for A and B, which follow.
#define PYKV_WGMMA(columns, sums, type, rest, ...)                                                 \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"                              \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type              \
                 " {" PYKV_D_##sums "}, " rest ";\n\t}"                                            \
                 : PYKV_SUMS_##sums(d, 0) : __VA_ARGS__, "l"(b.descriptor) : "memory")

// [wgmma.mma_async] D += A B by the four warps of a warpgroup, A 64 x 16 and B 16 x 128 of elements
// bf16 or f16, both by `wgmma_matrix`: of rows of A and of columns of B, or of rows of B if COLUMNS.
// Warp w has rows 16 w .. 16 w + 15 of D, eight columns after eight, each as in mma.
template <bool BF16, bool COLUMNS>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], WgmmaMatrix a,
                                                 WgmmaMatrix b) {
    if constexpr (BF16) {
        static_assert(!COLUMNS, "rows");
        PYKV_WGMMA("128", 64, "bf16", "%64, %65, add, 1, 1, 0, 0", "l"(a.descriptor));
    } else if constexpr (COLUMNS) {
        PYKV_WGMMA("128", 64, "f16", "%64, %65, add, 1, 1, 0, 1", "l"(a.descriptor));
    } else {
        PYKV_WGMMA("128", 64, "f16", "%64, %65, add, 1, 1, 0, 0", "l"(a.descriptor));
    }
}

// [wgmma.mma_async] D += A B of f16, with A in registers, 16 rows of each warp as in mma, which nobody
// writes before the wait, and B 16 x 2 SUMS, SUMS = 4, 8, 16 or 32, of columns of B.
#define PYKV_WGMMA_OF_REGISTERS(columns, sums, rest)                                               \
    PYKV_WGMMA(columns, sums, "f16", rest, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))
template <int SUMS>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[SUMS], const u32 (&a)[4], WgmmaMatrix b) {
    static_assert(SUMS == 4 || SUMS == 8 || SUMS == 16 || SUMS == 32, "columns of B");
    if constexpr (SUMS == 4) {
        PYKV_WGMMA_OF_REGISTERS("8", 4, "{%4, %5, %6, %7}, %8, add, 1, 1, 0");
    } else if constexpr (SUMS == 8) {
        PYKV_WGMMA_OF_REGISTERS("16", 8, "{%8, %9, %10, %11}, %12, add, 1, 1, 0");
    } else if constexpr (SUMS == 16) {
        PYKV_WGMMA_OF_REGISTERS("32", 16, "{%16, %17, %18, %19}, %20, add, 1, 1, 0");
    } else {
        PYKV_WGMMA_OF_REGISTERS("64", 32, "{%32, %33, %34, %35}, %36, add, 1, 1, 0");
    }
}
#undef PYKV_WGMMA_OF_REGISTERS
#undef PYKV_WGMMA

// Operands of two wgmma, which stay in their registers up to here, behind wgmma_wait.
__device__ __forceinline__ void wgmma_operands(u32 (&a)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) asm volatile("" :: "r"(a[i / 4][i % 4]) : "memory");
}

// What wgmma wrote, used behind wgmma_wait alone.
template <int N> __device__ __forceinline__ void wgmma_results(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

// [mbarrier.init] A barrier in shared memory, whose phases are over when so many arrivals, and all
// bytes that they expect, have come. One thread makes it, ahead of a barrier of the block; for bulk
// copies it then calls fence_async_proxy.
__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :: "r"((u32)__cvta_generic_to_shared(barrier)), "r"(arrivals) : "memory");
}

// [mbarrier.arrive] What a thread knows that arrives, is known to whoever has waited for the phase. It
// is no branch, at which ptxas lets no wgmma go on.
__device__ __forceinline__ void mbarrier_arrive(u64* barrier, bool arrives) {
    asm volatile("{\n\t.reg .pred arrives;\n\t.reg .b64 state;\n\tsetp.ne.u32 arrives, %1, 0;\n\t"
                 "@arrives mbarrier.arrive.shared::cta.b64 state, [%0];\n\t}"
                 :: "r"((u32)__cvta_generic_to_shared(barrier)), "r"((u32)arrives) : "memory");
}

// The same; the phase waits for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expecting(u64* barrier, u32 bytes) {
    asm volatile("{\n\t.reg .b64 state;\n\t"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n\t}"
                 :: "r"((u32)__cvta_generic_to_shared(barrier)), "r"(bytes) : "memory");
}

// [cp.async.mbarrier.arrive] An arrival that comes when all cp.async of this thread so far are done.
__device__ __forceinline__ void mbarrier_arrive_behind_copies(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];"
                 :: "r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}

// [mbarrier.try_wait] Waits until the phase of that parity is over, the first one's being 0; at once
// where the one that goes on has the other parity.
__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
    u32 is_over;
    do {
        asm volatile("{\n\t.reg .pred over;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, over;\n\t}"
                     : "=r"(is_over)
                     : "r"((u32)__cvta_generic_to_shared(barrier)), "r"(parity) : "memory");
    } while (!is_over);
}

// [cp.async.bulk] Asynchronous copy of a multiple of 16 bytes, both addresses aligned to 16, which
// counts as so many bytes that a phase of `barrier` waits for. wgmma sees them without a fence.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes),
                    "r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}
#endif  // PYKV_SIMT
