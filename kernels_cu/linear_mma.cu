// linear_mma.cu: out = x @ w.T + bias on tensor cores, weights as GGUF blocks, f16 or bf16.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/linear_mma.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to
//   pieces     const  [PIECES, T', I'] f16, or bf16 if KIND is; T' is T up to whole tiles, I' is I
//                     up to whole stages; what linear_split.cu makes of x
//   totals     const  [T', I' / 16] float  its sums of 16 elements; may be null where no kind needs it
//   units      const  [T'] float  what sums of a token are multiplied by
//   w          const  [O, W] u8  rows of planes of KIND (pykv/planes.py), or of floats, 16-byte
//                     aligned
//   bias       const  [O]     B_T, or null
//   partial           [parts, tiles, sums of a tile] float, where parts > 1
//   counters          [tiles] u32, zeros
// Defines:  KIND = a kind of planes.cuh, f16 or bf16; X_T, B_T = float, f16 or bf16; EXACT = 1 or 0,
//           see Order; PIECES of x; BLOCK = threads; TILE_T = tokens of a block, a multiple of 8;
//           OWN_TILES, 16 outputs each, of a warp; DEPTH = elements of a row in a stage, 64, 128 or
//           256, a multiple of what a lane loads at once; STAGES in shared memory; AHEAD = units of
//           weights on their way; X_AHEAD = operands of tokens that are read ahead of their products,
//           0 to 3; RESIDENT = blocks on an SM; GROUP_O = tiles of outputs whose blocks run together;
//           SHARED_BYTES. From sm_75 on; below it does nothing
// Launch:   grid (tiles, parts), tiles = ceil(O / (16 * OWN_TILES * BLOCK / 32)) * T' / TILE_T, block
//           (BLOCK), SHARED_BYTES of dynamic shared memory. It may start early: before the kernel ahead
//           has ended it reads w alone; what others write is not __restrict__, so that no load of it
//           moves ahead of the wait
// Traffic:  weights for each TILE_T tokens, pieces for each block of outputs, most from L2
// Order:    EXACT: products of pieces with codes or floats exact, sums of 32 elements on tensor
//           cores, of these in float, times their scales; else scales and weights rounded to f16,
//           all sums on tensor cores. Parts are added in order by the block that comes last. The order
//           depends on the launch alone, so two runs agree in every bit, and a token's results do not
//           depend on the others of its launch
// Stack: 56 bytes, of the widest tiles as NVRTC 12.4 compiles them; newer ones need none
#include "epilogue.cuh"
#include "mma_weights.cuh"
#include "parts.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(EXACT) || !defined(PIECES) || \
    !defined(BLOCK) || !defined(TILE_T)
#error "linear_mma.cu needs KIND, X_T, B_T, EXACT, PIECES, BLOCK and TILE_T"
#endif
#if !defined(OWN_TILES) || !defined(DEPTH) || !defined(STAGES) || !defined(AHEAD) || \
    !defined(X_AHEAD) || !defined(RESIDENT) || !defined(GROUP_O) || !defined(SHARED_BYTES)
#error "linear_mma.cu needs OWN_TILES, DEPTH, STAGES, AHEAD, X_AHEAD, RESIDENT, GROUP_O and SHARED_BYTES"
#endif

#if __CUDA_ARCH__ >= 750
using W = Weights<KIND, EXACT>;
using M = W::M;
#else
using M = f16;
#endif

