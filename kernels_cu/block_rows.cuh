// block_rows.cuh: four elements of a row of weights, of any kind; a part of block_rows.cu and
// phase_program.cuh.
#include "plain.cuh"

// Elements i .. i + 3 of a row of I, i a multiple of 4: products and the sum rounded to float each.
template <typename K> struct RowQuad {
    static __device__ __forceinline__ void load(float (&values)[4], const u8* row, int i, int I) {
        using CodesOf = Codes<K::BITS>;
        const int G = I / GROUP, g = i / GROUP, half = i % GROUP / 16, s = i % 16 / 4;
        const u8* high = row + (i64)G * CodesOf::WORDS * 4;
        const i64 place = ((i64)g * CodesOf::WORDS + (K::BITS == 8 ? 4 * half : 0) + s) * 4;
        const u32 word = CodesOf::WORDS ? *reinterpret_cast<const u32*>(row + place) : 0u;
        CodesOf c{};  // stays empty for kinds without pairs
        c.load_high(high, g, G);
        float d[K::HALVES], m[K::HALVES];
        K::decode(d, m, K::load(row + (i64)G * CodesOf::BYTES, g, G), g);
        const int h = K::HALVES == 2 ? half : 0;
        const u32 codes = quad<K>(word, half ? c.pairs[1] : c.pairs[0], c.ones, half, s);
#pragma unroll
        for (int b = 0; b < 4; b++) {
            values[b] = __fmul_rn(d[h], byte_to_float(codes, b, (float)K::ZERO));
            if (K::HAS_ADDEND) values[b] = __fadd_rn(values[b], m[h]);
        }
    }
};

template <typename T> struct RowQuad<Plain<T>> {
    static __device__ __forceinline__ void load(float (&values)[4], const u8* row, int i, int) {
        load4(values, reinterpret_cast<const T*>(row) + i);
    }
};
