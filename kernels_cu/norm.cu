// norm.cu: root-mean-square norm of rows.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/norm.py):
//   out            [T, H, D]  X_T, token stride out_stride elements; may be x itself
//   x       const  [T, H, D]  X_T, token stride x_stride elements
//   weight  const  [D]        W_T
// Scalars:  rows = T * H; out = x / sqrt(mean(x^2) + eps) * (weight + offset)
// Defines:  X_T, W_T = float, f16 or bf16; BLOCK = threads
// Launch:   block (BLOCK); rms_norm: grid (rows), a block for each row; rms_norm_warp: grid (rows
//           over warps of a block, rounded up), a warp for each row. Where D % 8 == 0, rows are
//           16-byte aligned. Both may start early, hence no array is __restrict__
// Traffic:  rows * D * 2 * sizeof(X_T) bytes; the second reading of a row hits a cache
// Order:    no atomics; float sums, in an order that D and the alignment of weight decide
#include "ptx.cuh"
#include "reduce.cuh"
#include "vector.cuh"

#if !defined(X_T) || !defined(W_T) || !defined(BLOCK)
#error "norm.cu needs X_T, W_T and BLOCK"
#endif

struct Warp {
    static constexpr int SIZE = WARP;
    int thread;
    __device__ float sum(float x) const { return group_sum<WARP>(x); }
};

struct Block {
    static constexpr int SIZE = BLOCK;
    int thread;
    float* scratch;
    __device__ float sum(float x) const { return block_sum<BLOCK>(x, scratch); }
};

// Every thread writes the elements that it has read, so out may be x.
template <typename Team>
__device__ __forceinline__ void norm_row(const Team& team, X_T* out, const X_T* x,
                                         const W_T* weight, int D, float eps,
                                         float offset) {
    const bool wide = D % 8 == 0 && reinterpret_cast<u64>(weight) % 16 == 0;
    float squares = 0.0f;
    if (wide) {
        for (int i = team.thread * 8; i < D; i += Team::SIZE * 8) {
            float v[8];
            load8(v, x + i);
#pragma unroll
            for (int j = 0; j < 8; j++) squares += v[j] * v[j];
        }
    } else {
        for (int i = team.thread; i < D; i += Team::SIZE) {
            const float v = to_float(x[i]);
            squares += v * v;
        }
    }
    const float scale = 1.0f / sqrtf(team.sum(squares) / (float)D + eps);
    if (wide) {
        for (int i = team.thread * 8; i < D; i += Team::SIZE * 8) {
            float v[8], w[8];
            load8(v, x + i);
            load8(w, weight + i);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] *= scale * (w[j] + offset);
            store8(out + i, v);
        }
    } else {
        for (int i = team.thread; i < D; i += Team::SIZE) {
            const float w = to_float(weight[i]) + offset;
            out[i] = from_float<X_T>(to_float(x[i]) * (scale * w));
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
rms_norm(X_T* out, const X_T* x, const W_T* weight, i64 out_stride, i64 x_stride,
         int rows, int H, int D, float eps, float offset) {
    __shared__ float scratch[BLOCK / WARP];
    let_next_start();
    await_previous();
    const int token = blockIdx.x / H, head = blockIdx.x % H;
    norm_row(Block{(int)threadIdx.x, scratch}, out + token * out_stride + (i64)head * D,
             x + token * x_stride + (i64)head * D, weight, D, eps, offset);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
rms_norm_warp(X_T* out, const X_T* x, const W_T* weight, i64 out_stride, i64 x_stride,
              int rows, int H, int D, float eps, float offset) {
    let_next_start();
    await_previous();
    const int row = blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;  // all lanes of a warp alike
    const int token = row / H, head = row % H;
    norm_row(Warp{(int)threadIdx.x % WARP}, out + token * out_stride + (i64)head * D,
             x + token * x_stride + (i64)head * D, weight, D, eps, offset);
}
