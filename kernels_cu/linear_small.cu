// linear_small.cu: out = x @ w.T + bias for few tokens and small matrices, or gated pairs of these, in
// one launch on tensor cores: each block normalises and rounds its tokens itself.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/linear_small.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to
//   x          const  [T, I]  X_T at row stride x_stride; base and rows 16-byte aligned
//   w          const  [R, W] u8  rows of planes of KIND (pykv/planes.py), or of floats, 16-byte
//                     aligned; R = O, or with a gate 2 * O: gates, then what they open
//   bias       const  [R]     B_T, or null
//   norm       const  [I] float or null, 16-byte aligned: x is x / sqrt(mean(x^2) + eps) * norm, row
//                     by row
// Scalars:  gate = 0, or of gate.cuh 1 or 2
// Defines:  KIND = a kind of planes.cuh, f16 or bf16; X_T, B_T = float, f16 or bf16. From sm_75 on;
//           below it does nothing
// Launch:   grid (ceil(R / 16), ceil(T / 8)), block (a warp for each 128 elements of a row, 64 to 512
//           threads), 2048 bytes of dynamic shared memory for each warp. It may start early: before the
//           kernel ahead has ended it reads w, bias and norm alone. Nothing is __restrict__, so that
//           every load stays on its side of the wait
// Traffic:  weights for each 8 tokens, and x for each 16 rows of w, most from L2
// Order:    x and elements of blocks rounded to f16, products exact, sums of 128 elements on tensor
//           cores, which truncate them; of these in float, one after the other. Two runs agree in every
//           bit, and a token's results do not depend on the others
#include "gate.cuh"
#include "mma_weights.cuh"
#include "reduce.cuh"
#include "split.cuh"
#include "vector.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T)
#error "linear_small.cu needs KIND, X_T and B_T"
#endif

#if __CUDA_ARCH__ >= 750
using W = Weights<KIND, false>;
using M = W::M;
constexpr int TOKENS = 8;          // of a block
constexpr int DEPTH = 128;         // elements of a row of a warp, four of a lane
constexpr int MOST_WARPS = 16;
constexpr int UNITS = DEPTH / (32 * W::SUBS);
constexpr int PITCH = DEPTH * 2;   // bytes of a token of a warp
constexpr int PARTS_PITCH = TOKENS + 1;

// Where a chunk of 16 bytes of a token lies, its elements in the order of weights' operands: chunk 4 *
// n + t holds those that lane t of four multiplies in steps 2 * n and 2 * n + 1 of mma. Every other
// token has its chunks in other banks.
__device__ __forceinline__ int place_of(int token, int chunk) {
    return token * PITCH + (chunk ^ token % 2 * 4) * 16;
}

// A token's largest finite magnitude, times norm, and the sum of its squares.
struct Extent { float largest, squares; };

// Those of the elements of a warp: lane l has token l % TOKENS.
__device__ __forceinline__ Extent extent_of(const float (&x)[TOKENS][4], const float (&norm)[4]) {
    float largest[TOKENS] = {}, squares[TOKENS] = {};
#pragma unroll
    for (int n = 0; n < TOKENS; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            squares[n] = fmaf(x[n][j], x[n][j], squares[n]);
            const float size = fabsf(x[n][j] * norm[j]);
            if (is_finite(size)) largest[n] = fmaxf(largest[n], size);
        }
    }
    fold<TOKENS / 2>(largest, [](float a, float b) { return fmaxf(a, b); });
    return {group_max<WARP, TOKENS>(largest[0]), warp_sums(squares)};
}

// A warp's products of its elements of all tokens, rows g and g + 8 of w.
__device__ __forceinline__ void multiply(float (&sums)[4], W (&w)[UNITS][2], const u8* tokens,
                                         int first, int I) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
#pragma unroll
        for (int r = 0; r < 2; r++) w[u][r].begin(first + u, I, t);
