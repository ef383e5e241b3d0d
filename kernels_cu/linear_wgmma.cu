// linear_wgmma.cu: out = x @ w.T + bias for 3 to some 100 tokens, or gated pairs of these, on the tensor
// cores of sm_90: tokens and the codes of weights come by way of shared memory, and weights are made
// of codes in registers, which are operands of wgmma.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/linear_wgmma.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to
//   pieces     const  [T', I'] f16; T' is T up to whole tiles, I' is I up to whole stages; what
//                     linear_split.cu makes of x
//   units      const  [T'] float  what sums of a token are multiplied by
//   w          const  [O, W] u8  rows of planes of KIND (pykv/planes.py), 16-byte aligned; with a GATE
//                     [2 * O, W], gates, then what they open
//   bias       const  [O]     B_T, or null; with a GATE [2 * O]
//   partial           [parts, tiles, TILE_T * TILE_O] float, where parts > 1
//   counters          [tiles] u32, zeros
// Defines:  KIND = a kind of planes.cuh; X_T, B_T = float, f16 or bf16; GATE = 0, or of gate.cuh 1 or 2;
//           BLOCK = threads, a multiple of 128, two for each row of w of a block, TILE_O; TILE_T = tokens
//           of a block, 8, 16, 32, or a multiple of 64; STAGES in shared memory; RESIDENT = blocks on an
//           SM; GROUP_O = tiles of outputs whose blocks run together; SHARED_BYTES. In cubins of sm_90
//           alone; elsewhere, in PTX for sm_90 as well, it does nothing
// Limits:   the rows of w of a block, and with a GATE all of w, within 2^32 bytes
// Launch:   grid (tiles, parts), tiles = ceil(rows of w / TILE_O) * T' / TILE_T, block (BLOCK),
//           SHARED_BYTES of dynamic shared memory. It may start early: before the kernel ahead has ended
//           it reads w alone; what others write is not __restrict__, so that no load of it moves ahead
//           of the wait
// Traffic:  weights for each TILE_T tokens, pieces for each block of rows of w, most from L2
// Order:    elements of blocks rounded to f16, products exact, all sums on tensor cores, which
//           truncate them. Parts are added in order by the block that comes last: two runs agree in
//           every bit, and a token's results do not depend on the others of its launch
#include "epilogue.cuh"
#include "gate.cuh"
#include "mma_weights.cuh"
#include "parts.cuh"
#include "wgmma.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(GATE) || !defined(BLOCK) || \
    !defined(TILE_T)
#error "linear_wgmma.cu needs KIND, X_T, B_T, GATE, BLOCK and TILE_T"
#endif
#if !defined(STAGES) || !defined(RESIDENT) || !defined(GROUP_O) || !defined(SHARED_BYTES)
#error "linear_wgmma.cu needs STAGES, RESIDENT, GROUP_O and SHARED_BYTES"
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
using W = Weights<KIND, false>;
using CodesOf = W::CodesOf;
constexpr int DEPTH = 256, GROUPS = DEPTH / GROUP;  // of I, in a stage
constexpr int TILE_O = BLOCK / 2;                   // rows of w of a block, 16 of a warp
constexpr int N = TILE_T < 64 ? TILE_T : 64;        // tokens of a wgmma
constexpr int WIDTH = GATE ? 2 : 1, OUTPUTS = TILE_O / WIDTH;
constexpr int X_PART = TILE_T * 128;                // bytes: 64 elements of all tokens lie together
constexpr int X_BYTES = DEPTH / 64 * X_PART;
constexpr int SCALES = (KIND::FIRST + KIND::SECOND + 15) / 16 * 16;  // bytes of a row
constexpr int CODE_BYTES = TILE_O * CodesOf::BYTES * GROUPS;
constexpr int STAGE_BYTES = X_BYTES + CODE_BYTES + TILE_O * SCALES;
static_assert(TILE_T % N == 0 && BLOCK % 128 == 0, "whole tiles of wgmma");
static_assert(SHARED_BYTES == STAGES * STAGE_BYTES && STAGES >= 3, "all stages");

using Sums = float[TILE_T / 8][4];
using Operands = u32[2][4];  // of two steps of 16 elements

