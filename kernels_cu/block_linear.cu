// block_linear.cu: products with weights as the blocks of a GGUF file or as floats, whose rows may be
// normalised before and gated behind; rows of blocks.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/block_linear.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to. Of `expand` [T, I], contiguous
//   x          const  [T, I]  X_T at row stride x_stride; base and rows 16-byte aligned
//   w          const  [R, W] u8  rows of planes of KIND (pykv/planes.py) or of floats, W bytes each,
//                     16-byte aligned; R = O, or with a gate 2 * O: gates, then what they open
//   bias       const  [R]     B_T, or null
//   norm       const  [I] float or null: x is x / sqrt(mean(x^2) + eps) * norm, row by row
//   ids        const  [T] int32, or null, which stands for 0 .. T-1; rows of w, outside 0 .. O-1: a
//                     row of zeros
// Scalars:  gate = 0, or 1 and 2: out = silu(a) * b and gelu(a) * b, a and b rows j and O + j of
//           w times x, plus bias; what `out` holds is added behind that
// Defines:  KIND = Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS or
//           MXFP4, or F32, F16 or BF16; X_T, B_T = float, f16 or bf16; BLOCK = threads
//           EXPAND compiles `expand`, of blocks
//           ROWS = 1, 2, 4 or 8, and OUTS, rows of w of a warp, even, with ROWS * OUTS up to 32,
//           compile `gemv`
// Launch:   gemv    grid (ceil(R / (OUTS * BLOCK / 32 / parts)), ceil(T / ROWS)), block (BLOCK);
//                   parts * ROWS * 4608 bytes of dynamic shared memory, parts a power of two up to
//                   BLOCK / 32
//           expand  grid (T, ceil(I / 4 / BLOCK)), block (BLOCK)
//           gemv may start early: before the kernel ahead has ended it reads w, bias and norm alone,
//           which are __restrict__; x and out are not, so that no load of them moves ahead of the
//           wait, or goes through the read-only path
// Traffic:  gemv    R * W bytes of w for each ROWS rows of x, which stay in L2
//           expand  T * W + T * I * sizeof(X_T) bytes
// Order:    gemv    codes times x in float, fused, over 32 elements of a lane or their halves, these
//                   times their scales; the order is fixed by the launch, so two runs agree in
//                   every bit
//           norm    x times norm is multiplied; the sum times the factor of the row, whose squares
//                   are summed in float
//           expand  products and the sum rounded to float each, as the gguf package does, then the
//                   product with scale, then once more to X_T
// Stack: 8 bytes, for one register more than the 128 that ptxas gives gemv of Q4_K on sm_120
#include "gate.cuh"
#include "plain.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(BLOCK)
#error "block_linear.cu needs KIND, X_T, B_T and BLOCK"
#endif

using K = KIND;
constexpr int GROUP = 32;

#if defined(EXPAND)

// A thread writes a quad.
extern "C" __global__ void __launch_bounds__(BLOCK)
expand(X_T* __restrict__ out, const u8* __restrict__ w, const int* __restrict__ ids, int O, int I,
       int W, float scale) {
    using CodesOf = Codes<K::BITS>;
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

#elif defined(ROWS) && defined(OUTS)
#include "block_gemv.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
gemv(X_T* out, const X_T* x, const u8* __restrict__ w,
     const B_T* __restrict__ bias, const float* __restrict__ norm, int T, int O, int I, int W,
     i64 x_stride, i64 out_stride, int parts, int accumulate, int gate, float eps) {
    extern __shared__ __align__(128) float staged[];
    __shared__ WarpSums shared;
    let_next_start();
    gemv_tile(staged, shared, out, x, w, bias, norm, T, O, I, W, x_stride, out_stride, parts,
              accumulate, gate, eps, blockIdx.x, blockIdx.y * ROWS, [] { await_previous(); });
}

#else
#error "block_linear.cu needs EXPAND, or ROWS and OUTS"
#endif