#pragma unroll
        for (int sub = 0; sub < W::SUBS; sub++) {
            u32 a[2][2][2];  // indexed by row, step, pair
#pragma unroll
            for (int r = 0; r < 2; r++) w[u][r].pairs(a[r], sub);
            const int chunk = (u * W::SUBS + sub) * 4 + t;
            const uint4 b = *reinterpret_cast<const uint4*>(tokens + place_of(g, chunk));
            mma_16x16<M>(sums, a[0][0][0], a[1][0][0], a[0][0][1], a[1][0][1], b.x, b.y);
            mma_16x16<M>(sums, a[0][1][0], a[1][1][0], a[0][1][1], a[1][1][1], b.z, b.w);
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(512)
linear_small(X_T* out, const X_T* x, const u8* w, const B_T* bias, const float* norm, int T, int O,
             int I, i64 w_stride, i64 x_stride, i64 out_stride, int accumulate, int gate, float eps) {
#if __CUDA_ARCH__ >= 750
    extern __shared__ __align__(128) u8 shared[];
    __shared__ Extent extents[MOST_WARPS][TOKENS];
    __shared__ float units[TOKENS];
    let_next_start();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int o0 = blockIdx.x * (gate ? 8 : 16), t0 = blockIdx.y * TOKENS;
    u8* const own = shared + warp * (TOKENS * PITCH);
    // Row r of 16 of w: with a gate 8 gates, then what they open. Past the last output that one again,
    // whose sums are dropped.
    const auto row_of = [&](int r) {
        return gate ? min(o0 + r % 8, O - 1) + (r < 8 ? 0 : O) : min(o0 + r, O - 1);
    };

    W weights[UNITS][2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const u8* const row = w + row_of(lane / 4 + r * 8) * w_stride;
#pragma unroll
        for (int u = 0; u < UNITS; u++) weights[u][r].load(row, warp * UNITS + u, I, lane % 4);
    }
    // A lane's four elements of all tokens.
    const int i = warp * DEPTH + lane * 4;
    const X_T* from = opaque_pointer(x + t0 * x_stride + i);
    float factors[4] = {1.0f, 1.0f, 1.0f, 1.0f}, values[TOKENS][4] = {};
    if (norm && i < I) load4(factors, norm + i);
    // A thread's token and outputs o and o + 8, or with a gate o alone, of the first 64 threads.
    const int token = t0 + threadIdx.x / 8, o = o0 + threadIdx.x % 8;
    const bool has_outputs = threadIdx.x < TOKENS * 8 && token < T && o < O;
    const bool has_second = has_outputs && !gate && o + 8 < O;
    X_T* const to = out + token * out_stride + o;
    float addends[2] = {}, there[2] = {};
    if (bias && has_outputs) {
#pragma unroll
        for (int h = 0; h < 2; h++) addends[h] = to_float(bias[row_of(threadIdx.x % 8 + h * 8)]);
    }

    await_previous();
    if (i < I) {
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            load4(values[n], from);
            if (t0 + n + 1 < T) from += x_stride;  // past the last token that one again
        }
    }
    if (accumulate && has_outputs) there[0] = to_float(to[0]);
    if (accumulate && has_second) there[1] = to_float(to[8]);

    const Extent of_warp = extent_of(values, factors);
    if (lane < TOKENS) extents[warp][lane] = of_warp;
    __syncthreads();
    float largest = 0.0f, squares = 0.0f;  // of token lane % TOKENS
    for (int p = 0; p < warps; p++) {
        const Extent one = extents[p][lane % TOKENS];
        largest = fmaxf(largest, one.largest), squares += one.squares;
    }
    const float factor = norm ? 1.0f / sqrtf(squares / (float)I + eps) : 1.0f;
    const PowerOfTwo power(largest * factor);
    if (threadIdx.x < TOKENS) units[lane] = power.inverse;

    constexpr int OF_UNIT = 8 * W::SUBS;  // lanes whose elements a unit has, OF_UNIT / 4 of lane t
    const int step = lane / OF_UNIT * (2 * W::SUBS) + lane % (2 * W::SUBS);
    const int chunk = step / 2 * 4 + lane % OF_UNIT / (OF_UNIT / 4);
#pragma unroll
    for (int n = 0; n < TOKENS; n++) {
        const float factor_of = __shfl_sync(FULL_MASK, factor, n);
        const float power_of = __shfl_sync(FULL_MASK, power.value, n);
#pragma unroll
        for (int j = 0; j < 4; j++) values[n][j] = values[n][j] * (factor_of * factors[j]) * power_of;
        *reinterpret_cast<uint2*>(own + place_of(n, chunk) + step % 2 * 8) =
            split_four<M, W::IS_EVEN_FIRST ? 2 : 1>(values[n]);
    }
    __syncwarp();
    float sums[4] = {};
    multiply(sums, weights, own, warp * UNITS, I);
    __syncwarp();  // all have read the tokens, whose place the sums take
    float2* const parts = reinterpret_cast<float2*>(own) + lane / 4 * PARTS_PITCH + lane % 4 * 2;
    parts[0] = float2{sums[0], sums[2]};
    parts[1] = float2{sums[1], sums[3]};
    __syncthreads();

    if (!has_outputs) return;
    float first = 0.0f, second = 0.0f;
    for (int p = 0; p < warps; p++) {
        const float2* const of_warp = reinterpret_cast<const float2*>(shared + p * (TOKENS * PITCH));
        const float2 two = of_warp[threadIdx.x % 8 * PARTS_PITCH + threadIdx.x / 8];
        first += two.x, second += two.y;
    }
    const float unit = units[threadIdx.x / 8];
    first = first * unit + addends[0], second = second * unit + addends[1];
    if (gate) first = gated(gate, first, second);
    to[0] = from_float<X_T>(first + there[0]);
    if (has_second) to[8] = from_float<X_T>(second + there[1]);
#endif
}