#if __CUDA_ARCH__ >= 750
constexpr int WARPS = BLOCK / WARP;
constexpr int OWN_O = 16 * OWN_TILES;      // outputs of a warp
constexpr int TILE_O = OWN_O * WARPS;      // outputs of a block
constexpr int N_TILES = TILE_T / 8;
constexpr int N_OF_TURN = N_TILES % 2 ? 1 : 2;  // tiles of tokens whose mma alternate
constexpr int ROWS = 2 * OWN_TILES;        // rows of weights that a lane has
constexpr int ROW_ALIGNMENT = 16;          // bytes; in these, offsets of 32 bits reach 64 GiB
constexpr int PITCH = DEPTH * 2;           // bytes of a token in a stage
constexpr int CHUNKS = DEPTH / 8;          // chunks of 16 bytes of a token in a stage
constexpr int UNITS = DEPTH / (32 * W::SUBS);  // units of weights in a stage
constexpr int TOTALS = W::HAS_ADDEND ? DEPTH / 16 : 0;
constexpr int PIECE_BYTES = TILE_T * PITCH;
constexpr int STAGE_BYTES = PIECES * PIECE_BYTES + TILE_T * TOTALS * 4;
static_assert(TILE_T % 8 == 0 && CHUNKS % 8 == 0, "whole tiles, free of conflicts of banks");
static_assert(UNITS * 32 * W::SUBS == DEPTH && UNITS % AHEAD == 0, "whole units and rings");
static_assert(SHARED_BYTES == STAGES * STAGE_BYTES, "all stages");
constexpr int PARTS = W::SCALES ? W::SCALES : 1;  // parts of a group, each with its own scale
using Sums = float[OWN_TILES][N_TILES][4];

// A stage of x: DEPTH elements of TILE_T tokens of each piece, whose chunks of 16 bytes are
// swizzled by the token, so that the eight rows of a matrix of ldmatrix lie in different banks.
__device__ __forceinline__ void copy_stage(u8* to, const M* pieces, const float* totals, int t0,
                                           i64 rows, int padded_I, int stage) {
    const int chunk = threadIdx.x % CHUNKS, token = threadIdx.x / CHUNKS;
    const M* from = pieces + (i64)(t0 + token) * padded_I + stage * DEPTH + chunk * 8;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
#pragma unroll
        for (int n = 0; n < TILE_T; n += BLOCK / CHUNKS) {
            if (TILE_T % (BLOCK / CHUNKS) == 0 || token + n < TILE_T) {
                const int place = (token + n) * PITCH + (chunk ^ (token + n) % 8) * 16;
                cp_async16(to + p * PIECE_BYTES + place, from + (i64)n * padded_I);
            }
        }
        from += rows * padded_I;
    }
    if (TOTALS > 0) {
        constexpr int OF_TOKEN = TOTALS > 0 ? TOTALS / 4 : 1;
        for (int item = threadIdx.x; item < TILE_T * OF_TOKEN; item += BLOCK) {
            const i64 at = (t0 + item / OF_TOKEN) * (i64)(padded_I / 16);
            cp_async16(to + PIECES * PIECE_BYTES + item * 16,
                       totals + at + stage * TOTALS + item % OF_TOKEN * 4);
        }
    }
}

// What a warp needs of its weights for 32 elements of a row.
struct Operands {
    u32 a[OWN_TILES][2][2][2];  // indexed by tile, row, step, pair
    float d[OWN_TILES][2][PARTS], m[OWN_TILES][2][PARTS];
};

// Sums of tiles n and following, N_OF_TURN of them, += products of 32 elements; b are the fragments
// of x, by tile and piece; `totals` begins with those of token 2t of tile 0, for this group.
__device__ __forceinline__ void multiply_tiles(Sums& sums, const Operands& w,
                                               const u32 (&b)[N_OF_TURN][PIECES][4], int n,
                                               const float* totals) {
    float part[N_OF_TURN][OWN_TILES][PARTS][4] = {};
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
#pragma unroll
        for (int step = 0; step < 2; step++) {
#pragma unroll
            for (int i = 0; i < N_OF_TURN; i++) {
#pragma unroll
                for (int o = 0; o < OWN_TILES; o++) {
                    float (&sum)[4] = W::SCALES ? part[i][o][step % PARTS] : sums[o][n + i];
                    mma_16x16<M>(sum, w.a[o][0][step][0], w.a[o][1][step][0], w.a[o][0][step][1],
                                 w.a[o][1][step][1], b[i][p][2 * step], b[i][p][2 * step + 1]);
                }
            }
        }
    }
    if constexpr (W::SCALES > 0) {
#pragma unroll
        for (int i = 0; i < N_OF_TURN; i++) {
            float total[2][2] = {};  // indexed by this lane's token and by half
            if constexpr (TOTALS > 0) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float2 two =
                        *reinterpret_cast<const float2*>(totals + ((n + i) * 8 + j) * TOTALS);
                    total[j][0] = PARTS == 1 ? two.x + two.y : two.x, total[j][1] = two.y;
                }
            }
