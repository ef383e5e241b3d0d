// linear_tiles.cu: out = x @ w.T + bias for many tokens, or gated pairs of these: tiles on tensor
// cores, x and w rounded.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/linear_tiles.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to
//   pieces     const  [PIECES, T', I'] f16, or bf16 if KIND is; T' >= T, I' >= I; what linear_split.cu
//                     makes of x in the order of elements
//   units      const  [T'] float  what sums of a token are multiplied by
//   w          const  [O, W] u8  rows of planes of KIND (pykv/planes.py), or of floats, 16-byte
//                     aligned; with a GATE [2 * O, W], gates, then what they open
//   bias       const  [O]     B_T, or null; with a GATE [2 * O]
//   partial           [parts, tiles, TILE_T * TILE_O] float, where parts > 1
//   counters          [tiles] u32, zeros
// Defines:  KIND = a kind of planes.cuh, f16 or bf16; X_T, B_T = float, f16 or bf16; PIECES of x;
//           GATE = 0, or of gate.cuh 1 or 2; BLOCK = threads; TILE_T, TILE_O = tokens and rows of w
//           of a block; WARPS_T = warps along the tokens; STAGES in shared memory; RESIDENT = blocks on
//           an SM; GROUP_O = tiles of outputs whose blocks run together; SHARED_BYTES. From sm_80 on;
//           below it does nothing
// Launch:   grid (tiles, parts), tiles = ceil(T / TILE_T) * ceil(rows of w / TILE_O), block (BLOCK),
//           SHARED_BYTES of dynamic shared memory. It may start early: before the kernel ahead has ended
//           it reads w alone; what others write is not __restrict__, so that no load of it moves ahead
//           of the wait
// Traffic:  weights for each TILE_T tokens, pieces for each TILE_O outputs, most from L2
// Order:    elements of blocks rounded to f16, products exact, all sums on tensor cores, which
//           truncate them. Parts are added in order by the block that comes last: two runs agree in
//           every bit, and a token's results do not depend on the others of its launch
// Stack: 80 bytes, of the larger tiles where mma multiplies; wgmma needs none
#include "epilogue.cuh"
#include "gate.cuh"
#include "mma_weights.cuh"
#include "parts.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(PIECES) || !defined(RESIDENT) || \
    !defined(GATE)
#error "linear_tiles.cu needs KIND, X_T, B_T, PIECES, RESIDENT and GATE"
#endif
#if !defined(BLOCK) || !defined(TILE_T) || !defined(TILE_O) || !defined(WARPS_T) || \
    !defined(STAGES) || !defined(GROUP_O) || !defined(SHARED_BYTES)
#error "linear_tiles.cu needs BLOCK, TILE_T, TILE_O, WARPS_T, STAGES, GROUP_O and SHARED_BYTES"
#endif

using W = Weights<KIND, false>;
using M = W::M;

#if __CUDA_ARCH__ >= 800
#include "mma_tiles.cuh"

static_assert(SHARED_BYTES == STAGES * STAGE_BYTES, "all stages");

// The row of w that is row r of a tile whose outputs begin at o0; past the last output that one
// again. Rows of 8 gates are followed by those of what they open, so that a lane has the sums of both.
constexpr int WIDTH = GATE ? 2 : 1, OUTPUTS = TILE_O / WIDTH;
__device__ __forceinline__ int weight_row(int o0, int r, int O) {
    if (GATE == 0) return min(o0 + r, O - 1);
    return min(o0 + r / 16 * 8 + r % 8, O - 1) + (r % 16 < 8 ? 0 : O);
}

// Weights of a stage that are floats come with x.
template <typename K> struct Stager {
    const K* rows;
    i64 stride;  // elements
    int o0, O, I;

    __device__ __forceinline__ Stager(const u8* w, i64 w_stride, int o0, int O, int I)
        : rows(reinterpret_cast<const K*>(w)), stride(w_stride / 2), o0(o0), O(O), I(I) {}
    __device__ __forceinline__ void load(int) {}
    __device__ __forceinline__ void copy(u8* to, int stage) const {
        stage_rows<TILE_O>(to, rows, stride, o0, stage * DEPTH, I,
                           [&](int o0, int r) { return weight_row(o0, r, O); });
    }
    __device__ __forceinline__ void store(u8*, int) {}
};

// Blocks: a thread has groups of 32 elements, and loads its codes and scales a stage ahead.
struct BlockStager {
    static constexpr int GROUPS = TILE_O * (DEPTH / 32) / BLOCK;
    static_assert(GROUPS * BLOCK == TILE_O * (DEPTH / 32), "equal shares");
    W held[GROUPS];
    const u8* w;
    i64 stride;
    int o0, O, I;

    __device__ __forceinline__ BlockStager(const u8* w, i64 w_stride, int o0, int O, int I)
        : w(w), stride(w_stride), o0(o0), O(O), I(I) {}
    __device__ __forceinline__ static int row(int n) { return n * (BLOCK / 2) + threadIdx.x / 2; }
    __device__ __forceinline__ static int group(int stage) { return stage * 2 + threadIdx.x % 2; }

