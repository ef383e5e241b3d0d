// mma.cuh: operands of mma: words of elements become pairs of f16 or of bf16.
#include "convert.cuh"

// Elements of a 32-bit word: two, four or eight. to_pairs converts them to pairs: pair p holds the
// adjacent elements 2p and 2p + 1 of an fp8 word, p and p + PER_WORD / 2 of any other.
template <typename T> constexpr int PER_WORD = 4 / (int)sizeof(T) * PACKED<T>;

template <typename T> constexpr bool PAIRS_ADJACENT = IS_FP8<T>;

template <typename T> __device__ constexpr int element_of_pair(int pair, int upper) {
    return PAIRS_ADJACENT<T> ? 2 * pair + upper : pair + upper * PER_WORD<T> / 2;
}

// The value that to_pairs gives to a code that means 1.
#if __CUDA_ARCH__ >= 890
template <typename T> constexpr float PAIR_UNIT = 1.0f;
#else
template <typename T> constexpr float PAIR_UNIT = 1.0f;
template <> constexpr float PAIR_UNIT<e4m3> = 1.0f / 256.0f;
#endif

__device__ __forceinline__ void to_pairs(u32 (&pairs)[1], u32 word, f16) { pairs[0] = word; }
__device__ __forceinline__ void to_pairs(u32 (&pairs)[1], u32 word, bf16) { pairs[0] = word; }

#if __CUDA_ARCH__ >= 750
// The unit of an f16 of 1024 is its lowest bit. A code c with its sign flipped is c + 128 there.
__device__ __forceinline__ void to_pairs(u32 (&pairs)[2], u32 word, i8) {
    constexpr u32 BIAS = 0x64806480u;  // 1024 + 128
    pairs[0] = sub_f16x2((word & 0x00ff00ffu) ^ BIAS, BIAS);
    pairs[1] = sub_f16x2((word >> 8 & 0x00ff00ffu) ^ BIAS, BIAS);
}

// The same for c + 8. Codes one nibble higher count 16-fold, hence a sixteenth of 1024 + 16 (c +
// 8).
__device__ __forceinline__ void to_pairs(u32 (&pairs)[4], u32 word, i4) {
    constexpr u32 BIAS = 0x64086408u, HIGH_BIAS = 0x64806480u;
    constexpr u32 SIXTEENTH = 0x2c002c00u, MINUS_72 = 0xd480d480u;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        pairs[i] = sub_f16x2((word & 0x000f000fu) ^ BIAS, BIAS);
        pairs[i + 1] = fma_f16x2((word & 0x00f000f0u) ^ HIGH_BIAS, SIXTEENTH, MINUS_72);
        word >>= 8;
    }
}

__device__ __forceinline__ void to_pairs(u32 (&pairs)[2], u32 word, e5m2) {
    pairs[0] = __byte_perm(word, 0, 0x1404);
    pairs[1] = __byte_perm(word, 0, 0x3424);
}

__device__ __forceinline__ void to_pairs(u32 (&pairs)[2], u32 word, e4m3) {
#if __CUDA_ARCH__ >= 890
    e4m3x4_to_f16x4(pairs, word);
#else
    // Upper and lower bytes of all four: a code moves down by one bit, its sign stays.
    const u32 magnitude = word & 0x7f7f7f7fu;
    const u32 is_nan = (magnitude + 0x01010101u) & 0x80808080u;  // makes the exponent 31
    const u32 upper = ((magnitude | is_nan) >> 1 & 0x7f7f7f7fu) | (word & 0x80808080u);
    const u32 lower = word << 7 & 0x80808080u;
    pairs[0] = __byte_perm(lower, upper, 0x5140);
    pairs[1] = __byte_perm(lower, upper, 0x7362);
#endif
}
#endif

// Half a word of a and half a word of b, interleaved so that to_pairs pairs element i of one with
// element i of the other, in order.
template <typename T> __device__ __forceinline__ u32 zip(u32 a, u32 b, int upper) {
    if (PAIRS_ADJACENT<T>) return __byte_perm(a, b, upper ? 0x7362 : 0x5140);
    return __byte_perm(a, b, upper ? 0x7632 : 0x5410);
}