#pragma unroll
            for (int o = 0; o < OWN_TILES; o++) {
#pragma unroll
                for (int h = 0; h < PARTS; h++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float& sum = sums[o][n + i][j];
                        sum = fmaf(w.d[o][j / 2][h], part[i][o][h][j], sum);
                        if (TOTALS) sum = fmaf(w.m[o][j / 2][h], total[j % 2][h], sum);
                    }
                }
            }
        }
    }
}

// Sums of a warp += the products of 32 elements, from `sub` * 32 on in a stage; sums that are
// exact, or of a single tile of tokens.
__device__ __forceinline__ void multiply_group(Sums& sums, const Operands& w, const u8* stage, int sub) {
    const int lane = threadIdx.x % WARP;
    const u8* const row = stage + lane % 8 * PITCH + ((sub * 4 + lane / 8) ^ lane % 8) * 16;
    const float* const totals =
        reinterpret_cast<const float*>(stage + PIECES * PIECE_BYTES) + lane % 4 * 2 * TOTALS + sub * 2;
    constexpr int LOOK = X_AHEAD > 0;
    u32 b[LOOK + 1][N_OF_TURN][PIECES][4];
    const auto load = [&](int n) {
        if (n >= N_TILES) return;
#pragma unroll
        for (int i = 0; i < N_OF_TURN; i++) {
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                ldmatrix_x4(b[n / N_OF_TURN % (LOOK + 1)][i][p],
                            row + p * PIECE_BYTES + (n + i) * (8 * PITCH));
            }
        }
    };
    if (LOOK) load(0);
#pragma unroll
    for (int n = 0; n < N_TILES; n += N_OF_TURN) {
        load(n + LOOK * N_OF_TURN);
        schedule_fence();  // else the compiler loads all operands first and spills
        multiply_tiles(sums, w, b[n / N_OF_TURN % (LOOK + 1)], n, totals);
    }
}

// The same for sums that go on from group to group: a step of mma for all tokens, then the next, so
// that no mma waits for the one before.
__device__ __forceinline__ void multiply_steps(Sums& sums, const Operands& w, const u8* stage,
                                               int sub) {
    constexpr int PAIRS = N_TILES / 2, TURNS = 2 * PAIRS;
    const int lane = threadIdx.x % WARP;
    const u8* const row = stage + (lane / 16 * 8 + lane % 8) * PITCH;
    u32 b[X_AHEAD + 1][PIECES][4];
    const auto load = [&](int turn) {
        if (turn >= TURNS) return;
        const int chunk = (sub * 4 + turn / PAIRS * 2 + lane / 8 % 2) ^ lane % 8;
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            ldmatrix_x4(b[turn % (X_AHEAD + 1)][p],
                        row + p * PIECE_BYTES + turn % PAIRS * (16 * PITCH) + chunk * 16);
        }
    };
#pragma unroll
    for (int turn = 0; turn < X_AHEAD; turn++) load(turn);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        load(turn + X_AHEAD);
        const int step = turn / PAIRS, n = turn % PAIRS * 2;
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const u32 (&of_turn)[4] = b[turn % (X_AHEAD + 1)][p];
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int o = 0; o < OWN_TILES; o++) {
                    mma_16x16<M>(sums[o][n + i], w.a[o][0][step][0], w.a[o][1][step][0],
                                 w.a[o][0][step][1], w.a[o][1][step][1], of_turn[2 * i],
                                 of_turn[2 * i + 1]);
                }
            }
        }
    }
}

// Sums of a warp += the products of a unit of weights, whose registers take the one AHEAD.
__device__ __forceinline__ void multiply_unit(Sums& sums, W (&own)[ROWS], const u8* w,
                                              const u32 (&offsets)[ROWS], int unit, int I,
                                              const u8* stage, int sub0) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < ROWS; r++) own[r].begin(unit, I, t);
