// planes.cuh: rows of GGUF blocks with codes and scales in planes (pykv/planes.py has the layout).
//
// A group is 32 elements; element 16 * half + 4 * s + b is byte b of quad s of a half. A kind K has
//   BITS, TABLE   of a code; whether codes are places in a table, whose entries `quad` gives, + 128
//   ZERO          what quad gives for an element of 0
//   HALVES        scales of a group: 1, or 2, of its halves
//   HAS_ADDEND    elements are d * code + m; else d * code
//   Raw           what a lane loads for the scales of a group: load(scales, g, G), decode(d, m, raw,
//                 g), where `scales` is where they begin in a row, g the group, G the groups of a row
//   SPAN          groups that have one Raw, 1 or 8
//   FIRST, SECOND bytes of the one and the other range of scales, of eight groups
//   AS_HALVES     whether decode_halves(d, m, raw, g) gives them as pairs of equal f16, too, rounded
#include "vector.cuh"

constexpr int GROUP = 32;

// Codes of a group as they lie in a row. Which members count is a matter of BITS.
template <int BITS> struct Codes {
    static constexpr int WORDS = BITS == 8 ? 8 : BITS >= 4 ? 4 : 0;  // words of bytes or nibbles
    static constexpr bool HAS_PAIRS = BITS == 2 || BITS == 3 || BITS == 6;
    static constexpr bool HAS_ONES = BITS == 3 || BITS == 5;
    static constexpr int BYTES = WORDS * 4 + HAS_PAIRS * 8 + HAS_ONES * 4;

    u32 words[WORDS ? WORDS : 1];
    u32 pairs[2];
    u32 ones;

    __device__ __forceinline__ void load(const u8* row, int g, int G) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(row + (i64)g * WORDS * 4 + i * 4);
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
        load_high(row + (i64)G * WORDS * 4, g, G);
    }

    // Pairs and ones, which follow bytes or nibbles.
    __device__ __forceinline__ void load_high(const u8* p, int g, int G) {
        if (HAS_PAIRS) {
            const uint2 two = *reinterpret_cast<const uint2*>(p + (i64)g * 8);
            pairs[0] = two.x, pairs[1] = two.y;
        }
        if (HAS_ONES) ones = *reinterpret_cast<const u32*>(p + (i64)G * HAS_PAIRS * 8 + (i64)g * 4);
    }

    // The same by way of shared memory, which has BYTES for each lane of a warp: lanes `copy` those of
    // groups first .. first + 31, or of the last group past the edge, and `read` what others copied
    // when all have waited. A copy of a warp is of whole sectors.
    static __device__ __forceinline__ void copy(u8* shared, const u8* row, int first, int G,
                                                int lane) {
        constexpr int SIXTEENS = WORDS / 4;  // of bytes, of a group
#pragma unroll
        for (int i = 0; i < SIXTEENS; i++) {
            const int at = i * WARP + lane;
            const i64 from = min(first * SIXTEENS + at, G * SIXTEENS - 1);
            cp_async16(shared + at * 16, row + from * 16);
        }
        const int g = min(first + lane, G - 1);
        row += (i64)G * WORDS * 4, shared += WORDS * 4 * WARP;
        if (HAS_PAIRS) {
            cp_async<8>(shared + lane * 8, row + (i64)g * 8);
            row += (i64)G * 8, shared += 8 * WARP;
        }
        if (HAS_ONES) cp_async<4>(shared + lane * 4, row + (i64)g * 4);
    }

    __device__ __forceinline__ void read(const u8* shared, int lane) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(shared + (lane * WORDS + i) * 4);
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
        shared += WORDS * 4 * WARP;
        if (HAS_PAIRS) {
            const uint2 two = *reinterpret_cast<const uint2*>(shared + lane * 8);
            pairs[0] = two.x, pairs[1] = two.y, shared += 8 * WARP;
        }
        if (HAS_ONES) ones = *reinterpret_cast<const u32*>(shared + lane * 4);
    }

    __device__ __forceinline__ u32 word(int half, int s) const {
        return words[BITS == 8 ? 4 * half + s : WORDS ? s : 0];
    }
};

