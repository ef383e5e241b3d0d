// mma_tiles.cuh: tiles of tokens x outputs on tensor cores, both operands from stages in shared
// memory.
//
// A block multiplies TILE_T tokens with TILE_O outputs, a warp OWN_T x OWN_O of these. A stage holds
// DEPTH elements of I: rows of x, then those of w, or w as columns of outputs. Rows of shared memory
// have 128 bytes, whose chunks of 16 are permuted by the lowest bits of the row, so that the eight
// rows of a matrix of ldmatrix lie in different banks.
// Needs:  TILE_T, TILE_O, BLOCK, WARPS_T = warps along the tokens, STAGES
#include "mma.cuh"
#include "wgmma.cuh"

constexpr int DEPTH = 64;
constexpr int CHUNKS = DEPTH / 8;  // chunks of 16 bytes of a row
constexpr int STEPS = DEPTH / 16;  // steps of mma
constexpr int PITCH = DEPTH * 2;   // bytes of a row
constexpr int X_BYTES = TILE_T * PITCH, STAGE_BYTES = X_BYTES + TILE_O * PITCH;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && TILE_O % 128 == 0 && STAGES > 2
#define BY_WGMMA 1
#else
#define BY_WGMMA 0
#endif

#if BY_WGMMA
// By wgmma four warps share all outputs, and 64 tokens for each of X_ROWS.
constexpr int GROUPS = BLOCK / 128, OWN_T = TILE_T / GROUPS, OWN_O = TILE_O;
constexpr int X_ROWS = OWN_T / 64, W_PAIRS = OWN_O / 16;
static_assert(X_ROWS * 64 * GROUPS == TILE_T, "whole tiles of wgmma");
__device__ __forceinline__ int own_t(int m) {
    const int warp = threadIdx.x / WARP;
    return warp / 4 * OWN_T + m * 64 + warp % 4 * 16;
}
__device__ __forceinline__ int own_o() { return 0; }
#else
constexpr int OWN_T = TILE_T / WARPS_T, OWN_O = TILE_O / (BLOCK / WARP / WARPS_T);
constexpr int X_ROWS = OWN_T / 16, W_PAIRS = OWN_O / 16;  // fragments that a warp has
static_assert(X_ROWS * 16 * WARPS_T == TILE_T, "whole tiles of mma");
static_assert(W_PAIRS * 16 * (BLOCK / WARP / WARPS_T) == TILE_O, "and of outputs");
static_assert(STAGES >= 2, "one is read while another comes");
__device__ __forceinline__ int own_t(int m) {
    return threadIdx.x / WARP % WARPS_T * OWN_T + m * 16;
}
__device__ __forceinline__ int own_o() { return threadIdx.x / WARP / WARPS_T * OWN_O; }
#endif

using Sums = float[X_ROWS][2 * W_PAIRS][4];

__device__ __forceinline__ u8* chunk_of(u8* rows, int row, int chunk) {
    return rows + row * PITCH + (chunk ^ row % 8) * 16;
}

// ROWS rows of an array from column i on, zeros past `in` columns; row r is row_of(first, r) there.
template <int ROWS, typename M, typename RowOf>
__device__ __forceinline__ void stage_rows(u8* to, const M* from, i64 stride, int first, int i,
                                           int in, const RowOf& row_of) {
    static_assert(ROWS * CHUNKS % BLOCK == 0, "equal shares");
    first = opaque(first);  // else the offsets of all rows take the registers that sums need
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, column = i + chunk * 8;
#pragma unroll
    for (int n = 0; n < ROWS; n += BLOCK / CHUNKS) {
        cp_async16_or_zero(chunk_of(to, n + row, chunk),
                           from + row_of(first, n + row) * stride + column, column < in);
    }
}

// The same of [rows, I] from `first` on; past the last row that one again.
template <int ROWS, typename M>
__device__ __forceinline__ void stage_rows(u8* to, const M* from, i64 stride, int first, int rows,
                                           int i, int in) {
    stage_rows<ROWS>(to, from, stride, first, i, in,
                     [&](int first, int r) { return min(first + r, rows - 1); });
}

// The same of w where its rows are elements of I: DEPTH rows from i on, TILE_O columns from `first`
// on, past the last columns those again. 64 columns lie together.
template <typename M>
__device__ __forceinline__ void stage_columns(u8* to, const M* from, i64 stride, int first,
                                              int columns, int i, int in) {
    static_assert(TILE_O % DEPTH == 0 && TILE_O * CHUNKS % BLOCK == 0, "equal shares");
    first = opaque(first);
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (int n = 0; n < TILE_O; n += BLOCK / CHUNKS) {
        const int k = i + (n + row) % DEPTH, column = first + (n + row) / DEPTH * 64 + chunk * 8;
        cp_async16_or_zero(chunk_of(to, n + row, chunk),
                           from + k * stride + min(column, columns - 8), k < in);
    }
}

