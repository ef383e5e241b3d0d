// dequant.cu: GGUF blocks to plain numbers.
//
// Arrays, row-major, contiguous, 16-byte aligned (letters as in pykv/ops/dequant.py):
//   out              [R, C]  OUT_T, written; n = R * C elements
//   blocks   const   [R, W] u8: whole blocks of KIND; rows have no padding, so the kernel sees one
//                    long row
// Defines:  OUT_T = float, f16 or bf16
//           KIND = F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K
//           BLOCK = threads
// Launch:   grid (ceil(n / BLOCK / 8)), block (BLOCK), no shared memory; a thread makes 8
//           elements
// Traffic:  R * W + n * sizeof(OUT_T) bytes
// Order:    bit-exact to the gguf package: each product and sum is rounded to float on its own,
//           and the last once more to OUT_T, to nearest even
//
// Formats (llama.cpp, ggml-common.h). d, m, dmin: f16, little-endian. q: unsigned unless said so.
// Nibbles of 32 elements: i < 16 is the low half of byte i, i >= 16 the high half of byte i - 16.
//   Q4_0  18 bytes  d, 16 nibble bytes                      d * (q - 8)
//   Q4_1  20        d, m, 16 nibble bytes                   d * q + m
//   Q5_0  22        d, 32 fifth bits, 16 nibble bytes       d * (q - 16)
//   Q5_1  24        d, m, 32 fifth bits, 16 nibble bytes    d * q + m
//   Q8_0  34        d, 32 signed bytes                      d * q
// The K kinds hold 256 elements; g = i / 32 is the group of element i.
//   Q4_K  144       d, dmin, 12 scale bytes, 128 nibble bytes            d*s[g] * q - dmin*m[g]
//   Q5_K  176       d, dmin, 12 scale bytes, 32 bytes of fifth bits,     the same
//                   128 nibble bytes
//   Q6_K  210       128 nibble bytes, 64 bytes of high pairs, 16 signed  d*s[i / 16] * (q - 32)
//                   scales s, d
#include "vector.cuh"

#if !defined(KIND) || !defined(OUT_T) || !defined(BLOCK)
#error "dequant.cu needs KIND, OUT_T and BLOCK"
#endif

// Every block has an even size, so two bytes are the widest load that is always aligned.
__device__ __forceinline__ float half_at(const u8* p) {
    return to_float(f16{*reinterpret_cast<const u16*>(p)});
}

__device__ __forceinline__ void bytes_at(u32 (&bytes)[8], const u8* p) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32 pair = reinterpret_cast<const u16*>(p)[j];
        bytes[2 * j] = pair & 0xffu;
        bytes[2 * j + 1] = pair >> 8;
    }
}

// --- Kinds: ELEMENTS and BYTES of a block, and read(y, block, i) for elements i .. i + 7 ---------

template <typename T> struct Plain {
    using Element = T;
    static constexpr int ELEMENTS = 1, BYTES = sizeof(T);

    static __device__ __forceinline__ void read(float (&y)[8], const u8* p, int) {
        load8(y, reinterpret_cast<const T*>(p));
    }
};

using F32 = Plain<float>;
using F16 = Plain<f16>;
using BF16 = Plain<bf16>;

// 32 elements in nibbles, with or without a minimum and fifth bits.
template <bool HAS_MIN, bool HAS_FIFTH> struct Nibbles {
    static constexpr int FIFTH = HAS_MIN ? 4 : 2;  // offset in bytes
    static constexpr int NIBBLES = FIFTH + (HAS_FIFTH ? 4 : 0);
    static constexpr int ELEMENTS = 32, BYTES = NIBBLES + 16;
    static constexpr int ZERO = HAS_MIN ? 0 : HAS_FIFTH ? 16 : 8;

    static __device__ __forceinline__ void read(float (&y)[8], const u8* block, int i) {
        const float d = half_at(block);
        const float m = HAS_MIN ? half_at(block + 2) : 0.0f;
        const u32 fifth = HAS_FIFTH ? block[FIFTH + i / 8] : 0;
        u32 bytes[8];
        bytes_at(bytes, block + NIBBLES + i % 16);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 q = (bytes[j] >> i / 16 * 4 & 15u) | (fifth >> j & 1u) << 4;
            y[j] = __fmul_rn(d, (float)((int)q - ZERO));
            if (HAS_MIN) y[j] = __fadd_rn(y[j], m);
        }
    }
};

