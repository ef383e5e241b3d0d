// kvtc_blocks.cu: rows of float32 from blocks that lie anywhere, less their mean, and back.
//
// Kernels: gather   x = blocks - mean
//          scatter  blocks = x + mean
// Arrays (letters as in pykv/ops/kvtc_blocks.py):
//   x           [N, F] float, rows `x_stride` elements apart
//   blocks      the first of N blocks of BLOCK_T, of any alignment, where addresses is null
//   addresses   const  [K] u64 or null: of every `run`-th block, in device or pinned host memory
//   mean        const  [F] float
// Scalars:  run: blocks that lie block_stride bytes apart each; pieces: of PER_BLOCK features
// Defines:  BLOCK_T = f16, bf16, float or double; BLOCK = threads; ROWS = blocks that share a mean
// Launch:   grid (pieces * ceil(N / ROWS)), block (BLOCK), no shared memory
// Traffic:  N * F * (sizeof(BLOCK_T) + 4) bytes, read or written once; 4 * F from L2 for each ROWS
//           blocks. Threads move 16 bytes of a block where F, addresses and strides allow, else
//           elements.
// Order:    no sums; one rounding of a difference or a sum in float, and one to BLOCK_T
#include "convert.cuh"

#if !defined(BLOCK_T) || !defined(BLOCK) || !defined(ROWS)
#error "kvtc_blocks.cu needs BLOCK_T, BLOCK and ROWS"
#endif
using T = BLOCK_T;
constexpr int WIDE = 16 / sizeof(T);  // elements of a vector
constexpr int PER_BLOCK = BLOCK * 8;  // features

__device__ __forceinline__ float to_float(double x) { return (float)x; }
template <> __device__ __forceinline__ double from_float<double>(float x) { return x; }

struct Blocks {
    const T* first;
    const u64* addresses;
    i64 stride;
    int run;
    __device__ T* at(u32 n) const {
        const u32 nth = n / (u32)run;
        const u64 base = addresses ? addresses[nth] : (u64)first;
        return (T*)(base + (u64)((n - nth * (u32)run) * stride));
    }
};

// V neighbouring elements, aligned to V of T where V is WIDE.
template <int V> struct alignas(V * sizeof(T)) Elements { T of[V]; };

template <int V> __device__ __forceinline__ void load(float (&to)[V], const float* from) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const float4 four = *(const float4*)(from + i);
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = from[i];
    }
}

template <int V> __device__ __forceinline__ void store(float* to, const float (&from)[V]) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            *(float4*)(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = from[i];
    }
}

// Some features of some blocks, V to a thread.
template <int V, bool GATHER>
__device__ __forceinline__ void move(float* x, i64 x_stride, const Blocks& blocks,
                                     const float* mean, u32 begin, u32 end, int first, int last) {
    for (int f = first + threadIdx.x * V; f < last; f += BLOCK * V) {
        float center[V];
        load(center, mean + f);
#pragma unroll 2
        for (u32 n = begin; n < end; n++) {
            Elements<V>* block = (Elements<V>*)(blocks.at(n) + f);
            float* row = x + n * x_stride + f;
            float y[V];
            if (GATHER) {
                const Elements<V> given = *block;
#pragma unroll
                for (int i = 0; i < V; i++) y[i] = to_float(given.of[i]) - center[i];
                store(row, y);
            } else {
                load(y, row);
                Elements<V> made;
#pragma unroll
                for (int i = 0; i < V; i++) made.of[i] = from_float<T>(y[i] + center[i]);
                *block = made;
            }
        }
    }
}

template <bool GATHER>
__device__ __forceinline__ void move_piece(float* x, i64 x_stride, const Blocks& blocks,
                                           const float* mean, int N, int F, int pieces) {
    const u32 begin = blockIdx.x / pieces * ROWS, end = min(begin + ROWS, (u32)N);
    const int first = (int)(blockIdx.x % pieces) * PER_BLOCK, last = min(first + PER_BLOCK, F);
    u64 bits = (u64)x | (u64)mean | (u64)(x_stride * sizeof(float)) | (u64)F * sizeof(T);
    for (u32 n = begin; n < end; n++) bits |= (u64)blocks.at(n);
    if (bits % 16 == 0) move<WIDE, GATHER>(x, x_stride, blocks, mean, begin, end, first, last);
    else move<1, GATHER>(x, x_stride, blocks, mean, begin, end, first, last);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
gather(float* __restrict__ x, const BLOCK_T* __restrict__ blocks, const u64* __restrict__ addresses,
       const float* __restrict__ mean, int N, int F, i64 x_stride, i64 block_stride, int run,
       int pieces) {
    const Blocks from{blocks, addresses, block_stride, run};
    move_piece<true>(x, x_stride, from, mean, N, F, pieces);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
scatter(BLOCK_T* __restrict__ blocks, const u64* __restrict__ addresses,
        const float* __restrict__ x, const float* __restrict__ mean, int N, int F, i64 x_stride,
        i64 block_stride, int run, int pieces) {
    const Blocks to{blocks, addresses, block_stride, run};
    move_piece<false>(const_cast<float*>(x), x_stride, to, mean, N, F, pieces);
}
