// linear_wgmma.cu: out = x @ w.T + bias for 3 to some 100 tokens, or gated pairs of these, on the tensor
// cores of sm_90. Two warps of a block copy: tokens and the codes and scales of weights go to rings of
// stages in shared memory. The others multiply, each group of four warps at its own pace: they make
// weights of codes in registers, which are operands of wgmma.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/linear_wgmma.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to
//   pieces     const  [T', I'] f16; T' is T up to whole tiles, I' is I up to whole stages; what
//                     linear_split.cu makes of x, in tiles of TILE_T tokens
//   units      const  [T'] float  what sums of a token are multiplied by
//   w          const  [O, W] u8  rows of planes of KIND (pykv/planes.py), 16-byte aligned; with a GATE
//                     [2 * O, W], gates, then what they open
//   bias       const  [O]     B_T, or null; with a GATE [2 * O]
//   partial           [parts, tiles, TILE_T * TILE_O] float, where parts > 1
//   counters          [tiles] u32, zeros
// Defines:  KIND = a kind of planes.cuh; X_T, B_T = float, f16 or bf16; GATE = 0, or of gate.cuh 1 or 2;
//           BLOCK = threads that multiply, a multiple of 128, two for each row of w of a block, TILE_O;
//           TILE_T = tokens of a block, 8, 16, 32, or a multiple of 64; STAGES of weights in shared
//           memory, and of tokens X_STAGES, no more of them; RESIDENT = blocks on an SM; GROUP_O = tiles
//           of outputs whose blocks run together; SHARED_BYTES. In cubins of sm_90 alone; elsewhere, in
//           PTX for sm_90 as well, it does nothing
// Limits:   the rows of w of a block, and with a GATE all of w, within 2^32 bytes
// Launch:   grid (tiles, parts), tiles = ceil(rows of w / TILE_O) * T' / TILE_T, block (BLOCK + 64),
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
#include "planes.cuh"
#include "wgmma.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(GATE) || !defined(BLOCK) || \
    !defined(TILE_T)
#error "linear_wgmma.cu needs KIND, X_T, B_T, GATE, BLOCK and TILE_T"
#endif
#if !defined(STAGES) || !defined(X_STAGES) || !defined(RESIDENT) || !defined(GROUP_O) || \
    !defined(SHARED_BYTES)
#error "linear_wgmma.cu needs STAGES, X_STAGES, RESIDENT, GROUP_O and SHARED_BYTES"
#endif

constexpr int COPIERS = 64;  // threads

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
using W = Weights<KIND, false>;
using CodesOf = Codes<KIND::BITS>;
constexpr int GROUPS = 8, DEPTH = GROUPS * GROUP;   // of I, in a stage
// Chunks of 16 bytes of a row's codes in a stage: of bytes or nibbles, of pairs, of ones.
constexpr int WORDS = CodesOf::WORDS / 4 * GROUPS, PAIRS = CodesOf::HAS_PAIRS * GROUPS / 2;
constexpr int ONES = CodesOf::HAS_ONES * GROUPS / 4;
constexpr int TILE_O = BLOCK / 2;                   // rows of w of a block, 16 of a warp
constexpr int N = TILE_T < 64 ? TILE_T : 64;        // tokens of a wgmma
constexpr int WIDTH = GATE ? 2 : 1, OUTPUTS = TILE_O / WIDTH;
constexpr int X_PART = TILE_T * 128;                // bytes: 64 elements of all tokens lie together
constexpr int X_BYTES = DEPTH / 64 * X_PART;
constexpr int SCALES = (KIND::FIRST + KIND::SECOND + 15) / 16 * 16;  // bytes of a row
constexpr int CODE_BYTES = TILE_O * CodesOf::BYTES * GROUPS;
constexpr int W_BYTES = CODE_BYTES + TILE_O * SCALES;
static_assert(TILE_T % N == 0 && BLOCK % 128 == 0, "whole tiles of wgmma");
static_assert(SHARED_BYTES == STAGES * W_BYTES + X_STAGES * X_BYTES, "all stages");
static_assert(X_STAGES <= STAGES, "a stage's signals are those of its weights");

using Sums = float[TILE_T / 8][4];
using Operands = u32[2][4];  // of two steps of 16 elements