#if BY_WGMMA
// Sums of a warp += the products of stages first .. last - 1. `copy(to, stage)` requests what
// cp.async brings; `fill(to, stage)` writes what threads make themselves, while tensor cores run.
// wgmma reads a stage while that of the next is made ready.
template <typename M, bool COLUMNS, typename Copy, typename Fill>
__device__ __forceinline__ void multiply_stages(Sums& sums, u8* shared, int first, int last,
                                                const Copy& copy, const Fill& fill) {
    constexpr int LEADING = COLUMNS ? DEPTH * PITCH : 0;
    const auto slot = [&](int stage) { return shared + (stage - first) % STAGES * STAGE_BYTES; };
    const auto request = [&](int stage) {
        if (stage < last) copy(slot(stage), stage);
        cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 2; i++) request(first + i);
    if (first >= last) return;
    fill(slot(first), first);
#pragma unroll 1
    for (int stage = first; stage < last; stage++) {
        cp_async_wait<STAGES - 3>();
        fence_async_proxy();
        __syncthreads();  // the stage is there; only the one before may still be read
        const u8* const x = slot(stage) + threadIdx.x / 128 * (OWN_T * PITCH);
        const u8* const w = slot(stage) + X_BYTES;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int m = 0; m < X_ROWS; m++) {
#pragma unroll
                for (int n = 0; n < TILE_O / 128; n++) {
                    const int at = COLUMNS ? step * 16 * PITCH : step * 32;
                    wgmma_m64n128k16<IS_BF16<M>, COLUMNS>(
                        reinterpret_cast<float (&)[64]>(sums[m][n * 16]),
                        wgmma_matrix(x + m * 64 * PITCH + step * 32, 0),
                        wgmma_matrix(w + n * 128 * PITCH + at, LEADING));
                }
            }
        }
        wgmma_commit();
        request(stage + STAGES - 2);
        if (stage + 1 < last) fill(slot(stage + 1), stage + 1);
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    wgmma_results(reinterpret_cast<float (&)[sizeof(Sums) / 4]>(sums));
}
#else
struct Operands { u32 x[X_ROWS][4], w[W_PAIRS][4]; };

// The operands of a warp for 16 of I, from `step` * 16 on in a stage.
template <bool COLUMNS>
__device__ __forceinline__ void load_operands(Operands& to, u8* stage, int step) {
    const int lane = threadIdx.x % WARP, upper = lane / 8 % 2, half = lane / 16;
#pragma unroll
    for (int m = 0; m < X_ROWS; m++) {
        ldmatrix_x4(to.x[m], chunk_of(stage, own_t(m) + lane % 16, step * 2 + half));
    }
    u8* const w = stage + X_BYTES;
#pragma unroll
    for (int n = 0; n < W_PAIRS; n++) {
        if (COLUMNS) {
            const int chunk = own_o() / 8 + n * 2 + half;
            const int row = chunk / CHUNKS * DEPTH + step * 16 + upper * 8 + lane % 8;
            ldmatrix_x4_trans(to.w[n], chunk_of(w, row, chunk % CHUNKS));
        } else {
            ldmatrix_x4(to.w[n], chunk_of(w, own_o() + n * 16 + half * 8 + lane % 8, step * 2 + upper));
        }
    }
}

// As above. Operands of a step are loaded while those of the one before are multiplied, across
// stages too.
template <typename M, bool COLUMNS, typename Copy, typename Fill>
__device__ __forceinline__ void multiply_stages(Sums& sums, u8* shared, int first, int last,
                                                const Copy& copy, const Fill& fill) {
    const auto slot = [&](int stage) { return shared + (stage - first) % STAGES * STAGE_BYTES; };
    const auto request = [&](int stage) {
        if (stage < last) copy(slot(stage), stage);
        cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) request(first + i);
    if (first >= last) return;
    fill(slot(first), first);
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    Operands operands[2];
    load_operands<COLUMNS>(operands[0], slot(first), 0);
#pragma unroll 1
    for (int stage = first; stage < last; stage++) {
        u8* const now = slot(stage);
        u8* const next = slot(stage + 1);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step < STEPS - 1) {
                load_operands<COLUMNS>(operands[(step + 1) % 2], now, step + 1);
            } else if (stage + 1 < last) {
                cp_async_wait<STAGES - 2>();
                __syncthreads();  // the next stage is there, and all have read this one
                load_operands<COLUMNS>(operands[0], next, 0);
            }
            if (step == 0) request(stage + STAGES - 1);
            if (step == 1 && stage + 1 < last) fill(next, stage + 1);
            const Operands& own = operands[step % 2];
#pragma unroll
            for (int m = 0; m < X_ROWS; m++) {
#pragma unroll
                for (int n = 0; n < 2 * W_PAIRS; n++) {
                    mma_16x16<M>(sums[m][n], own.x[m][0], own.x[m][1], own.x[m][2], own.x[m][3],
                                 own.w[n / 2][n % 2 * 2], own.w[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
    }
}
#endif

// Calls visit(begin(token), output, sums) for each pair of a lane's sums that begins in [T, O], from
// token t0 and output o0 of the block on; sums[0] is that of the output, sums[1] of the next. Where
// each 8 outputs have 8 * WIDTH rows of w, sums[4] and sums[5] are those of the second 8, and so on.
template <int WIDTH, typename Begin, typename Visit>
__device__ __forceinline__ void visit_pairs(const Sums& sums, int t0, int o0, int T, int O,
                                            const Begin& begin, const Visit& visit) {
    t0 += threadIdx.x % WARP / 4, o0 += own_o() / WIDTH + threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < X_ROWS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = t0 + own_t(m) + half * 8;
            if (t >= T) continue;
            const auto row = begin(t);
#pragma unroll
            for (int n = 0; n < 2 * W_PAIRS; n += WIDTH) {
                const int o = o0 + n / WIDTH * 8;
                if (o < O) visit(row, o, &sums[m][n][2 * half]);
            }
        }
    }
}
