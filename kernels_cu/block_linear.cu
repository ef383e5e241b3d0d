// block_linear.cu: out = x @ w.T + bias with weights as the blocks of a GGUF file; rows of them.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/block_linear.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to. Of `expand` [T, I], contiguous
//   x          const  [T, I]  X_T at row stride x_stride; base and rows 16-byte aligned
//   w          const  [O, W] u8  rows of planes of KIND (pykv/planes.py), 16-byte aligned
//   bias       const  [O]     B_T, or null
//   ids        const  [T] int32, or null, which stands for 0 .. T-1; rows of w, outside 0 .. O-1: a
//                     row of zeros
// Defines:  KIND = Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS or
//           MXFP4; X_T, B_T = float, f16 or bf16; BLOCK = threads
//           ROWS = 1, 2, 4 or 8, and OUTS, outputs of a warp, with ROWS * OUTS up to 32, compile
//           `gemv` and `expand`; TILE_T = tokens of a block, a multiple of 8, K_WARPS = warps that
//           share outputs, 1 or all, and OWN_TILES, 16 outputs each, of a warp compile `gemm`,
//           which does nothing below sm_75
// Launch:   gemv    grid (ceil(O / (OUTS * BLOCK / 32 / parts)), ceil(T / ROWS)), block (BLOCK);
//                   parts * ROWS * 4608 bytes of dynamic shared memory, parts a power of two up to
//                   BLOCK / 32
//           expand  grid (T, ceil(I / 4 / BLOCK)), block (BLOCK)
//           gemm    grid (ceil(O / (16 * OWN_TILES * BLOCK / 32 / K_WARPS)), ceil(T / TILE_T)),
//                   block (BLOCK)
// Traffic:  gemv    O * W bytes of w for each ROWS rows of x, which stay in L2
//           expand  T * W + T * I * sizeof(X_T) bytes
//           gemm    O * W bytes of w for each TILE_T rows of x; x for each block of outputs, from L2
// Order:    gemv    codes times x in float, fused, over a group of 32 or its halves, these times
//                   their scales; the order is fixed by the launch, so two runs agree in every bit
//           gemm    products of codes and x exact, but for the last bits of a float x; sums of a
//                   group by tensor cores, of groups in float, fused
//           expand  products and the sum rounded to float each, as the gguf package does, then the
//                   product with scale, then once more to X_T
#include "epilogue.cuh"
#include "mma.cuh"
#include "planes.cuh"
#include "reduce.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(BLOCK)
#error "block_linear.cu needs KIND, X_T, B_T and BLOCK"
#endif

using K = KIND;
using CodesOf = Codes<K::BITS>;
constexpr int GROUP = 32;

#if defined(ROWS) && defined(OUTS)

// A lane takes a group of OUTS rows of weights: 16-byte loads of nibbles, 512 bytes a warp. Its 32
// elements of x would be 32 lines apart for each load of a warp, so a block brings them to shared
// memory first, where a pitch of 36 floats lets eight lanes read 16 bytes each without a conflict.
// `parts` warps share outputs and split I; the others of the block have outputs of their own.
constexpr int WARPS = BLOCK / WARP;
constexpr int SUMS = ROWS * OUTS;
constexpr int SLICE = WARP * GROUP;  // of I, that a warp multiplies at a time
constexpr int PITCH = GROUP + 4;
static_assert(SUMS <= WARP && (SUMS & (SUMS - 1)) == 0, "a lane for each sum");

// Elements i0 .. i0 + parts * SLICE - 1 of ROWS rows of x; zeros outside.
__device__ __forceinline__ void stage(float* staged, const X_T* x, i64 x_stride, int t0, int T,
                                      int i0, int I, int parts) {
    for (int piece = threadIdx.x; piece < parts * ROWS * (SLICE / 4); piece += BLOCK) {
        const int row = piece / (SLICE / 4), at = piece % (SLICE / 4) * 4;
        const int t = t0 + row % ROWS, i = i0 + row / ROWS * SLICE + at;
        float* to = staged + row * (WARP * PITCH) + at / GROUP * PITCH + at % GROUP;
        if (t >= T || i >= I) {
            *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
        } else if constexpr (SAME<X_T, float>) {
            cp_async16(to, x + t * x_stride + i);
        } else {
            float values[4];
            load4(values, x + t * x_stride + i);
            store4(to, values);
        }
    }
    cp_async_commit();
    cp_async_wait<0>();
}

