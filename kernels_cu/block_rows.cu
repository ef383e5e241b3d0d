// block_rows.cu: the values of rows of a GGUF matrix, from its blocks.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/block_rows.py):
//   out         [T, I] X_T
//   w    const  [O, W] u8  rows of planes of KIND (pykv/planes.py), W bytes each, 16-byte aligned
//   ids  const  [T] int32, or null, which stands for 0 .. T-1; rows of w, outside 0 .. O-1: a row of
//               zeros
// Defines:  KIND = Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS or
//           MXFP4; X_T = float, f16 or bf16; BLOCK = threads
// Launch:   grid (T, ceil(I / 4 / BLOCK)), block (BLOCK)
// Traffic:  T * W + T * I * sizeof(X_T) bytes
// Order:    products and the sum rounded to float each, as the gguf package does, then the product
//           with scale, then once more to X_T
#include "planes.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(BLOCK)
#error "block_rows.cu needs KIND, X_T and BLOCK"
#endif

using K = KIND;
constexpr int GROUP = 32;

// A thread writes a quad.
extern "C" __global__ void __launch_bounds__(BLOCK)
block_rows(X_T* __restrict__ out, const u8* __restrict__ w, const int* __restrict__ ids, int O,
           int I, int W, float scale) {
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