// The entries of a table of 16 bytes at the four nibbles in the lower half of `places`.
__device__ __forceinline__ u32 look_up(uint4 table, u32 places) {
    const u32 place = places & 0x7777u;
    const u32 lower = __byte_perm(table.x, table.y, place);
    const u32 upper = __byte_perm(table.z, table.w, place);
    return __byte_perm(lower, upper, 0x3210u + (places >> 1 & 0x4444u));
}

// The codes of elements 16 * half + 4 * s .. + 3, a byte each, from words of each plane.
template <typename K>
__device__ __forceinline__ u32 quad(u32 word, u32 pairs, u32 ones, int half, int s) {
    constexpr int BITS = K::BITS;
    u32 codes = 0;
    if (BITS == 8) codes = word;
    if (BITS >= 4 && BITS <= 6) {
        if constexpr (K::TABLE) return look_up(K::table(), word >> 16 * half);
        codes = word >> 4 * half & 0x0f0f0f0fu;
    }
    if (BITS == 6) codes |= (s < 2 ? pairs >> 2 * s : pairs << 4 >> 2 * (s - 2)) & 0x30303030u;
    if (BITS <= 3) codes = pairs >> 2 * ((s + 2) % 4) & 0x03030303u;
    if (BITS == 3 || BITS == 5) {
        constexpr int TO = BITS - 1;
        codes |= (half ? ones << TO >> s : ones >> (4 - TO + s)) & (0x01010101u << TO);
    }
    return codes;
}

__device__ __forceinline__ float half_of(u32 word) { return to_float(f16{(u16)word}); }

__device__ __forceinline__ u32 two_bytes(const u8* p) { return *reinterpret_cast<const u16*>(p); }

// --- Kinds of 32 elements ------------------------------------------------------------------------

template <int BITS_, int ZERO_> struct OneHalf {
    static constexpr int BITS = BITS_, ZERO = ZERO_, HALVES = 1, SPAN = 1;
    static constexpr bool TABLE = false, HAS_ADDEND = false, AS_HALVES = true;
    static constexpr int FIRST = 16, SECOND = 0;
    using Raw = u32;

    static __device__ __forceinline__ Raw load(const u8* scales, int g, int) {
        return two_bytes(scales + (i64)g * 2);
    }
    static __device__ __forceinline__ void decode(float (&d)[1], float (&)[1], Raw raw, int) {
        d[0] = half_of(raw);
    }
    static __device__ __forceinline__ void decode_halves(u32 (&d)[1], u32 (&)[1], Raw raw, int) {
        d[0] = lower_twice(raw);
    }
};

template <int BITS_> struct TwoHalves {
    static constexpr int BITS = BITS_, ZERO = 0, HALVES = 1, SPAN = 1;
    static constexpr bool TABLE = false, HAS_ADDEND = true, AS_HALVES = true;
    static constexpr int FIRST = 32, SECOND = 0;
    using Raw = u32;

    static __device__ __forceinline__ Raw load(const u8* scales, int g, int) {
        return *reinterpret_cast<const u32*>(scales + (i64)g * 4);
    }
    static __device__ __forceinline__ void decode(float (&d)[1], float (&m)[1], Raw raw, int) {
        d[0] = half_of(raw);
        m[0] = half_of(raw >> 16);
    }
    static __device__ __forceinline__ void decode_halves(u32 (&d)[1], u32 (&m)[1], Raw raw, int) {
        d[0] = lower_twice(raw);
        m[0] = upper_twice(raw);
    }
};

using Q4_0 = OneHalf<4, 8>;
using Q5_0 = OneHalf<5, 16>;
using Q8_0 = OneHalf<8, 128>;
using Q4_1 = TwoHalves<4>;
using Q5_1 = TwoHalves<5>;