// sums[r * OUTS + o] += the product of a group of weights and of the lane's elements of row r.
__device__ __forceinline__ void multiply(float (&sums)[SUMS], const CodesOf (&codes)[OUTS],
                                         const K::Raw (&raw)[OUTS], int g, const float* x) {
    float dots[SUMS], total[ROWS];
    float d[OUTS][K::HALVES], m[OUTS][K::HALVES];
#pragma unroll
    for (int o = 0; o < OUTS; o++) K::decode(d[o], m[o], raw[o], g);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half == 0 || K::HALVES == 2) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) dots[i] = 0.0f;
#pragma unroll
            for (int r = 0; r < ROWS; r++) total[r] = 0.0f;
        }
#pragma unroll
        for (int s = 0; s < 4; s++) {
            float values[ROWS][4];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                load4(values[r], x + r * (WARP * PITCH) + half * 16 + s * 4);
                if (K::HAS_ADDEND) {
                    total[r] += (values[r][0] + values[r][1]) + (values[r][2] + values[r][3]);
                }
            }
#pragma unroll
            for (int o = 0; o < OUTS; o++) {
                const CodesOf& c = codes[o];
                const u32 four = quad<K>(c.word(half, s), c.pairs[half], c.ones, half, s);
#pragma unroll
                for (int b = 0; b < 4; b++) {
                    const float code = byte_to_float(four, b, (float)K::ZERO);
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        dots[r * OUTS + o] = fmaf(code, values[r][b], dots[r * OUTS + o]);
                    }
                }
            }
        }
        if (half == 1 || K::HALVES == 2) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int o = 0; o < OUTS; o++) {
                    const int i = r * OUTS + o, h = K::HALVES == 2 ? half : 0;
                    sums[i] = fmaf(d[o][h], dots[i], sums[i]);
                    if (K::HAS_ADDEND) sums[i] = fmaf(m[o][h], total[r], sums[i]);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
gemv(X_T* __restrict__ out, const X_T* __restrict__ x, const u8* __restrict__ w,
     const B_T* __restrict__ bias, int T, int O, int I, int W, i64 x_stride, i64 out_stride,
     int parts, int accumulate) {
    extern __shared__ __align__(128) float staged[];
    __shared__ float partial[WARPS][SUMS];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int part = warp % parts;
    const int o0 = (blockIdx.x * (WARPS / parts) + warp / parts) * OUTS;
    const int t0 = blockIdx.y * ROWS;
    const int G = I / GROUP;

    float sums[SUMS] = {};
#pragma unroll 1
    for (int i0 = 0; i0 < I; i0 += parts * SLICE) {
        // Past the edges the last row and group are read again; x is zero there, or the sum dropped.
        const int g = min((i0 + part * SLICE) / GROUP + lane, G - 1);
        CodesOf codes[OUTS];
        K::Raw raw[OUTS];
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const u8* row = w + (i64)min(o0 + o, O - 1) * W;
            codes[o].load(row, g, G);
            raw[o] = K::load(row + (i64)G * CodesOf::BYTES, g, G);
        }
        if (i0 > 0) __syncthreads();  // all have read the previous slices
        stage(staged, x, x_stride, t0, T, i0, I, parts);
        __syncthreads();
        multiply(sums, codes, raw, g, staged + part * ROWS * (WARP * PITCH) + lane * PITCH);
    }

    float sum = warp_sums(sums);  // lane l: row l / OUTS of x, output l % OUTS
    if (parts > 1) {
        if (lane < SUMS) partial[warp][lane] = sum;
        __syncthreads();
        if (part > 0) return;
        sum = 0.0f;
        if (lane < SUMS) {
            for (int p = 0; p < parts; p++) sum += partial[warp + p][lane];
        }
    }
    const int o = o0 + lane % OUTS, t = t0 + lane / OUTS;
    if (lane < SUMS && o < O && t < T) finish(out + t * out_stride + o, sum, bias, o, accumulate);
}

// --- Rows ----------------------------------------------------------------------------------------