// Chunks of 16 bytes of a plane, CHUNKS of a row in a stage, whose places are permuted by the row, so
// that what a warp reads together, 32 codes for each of 8 rows and 4 lanes, lies in different banks.
template <int CHUNKS> __device__ __forceinline__ int place_of(int row, int chunk) {
    constexpr int ROW = CHUNKS == 16 ? 1 : CHUNKS == 8 ? 1 : CHUNKS == 4 ? 2 : 4;
    constexpr int BIT = CHUNKS == 8 ? 4 : CHUNKS == 4 ? 2 : 1;
    return (row * CHUNKS + (chunk ^ (row & ROW ? BIT : 0))) * 16;
}

// What a block copies and reads of its rows of w.
struct Rows {
    static constexpr int WORDS = CodesOf::WORDS / 4 * GROUPS, PAIRS = CodesOf::HAS_PAIRS * GROUPS / 2;
    static constexpr int ONES = CodesOf::HAS_ONES * GROUPS / 4;  // chunks of a row
    static constexpr int LOADED = (KIND::FIRST + 7) / 8;         // words of scales of a thread

    static constexpr int SHARE = WORDS ? TILE_O * WORDS / BLOCK : 1;  // chunks of words of a thread

    const u8* w;         // row o0, or its gate
    u32 stride, opened;  // bytes from a row to the next, and from a gate to what it opens
    int last, G;         // how many rows follow the first; groups of a row
    u32 words[SHARE], scales;  // where a thread's chunks begin, and the row of its scales
    u32 first[LOADED], second;

    __device__ __forceinline__ Rows(const u8* w, i64 w_stride, int o0, int O, int G)
        : w(opaque_pointer(w + min(o0, O - 1) * w_stride)), stride((u32)w_stride),
          opened(O * (u32)w_stride), last(max(O - 1 - o0, 0)), G(G) {
        scales = row(threadIdx.x / 2);
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            constexpr int CHUNKS = WORDS ? WORDS : 1;
            words[i] = row((i * BLOCK + threadIdx.x) / CHUNKS) + threadIdx.x % CHUNKS * 16;
        }
    }

    // Where row r of the block begins: with a GATE 8 gates are followed by what they open. Past the last
    // output that one again, whose sums are dropped.
    __device__ __forceinline__ u32 row(int r) const {
        if (GATE == 0) return min(r, last) * stride;
        return min(r / 16 * 8 + r % 8, last) * stride + (r % 16 < 8 ? 0 : opened);
    }

    template <int CHUNKS> __device__ __forceinline__ void copy_plane(u8*& to, u32& plane,
                                                                       int stage) const {
        if constexpr (CHUNKS > 0) {
            const int chunk = threadIdx.x % CHUNKS;
            const int end = (G * CHUNKS + GROUPS - 1) / GROUPS - 1;  // past the end that one again
            const u32 from = plane + (min(stage * CHUNKS + chunk, end) - chunk) * 16;
#pragma unroll
            for (int i = 0; i * BLOCK < TILE_O * CHUNKS; i++) {
                const int r = (i * BLOCK + threadIdx.x) / CHUNKS;
                if (TILE_O * CHUNKS % BLOCK == 0 || r < TILE_O) {
                    const u32 start = CHUNKS == WORDS ? words[i] : row(r) + chunk * 16;
                    cp_async16(to + place_of<CHUNKS>(r, chunk), w + (from + start));
                }
            }
            to += TILE_O * CHUNKS * 16, plane += G * CHUNKS * 16 / GROUPS;
        }
    }
    __device__ __forceinline__ void copy_codes(u8* to, int stage) const {
        u32 plane = 0;
        copy_plane<WORDS>(to, plane, stage);
        copy_plane<PAIRS>(to, plane, stage);
        copy_plane<ONES>(to, plane, stage);
    }

    // Scales begin at multiples of two or four bytes, where cp.async cannot copy 16: threads load them,
    // two threads a row, and store them later. Past the end of a row they are the last word again.
    __device__ __forceinline__ void load_scales(int stage) {
        const int half = threadIdx.x % 2;
        const u32 from = scales + G * CodesOf::BYTES;
        const int end = G * KIND::FIRST / GROUPS;
#pragma unroll
        for (int i = 0; i < LOADED; i++) {
            const u32 at = min(stage * KIND::FIRST + (half * LOADED + i) * 4, (end - 1) / 4 * 4);
            first[i] = load_eager(reinterpret_cast<const u32*>(w + (from + at)));
        }
        if (KIND::SECOND > 0 && half == 0) {
            const u16* const other = reinterpret_cast<const u16*>(w + (from + end + stage * KIND::SECOND));
            second = load_eager(other);
            if (KIND::SECOND == 4) second |= load_eager(other + 1) << 16;
        }
    }
    __device__ __forceinline__ void store_scales(u8* to) const {
        const int half = threadIdx.x % 2;
        to += threadIdx.x / 2 * SCALES;
#pragma unroll
        for (int i = 0; i < LOADED; i++) {
            const int word = half * LOADED + i;
            if (word * 4 < KIND::FIRST) reinterpret_cast<u32*>(to)[word] = first[i];
        }
        if (KIND::SECOND > 0 && half == 0) *reinterpret_cast<u32*>(to + KIND::FIRST) = second;
    }

    // Codes and scales of group g of a stage, of row r.
    static __device__ __forceinline__ void read(W& to, const u8* codes, int r, int g) {
        if constexpr (WORDS > 0) {
            constexpr int OF_GROUP = CodesOf::WORDS / 4;
#pragma unroll
            for (int i = 0; i < OF_GROUP; i++) {
                const u8* at = codes + place_of<WORDS>(r, g * OF_GROUP + i);
                const uint4 four = *reinterpret_cast<const uint4*>(at);
                u32* const words = to.codes.words + 4 * i;
                words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
            }
        }
        codes += TILE_O * WORDS * 16;
        if constexpr (PAIRS > 0) {
            const u8* at = codes + place_of<PAIRS>(r, g / 2) + g % 2 * 8;
            const uint2 two = *reinterpret_cast<const uint2*>(at);
            to.codes.pairs[0] = two.x, to.codes.pairs[1] = two.y;
        }
        codes += TILE_O * PAIRS * 16;
        if constexpr (ONES > 0) {
            to.codes.ones = *reinterpret_cast<const u32*>(codes + place_of<ONES>(r, g / 4) + g % 4 * 4);
        }
        codes += TILE_O * ONES * 16;
        to.raw = KIND::load(codes + r * SCALES, g, GROUPS);
    }
};

