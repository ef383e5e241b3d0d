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
//           BLOCK = threads; STAGES = tiles of operands in shared memory, on tensor cores, from
//           sm_75 on; 0: on CUDA cores, where both tiles are 64 and BLOCK is 256; SHARED_BYTES
// Launch:   grid (ceil(T / TILE_T), ceil(max O / TILE_O), 2), block (BLOCK); z: K, V; SHARED_BYTES
//           of dynamic shared memory. Blocks that follow each other share w
// Traffic:  w ceil(T / TILE_T) times and x ceil(O / TILE_O) times, mostly from L2
// Order:    no atomics; products exact, sums in float, the order fixed by the launch
#include "mma.cuh"
#include "vector.cuh"

#if !defined(X_T) || !defined(BACK) || !defined(TILE_T) || !defined(TILE_O) || !defined(BLOCK) || \
    !defined(STAGES) || !defined(SHARED_BYTES)
#error "kvtc_project.cu needs X_T, BACK, TILE_T, TILE_O, BLOCK, STAGES and SHARED_BYTES"
#endif

// One of K and V.
struct Product { X_T* out; const f16* x; const f16* w; int T, in, outputs; i64 stride; };

#if STAGES > 0

// --- On tensor cores -----------------------------------------------------------------------------

constexpr int DEPTH = 64;             // of I, in a stage
constexpr int CHUNKS = DEPTH / 8;     // of 16 bytes
constexpr int STEPS = DEPTH / 16;     // of mma
constexpr int OWN_O = 64, OWN_T = TILE_T * TILE_O / OWN_O * WARP / BLOCK;  // of a warp
constexpr int WARPS_T = TILE_T / OWN_T, WARPS_O = TILE_O / OWN_O;
// Operands of the next step come while those of a step are multiplied, where registers allow.
constexpr int AHEAD = __CUDA_ARCH__ >= 800 ? 1 : 0;
constexpr int X_ROWS = OWN_T / 16, W_PAIRS = OWN_O / 16;  // fragments of a warp
static_assert(BLOCK == WARPS_T * WARPS_O * WARP, "a warp for each of its tiles");
static_assert(TILE_T * CHUNKS % BLOCK == 0 && TILE_O * CHUNKS % BLOCK == 0, "equal shares");
static_assert(SHARED_BYTES == STAGES * (TILE_T + TILE_O) * DEPTH * 2, "all stages");

// A tile whose rows are WIDTH elements. A row's chunks are permuted by its lowest bits, so that the
// eight rows of a matrix of ldmatrix lie in different banks.
template <int WIDTH> struct Tile {
    f16* data;
    __device__ __forceinline__ f16* chunk(int row, int at) const {
        return data + row * WIDTH + (at ^ row % 8) * 8;
    }
};

__device__ __forceinline__ void copy_or_zero(f16* to, const f16* from, bool exists) {
    if (exists) {
        cp_async16(to, from);
    } else {
        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
    }
}

// ROWS rows of [rows, I] from column i on; past the last row that one again, zeros past I.
template <int ROWS>
__device__ __forceinline__ void stage_rows(Tile<DEPTH> tile, const f16* from, i64 stride, int first,
                                           int rows, int i, int in) {
#pragma unroll
    for (int n = 0; n < ROWS * CHUNKS / BLOCK; n++) {
        const int row = (n * BLOCK + (int)threadIdx.x) / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const int column = i + chunk * 8;
        copy_or_zero(tile.chunk(row, chunk), from + min(first + row, rows - 1) * stride + column,
                     column < in);
    }
}

// DEPTH rows of w from i on, TILE_O columns of them; past the last columns those again.
__device__ __forceinline__ void stage_columns(Tile<TILE_O> tile, const Product& p, int o0, int i) {
    constexpr int OF_ROW = TILE_O / 8;
#pragma unroll
    for (int n = 0; n < DEPTH * OF_ROW / BLOCK; n++) {
        const int item = n * BLOCK + threadIdx.x, row = item / OF_ROW, chunk = item % OF_ROW;
        copy_or_zero(tile.chunk(row, chunk),
                     p.w + (i + row) * p.stride + min(o0 + chunk * 8, p.outputs - 8),
                     i + row < p.in);
    }
}