// A thread writes a quad.
extern "C" __global__ void __launch_bounds__(BLOCK)
expand(X_T* __restrict__ out, const u8* __restrict__ w, const int* __restrict__ ids, int O, int I,
       int W, float scale) {
    const int i = (blockIdx.y * BLOCK + threadIdx.x) * 4;
    if (i >= I) return;
    const int id = ids ? ids[blockIdx.x] : blockIdx.x;
    float values[4] = {};
    if (id >= 0 && id < O) {
        const int G = I / GROUP, g = i / GROUP, half = i % GROUP / 16, s = i % 16 / 4;
        const u8* row = w + (i64)id * W;
        const u8* high = row + (i64)G * CodesOf::WORDS * 4;
        const int place = (g * CodesOf::WORDS + (K::BITS == 8 ? 4 * half : 0) + s) * 4;
        const u32 word = CodesOf::WORDS ? *reinterpret_cast<const u32*>(row + place) : 0u;
        CodesOf c{};  // kinds without pairs load none
        c.load_high(high, g, G);
        float d[K::HALVES], m[K::HALVES];
        K::decode(d, m, K::load(row + (i64)G * CodesOf::BYTES, g, G), g);
        const int h = K::HALVES == 2 ? half : 0;
        const u32 codes = quad<K>(word, half ? c.pairs[1] : c.pairs[0], c.ones, half, s);
#pragma unroll
        for (int b = 0; b < 4; b++) {
            values[b] = __fmul_rn(d[h], byte_to_float(codes, b, (float)K::ZERO));
            if (K::HAS_ADDEND) values[b] = __fadd_rn(values[b], m[h]);
            values[b] = __fmul_rn(values[b], scale);
        }
    }
    store4(out + (i64)blockIdx.x * I + i, values);
}

#elif defined(TILE_T) && defined(K_WARPS) && defined(OWN_TILES)

// --- A tile of tokens by outputs, on tensor cores ------------------------------------------------

#if __CUDA_ARCH__ >= 750

// Weights are operand A, straight from global memory: lane 4 * g + t takes word t of a group of
// rows g and g + 8, whose bytes are elements 4 t .. 4 t + 3 of either half. Codes are exact in f16.
// x is operand B: in shared memory a lane's elements of both halves are 16 bytes, as one f16, or for
// float as two whose sum is x to 22 bits. A power of two for each token keeps x below 2^15; if it
// grows beyond, the power shrinks, and the sums with it. K_WARPS warps share outputs and split I.
constexpr int WARPS = BLOCK / WARP;
constexpr int PIECES = SAME<X_T, float> ? 2 : 1;
constexpr int SLICE = 2 * GROUP;  // of I, that a warp multiplies at a time
constexpr int QUADS = SLICE / 4;  // lanes that bring a slice of a token
constexpr int PITCH = PIECES * SLICE * 2 + 64;  // bytes: two tokens that follow are 16 banks apart
constexpr int N_TILES = TILE_T / 8;
constexpr int OWN_O = 16 * OWN_TILES;                // outputs of a warp
constexpr int TILE_O = OWN_O * (WARPS / K_WARPS);    // and of a block
constexpr float MOST = 32768.0f;                     // that x times its power stays below
static_assert(TILE_T % 8 == 0 && (K_WARPS == 1 || K_WARPS == WARPS), "whole tiles; one of outputs");

struct Slice {  // of x: what a warp multiplies with
    u8 rows[TILE_T][PITCH];
    float totals[TILE_T][2 * 2];  // of groups and their halves
    float scale[TILE_T], shrunk[TILE_T];
};

// The power of two with which x of magnitude `largest` stays below MOST, given the last one.
__device__ __forceinline__ float power_for(float largest, float last) {
    if (largest * last < MOST) return last;
    const int exponent = (int)(__float_as_uint(largest) >> 23) - 127;  // 2^exponent <= largest
    return __uint_as_float((u32)(127 + min(11 - exponent, 126)) << 23);
}