// Integer codes, offset to start at 0, as the bits of subnormal f16, which mma takes: code c is
// c * 2^-24. It needs no arithmetic. In odd pairs of an i4 word codes count 16-fold.
template <typename T> struct Subnormal {};
template <typename T> constexpr float SUBNORMAL_ZERO = 0.0f;  // value of the code 0, times 2^24
template <> constexpr float SUBNORMAL_ZERO<Subnormal<i8>> = 128.0f;
template <> constexpr float SUBNORMAL_ZERO<Subnormal<i4>> = 8.0f;
template <typename T> __device__ constexpr float subnormal_factor(int pair) { return 1.0f; }
template <> __device__ constexpr float subnormal_factor<Subnormal<i4>>(int pair) {
    return pair % 2 ? 16.0f : 1.0f;
}
template <> constexpr int PER_WORD<Subnormal<i8>> = 4;
template <> constexpr int PER_WORD<Subnormal<i4>> = 8;
template <> constexpr bool PAIRS_ADJACENT<Subnormal<i8>> = true;

__device__ __forceinline__ void to_pairs(u32 (&pairs)[2], u32 word, Subnormal<i8>) {
    word ^= 0x80808080u;
    pairs[0] = __byte_perm(word, 0, 0x4140);
    pairs[1] = __byte_perm(word, 0, 0x4342);
}

__device__ __forceinline__ void to_pairs(u32 (&pairs)[4], u32 word, Subnormal<i4>) {
    word ^= 0x88888888u;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        pairs[i] = word & 0x000f000fu;
        pairs[i + 1] = word & 0x00f000f0u;
        word >>= 8;
    }
}

// The bits that are all set in elements of a word that are NaN or infinite; 0 for integers.
template <typename T> constexpr u32 SPECIAL_BITS = 0;
template <> constexpr u32 SPECIAL_BITS<f16> = 0x7c007c00u;
template <> constexpr u32 SPECIAL_BITS<bf16> = 0x7f807f80u;
template <> constexpr u32 SPECIAL_BITS<e4m3> = 0x7f7f7f7fu;
template <> constexpr u32 SPECIAL_BITS<e5m2> = 0x7c7c7c7cu;

// The highest bit of each such element of a word.
template <typename T> __device__ __forceinline__ u32 special_elements(u32 word) {
    constexpr u32 HIGHEST = sizeof(T) == 2 ? 0x80008000u : 0x80808080u;
    return SPECIAL_BITS<T> ? (word & SPECIAL_BITS<T>) + (HIGHEST - SPECIAL_BITS<T>) & HIGHEST : 0u;
}

// The word with 0 in their place.
template <typename T> __device__ __forceinline__ u32 without_special(u32 word) {
    constexpr int BITS = 8 * sizeof(T);
    return word & ~((special_elements<T>(word) >> (BITS - 1)) * ((1u << BITS) - 1));
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INF; }

// The operand type of an mma over elements T.
template <typename T> struct Operand { using Type = f16; };
template <> struct Operand<bf16> { using Type = bf16; };

#if __CUDA_ARCH__ >= 750
// D += A B with A 16 x 16 and B 16 x 8 of elements M; fragments as in ptx.cuh.
template <typename M>
__device__ __forceinline__ void mma_16x16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1) {
#if __CUDA_ARCH__ >= 800
    if constexpr (IS_BF16<M>) {
        mma_m16n8k16_bf16(d, {a0, a1, a2, a3}, {b0, b1});
    } else {
        mma_m16n8k16_f16(d, {a0, a1, a2, a3}, {b0, b1});
    }
#else
    mma_m16n8k8_f16(d, {a0, a1}, {b0});
    mma_m16n8k8_f16(d, {a2, a3}, {b1});
#endif
}
#endif

// x rounded to two f16 or bf16; x becomes the exact remainder, to be split off as the next term.
template <typename T> __device__ __forceinline__ u32 split_halves(float (&x)[2]) {
    const u32 pair = two_halves(x[0], x[1], T{});
    x[0] -= to_float(T{(u16)pair});
    x[1] -= to_float(T{(u16)(pair >> 16)});
    return pair;
}
