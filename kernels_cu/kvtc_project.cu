// kvtc_project.cu: rows of K and V times their bases, and coefficients back to rows.
//
//   forward  out[t, c] = sum over f of x[t, f] * w[f, c]    I = F features in, O = C components out
//   BACK     out[t, f] = sum over c of x[t, c] * w[f, c]    I = C components in, O = F features out
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/kvtc_project.py):
//   k_out, v_out           [T, O]  X_T
//   k_x, v_x        const  [T, I]  f16
//   k_w, v_w        const  [F, C]  f16, row stride k_stride or v_stride, a multiple of 8
// Scalars:  T; k_in, v_in = I and k_out_size, v_out_size = O of K and of V, multiples of 8
// Defines:  X_T = float or f16; BACK = 0 or 1; TILE_T and TILE_O = tokens and outputs of a block;
//           BLOCK = threads; WARPS_T = warps along the tokens; STAGES of operands in shared memory,
//           on tensor cores, from sm_75 on; 0: on CUDA cores, where both tiles are 64 and BLOCK is
//           256; SHARED_BYTES
// Launch:   grid (ceil(T / TILE_T), ceil(max O / TILE_O), 2), block (BLOCK); z: K, V; SHARED_BYTES
//           of dynamic shared memory. Blocks that follow each other share w
// Traffic:  w ceil(T / TILE_T) times and x ceil(O / TILE_O) times, mostly from L2
// Order:    no atomics; products exact, sums in float, the order fixed by the launch
// Stack: 24 bytes, of the tiles of 64 x 64 of a warp by mma; wgmma needs none
#include "vector.cuh"

#if !defined(X_T) || !defined(BACK) || !defined(TILE_T) || !defined(TILE_O) || !defined(BLOCK) || \
    !defined(WARPS_T) || !defined(STAGES) || !defined(SHARED_BYTES)
#error "kvtc_project.cu needs X_T, BACK, TILE_T, TILE_O, BLOCK, WARPS_T, STAGES and SHARED_BYTES"
#endif

// One of K and V.
struct Product { X_T* out; const f16* x; const f16* w; int T, in, outputs; i64 stride; };

#if STAGES > 0
#include "mma_tiles.cuh"

// --- On tensor cores -----------------------------------------------------------------------------

static_assert(SHARED_BYTES == STAGES * STAGE_BYTES, "all stages");

__device__ __forceinline__ void multiply(const Product& p, int t0, int o0) {
    extern __shared__ __align__(1024) u8 shared[];
    const auto copy = [&](u8* to, int stage) {
        const int i = stage * DEPTH;
        stage_rows<TILE_T>(to, p.x, p.in, t0, p.T, i, p.in);
#if BACK
        stage_rows<TILE_O>(to + X_BYTES, p.w, p.stride, o0, p.outputs, i, p.in);
#else
        stage_columns(to + X_BYTES, p.w, p.stride, o0, p.outputs, i, p.in);
#endif
    };
    Sums sums = {};
    multiply_stages<f16, !BACK>(sums, shared, 0, (p.in + DEPTH - 1) / DEPTH, copy, [](u8*, int) {});
    visit_pairs<1>(
        sums, t0, o0, p.T, p.outputs, [&](int t) { return p.out + (i64)t * p.outputs; },
        [](X_T* row, int o, const float* sums) { store2(row + o, sums[0], sums[1]); });
}

#else

// --- On CUDA cores -------------------------------------------------------------------------------

constexpr int DEPTH = 16;  // elements of I that shared memory holds at a time
constexpr int OWN = 4;     // tokens, and outputs, that a thread has
static_assert(TILE_T == 64 && TILE_O == 64 && BLOCK == 256, "equal shares");
static_assert(SHARED_BYTES == DEPTH * (TILE_T + TILE_O) * 4, "both tiles");

// Four elements of row `row` of [rows, columns] from column `column` on; zeros outside.
__device__ __forceinline__ void load_or_zero(float (&v)[4], const f16* p, i64 stride, int row,
                                             int rows, int column, int columns) {
    if (row < rows && column < columns) {
        load4(v, p + row * stride + column);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = 0.0f;
    }
}

__device__ __forceinline__ void multiply(const Product& p, int t0, int o0) {
    extern __shared__ __align__(128) u8 shared[];
    float (*const x_tile)[TILE_T] = reinterpret_cast<float (*)[TILE_T]>(shared);  // transposed
    float (*const w_tile)[TILE_O] = reinterpret_cast<float (*)[TILE_O]>(x_tile + DEPTH);
    const int row = threadIdx.x / 4, quarter = threadIdx.x % 4 * 4;
    const int own_t = threadIdx.x / (TILE_O / OWN) * OWN;
    const int own_o = threadIdx.x % (TILE_O / OWN) * OWN;
    float sums[OWN][OWN] = {};
    for (int i = 0; i < p.in; i += DEPTH) {
        float x[4], w[4];
        load_or_zero(x, p.x, p.in, t0 + row, p.T, i + quarter, p.in);
#if BACK
        load_or_zero(w, p.w, p.stride, o0 + row, p.outputs, i + quarter, p.in);
#else
        const int of_w = threadIdx.x / (TILE_O / 4), column = threadIdx.x % (TILE_O / 4) * 4;
        load_or_zero(w, p.w, p.stride, i + of_w, p.in, o0 + column, p.outputs);
#endif
        __syncthreads();  // all have read the previous tile
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x_tile[quarter + j][row] = x[j];
#if BACK
            w_tile[quarter + j][row] = w[j];
#else
            w_tile[of_w][column + j] = w[j];
#endif
        }
        __syncthreads();
        float part[OWN][OWN] = {};  // a sum of sums errs less than one long sum
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
#pragma unroll
            for (int t = 0; t < OWN; t++) {
#pragma unroll
                for (int o = 0; o < OWN; o++) {
                    part[t][o] = fmaf(x_tile[k][own_t + t], w_tile[k][own_o + o], part[t][o]);
                }
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
        if (t0 + own_t + t >= p.T || o0 + own_o >= p.outputs) continue;
        store4(p.out + (i64)(t0 + own_t + t) * p.outputs + o0 + own_o, sums[t]);
    }
}

#endif

#if STAGES > 0
constexpr int RESIDENT = BLOCK == 128 ? 2 : 1;  // blocks on an SM that registers allow
#else
constexpr int RESIDENT = 2;
#endif

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)
kvtc_project(X_T* __restrict__ k_out, X_T* __restrict__ v_out, const f16* __restrict__ k_x,
             const f16* __restrict__ v_x, const f16* __restrict__ k_w, const f16* __restrict__ v_w,
             int T, int k_in, int v_in, int k_out_size, int v_out_size, i64 k_stride,
             i64 v_stride) {
    const Product p = blockIdx.z ? Product{v_out, v_x, v_w, T, v_in, v_out_size, v_stride}
                                 : Product{k_out, k_x, k_w, T, k_in, k_out_size, k_stride};
    const int o0 = blockIdx.y * TILE_O;
    if (o0 < p.outputs) multiply(p, blockIdx.x * TILE_T, o0);
}
