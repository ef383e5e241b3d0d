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
//           ROWS = 1, 2, 4 or 8, and OUTS, outputs of a warp, with ROWS * OUTS up to 32
// Launch:   gemv    grid (ceil(O / (OUTS * BLOCK / 32 / parts)), ceil(T / ROWS)), block (BLOCK);
//                   parts * ROWS * 4608 bytes of dynamic shared memory, parts a power of two up to
//                   BLOCK / 32
//           expand  grid (T, ceil(I / 4 / BLOCK)), block (BLOCK)
// Traffic:  gemv    O * W bytes of w for each ROWS rows of x, which stay in L2
//           expand  T * W + T * I * sizeof(X_T) bytes
// Order:    gemv    codes times x in float, fused, over a group of 32 or its halves, these times
//                   their scales; the order is fixed by the launch, so two runs agree in every bit
//           expand  products and the sum rounded to float each, as the gguf package does, then the
//                   product with scale, then once more to X_T
#include "epilogue.cuh"
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

#else
#error "block_linear.cu needs ROWS and OUTS"
#endif
