// linear.cu: out = x @ w.T + bias of many tokens, weights in rows as GGUF stores them. Few tokens, and
// whatever tensor cores multiply, is of block_linear.cu.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/linear.py):
//   out               [T, O]  X_T at row stride out_stride elements, written; where `accumulate` is 1
//                     also read and added to
//   x          const  [T, I]  X_T, row stride x_stride elements, a multiple of 8
//   w          const  [O, I]  W_T, I a multiple of 8
//   bias       const  [O]     B_T, or null
//   pieces            [X_PIECES, T, I] W_T, written by `split`, see there
//   scalars           [8] float; [0] largest |x| (zero before `absmax`), [1..3] weight of each
//                     piece, [4] = 1
// Defines:  X_T, W_T, B_T = float, f16 or bf16
//           BLOCK = threads; TILE = tokens and outputs of a block; X_PIECES = 1, 2 or 3 for W_T
// Launch:   gemm     grid (ceil(O / TILE), ceil(T / TILE)), block (BLOCK)
//           add_bias, absmax, split   grid (T), block (BLOCK)
// Traffic:  gemm     ceil(T / TILE) * O * I weights and ceil(O / TILE) * T * I elements of x
//           add_bias, absmax, split   each array once
// Order:    products and sums in float, fused; the order is fixed by the launch, so two runs agree
//           in every bit. absmax uses an atomic maximum, which has no order.
#include "epilogue.cuh"
#include "reduce.cuh"
#include "vector.cuh"

#if !defined(X_T) || !defined(W_T) || !defined(B_T) || !defined(BLOCK) || !defined(TILE) || \
    !defined(X_PIECES)
#error "linear.cu needs X_T, W_T, B_T, BLOCK, TILE and X_PIECES"
#endif

// --- A tile of tokens by outputs -----------------------------------------------------------------

constexpr int DEPTH = 16;  // elements of I that shared memory holds at a time
constexpr int OWN = 4;     // tokens, and outputs, that a thread has
static_assert(BLOCK * OWN * OWN == TILE * TILE && BLOCK * 8 == 2 * TILE * DEPTH, "equal shares");

// Eight elements of row `row` of [rows, I] at column i; zeros outside.
template <typename T>
__device__ __forceinline__ void load_or_zero(float (&v)[8], const T* p, i64 stride, int row,
                                             int rows, int i, int I) {
    if (row < rows && i < I) {
        load8(v, p + row * stride + i);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
gemm(X_T* __restrict__ out, const X_T* __restrict__ x, const W_T* __restrict__ w,
     const B_T* __restrict__ bias, int T, int O, int I, i64 x_stride, i64 out_stride,
     int accumulate) {
    __shared__ __align__(16) float x_tile[DEPTH][TILE];  // transposed: a thread's tokens adjoin
    __shared__ __align__(16) float w_tile[DEPTH][TILE];
    const int t0 = blockIdx.y * TILE;
    const int o0 = blockIdx.x * TILE;

    // Half of the threads carry x, half carry w, eight elements each.
    const bool carries_x = threadIdx.x < BLOCK / 2;
    const int row = threadIdx.x % (BLOCK / 2) / 2;
    const int column = threadIdx.x % 2 * 8;
    float (*const tile)[TILE] = carries_x ? x_tile : w_tile;

    const int own_t = threadIdx.x / (TILE / OWN) * OWN;
    const int own_o = threadIdx.x % (TILE / OWN) * OWN;
    float sums[OWN][OWN] = {};

    float next[8];
    for (int i0 = -DEPTH; i0 < I; i0 += DEPTH) {
        if (i0 >= 0) {
            __syncthreads();  // all have read the previous tile
#pragma unroll
            for (int j = 0; j < 8; j++) tile[column + j][row] = next[j];
            __syncthreads();
        }
        const int i = i0 + DEPTH + column;  // prefetch: loaded while this tile is multiplied
        if (carries_x) {
            load_or_zero(next, x, x_stride, t0 + row, T, i, I);
        } else {
            load_or_zero(next, w, I, o0 + row, O, i, I);
        }
        if (i0 < 0) continue;
        float part[OWN][OWN] = {};  // a sum of sums errs less than one long sum
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            const float4 a = *reinterpret_cast<const float4*>(&x_tile[k][own_t]);
            const float4 b = *reinterpret_cast<const float4*>(&w_tile[k][own_o]);
            const float values[OWN] = {a.x, a.y, a.z, a.w};
            const float weights[OWN] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int t = 0; t < OWN; t++) {
#pragma unroll
                for (int o = 0; o < OWN; o++) part[t][o] = fmaf(values[t], weights[o], part[t][o]);
            }
        }
#pragma unroll
        for (int t = 0; t < OWN; t++) {
#pragma unroll
            for (int o = 0; o < OWN; o++) sums[t][o] += part[t][o];
        }
    }

#pragma unroll
    for (int t = 0; t < OWN; t++) {
#pragma unroll
        for (int o = 0; o < OWN; o++) {
            const int token = t0 + own_t + t, output = o0 + own_o + o;
            if (token < T && output < O) {
                finish(out + token * out_stride + output, sums[t][o], bias, output, accumulate);
            }
        }
    }
}