// Bring elements i0 .. of all slices of TILE_T tokens, zeros outside, and find their powers.
__device__ __forceinline__ bool stage(Slice* slices, const X_T* x, i64 x_stride, int t0, int T,
                                      int i0, int I) {
    bool any_shrunk = false;
#pragma unroll 2
    for (int item = threadIdx.x; item < K_WARPS * TILE_T * QUADS; item += BLOCK) {
        const int quad_of = item % QUADS, token = item / QUADS % TILE_T;
        Slice& slice = slices[item / QUADS / TILE_T];
        const int t = t0 + token, i = i0 + item / QUADS / TILE_T * SLICE + quad_of * 4;
        float v[4] = {};
        if (t < T && i < I) load4(v, x + t * x_stride + i);
        float largest = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (fabsf(v[j]) < INF) largest = fmaxf(largest, fabsf(v[j]));
        }
        largest = group_max<QUADS>(largest);
        const float last = slice.scale[token], power = power_for(largest, last);
        __syncwarp();  // all have read the last one
        if (quad_of == 0) {
            slice.scale[token] = power;
            slice.shrunk[token] = power / last;
        }
        any_shrunk |= power != last;
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] *= power;
        const float total = group_sum<4>((v[0] + v[1]) + (v[2] + v[3]));
        if (quad_of % 4 == 0) slice.totals[token][quad_of / 4] = total;
        u8* to = slice.rows[token] + quad_of / 8 * (PIECES * 64) + quad_of % 4 * 16 +
                 quad_of / 4 % 2 * 8;
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            float lower[2] = {v[0], v[1]}, upper[2] = {v[2], v[3]};
            const u32 a = split_halves<f16>(lower), b = split_halves<f16>(upper);
            *reinterpret_cast<uint2*>(to + p * 64) = uint2{a, b};
            const float rest[4] = {lower[0], lower[1], upper[0], upper[1]};
            // What an infinity leaves is a NaN: the first piece says it all.
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = fabsf(rest[j]) < INF ? rest[j] : 0.0f;
        }
    }
    return any_shrunk;
}

// What a lane holds of a group of one row of weights.
struct Weights {
    u32 words[K::BITS == 8 ? 2 : 1];
    CodesOf high;
    K::Raw raw;

    __device__ __forceinline__ void load(const u8* row, int g, int G, int t) {
        if (CodesOf::WORDS) {
            const u32* at = reinterpret_cast<const u32*>(row) + (i64)g * CodesOf::WORDS + t;
            words[0] = at[0];
            if (K::BITS == 8) words[K::BITS == 8] = at[4];
        }
        high.load_high(row + (i64)G * CodesOf::WORDS * 4, g, G);
        raw = K::load(row + (i64)G * CodesOf::BYTES, g, G);
    }

    // Elements 4 t .. 4 t + 3 of a half, less what stands for zero, as two pairs of f16.
    __device__ __forceinline__ void pairs(u32 (&to)[2], int half, int t) const {
        constexpr u32 BASE = 0x64006400u;  // 1024, whose lowest bit is 1
        constexpr u32 ZERO = BASE + K::ZERO * 0x10001u;
        const u32 word = CodesOf::WORDS ? words[K::BITS == 8 ? half : 0] : 0u;
        const u32 four = quad<K>(word, high.pairs[half], high.ones, half, t);
        to[0] = sub_f16x2(__byte_perm(four, BASE, 0x5150), ZERO);
        to[1] = sub_f16x2(__byte_perm(four, BASE, 0x5352), ZERO);
    }
};

using Sums = float[OWN_TILES][N_TILES][4];

// Sums of a warp's outputs and all tokens += the products of a group.
__device__ __forceinline__ void multiply(Sums& sums, const Weights (&w)[OWN_TILES][2], int g,
                                         const Slice& slice, int group) {
    const int lane = threadIdx.x % WARP, row = lane / 4, t = lane % 4;
    u32 a[OWN_TILES][2][2][2];  // by tile, row, half
    float d[OWN_TILES][2][K::HALVES], m[OWN_TILES][2][K::HALVES];
#pragma unroll
    for (int o = 0; o < OWN_TILES; o++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            K::decode(d[o][r], m[o][r], w[o][r].raw, g);
            w[o][r].pairs(a[o][r][0], 0, t);
            w[o][r].pairs(a[o][r][1], 1, t);
        }
    }
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
        uint4 b[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            b[p] = *reinterpret_cast<const uint4*>(slice.rows[n * 8 + row] +
                                                   (group * PIECES + p) * 64 + t * 16);
        }
        float total[2][2] = {};  // by token of this lane, half
        if (K::HAS_ADDEND) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float* of_token = slice.totals[n * 8 + t * 2 + i] + group * 2;
                total[i][0] = of_token[0], total[i][1] = of_token[1];
                if (K::HALVES == 1) total[i][0] += total[i][1];
            }
        }