// A stage of x in the order that wgmma reads: rows of 128 bytes, whose chunks of 16 are permuted by
// the lowest bits of the row.
__device__ __forceinline__ void copy_tokens(u8* to, const f16* pieces, int t0, int padded_I, int stage) {
    constexpr int CHUNKS = DEPTH / 8, STEP = BLOCK / CHUNKS;  // tokens that all threads copy at once
    const int chunk = threadIdx.x % CHUNKS, token = threadIdx.x / CHUNKS;
    const f16* from = pieces + (i64)(t0 + token) * padded_I + stage * DEPTH + chunk * 8;
    to += chunk / 8 * X_PART;
#pragma unroll
    for (int n = 0; n < TILE_T; n += STEP) {
        if (TILE_T % STEP == 0 || token + n < TILE_T) {
            const int place = (token + n) * 128 + (chunk % 8 ^ (token + n) % 8) * 16;
            cp_async16(to + place, from + (i64)n * padded_I);
        }
    }
}

// Sums += products of 32 elements, which begin at `sub` * 32 of a stage of x.
__device__ __forceinline__ void multiply_group(Sums& sums, const Operands& w, WgmmaMatrix x, int sub) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 2; step++) {
#pragma unroll
        for (int n = 0; n < TILE_T / N; n++) {
            const int at = sub / 2 * X_PART + (sub % 2 * 2 + step) * 32 + n * N * 128;
            wgmma_m64k16(reinterpret_cast<float (&)[N / 2]>(sums[n * N / 8]), w[step],
                                wgmma_matrix(x, at));
        }
    }
    wgmma_commit();
}