// Where a chunk of a plane lies in a stage, CHUNKS of each row; plane lies behind plane. Chunks of a row
// are permuted by the row, so that what a warp reads together, the codes of 4 groups in 8 rows, lies in
// different banks.
template <int CHUNKS> __device__ __forceinline__ int place_of(int row, int chunk) {
    constexpr int ROW = CHUNKS >= 8 ? 1 : CHUNKS == 4 ? 2 : 4;
    constexpr int BIT = CHUNKS == 8 ? 4 : CHUNKS == 4 ? 2 : 1;
    return (row * CHUNKS + (chunk ^ (row & ROW ? BIT : 0))) * 16;
}

// What a block copies and reads of its rows of w.
struct Rows {
    // Bytes of a copy of scales, which begin behind codes of any number of groups.
    static constexpr int ALL = CodesOf::BYTES | KIND::FIRST | 16, AT_ONCE = ALL & -ALL;
    static_assert(AT_ONCE >= 4 && KIND::SECOND <= 4, "what cp.async copies");

    const u8* w;         // row o0, or its gate
    u32 stride, opened;  // bytes from a row to the next, and from a gate to what it opens
    int last, G;         // how many outputs follow the first; groups of a row
    int thread;          // of those that copy

    __device__ __forceinline__ Rows(const u8* w, i64 w_stride, int o0, int O, int G)
        : w(w + min(o0, O - 1) * w_stride), stride((u32)w_stride), opened(O * (u32)w_stride),
          last(max(O - 1 - o0, 0)), G(G), thread(threadIdx.x - BLOCK) {}

    // Where row r of the block begins: with a GATE 8 gates are followed by what they open. Past the last
    // output that one again, whose sums are dropped.
    __device__ __forceinline__ u32 row(int r) const {
        return min(output_of(r), last) * stride + (opens(r) ? opened : 0);
    }
    static __device__ __forceinline__ int output_of(int r) {
        return GATE ? r / 16 * 8 + r % 8 : r;
    }
    static __device__ __forceinline__ bool opens(int r) { return GATE && r % 16 >= 8; }

    // copy(place, rows behind the first) for each row that is this thread's, PER_ROW threads sharing
    // one; `from` is the place in row 0. These rows are STEP apart, a power of two, and the first is
    // below that: where all outputs of the block exist, its offset and that of a multiple of STEP add
    // up, so that a copy takes one addition.
    template <int PER_ROW, typename Copy>
    __device__ __forceinline__ void each_row(const u8* from, Copy copy) const {
        constexpr int STEP = COPIERS / PER_ROW;
        const int first = thread / PER_ROW;
        if (last >= OUTPUTS - 1) {
            const u8* const own = from + row(first);
            const u8* const opened_by_own = own + opened;
#pragma unroll
            for (int r = 0; r < TILE_O; r += STEP) {
                copy((opens(r) ? opened_by_own : own) + (u64)stride * output_of(r), r);
            }
        } else {
#pragma unroll 1
            for (int r = 0; r < TILE_O; r += STEP) copy(from + row(first + r), r);
        }
    }

    template <int CHUNKS> __device__ __forceinline__ void copy_plane(u8*& to, u32& plane,
                                                                     int stage) const {
        if constexpr (CHUNKS > 0) {
            const int chunk = thread % CHUNKS;
            const int end = (G * CHUNKS + GROUPS - 1) / GROUPS - 1;  // past the end that one again
            const u8* const from = w + (plane + min(stage * CHUNKS + chunk, end) * 16);
            u8* const own = to + place_of<CHUNKS>(thread / CHUNKS, chunk);  // as of all its rows
            each_row<CHUNKS>(from, [&](const u8* row, int r) {
                cp_async16(own + r * CHUNKS * 16, row);
            });
            to += TILE_O * CHUNKS * 16, plane += G * CHUNKS * 16 / GROUPS;
        }
    }

    // Past the end of a row its last scales again, and zeros behind these. Scales of two bytes are
    // copied with those of the next stage, or of the one before.
    __device__ __forceinline__ void copy_scales(u8* to, u32 plane, int stage) const {
        constexpr int OF_ROW = KIND::FIRST / AT_ONCE;  // copies, each by a thread
        constexpr int PER_ROW = OF_ROW == 3 ? 4 : OF_ROW;
        const int bytes = G * KIND::FIRST / GROUPS, end = (bytes - 1) / AT_ONCE * AT_ONCE;
        const int at = thread % PER_ROW * AT_ONCE;
        if (PER_ROW == OF_ROW || at < KIND::FIRST) {
            u8* const own = to + thread / PER_ROW * SCALES + at;
            each_row<PER_ROW>(w + (plane + min(stage * KIND::FIRST + at, end)),
                              [&](const u8* row, int r) { cp_async<AT_ONCE>(own + r * SCALES, row); });
        }
        if constexpr (KIND::SECOND > 0) {
            u8* const own = to + thread * SCALES + KIND::FIRST;
            each_row<1>(w + (plane + bytes + stage * KIND::SECOND / 4 * 4),
                        [&](const u8* row, int r) { cp_async<4>(own + r * SCALES, row); });
        }
    }

