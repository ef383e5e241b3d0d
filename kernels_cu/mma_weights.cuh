// mma_weights.cuh: rows of weights as operand A of mma, from global memory to registers.
//
// A warp multiplies 16 rows at a time: lane 4 * g + t has elements of rows g and g + 8. mma sums
// over all k, whose order is free as long as x has the same: lane t takes OWN elements that follow
// each other of each 4 * OWN, so that it loads whole words, and linear_split.cu permutes x likewise.
// What a lane loads at once is its part of a unit of SUBS * 32 elements of a row.
#include "mma.cuh"
#include "planes.cuh"

// Codes of four elements, a byte each, less what stands for zero, as two pairs of f16: of elements 0
// and 2, and of 1 and 3.
template <int ZERO> __device__ __forceinline__ void code_pairs(u32 (&to)[2], u32 four) {
    constexpr u32 BASE = 0x64006400u;  // 1024, whose lowest bit is 1
    to[0] = sub_f16x2(__byte_perm(four, BASE, 0x5250), BASE + ZERO * 0x10001u);
    to[1] = sub_f16x2(__byte_perm(four, BASE, 0x5351), BASE + ZERO * 0x10001u);
}

// The mask of the lowest nibble of each half of a word. I is never negative, but the compiler does not
// know, and keeps the mask in a register: it would load a constant anew for each use, as instructions
// take one constant only.
__device__ __forceinline__ u32 nibbles_of(int I) { return I < 0 ? 0u : 0x000f000fu; }

// The codes that `quad` gives, as pairs likewise. Nibbles become f16 where they stand: the upper ones
// count 16-fold.
template <typename K>
__device__ __forceinline__ void quad_pairs(u32 (&to)[2], u32 word, u32 pairs, u32 ones, int half,
                                           int s, u32 nibbles) {
    if constexpr (K::BITS == 4 && !K::TABLE) {
        constexpr u32 BASE = 0x64006400u, SIXTEENTH = 0x2c002c00u;
        constexpr u32 MINUS_64 = 0xd400d400u + K::ZERO * 0x100010u;  // less ZERO
#pragma unroll
        for (int i = 0; i < 2; i++, word >>= 8) {
            to[i] = half ? fma_f16x2((word & nibbles << 4) | BASE, SIXTEENTH, MINUS_64)
                         : sub_f16x2((word & nibbles) | BASE, BASE + K::ZERO * 0x10001u);
        }
    } else {
        code_pairs<K::ZERO>(to, quad<K>(word, pairs, ones, half, s));
    }
}

// Each kind of weights has
//   load(row, unit, I, t)  what lane t needs of a unit; past the end of the row any finite weights
//                          of it, which meet zeros
//   begin(unit, I, t)      before the first pairs of a unit
//   pairs(to, sub)         two steps of mma, two pairs each: 32 elements from sub * 32 on
//   scales(d, m, unit)     of a group, where SCALES of them and `addend` follow the product
// With IS_EVEN_FIRST pairs are of elements 0 and 2, and 1 and 3, of each four, and those of x likewise.

// Codes of GGUF blocks, which are exact in f16; their scales multiply the sums of a group.
template <typename K, bool IS_EXACT> struct Weights {
    using M = f16;
    using CodesOf = Codes<K::BITS>;
    static constexpr int OWN = 4, SUBS = 1, SCALES = K::HALVES;
    static constexpr bool HAS_ADDEND = K::HAS_ADDEND, IS_EVEN_FIRST = true;

    u32 words[K::BITS == 8 ? 2 : 1];
    CodesOf high;
    typename K::Raw raw;
    u32 nibbles;
    int lane;

    __device__ __forceinline__ void load(const u8* row, int unit, int I, int t) {
        const int G = I / 32, g = min(unit, G - 1);
        lane = t, nibbles = nibbles_of(I);
        if (CodesOf::WORDS) {
            const u32* at = reinterpret_cast<const u32*>(row) + (i64)g * CodesOf::WORDS + t;
            words[0] = at[0];
            if (K::BITS == 8) words[K::BITS == 8] = at[4];
        }
        high.load_high(row + (i64)G * CodesOf::WORDS * 4, g, G);
        raw = K::load(row + (i64)G * CodesOf::BYTES, g, G);
    }
    __device__ __forceinline__ void begin(int, int, int) {}
    __device__ __forceinline__ void pairs(u32 (&to)[2][2], int) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 word = CodesOf::WORDS ? words[K::BITS == 8 ? half : 0] : 0u;
            quad_pairs<K>(to[half], word, high.pairs[half], high.ones, half, lane, nibbles);
        }
    }
    __device__ __forceinline__ void scales(float (&d)[SCALES], float (&m)[SCALES], int unit,
                                           int I) const {
        K::decode(d, m, raw, min(unit, I / 32 - 1));
    }
};