#pragma unroll
        for (int o = 0; o < OWN_TILES; o++) {
            float part[K::HALVES][4] = {};
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    mma_16x16<f16>(part[K::HALVES == 2 ? half : 0], a[o][0][half][0],
                                   a[o][1][half][0], a[o][0][half][1], a[o][1][half][1],
                                   half ? b[p].z : b[p].x, half ? b[p].w : b[p].y);
                }
            }
#pragma unroll
            for (int h = 0; h < K::HALVES; h++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& sum = sums[o][n][i];
                    sum = fmaf(d[o][i / 2][h], part[h][i], sum);
                    if (K::HAS_ADDEND) sum = fmaf(m[o][i / 2][h], total[i % 2][h], sum);
                }
            }
        }
    }
}

#endif

constexpr int RESIDENT = K_WARPS > 1 ? 4 : 2;  // blocks on an SM that registers allow

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)
gemm(X_T* __restrict__ out, const X_T* __restrict__ x, const u8* __restrict__ w,
     const B_T* __restrict__ bias, int T, int O, int I, int W, i64 x_stride, i64 out_stride,
     int accumulate) {
#if __CUDA_ARCH__ >= 750
    __shared__ __align__(16) Slice slices[K_WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = lane / 4, t = lane % 4;
    const int o0 = blockIdx.x * TILE_O + warp / K_WARPS * OWN_O;
    const int t0 = blockIdx.y * TILE_T;
    const int G = I / GROUP;
    Slice& own = slices[warp % K_WARPS];

    for (int i = threadIdx.x; i < K_WARPS * TILE_T; i += BLOCK) {
        slices[i / TILE_T].scale[i % TILE_T] = 0x1p126f;
    }
    __syncthreads();
    Sums sums = {};
#pragma unroll 1
    for (int i0 = 0; i0 < I; i0 += K_WARPS * SLICE) {
        // Past the edges the last row and group are read again; x is zero there, or the sum dropped.
        const int first = i0 / GROUP + warp % K_WARPS * 2;
        Weights weights[2][OWN_TILES][2];
#pragma unroll
        for (int group = 0; group < 2; group++) {
#pragma unroll
            for (int i = 0; i < OWN_TILES * 2; i++) {
                const int o = min(o0 + i * 8 + row, O - 1);
                weights[group][i / 2][i % 2].load(w + (i64)o * W, min(first + group, G - 1), G, t);
            }
        }
        const bool shrunk = stage(slices, x, x_stride, t0, T, i0, I);
        if (__syncthreads_or(shrunk)) {
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
#pragma unroll
                for (int i = 0; i < OWN_TILES * 4; i++) {
                    sums[i / 4][n][i % 4] *= own.shrunk[n * 8 + t * 2 + i % 2];
                }
            }
        }
#pragma unroll
        for (int group = 0; group < 2; group++) {
            multiply(sums, weights[group], min(first + group, G - 1), own, group);
        }
        __syncthreads();  // all have read the slices
    }

    // Warps that share outputs leave their sums where x was; the first of them adds and writes.
    float (*const shared_sums)[OWN_O] = reinterpret_cast<float (*)[OWN_O]>(own.rows[0]);
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
#pragma unroll
        for (int i = 0; i < OWN_TILES * 4; i++) {
            const int token = n * 8 + t * 2 + i % 2, o = i / 4 * 16 + i % 4 / 2 * 8 + row;
            float& sum = sums[i / 4][n][i % 4];
            sum /= own.scale[token];
            if (K_WARPS > 1) shared_sums[token][o] = sum;
            if (K_WARPS == 1 && t0 + token < T && o0 + o < O) {
                finish(out + (t0 + token) * out_stride + o0 + o, sum, bias, o0 + o, accumulate);
            }
        }
    }
    if (K_WARPS == 1) return;
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_T * TILE_O; i += BLOCK) {
        const int token = i / TILE_O, o = i % TILE_O;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < K_WARPS; k++) {
            sum += reinterpret_cast<const float (*)[OWN_O]>(slices[k].rows[0])[token][o];
        }
        const int at = blockIdx.x * TILE_O + o;
        if (t0 + token < T && at < O) {
            finish(out + (t0 + token) * out_stride + at, sum, bias, at, accumulate);
        }
    }
#endif
}

#else
#error "block_linear.cu needs ROWS and OUTS, or TILE_T, K_WARPS and OWN_TILES"
#endif