// Sums += the products of a stage.
__device__ __forceinline__ void multiply_stage(Sums& sums, const u8* stage, int I) {
    const int lane = threadIdx.x % WARP, t = lane % 4, r = threadIdx.x / WARP * 16 + lane / 4;
    const WgmmaMatrix x = wgmma_matrix(stage, 0);
    Operands operands[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
        W own[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Rows::read(own[half], stage + X_BYTES, r + half * 8, u * 4 + t);
            own[half].begin(u, I, t);
        }
#pragma unroll
        for (int sub = 0; sub < 4; sub++) {
            Operands& now = operands[sub % 2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 pairs[2][2];
                own[half].pairs(pairs, sub);
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    now[step][half] = pairs[step][0];
                    now[step][2 + half] = pairs[step][1];
                }
            }
            multiply_group(sums, now, x, u * 4 + sub);
            wgmma_wait<1>();
            wgmma_operands(operands[(sub + 1) % 2]);
        }
    }
    wgmma_wait<0>();
    wgmma_operands(operands[1]);
}
#endif

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)
linear_wgmma(X_T* out, float* partial, u32* counters, const f16* pieces, const float* units,
             const u8* __restrict__ w, const B_T* __restrict__ bias, int T, int O, int I,
             int padded_I, int tiles_t, i64 w_stride, i64 out_stride, int accumulate) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ int is_last;
    let_next_start();
    // Blocks that run together share weights and tokens: GROUP_O tiles of outputs, all of tokens.
    const int tiles_o = (O + OUTPUTS - 1) / OUTPUTS;
    const int group = blockIdx.x / (GROUP_O * tiles_t), place = blockIdx.x % (GROUP_O * tiles_t);
    const int width = min(GROUP_O, tiles_o - group * GROUP_O);
    const int o0 = (group * GROUP_O + place % width) * OUTPUTS, t0 = place / width * TILE_T;
    const int stages = padded_I / DEPTH;
    const int first = (int)((i64)stages * blockIdx.y / gridDim.y);
    const int last = (int)((i64)stages * (blockIdx.y + 1) / gridDim.y);
    const auto slot = [&](int n) { return shared + n * STAGE_BYTES; };

    constexpr int AHEAD = STAGES - 1;
    Rows rows(w, w_stride, o0, O, I / GROUP);
#pragma unroll 1
    for (int n = 0; n < min(AHEAD, last - first); n++) {
        rows.copy_codes(slot(n) + X_BYTES, first + n);
        rows.load_scales(first + n);
        rows.store_scales(slot(n) + X_BYTES + CODE_BYTES);
    }
    await_previous();
#pragma unroll 1
    for (int n = 0; n < AHEAD; n++) {
        if (first + n < last) copy_tokens(slot(n), pieces, t0, padded_I, first + n);
        cp_async_commit();
    }

    Sums sums = {};
    bool is_held = false;
    int now = 0, replaced = AHEAD, held = AHEAD - 1;  // slots: of this stage, the one before, scales
#pragma unroll 1
    for (int stage = first; stage < last; stage++) {
        cp_async_wait<AHEAD - 1>();
        fence_async_proxy();
        __syncthreads();  // the stage is there, and all have read the one before, which is replaced
        if (is_held) rows.store_scales(slot(held) + X_BYTES + CODE_BYTES);
        const int next = stage + AHEAD;
        is_held = next < last;
        if (is_held) {
            copy_tokens(slot(replaced), pieces, t0, padded_I, next);
            rows.copy_codes(slot(replaced) + X_BYTES, next);
            rows.load_scales(next);
        }
        cp_async_commit();
        multiply_stage(sums, slot(now), I);
        held = replaced, replaced = now, now = now + 1 < STAGES ? now + 1 : 0;
    }
    constexpr int OF_LANE = sizeof(Sums) / sizeof(float);
    wgmma_results(reinterpret_cast<float (&)[OF_LANE]>(sums));
    if (gridDim.y > 1 && !add_parts(reinterpret_cast<float (&)[OF_LANE]>(sums), partial, counters,
                                    is_last)) {
        return;
    }
    const int lane = threadIdx.x % WARP, o = o0 + threadIdx.x / WARP * 16 / WIDTH + lane / 4;
#pragma unroll
    for (int n = 0; n < TILE_T / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = t0 + n * 8 + lane % 4 * 2 + i;
            if (token >= T) continue;
            X_T* const of_token = out + token * out_stride;
            const float lower = sums[n][i] * units[token], upper = sums[n][2 + i] * units[token];
#if GATE
            if (o >= O) continue;
            float gate = lower, up = upper;
            if (bias) gate += to_float(bias[o]), up += to_float(bias[O + o]);
            const float there = accumulate ? to_float(of_token[o]) : 0.0f;
            of_token[o] = from_float<X_T>(fmaf(activated(GATE, gate), up, there));
#else
            if (o < O) finish(of_token + o, lower, bias, o, accumulate);
            if (o + 8 < O) finish(of_token + o + 8, upper, bias, o + 8, accumulate);
#endif
        }
    }
#endif
}
