// rope.cu: rotate pairs of elements of query and key heads, further at each position.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/rope.py):
//   q                 [T, HQ, D]     X_T, token stride q_stride elements, updated in place
//   k                 [T, H, D]      X_T, token stride k_stride elements, updated in place
//   positions  const  [T] int32
//   inv_freq   const  [F] float      radians per position; 2 * F <= D
// Scalars:  pair j of a head is its elements j * step and j * step + gap: step 1, gap F (half) or
//           step 2, gap 1 (adjacent)
// Defines:  X_T = float, f16 or bf16; HEADS_PER_THREAD; BLOCK = threads
// Launch:   grid (T, (HQ + H) / (HEADS_PER_THREAD * blockDim.y) rounded up), block (x, y) with
//           x * y <= BLOCK; a thread takes one pair of some heads, which share sine and cosine
// Traffic:  T * (HQ + H) * 4 * F * sizeof(X_T) bytes
// Order:    no atomics, no sums
#include "convert.cuh"
#include "rotary.cuh"

#if !defined(X_T) || !defined(HEADS_PER_THREAD) || !defined(BLOCK)
#error "rope.cu needs X_T, HEADS_PER_THREAD and BLOCK"
#endif

constexpr int HEADS = HEADS_PER_THREAD;

extern "C" __global__ void __launch_bounds__(BLOCK)
rope(X_T* __restrict__ q, X_T* __restrict__ k, const int* __restrict__ positions,
     const float* __restrict__ inv_freq, i64 q_stride, i64 k_stride, int HQ, int H, int D, int F,
     int step, int gap) {
    const i64 token = blockIdx.x;
    const double position = positions[token];
    const int first = blockIdx.y * blockDim.y * HEADS + threadIdx.y;
    for (int j = threadIdx.x; j < F; j += blockDim.x) {
        float sine, cosine;
        sin_cos(position * inv_freq[j], sine, cosine);
        X_T* pair[HEADS];
        float a[HEADS], b[HEADS];
#pragma unroll
        for (int i = 0; i < HEADS; i++) {  // all loads before the first store
            const int head = first + i * blockDim.y;
            if (head >= HQ + H) continue;
            pair[i] = head < HQ ? q + token * q_stride + (i64)head * D
                                : k + token * k_stride + (i64)(head - HQ) * D;
            pair[i] += j * step;
            a[i] = to_float(pair[i][0]);
            b[i] = to_float(pair[i][gap]);
        }
#pragma unroll
        for (int i = 0; i < HEADS; i++) {
            if (first + i * (int)blockDim.y >= HQ + H) continue;
            pair[i][0] = from_float<X_T>(a[i] * cosine - b[i] * sine);
            pair[i][gap] = from_float<X_T>(a[i] * sine + b[i] * cosine);
        }
    }
}
