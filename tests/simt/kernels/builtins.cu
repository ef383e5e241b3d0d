// builtins.cu: CUDA's built-in functions, one row of results each.
//
// Arrays:   out [rows, 64] u32, as BUILTINS of tests/simt/test_builtins.py names the rows;
//           cells [16] u32, in place; in const [64] u32
// Launch:   warps, integers, floats: grid (1), block (64); counters: grid (2), block (64);
//           memories: grid (1), block (64), 512 bytes of dynamic shared memory
// Order:    atomics on integers, exact in any order
#include "types.cuh"

extern "C" __global__ void warps(u32* out, const u32* in) {
    const int t = threadIdx.x, lane = t % WARP;
    const u32 x = in[t];
    u32* row = out + t;
    *row = __shfl_sync(FULL_MASK, x, lane * 7 % 32), row += 64;
    *row = __shfl_sync(FULL_MASK, x, 11, 8), row += 64;
    *row = __shfl_up_sync(FULL_MASK, x, 3), row += 64;
    *row = __shfl_up_sync(FULL_MASK, x, 3, 8), row += 64;
    *row = __shfl_down_sync(FULL_MASK, x, 5), row += 64;
    *row = __shfl_down_sync(FULL_MASK, x, 5, 16), row += 64;
    *row = __shfl_xor_sync(FULL_MASK, x, 9), row += 64;
    *row = __shfl_xor_sync(FULL_MASK, x, 12, 16), row += 64;
    *row = (u32)(__shfl_xor_sync(FULL_MASK, (u64)x << 20, 1) >> 20), row += 64;
    *row = __float_as_uint(__shfl_xor_sync(FULL_MASK, __uint_as_float(x), 1)), row += 64;
    *row = __ballot_sync(FULL_MASK, x & 1), row += 64;
    *row = __any_sync(FULL_MASK, x == in[40]), row += 64;
    *row = __all_sync(FULL_MASK, x >= in[t / 32 * 32]), row += 64;
    *row = __match_any_sync(FULL_MASK, x % 5), row += 64;
    int all;
    *row = __match_all_sync(FULL_MASK, t / 32 ? x : 7, &all) >> 1, row += 64;
    *row = all, row += 64;
    if (lane < 16) *row = __shfl_xor_sync(0xffffu, x, 1);
    else *row = __shfl_xor_sync(0xffff0000u, x, 2);
    row += 64;
    *row = 0;
    if (lane < 8) *row = __activemask();
    __syncwarp();
    row += 64;
    *row = __syncthreads_count(x & 1), row += 64;
    *row = __syncthreads_or(t == 63) + 2 * __syncthreads_or(t == 64), row += 64;
    *row = __syncthreads_and(t < 64) + 2 * __syncthreads_and(t < 63), row += 64;
    *row = gridDim.x * 1000000 + blockDim.x * 1000 + warpSize, row += 64;
#if __CUDA_ARCH__ >= 800
    row[0] = __reduce_add_sync(FULL_MASK, x);
    row[64] = __reduce_min_sync(FULL_MASK, x);
    row[128] = __reduce_max_sync(FULL_MASK, (int)x);
    row[192] = __reduce_and_sync(FULL_MASK, x | 1u);
    row[256] = __reduce_or_sync(FULL_MASK, x);
    row[320] = __reduce_xor_sync(FULL_MASK, x);
#endif
}

extern "C" __global__ void integers(u32* out, const u32* in) {
    const int t = threadIdx.x;
    const u32 x = in[t], y = in[63 - t];
    const u64 wide = (u64)x << 32 | y;
    const u32 results[] = {
        (u32)__popc(x), (u32)__popcll(wide),
        (u32)__clz((int)(x >> t % 32)), (u32)__clzll(wide >> t),
        (u32)__ffs((int)(x << t % 32)), (u32)__ffsll((i64)(wide << t)), __brev(x),
        __byte_perm(x, y, 0x7250), __byte_perm(x, y, 0x8c3f), __umulhi(x, y),
        (u32)__mulhi((int)x, (int)y), (u32)__umul64hi(wide, wide ^ 0xabcdef0123456789ull),
        (u32)min((int)x, (int)y), max(x, y), (u32)(max((i64)x - y, (i64)0) >> 1),
        __ldg(in + 63 - t)};
#pragma unroll
    for (int i = 0; i < 16; i++) out[64 * i + t] = results[i];
}

extern "C" __global__ void floats(float* out, const float* in) {
    const int t = threadIdx.x;
    const float x = in[t], y = in[63 - t];
    const float results[] = {
        __fadd_rn(x, y), __fsub_rn(x, y), __fmul_rn(x, y), __fmaf_rn(x, y, x), __fdiv_rn(x, y),
        __fsqrt_rn(fabsf(x)), fminf(x, y), fmaxf(x, y), (float)__float2int_rn(x),
        __int_as_float(__float_as_int(x) ^ 1), __saturatef(x * 0.001f),
        __saturatef(x + INF - INF)};
#pragma unroll
    for (int i = 0; i < 12; i++) out[64 * i + t] = results[i];
}

__constant__ u32 primes[4] = {2, 3, 5, 7};

// Constant, static and dynamic shared memory, and a fence.
extern "C" __global__ void memories(u32* out, const u32* in) {
    __shared__ u32 fixed[64];
    extern __shared__ __align__(16) uint2 asked[];
    const int t = threadIdx.x;
    fixed[t] = in[t];
    asked[t] = make_uint2(in[t], primes[t % 4]);
    __threadfence_block();
    __syncthreads();
    const uint2 other = asked[63 - t];
    out[t] = fixed[t ^ 32] + other.x * other.y;
}

// Every thread of both blocks, on integers: whatever the order, the cells end alike.
extern "C" __global__ void counters(u32* cells, const u32* in) {
    const u32 x = in[threadIdx.x] + blockIdx.x;
    atomicAdd(cells + 0, x);
    atomicAdd((int*)cells + 1, -(int)(x % 100));
    atomicSub(cells + 2, x);
    atomicMin(cells + 3, x);
    atomicMax(cells + 4, x);
    atomicMin((int*)cells + 5, (int)x);
    atomicMax((int*)cells + 6, (int)x);
    atomicAnd(cells + 7, x | 0xff);
    atomicOr(cells + 8, x & 0xff00);
    atomicXor(cells + 9, x);
    atomicInc(cells + 10, 99);
    atomicDec(cells + 11, 99);
    atomicAdd((u64*)(cells + 12), (u64)x << 16);
    for (u32 old = cells[15], seen = old + 1; seen != old;) {  // a counter by compare and swap
        seen = old;
        old = atomicCAS(cells + 14, seen, seen + 1);
    }
}