    __device__ __forceinline__ void load(int stage) {
        const int g = group(stage);
#pragma unroll
        for (int n = 0; n < GROUPS; n++) {
            held[n].load(w + weight_row(o0, row(n), O) * stride, g / 4, I, g % 4);
        }
    }
    __device__ __forceinline__ void copy(u8*, int) const {}
    __device__ __forceinline__ void store(u8* to, int stage) {
        const int g = group(stage);
#pragma unroll
        for (int n = 0; n < GROUPS; n++) {
            held[n].begin(g / 4, I, g % 4);
#pragma unroll
            for (int sub = 0; sub < 4; sub++) {
                u32 pairs[2][2];
                held[n].pairs(pairs, sub);
                store16_shared(chunk_of(to, row(n), g % 2 * 4 + sub),
                               {pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]});
            }
        }
    }
};

template <typename K> struct StagerOf { using Type = BlockStager; };
template <> struct StagerOf<f16> { using Type = Stager<f16>; };
template <> struct StagerOf<bf16> { using Type = Stager<bf16>; };
#endif

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)
linear_tiles(X_T* out, float* partial, u32* counters, const M* pieces, const float* units,
             const u8* __restrict__ w, const B_T* __restrict__ bias, int T, int O, int I,
             int padded_I, int rows, i64 w_stride, i64 out_stride, int accumulate) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ int is_last;
    let_next_start();
    // Blocks that run together share weights and tokens: GROUP_O tiles of outputs, all of tokens.
    const int tiles_t = (T + TILE_T - 1) / TILE_T, tiles_o = (O + OUTPUTS - 1) / OUTPUTS;
    const int group = blockIdx.x / (GROUP_O * tiles_t), place = blockIdx.x % (GROUP_O * tiles_t);
    const int width = min(GROUP_O, tiles_o - group * GROUP_O);
    const int o0 = (group * GROUP_O + place % width) * OUTPUTS, t0 = place / width * TILE_T;
    const int of_piece = (I + DEPTH - 1) / DEPTH, stages = of_piece * PIECES;
    const int first = (int)((i64)stages * blockIdx.y / gridDim.y);
    const int last = (int)((i64)stages * (blockIdx.y + 1) / gridDim.y);

    StagerOf<KIND>::Type weights(w, w_stride, o0, O, I);
    const auto of_weights = [&](int stage) { return PIECES == 1 ? stage : stage % of_piece; };
    const auto copy = [&](u8* to, int stage) {
        const int n = PIECES == 1 ? 0 : stage / of_piece, at = of_weights(stage);
        stage_rows<TILE_T>(to, pieces + (i64)n * rows * padded_I, padded_I, t0, T, at * DEPTH, I);
        weights.copy(to + X_BYTES, at);
    };
    const auto fill = [&](u8* to, int stage) {
        weights.store(to + X_BYTES, of_weights(stage));
        if (stage + 1 < last) weights.load(of_weights(stage + 1));
    };
    if (first < last) weights.load(of_weights(first));
    await_previous();
    Sums sums = {};
    multiply_stages<M, false>(sums, shared, first, last, copy, fill);

    constexpr int OF_LANE = sizeof(Sums) / sizeof(float);
    if (gridDim.y > 1 && !add_parts(reinterpret_cast<float (&)[OF_LANE]>(sums), partial, counters,
                                    is_last)) {
        return;
    }
    struct Row { X_T* out; float unit; };
    constexpr int PAIR_BYTES = 2 * sizeof(X_T);
    const bool are_pairs = ((u64)out | (u64)out_stride * sizeof(X_T)) % PAIR_BYTES == 0;
    visit_pairs<WIDTH>(
        sums, t0, o0, T, O, [&](int t) { return Row{out + t * out_stride, units[t]}; },
        [&](const Row& row, int o, const float* sums) {
            const float a = sums[0] * row.unit, b = sums[1] * row.unit;
#if GATE
            const auto gated = [&](float gate, float up, int o) {
                if (bias) gate += to_float(bias[o]), up += to_float(bias[O + o]);
                return fmaf(activated(GATE, gate), up, accumulate ? to_float(row.out[o]) : 0.0f);
            };
            const float first = gated(a, sums[4] * row.unit, o);
            if (o + 1 == O) {
                row.out[o] = from_float<X_T>(first);
                return;
            }
            const float second = gated(b, sums[5] * row.unit, o + 1);
            if (are_pairs) {
                store2(row.out + o, first, second);
            } else {
                row.out[o] = from_float<X_T>(first);
                row.out[o + 1] = from_float<X_T>(second);
            }
#else
            if (are_pairs && o + 1 < O) {
                finish_pair(row.out + o, a, b, bias, o, accumulate);
            } else {
                finish(row.out + o, a, bias, o, accumulate);
                if (o + 1 < O) finish(row.out + o + 1, b, bias, o + 1, accumulate);
            }
#endif
        });
#endif
}
