// linear_split.cu: rows of activations as 16-bit numbers, in the order of weights' operands; in front
// of linear_mma.cu, linear_tiles.cu and linear_wgmma.cu.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/linear_split.py):
//   pieces            [PIECES, T', I'] HALF_T, T' >= T, I' >= I a multiple of 16; x times a power of
//                     two for each token, as the sum of its pieces; zeros outside. With a `tile` of
//                     tokens, a multiple of 8, whose T' and I' are multiples of tile and 64, they are
//                     [PIECES, T' / tile, I' / 64, tile, 64], whose chunks of 8 elements are permuted
//                     as wgmma reads them: chunk c of token t stands at c ^ t % 8
//   totals            [T', I' / 16] float  sums of 16 elements of x times that power, in the order of
//                     pieces; only with TOTALS
//   units             [T'] float  one over that power
//   counters          [num_counters] u32, which become zeros: a product's, which follows
//   x          const  [T, I]  X_T at row stride x_stride; base and rows 16-byte aligned
//   norm       const  [I] float or null, 16-byte aligned: x is x / sqrt(mean(x^2) + eps) * norm, row
//                     by row
// Defines:  X_T = float, f16 or bf16; HALF_T = f16 or bf16; PIECES; OWN = elements of x that a lane
//           multiplies one after the other, 4, 8 or 32 (mma_weights.cuh), or 0: the order of x;
//           EVEN_FIRST = 1 where pairs are of elements 0 and 2, and 1 and 3, of each four, else 0;
//           TOTALS = 1 or 0; BLOCK = threads. From sm_75 on; below it does nothing
// Launch:   grid (T'), block (BLOCK); it may start early
// Traffic:  T * I elements of x, twice, once from L1; PIECES * T' * I' * 2 bytes written
// Order:    squares by threads, lanes and warps, the same in every run; a row does not depend on others
#include "reduce.cuh"
#include "split.cuh"
#include "vector.cuh"

#if !defined(X_T) || !defined(HALF_T) || !defined(PIECES) || !defined(OWN) || !defined(EVEN_FIRST) || \
    !defined(TOTALS) || !defined(BLOCK)
#error "linear_split.cu needs X_T, HALF_T, PIECES, OWN, EVEN_FIRST, TOTALS and BLOCK"
#endif

constexpr int WARPS = BLOCK / WARP;

// The first of four elements of x that stand at lane `lane` of the 16 places from p on: slots 2t,
// 2t + 1, then 2t + 8, 2t + 9 of an mma are four elements that follow each other.
__device__ __forceinline__ int element(int p, int lane) {
    constexpr int SPAN = OWN ? 4 * OWN : 16;  // elements of four lanes
    return OWN ? p / SPAN * SPAN + lane * OWN + p % SPAN / 4 : p + 4 * lane;
}

// Where element p of token t stands, p a multiple of 8.
__device__ __forceinline__ i64 start_of(i64 t, int p, int padded_I, int tile) {
    if (tile == 0) return t * padded_I + p;
    return t / tile * tile * padded_I + ((i64)(p / 64) * tile + t % tile) * 64 + (p % 64 / 8 ^ t % 8) * 8;
}

// The largest finite magnitude of a row, and its sum of squares, as all threads have them.
__device__ __forceinline__ void reduce_row(float& largest, float& squares, const X_T* row,
                                           const float* norm, int I) {
    __shared__ float scratch[2][WARPS];
    largest = squares = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x * 4; i < I; i += BLOCK * 4) {
        float v[4], w[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        load4(v, row + i);
        if (norm) load4(w, norm + i);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            squares = fmaf(v[j], v[j], squares);
            const float size = fabsf(v[j] * w[j]);
            if (is_finite(size)) largest = fmaxf(largest, size);  // NaN and infinities set no power
        }
    }
    largest = warp_max(largest);
    squares = group_sum<WARP>(squares);
    if (threadIdx.x % WARP == 0) {
        scratch[0][threadIdx.x / WARP] = largest;
        scratch[1][threadIdx.x / WARP] = squares;
    }
    __syncthreads();
    squares = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        largest = fmaxf(largest, scratch[0][i]);
        squares += scratch[1][i];
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
split(HALF_T* pieces, float* totals, float* units, u32* counters, const X_T* x, const float* norm,
      int T, int I, int padded_I, i64 x_stride, int num_counters, float eps, int tile) {
#if __CUDA_ARCH__ >= 750
    let_next_start();
    await_previous();
    const i64 t = blockIdx.x;
    for (int i = blockIdx.x * BLOCK + threadIdx.x; i < num_counters; i += gridDim.x * BLOCK) {
        counters[i] = 0;
    }
    const X_T* row = x + t * x_stride;
    float largest, squares;
    reduce_row(largest, squares, row, norm, t < T ? I : 0);
    const float factor = norm ? 1.0f / sqrtf(squares / (float)I + eps) : 1.0f;
    largest *= factor;
    const PowerOfTwo power(largest);
    if (threadIdx.x == 0) units[t] = power.inverse;

    const i64 piece = (i64)gridDim.x * padded_I;  // elements
    for (int p = threadIdx.x * 16; p < padded_I; p += BLOCK * 16) {
        float total = 0.0f;
        u32 words[PIECES][8];
#pragma unroll
        for (int lane = 0; lane < 4; lane++) {
            const int i = element(p, lane);
            float v[4] = {}, w[4] = {1.0f, 1.0f, 1.0f, 1.0f};
            if (t < T && i < I) {
                load4(v, row + i);
                if (norm) load4(w, norm + i);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = v[j] * (factor * w[j]) * power.value;
            total += (v[0] + v[1]) + (v[2] + v[3]);
#pragma unroll
            for (int n = 0; n < PIECES; n++) {
                const uint2 pairs = split_four<HALF_T, EVEN_FIRST ? 2 : 1>(v);
                words[n][OWN ? lane : 2 * lane] = pairs.x;
                words[n][OWN ? lane + 4 : 2 * lane + 1] = pairs.y;
            }
        }
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
            uint4* to = reinterpret_cast<uint4*>(pieces + n * piece + start_of(t, p, padded_I, tile));
            const int second = tile && t % 2 ? -1 : 1;  // places from the first chunk on
            to[0] = uint4{words[n][0], words[n][1], words[n][2], words[n][3]};
            to[second] = uint4{words[n][4], words[n][5], words[n][6], words[n][7]};
        }
        if (TOTALS) totals[(t * padded_I + p) / 16] = total;
    }
#endif
}