// -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113, and twice the numbers of e2m1
__device__ __forceinline__ uint4 iq4_table() {
    return {0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u};
}
__device__ __forceinline__ uint4 e2m1_table() {
    return {0x83828180u, 0x8c888684u, 0x7d7e7f80u, 0x74787a7cu};
}

struct IQ4_NL : OneHalf<4, 128> {
    static constexpr bool TABLE = true;
    static __device__ __forceinline__ uint4 table() { return iq4_table(); }
};

struct MXFP4 {
    static constexpr int BITS = 4, ZERO = 128, HALVES = 1, SPAN = 1;
    static constexpr bool TABLE = true, HAS_ADDEND = false, AS_HALVES = false;
    static constexpr int FIRST = 8, SECOND = 0;
    using Raw = u32;
    static __device__ __forceinline__ uint4 table() { return e2m1_table(); }

    static __device__ __forceinline__ Raw load(const u8* scales, int g, int) { return scales[g]; }
    static __device__ __forceinline__ void decode(float (&d)[1], float (&)[1], Raw e, int) {
        d[0] = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);  // 2^(e - 128)
    }
};

// --- Kinds of 256 elements -----------------------------------------------------------------------

// Eight scales and minima of six bits: the last four have their low bits in the third word, and
// their high ones above the first four.
template <int BITS_> struct Groups {
    static constexpr int BITS = BITS_, ZERO = 0, HALVES = 1, SPAN = 8;
    static constexpr bool TABLE = false, HAS_ADDEND = true, AS_HALVES = true;
    static constexpr int FIRST = 16, SECOND = 0;
    using Raw = uint4;  // two halves and twelve bytes

    static __device__ __forceinline__ Raw load(const u8* scales, int g, int) {
        return *reinterpret_cast<const uint4*>(scales + (i64)(g / 8) * 16);
    }
    static __device__ __forceinline__ void decode(float (&d)[1], float (&m)[1], const Raw& raw,
                                                  int g) {
        const bool is_early = g % 8 < 4;
        const int shift = g % 4 * 8;
        const u32 low = is_early ? 63u : 15u, high = is_early ? 0u : 48u;
        const u32 a = (is_early ? raw.y : raw.w) >> shift;
        const u32 b = (is_early ? raw.z : raw.w) >> (is_early ? shift : shift + 4);
        const float scale = (float)(int)((a & low) | (raw.y >> shift + 2 & high));
        const float minimum = (float)(int)((b & low) | (raw.z >> shift + 2 & high));
        d[0] = __fmul_rn(half_of(raw.x), scale);
        m[0] = -__fmul_rn(half_of(raw.x >> 16), minimum);
    }
#if __CUDA_ARCH__ >= 750
    // Scale and minimum in the halves of a word.
    static __device__ __forceinline__ void decode_halves(u32 (&d)[1], u32 (&m)[1], const Raw& raw,
                                                         int g) {
        constexpr u32 ONE_K = 0x64006400u, MINUS_ZERO = 0x80008000u;  // 1024, whose lowest bit is 1
        const u32 bytes = 0x4400u + g % 4 * 0x1111u;
        const u32 both = __byte_perm(raw.y, raw.z, bytes);
        const u32 low = __byte_perm(raw.w, raw.w >> 4, bytes) & 0x000f000fu;
        const u32 codes = g % 8 < 4 ? both & 0x003f003fu : low | (both >> 2 & 0x00300030u);
        const u32 numbers = sub_f16x2(codes | ONE_K, ONE_K);
        const u32 scales = fma_f16x2(numbers, raw.x ^ 0x80000000u, MINUS_ZERO);
        d[0] = lower_twice(scales);
        m[0] = upper_twice(scales);
    }
#endif
};

using Q4_K = Groups<4>;
using Q5_K = Groups<5>;

struct TwoWords { u32 scales, d; };

struct Q6_K {
    static constexpr int BITS = 6, ZERO = 32, HALVES = 2, SPAN = 1;
    static constexpr bool TABLE = false, HAS_ADDEND = false, AS_HALVES = false;
    static constexpr int FIRST = 16, SECOND = 2;
    using Raw = TwoWords;