    __device__ __forceinline__ void copy(u8* to, int stage) const {
        u32 plane = 0;
        copy_plane<WORDS>(to, plane, stage);
        copy_plane<PAIRS>(to, plane, stage);
        copy_plane<ONES>(to, plane, stage);
        copy_scales(to, plane, stage);
    }

    // Codes and scales of group g of a stage that is odd or not, of row r.
    static __device__ __forceinline__ void read(W& to, const u8* codes, int r, int g, int is_odd) {
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
        to.raw = raw_of<KIND>(codes + r * SCALES, g, is_odd);
    }
    template <typename K>
    static __device__ __forceinline__ typename K::Raw raw_of(const u8* scales, int g, int is_odd) {
        typename K::Raw raw = K::load(scales, g, GROUPS);
        if constexpr (K::SECOND == 2) raw.d = two_bytes(scales + K::FIRST + is_odd * 2);
        return raw;
    }
};

// Rings of stages in shared memory. Stage n, from 0 on, is filled when all threads that copy have
// arrived with what they copy, and emptied when all warps that multiply have arrived.
struct Rings {
    u8* shared;
    u64 *filled, *emptied;  // STAGES each

    // Tokens come first: wgmma reads them at multiples of 1024.
    __device__ __forceinline__ u8* tokens(int n) const { return shared + n % X_STAGES * X_BYTES; }
    __device__ __forceinline__ u8* weights(int n) const {
        return shared + X_STAGES * X_BYTES + n % STAGES * W_BYTES;
    }
    __device__ __forceinline__ void copy_tokens(const u8* from, int n) const {
        mbarrier_arrive_expecting(filled + n % STAGES, X_BYTES);
        copy_bulk(tokens(n), from + (i64)n * X_BYTES, X_BYTES, filled + n % STAGES);
    }
    __device__ __forceinline__ void copy_weights(const Rows& rows, int first, int n) const {
        rows.copy(weights(n), first + n);
        mbarrier_arrive_behind_copies(filled + n % STAGES);
    }
    __device__ __forceinline__ static void await(u64* signals, int n) {
        mbarrier_wait(signals + n % STAGES, n / STAGES % 2);
    }
};