#pragma unroll
    for (int sub = 0; sub < W::SUBS; sub++) {
        Operands operands;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            own[r].pairs(operands.a[r / 2][r % 2], sub);
            if (W::SCALES > 0) {
                own[r].scales(operands.d[r / 2][r % 2], operands.m[r / 2][r % 2], unit, I);
            }
        }
        if (sub == W::SUBS - 1) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                own[r].load(w + (u64)offsets[r] * ROW_ALIGNMENT, unit + AHEAD, I, t);
            }
        }
        if constexpr (W::SCALES == 0 && N_TILES % 2 == 0) {
            multiply_steps(sums, operands, stage, sub0 + sub);
        } else {
            multiply_group(sums, operands, stage, sub0 + sub);
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)
gemm(X_T* out, float* partial, u32* counters, const M* pieces, const float* totals,
     const float* units, const u8* __restrict__ w, const B_T* __restrict__ bias, int T, int O,
     int I, int padded_I, int tiles_t, i64 w_stride, i64 out_stride, int accumulate) {
#if __CUDA_ARCH__ >= 750
    extern __shared__ __align__(128) u8 shared[];
    __shared__ int is_last;
    let_next_start();
    const int lane = threadIdx.x % WARP, row = lane / 4, t = lane % 4;
    // Blocks that run together share weights and tokens: GROUP_O tiles of outputs, all of tokens.
    const int tiles_o = (O + TILE_O - 1) / TILE_O;
    const int group = blockIdx.x / (GROUP_O * tiles_t), place = blockIdx.x % (GROUP_O * tiles_t);
    const int width = min(GROUP_O, tiles_o - group * GROUP_O);
    const int o0 = (group * GROUP_O + place % width) * TILE_O + threadIdx.x / WARP * OWN_O;
    const int t0 = place / width * TILE_T;
    const int stages = padded_I / DEPTH;
    const int first = (int)((i64)stages * blockIdx.y / gridDim.y);
    const int last = (int)((i64)stages * (blockIdx.y + 1) / gridDim.y);
    const i64 rows_of_x = (i64)tiles_t * TILE_T;

    const auto copy = [&](int stage) {
        if (stage < last) {
            copy_stage(shared + (stage - first) % STAGES * STAGE_BYTES, pieces, totals, t0,
                       rows_of_x, padded_I, stage);
        }
        cp_async_commit();
    };
    // Past the last output that one again, whose sums are dropped.
    const u8* const own_w = w + min(o0, O - 1) * w_stride;
    u32 offsets[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        offsets[r] = min(r * 8 + row, max(O - 1 - o0, 0)) * (u32)(w_stride / ROW_ALIGNMENT);
    }
    W weights[AHEAD][ROWS];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (I == 0) continue;
            weights[u][r].load(own_w + (u64)offsets[r] * ROW_ALIGNMENT, first * UNITS + u, I, t);
        }
    }
    await_previous();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy(first + i);

    Sums sums = {};
#pragma unroll 1
    for (int stage = first; stage < last; stage++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // the stage is there, and all have read the one that is replaced
        copy(stage + STAGES - 1);
        const u8* const x = shared + (stage - first) % STAGES * STAGE_BYTES;
#pragma unroll 1
        for (int u = 0; u < UNITS; u += AHEAD) {
#pragma unroll
            for (int slot = 0; slot < AHEAD; slot++) {
                multiply_unit(sums, weights[slot], own_w, offsets, stage * UNITS + u + slot, I, x,
                              (u + slot) * W::SUBS);
            }
        }
    }

    constexpr int OF_LANE = OWN_TILES * N_TILES * 4;
    if (gridDim.y > 1 && !add_parts(reinterpret_cast<float (&)[OF_LANE]>(sums), partial, counters,
                                    is_last)) {
        return;
    }
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = t0 + n * 8 + t * 2 + i;
            if (token >= T) continue;
            const float unit = units[token];
            X_T* const of_token = out + token * out_stride;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int o = o0 + r * 8 + row;
                if (o >= O) continue;
                finish(of_token + o, sums[r / 2][n][r % 2 * 2 + i] * unit, bias, o, accumulate);
            }
        }
    }
#endif
}