    static __device__ __forceinline__ Raw load(const u8* scales, int g, int G) {
        const u8* d = scales + (i64)G * 2 + (i64)(g / 8) * 2;
        return {two_bytes(scales + (i64)g * 2), two_bytes(d)};
    }
    static __device__ __forceinline__ void decode(float (&d)[2], float (&)[2], const Raw& raw,
                                                  int) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            d[i] = __fmul_rn(half_of(raw.d), byte_to_float(raw.scales ^ 0x8080u, i, 128.0f));
        }
    }
};

struct Q2_K {
    static constexpr int BITS = 2, ZERO = 0, HALVES = 2, SPAN = 1;
    static constexpr bool TABLE = false, HAS_ADDEND = true, AS_HALVES = false;
    static constexpr int FIRST = 16, SECOND = 4;
    using Raw = TwoWords;

    static __device__ __forceinline__ Raw load(const u8* scales, int g, int G) {
        const u8* d = scales + (i64)G * 2 + (i64)(g / 8) * 4;
        return {two_bytes(scales + (i64)g * 2), *reinterpret_cast<const u32*>(d)};
    }
    static __device__ __forceinline__ void decode(float (&d)[2], float (&m)[2], const Raw& raw,
                                                  int) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            d[i] = __fmul_rn(half_of(raw.d), byte_to_float(raw.scales & 0x0f0fu, i, 0.0f));
            m[i] = -__fmul_rn(half_of(raw.d >> 16),
                              byte_to_float(raw.scales >> 4 & 0x0f0fu, i, 0.0f));
        }
    }
};

// Sixteen scales of six bits: low nibbles in eight bytes, high pairs in four.
struct Q3_K {
    static constexpr int BITS = 3, ZERO = 4, HALVES = 2, SPAN = 1;
    static constexpr bool TABLE = false, HAS_ADDEND = false, AS_HALVES = false;
    static constexpr int FIRST = 12, SECOND = 2;
    using Raw = TwoWords;

    static __device__ __forceinline__ Raw load(const u8* scales, int g, int G) {
        const u8* of_block = scales + (i64)(g / 8) * 12;
        const u32 low = two_bytes(of_block + g % 4 * 2), high = two_bytes(of_block + 8 + g % 2 * 2);
        return {low | high << 16, two_bytes(scales + (i64)(G / 8) * 12 + (i64)(g / 8) * 2)};
    }
    static __device__ __forceinline__ void decode(float (&d)[2], float (&)[2], const Raw& raw,
                                                  int g) {
        const u32 low = raw.scales >> g % 8 / 4 * 4 & 0x0f0fu;
        const u32 high = raw.scales >> 16 >> g % 8 / 2 * 2 & 0x0303u;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            d[i] = __fmul_rn(half_of(raw.d), byte_to_float(low | high << 4, i, 32.0f));
        }
    }
};

struct IQ4_XS {
    static constexpr int BITS = 4, ZERO = 128, HALVES = 1, SPAN = 8;
    static constexpr bool TABLE = true, HAS_ADDEND = false, AS_HALVES = false;
    static constexpr int FIRST = 8, SECOND = 0;
    using Raw = uint2;  // a half, the scales' upper bits in pairs, their nibbles
    static __device__ __forceinline__ uint4 table() { return iq4_table(); }

    static __device__ __forceinline__ Raw load(const u8* scales, int g, int) {
        return *reinterpret_cast<const uint2*>(scales + (i64)(g / 8) * 8);
    }
    static __device__ __forceinline__ void decode(float (&d)[1], float (&)[1], const Raw& raw,
                                                  int g) {
        const u32 low = raw.y >> g % 8 * 4 & 15u, high = raw.x >> 16 >> g % 8 * 2 & 3u;
        d[0] = __fmul_rn(half_of(raw.x), byte_to_float(low | high << 4, 0, 32.0f));
    }
};