struct Operands { u32 x[X_ROWS][4], w[W_PAIRS][4]; };

// The operands of a warp for 16 of I, from `step` * 16 on.
__device__ __forceinline__ void load_operands(Operands& to, Tile<DEPTH> x, f16* w, int own_t,
                                              int own_o, int step) {
    const int lane = threadIdx.x % WARP, upper = lane / 8 % 2, half = lane / 16;
#pragma unroll
    for (int m = 0; m < X_ROWS; m++) {
        ldmatrix_x4(to.x[m], x.chunk(own_t + m * 16 + lane % 16, step * 2 + half));
    }
#pragma unroll
    for (int n = 0; n < W_PAIRS; n++) {
#if BACK
        const int row = own_o + n * 16 + half * 8 + lane % 8;
        ldmatrix_x4(to.w[n], Tile<DEPTH>{w}.chunk(row, step * 2 + upper));
#else
        const int row = step * 16 + upper * 8 + lane % 8;
        ldmatrix_x4_trans(to.w[n], Tile<TILE_O>{w}.chunk(row, own_o / 8 + n * 2 + half));
#endif
    }
}

__device__ __forceinline__ void multiply(const Product& p, int t0, int o0) {
    extern __shared__ __align__(128) u8 shared[];
    constexpr int STAGE = (TILE_T + TILE_O) * DEPTH;
    f16* const stages = reinterpret_cast<f16*>(shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int own_t = warp % WARPS_T * OWN_T, own_o = warp / WARPS_T * OWN_O;
    const int tiles = (p.in + DEPTH - 1) / DEPTH;

    const auto stage = [&](int tile) {
        if (tile < tiles) {
            f16* const at = stages + tile % STAGES * STAGE;
            f16* const w = at + TILE_T * DEPTH;
            stage_rows<TILE_T>({at}, p.x, p.in, t0, p.T, tile * DEPTH, p.in);
#if BACK
            stage_rows<TILE_O>({w}, p.w, p.stride, o0, p.outputs, tile * DEPTH, p.in);
#else
            stage_columns({w}, p, o0, tile * DEPTH);
#endif
        }
        cp_async_commit();
    };
    float sums[X_ROWS][2 * W_PAIRS][4] = {};
    for (int tile = 0; tile < STAGES - 1; tile++) stage(tile);
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // the tile is there, and all have read the one that is replaced
        stage(tile + STAGES - 1);
        f16* const at = stages + tile % STAGES * STAGE;
        f16* const w = at + TILE_T * DEPTH;
        Operands operands[AHEAD + 1];
        const auto load = [&](int step) {
            if (step >= STEPS) return;
            load_operands(operands[step % (AHEAD + 1)], {at}, w, own_t, own_o, step);
        };
#pragma unroll
        for (int step = 0; step < AHEAD; step++) load(step);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            load(step + AHEAD);
            const Operands& now = operands[step % (AHEAD + 1)];
#pragma unroll
            for (int m = 0; m < X_ROWS; m++) {
#pragma unroll
                for (int n = 0; n < 2 * W_PAIRS; n++) {
                    mma_16x16<f16>(sums[m][n], now.x[m][0], now.x[m][1], now.x[m][2], now.x[m][3],
                                   now.w[n / 2][n % 2 * 2], now.w[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < X_ROWS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = t0 + own_t + m * 16 + half * 8 + lane / 4;
            if (t >= p.T) continue;
#pragma unroll
            for (int n = 0; n < 2 * W_PAIRS; n++) {
                const int o = o0 + own_o + n * 8 + lane % 4 * 2;
                if (o >= p.outputs) continue;
                store2(p.out + (i64)t * p.outputs + o, sums[m][n][2 * half],
                       sums[m][n][2 * half + 1]);
            }
        }
    }
}

#else

// --- On CUDA cores -------------------------------------------------------------------------------

constexpr int DEPTH = 16;  // of I, held in shared memory at a time
constexpr int OWN = 4;     // tokens and outputs of a thread
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