using Q4_0 = Nibbles<false, false>;
using Q4_1 = Nibbles<true, false>;
using Q5_0 = Nibbles<false, true>;
using Q5_1 = Nibbles<true, true>;

struct Q8_0 {
    static constexpr int ELEMENTS = 32, BYTES = 34;

    static __device__ __forceinline__ void read(float (&y)[8], const u8* block, int i) {
        const float d = half_at(block);
        u32 bytes[8];
        bytes_at(bytes, block + 2 + i);
#pragma unroll
        for (int j = 0; j < 8; j++) y[j] = __fmul_rn(d, (float)(i8)bytes[j]);
    }
};

// Q4_K, and Q5_K with its fifth bits: eight groups of 32, each with a 6-bit scale and minimum.
template <bool HAS_FIFTH> struct Groups {
    static constexpr int SCALES = 4, FIFTH = 16, NIBBLES = FIFTH + (HAS_FIFTH ? 32 : 0);
    static constexpr int ELEMENTS = 256, BYTES = NIBBLES + 128;

    static __device__ __forceinline__ void read(float (&y)[8], const u8* block, int i) {
        const int group = i / 32;
        const u8* s = block + SCALES;
        u32 scale, minimum;
        if (group < 4) {
            scale = s[group] & 63u;
            minimum = s[group + 4] & 63u;
        } else {  // low four bits share a byte; the high two stand above the scales of group - 4
            scale = (s[group + 4] & 15u) | (u32)s[group - 4] >> 6 << 4;
            minimum = (u32)s[group + 4] >> 4 | (u32)s[group] >> 6 << 4;
        }
        const float d = __fmul_rn(half_at(block), (float)scale);
        const float m = __fmul_rn(half_at(block + 2), (float)minimum);

        u32 bytes[8], fifths[8] = {};
        bytes_at(bytes, block + NIBBLES + group / 2 * 32 + i % 32);
        if (HAS_FIFTH) bytes_at(fifths, block + FIFTH + i % 32);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 q = (bytes[j] >> group % 2 * 4 & 15u) | (fifths[j] >> group & 1u) << 4;
            y[j] = __fsub_rn(__fmul_rn(d, (float)q), m);
        }
    }
};

using Q4_K = Groups<false>;
using Q5_K = Groups<true>;

struct Q6_K {
    static constexpr int PAIRS = 128, SCALES = 192, D = 208;
    static constexpr int ELEMENTS = 256, BYTES = 210;

    static __device__ __forceinline__ void read(float (&y)[8], const u8* block, int i) {
        const int half = i / 128;  // of the block: 64 nibble bytes and 32 pair bytes
        const float d = __fmul_rn(half_at(block + D), (float)(i8)block[SCALES + i / 16]);
        u32 nibbles[8], pairs[8];
        bytes_at(nibbles, block + half * 64 + i % 64);
        bytes_at(pairs, block + PAIRS + half * 32 + i % 32);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 low = nibbles[j] >> i / 64 % 2 * 4 & 15u;
            const u32 high = pairs[j] >> i / 32 % 4 * 2 & 3u;
            y[j] = __fmul_rn(d, (float)((int)(low | high << 4) - 32));
        }
    }
};

// --- The kernel ----------------------------------------------------------------------------------

template <typename Kind>
__device__ __forceinline__ void expand(OUT_T* out, const u8* blocks, i64 first, i64 n) {
    if (first + 8 <= n) {
        const u8* block = blocks + first / Kind::ELEMENTS * Kind::BYTES;
        float y[8];
        Kind::read(y, block, (int)(first % Kind::ELEMENTS));
        store8(out + first, y);
    } else if constexpr (Kind::ELEMENTS == 1) {  // only plain kinds end inside eight elements
        const auto* x = reinterpret_cast<const typename Kind::Element*>(blocks);
        for (i64 i = first; i < n; i++) out[i] = from_float<OUT_T>(to_float(x[i]));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
dequant(OUT_T* __restrict__ out, const u8* __restrict__ blocks, i64 n) {
    expand<KIND>(out, blocks, ((i64)blockIdx.x * BLOCK + threadIdx.x) * 8, n);
}
