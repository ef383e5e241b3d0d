// mma_rows.cuh: queries and keys as operands of mma: their types, and rows of them in shared memory.
#include "head_dim.cuh"
#include "mma.cuh"
#include "vector.cuh"

constexpr bool K_HAS_CODES = LARGEST<K_T> > 0.0f;
using KM = Operand<K_T>::Type;
constexpr bool Q_IS_16BIT = sizeof(Q_T) == 2;
constexpr bool Q_IS_EXACT = Q_IS_16BIT && IS_BF16<Q_T> == IS_BF16<KM>;
// A query is the sum of so many terms.
constexpr int Q_TERMS = Q_IS_16BIT ? 1 + (IS_BF16<KM> && !IS_BF16<Q_T>) : 2 + IS_BF16<KM>;

// Rows of BYTES in shared memory, swizzled so that the same 16-byte chunk of eight consecutive rows
// lies on different banks. Chunks move within lines of 128 bytes, because a copy of one line into
// parts of two is two requests; rows of other sizes are padded instead.
template <int BYTES> struct Swizzled {
    static constexpr int CHUNKS = BYTES / 16;
    static constexpr bool HAS_SWIZZLE = CHUNKS % 8 == 0;
    static constexpr int PITCH = BYTES + (CHUNKS % 2 || HAS_SWIZZLE ? 0 : 16);
    static_assert(BYTES % 16 == 0 && PITCH / 16 % 2 + HAS_SWIZZLE > 0, "all banks serve eight rows");

    static __device__ __forceinline__ int place(int row, int chunk) {
        return row * PITCH + (HAS_SWIZZLE ? chunk ^ row % 8 : chunk) * 16;
    }
    // The place of the same chunk `rows` further, where the two numbers of rows share no bit.
    static __device__ __forceinline__ int further(int place, int rows) {
        return (HAS_SWIZZLE ? place ^ rows % 8 * 16 : place) + rows * PITCH;
    }
};
using Halves = Swizzled<2 * D>;

#if __CUDA_ARCH__ >= 750  // older SMs get empty kernels, which the host never launches

// The address that a lane passes to ldmatrix: row `row`, chunk `upper` of a pair of chunks. Rows of
// other matrices are a constant offset away.
struct Reader {
    const u8* row;
    u32 swizzle;

    __device__ __forceinline__ Reader(const u8* rows, int row, int upper)
        : row(rows + row * Halves::PITCH),
          swizzle((Halves::HAS_SWIZZLE ? upper ^ row % 8 : upper) * 16) {}

    __device__ __forceinline__ const u8* at(int pair) const {
        return Halves::HAS_SWIZZLE ? row + (pair % 4 * 32 ^ swizzle) + pair / 4 * 128
                                   : row + swizzle + pair * 32;
    }
};

// The codes of a word as f16, in their order.
template <typename T> __device__ __forceinline__ void word_to_halves(u32* to, u32 word) {
    constexpr int PAIRS = PER_WORD<T> / 2;
    u32 pairs[PAIRS];
    to_pairs(pairs, word, T{});
#pragma unroll
    for (int p = 0; p < PAIRS; p += 2) {
        if constexpr (PAIRS_ADJACENT<T>) {
            to[p] = pairs[p], to[p + 1] = pairs[p + 1];
        } else {
            to[p / 2] = __byte_perm(pairs[p], pairs[p + 1], 0x5410);
            to[(p + PAIRS) / 2] = __byte_perm(pairs[p], pairs[p + 1], 0x7632);
        }
    }
}

template <typename T> __device__ __forceinline__ uint4 to_halves(const Eight<T>& eight) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 2 / PACKED<T>; i++) word_to_halves<T>(words + 2 * i, eight.words[i]);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

#endif