// The same times their scales, rounded to f16: a lane has groups of its own.
template <typename K> struct Weights<K, false> {
    using M = f16;
    using CodesOf = Codes<K::BITS>;
    static constexpr int OWN = 32, SUBS = 4, SCALES = 0;
    static constexpr bool HAS_ADDEND = false, IS_EVEN_FIRST = true;

    CodesOf codes;
    typename K::Raw raw;
    u32 scale[K::HALVES], addend[K::HALVES], nibbles;

    static __device__ __forceinline__ int group(int unit, int I, int t) {
        return min(unit * 4 + t, I / 32 - 1);
    }
    __device__ __forceinline__ void load(const u8* row, int unit, int I, int t) {
        const int G = I / 32, g = group(unit, I, t);
        codes.load(row, g, G);
        raw = K::load(row + (i64)G * CodesOf::BYTES, g, G);
    }
    __device__ __forceinline__ void begin(int unit, int I, int t) {
        nibbles = nibbles_of(I);
        if constexpr (K::AS_HALVES) {
            K::decode_halves(scale, addend, raw, unit * 4 + t);
        } else {
            float d[K::HALVES], m[K::HALVES] = {};
            K::decode(d, m, raw, group(unit, I, t));
#pragma unroll
            for (int h = 0; h < K::HALVES; h++) {
                scale[h] = two_halves(d[h], d[h], f16{});
                addend[h] = two_halves(m[h], m[h], f16{});
            }
        }
    }
    __device__ __forceinline__ void pairs(u32 (&to)[2][2], int sub) const {
        const int half = sub / 2, h = K::HALVES == 2 ? half : 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int s = sub % 2 * 2 + i;
            u32 of_codes[2];
            quad_pairs<K>(of_codes, codes.word(half, s), codes.pairs[half], codes.ones, half, s,
                          nibbles);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                to[i][j] = fma_f16x2(of_codes[j], scale[h], K::HAS_ADDEND ? addend[h] : 0u);
            }
        }
    }
    __device__ __forceinline__ void scales(float (&)[1], float (&)[1], int, int) const {}
};

// f16 and bf16 as they are. Exact sums begin anew for each unit.
template <typename T, bool IS_EXACT> struct FloatWeights {
    using M = T;
    static constexpr int OWN = 8, SUBS = 1, SCALES = IS_EXACT ? 1 : 0;
    static constexpr bool HAS_ADDEND = false, IS_EVEN_FIRST = false;

    uint4 words;

    __device__ __forceinline__ void load(const u8* row, int unit, int I, int t) {
        const int i = unit * 32 + t * 8;
        words = i < I ? *reinterpret_cast<const uint4*>(row + (i64)i * 2) : uint4{0, 0, 0, 0};
    }
    __device__ __forceinline__ void begin(int, int, int) {}
    __device__ __forceinline__ void pairs(u32 (&to)[2][2], int) const {
        to[0][0] = words.x, to[0][1] = words.y, to[1][0] = words.z, to[1][1] = words.w;
    }
    __device__ __forceinline__ void scales(float (&d)[1], float (&)[1], int, int) const {
        d[0] = 1.0f;
    }
};

template <> struct Weights<f16, true> : FloatWeights<f16, true> {};
template <> struct Weights<f16, false> : FloatWeights<f16, false> {};
template <> struct Weights<bf16, true> : FloatWeights<bf16, true> {};
template <> struct Weights<bf16, false> : FloatWeights<bf16, false> {};