// --- Around a library product --------------------------------------------------------------------

// out = bias, or out += bias.
extern "C" __global__ void __launch_bounds__(BLOCK)
add_bias(X_T* __restrict__ out, const B_T* __restrict__ bias, int O, i64 out_stride,
         int accumulate) {
    X_T* row = out + blockIdx.x * out_stride;
    for (int o = threadIdx.x; o < O; o += BLOCK) finish(row + o, 0.0f, bias, o, accumulate);
}

// `split` writes x as a weighted sum of X_PIECES matrices of the type of the weights, which tensor
// cores multiply: x = scalars[1] * pieces[0] + scalars[2] * pieces[1] + ... First x is scaled by a
// power of two that brings the largest finite |x| to 2^14 .. 2^15. Each piece is the rest rounded,
// and the next rest is scaled by STEP, the inverse of the rounding error, so all pieces have the
// same range. Two f16 pieces keep 22 bits, three bf16 pieces all 24, of every element down to 2^-28
// of the largest; smaller ones keep an absolute error under 2^-50 of the largest.
template <typename T> constexpr float STEP = 1.0f;
template <> constexpr float STEP<f16> = 2048.0f;  // 11 significant bits
template <> constexpr float STEP<bf16> = 256.0f;  // 8 significant bits

extern "C" __global__ void __launch_bounds__(BLOCK)
absmax(float* __restrict__ scalars, const X_T* __restrict__ x, int I, i64 x_stride) {
    __shared__ float scratch[BLOCK / WARP];
    const X_T* row = x + blockIdx.x * x_stride;
    float largest = 0.0f;
    for (int i = threadIdx.x * 8; i < I; i += BLOCK * 8) {
        float values[8];
        load8(values, row + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float size = fabsf(values[j]);
            if (size < INF) largest = fmaxf(largest, size);  // NaN and infinity set no scale
        }
    }
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = largest;
    __syncthreads();
    if (threadIdx.x > 0) return;
#pragma unroll
    for (int warp = 0; warp < BLOCK / WARP; warp++) largest = fmaxf(largest, scratch[warp]);
    // Floats that are not negative are ordered like their bits.
    atomicMax(reinterpret_cast<u32*>(scalars), __float_as_uint(largest));
}

extern "C" __global__ void __launch_bounds__(BLOCK)
split(W_T* __restrict__ pieces, float* __restrict__ scalars, const X_T* __restrict__ x, int T,
      int I, i64 x_stride) {
    // Exponents as float stores them, 127 for 1.0; the bound keeps every weight a normal number.
    const int exponent = max((int)(__float_as_uint(scalars[0]) >> 23), 40);
    const float scale = __uint_as_float((u32)(127 + 141 - exponent) << 23);

    const X_T* row = x + blockIdx.x * x_stride;
    for (int i = threadIdx.x * 8; i < I; i += BLOCK * 8) {
        float rest[8];
        load8(rest, row + i);
#pragma unroll
        for (int j = 0; j < 8; j++) rest[j] *= scale;
#pragma unroll
        for (int piece = 0; piece < X_PIECES; piece++) {
            store8(pieces + ((i64)piece * T + blockIdx.x) * I + i, rest);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float rounded = to_float(from_float<W_T>(rest[j]));
                rest[j] = fabsf(rounded) < INF ? (rest[j] - rounded) * STEP<W_T> : 0.0f;
            }
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        float weight = __uint_as_float((u32)(127 - 141 + exponent) << 23);
#pragma unroll
        for (int piece = 0; piece < 3; piece++) {
            scalars[1 + piece] = weight;
            weight /= STEP<W_T>;
        }
        scalars[4] = 1.0f;
    }
}