// What threads do that copy: `count` stages from `first` on. They ask for weights before the kernel
// ahead has ended.
__device__ __forceinline__ void copy_stages(const Rings& rings, const Rows& rows, const f16* pieces,
                                            int t0, int padded_I, int first, int count) {
    const u8* const tile = reinterpret_cast<const u8*>(pieces + (i64)t0 * padded_I);
    const u8* const x = tile + (i64)first * X_BYTES;
#pragma unroll 1
    for (int n = 0; n < min(STAGES, count); n++) rings.copy_weights(rows, first, n);
    await_previous();
    if (rows.thread == 0) {
        for (int n = 0; n < min(X_STAGES, count); n++) rings.copy_tokens(x, n);
    }
#pragma unroll 1
    for (int n = 0; n < count - X_STAGES; n++) {
        Rings::await(rings.emptied, n);
        if (rows.thread == 0) rings.copy_tokens(x, n + X_STAGES);
        if (n + STAGES < count) rings.copy_weights(rows, first, n + STAGES);
    }
    cp_async_wait<0>();  // no thread ends ahead of its copies
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

// Sums += the products of stage n, of which those of the last 32 elements may yet go on. A lane has
// rows r and r + 8, and groups t and t + 4.
__device__ __forceinline__ void multiply_stage(Sums& sums, Operands (&operands)[2], const Rings& rings,
                                               int n, int is_odd, int r, int t, int I) {
    const WgmmaMatrix x = wgmma_matrix(rings.tokens(n), 0);
#pragma unroll
    for (int u = 0; u < 2; u++) {
        W own[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Rows::read(own[half], rings.weights(n), r + half * 8, u * 4 + t, is_odd);
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
            if (u + sub == 0) {  // the stage before is over
                __syncwarp();
                mbarrier_arrive(rings.emptied + (n + STAGES - 1) % STAGES, n > 0 && r % 8 + t == 0);
            }
        }
    }
}

// Sums += the products of `count` stages from `first` on.
__device__ __forceinline__ void multiply_stages(Sums& sums, const Rings& rings, int first, int count,
                                                int I) {
    const int lane = threadIdx.x % WARP, t = lane % 4;
    const int row = threadIdx.x / WARP * 16 + lane / 4;
    // Places in stages are made once, where registers are left for them.
    const int r = CodesOf::HAS_PAIRS && CodesOf::HAS_ONES ? row : opaque(row);
    Operands operands[2] = {};
#pragma unroll 1
    for (int n = 0; n < count; n++) {
        Rings::await(rings.filled, n);
        multiply_stage(sums, operands, rings, n, (first + n) % 2, r, t, I);
    }
    wgmma_wait<0>();
    wgmma_operands(operands[1]);
    wgmma_results(reinterpret_cast<float (&)[sizeof(Sums) / sizeof(float)]>(sums));
}

// Stores a lane's outputs of row `o` of w, or of o and o + 8: of every eight tokens of the tile the first
// two from `out` and `units` on, of which `left` exist. What all outputs need is loaded ahead of the
// first store, behind which the compiler moves no load.
__device__ __forceinline__ void store(X_T* out, const Sums& sums, const float* units, const B_T* bias,
                                      int o, int O, int left, i64 out_stride, int accumulate) {
    if (o >= O) return;
    float2 of_tokens[TILE_T / 8];
#pragma unroll
    for (int n = 0; n < TILE_T / 8; n++) {
        of_tokens[n] = *reinterpret_cast<const float2*>(units + n * 8);
    }
#if GATE  // x + -0 is x, whatever its sign
    const float of_gate = bias ? to_float(bias[o]) : -0.0f;
    const float of_opened = bias ? to_float(bias[O + o]) : -0.0f;
#endif
    const i64 step = opaque_pointer(out_stride);  // a token further is an addition, not a product
    X_T* at = out + o;
#pragma unroll
    for (int n = 0; n < TILE_T / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++, at += i < 2 ? step : 7 * step) {
            const bool exists = n * 8 + i < left;
            const float unit = i ? of_tokens[n].y : of_tokens[n].x;
            const float lower = sums[n][i] * unit, upper = sums[n][2 + i] * unit;
#if GATE
            const float gate = activated(GATE, lower + of_gate), up = upper + of_opened;
            const float there = accumulate && exists ? to_float(*at) : 0.0f;
            if (exists) *at = from_float<X_T>(fmaf(gate, up, there));
#else
            if (!exists) continue;
            finish(at, lower, bias, o, accumulate);
            if (o + 8 < O) finish(at + 8, upper, bias, o + 8, accumulate);
#endif
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(BLOCK + COPIERS, RESIDENT)
linear_wgmma(X_T* out, float* partial, u32* counters, const f16* pieces, const float* units,
             const u8* __restrict__ w, const B_T* __restrict__ bias, int T, int O, int I,
             int padded_I, int tiles_t, i64 w_stride, i64 out_stride, int accumulate) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 filled[STAGES], emptied[STAGES];
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
    if (threadIdx.x < STAGES) {
        mbarrier_init(filled + threadIdx.x, COPIERS + 1);
        mbarrier_init(emptied + threadIdx.x, BLOCK / WARP);
        fence_async_proxy();  // bulk copies find what they arrive at
    }
    __syncthreads();
    const Rings rings = {shared, filled, emptied};
    if (threadIdx.x >= BLOCK) {
        const Rows rows(w, w_stride, o0, O, I / GROUP);
        copy_stages(rings, rows, pieces, t0, padded_I, first, last - first);
        return;
    }
    await_previous();
    Sums sums = {};
    multiply_stages(sums, rings, first, last - first, I);
    constexpr int OF_LANE = sizeof(Sums) / sizeof(float);
    if (gridDim.y > 1 && !add_parts(reinterpret_cast<float (&)[OF_LANE]>(sums), partial, counters,
                                    is_last)) {
        return;
    }
    const int lane = threadIdx.x % WARP, o = o0 + threadIdx.x / WARP * 16 / WIDTH + lane / 4;
    store(out + (t0 + lane % 4 * 2) * out_stride, sums, units + t0 + lane % 4 * 2, bias, o, O,
          T - t0 - lane % 4 * 2, out_stride, accumulate);
#endif
}
