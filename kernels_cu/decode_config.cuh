// decode_config.cuh: sizes and operand types of paged_decode_mma, by its defines.
#include "head_dim.cuh"
#include "mma.cuh"
#include "softmax.cuh"

constexpr bool K_HAS_CODES = LARGEST<K_T> > 0.0f, V_HAS_CODES = LARGEST<V_T> > 0.0f;
constexpr bool HAS_CODES = K_HAS_CODES || V_HAS_CODES;
constexpr bool K_ROW_SCALES = K_HAS_CODES && ROW_SCALES, V_ROW_SCALES = V_HAS_CODES && ROW_SCALES;
static_assert(D % 16 == 0 && D <= 256, "whole steps of mma, and sums that fit the registers");
static_assert(ROWS == 8, "an mma takes as many rows, and as many of their remainders");
static_assert(KEYS == 16 || (KEYS == 32 && D <= 128), "whole steps of mma; more would spill");
static_assert(MIN_KEYS % KEYS == 0, "ranges are whole tiles");

// One of N lanes' fragment of a row: COUNT pieces, piece i of lane l at byte (i * N + l) * BYTES.
template <typename T, int N> struct RowFragment {
    static constexpr int SHARERS = N;
    static constexpr int ROW_BYTES = D / PACKED<T> * (int)sizeof(T) / N;
    static constexpr int BYTES = ROW_BYTES % 16 == 0 ? 16 : ROW_BYTES % 8 == 0 ? 8 : 4;
    static constexpr int COUNT = ROW_BYTES / BYTES;
    static constexpr int WORDS = BYTES / 4;
    static constexpr int ELEMENTS = WORDS * PER_WORD<T>;
    static_assert(ROW_BYTES % 4 == 0 && ELEMENTS * COUNT * N == D, "whole words");
};
using KFragment = RowFragment<K_T, 4>;  // each lane / 4 has one key
using VFragment = RowFragment<V_T, 8>;  // each lane % 4 has four keys

// Pitch of rows in shared memory, in bytes. No row of up to 128 bytes crosses a line of 128 bytes
// there: a copy of one global line into parts of two shared lines would be two requests.
template <int ROW>
constexpr int PITCH_OF = ROW > 128 ? ROW : ROW > 64 ? 128 : ROW > 32 ? 64 : ROW > 16 ? 32 : 16;
constexpr int K_BYTES = KEYS * PITCH_OF<KFragment::ROW_BYTES * 4>;
constexpr int V_BYTES = KEYS * PITCH_OF<VFragment::ROW_BYTES * 8>;

// From sm_80 on cp.async fills a stage of keys and one of values. On older SMs registers hold the
// loaded rows until the only stage is free.
constexpr bool HAS_CP_ASYNC = __CUDA_ARCH__ >= 800;
constexpr int MAX_BYTES = K_BYTES > V_BYTES ? K_BYTES : V_BYTES;
static_assert(STAGE_BYTES == (HAS_CP_ASYNC ? K_BYTES + V_BYTES : MAX_BYTES), "of a warp");

// Terms of operands: the remainder of rounding to an mma's type is kept in further terms where
// queries are more precise than that type.
using KM = Operand<K_T>::Type;
using VM = Operand<V_T>::Type;
constexpr bool Q_IS_EXACT = sizeof(Q_T) == 2 && IS_BF16<Q_T> == IS_BF16<KM>;
constexpr bool Q_HAS_LOW = sizeof(Q_T) == 4 || (IS_BF16<KM> && !IS_BF16<Q_T>);
constexpr bool Q_HAS_REST = sizeof(Q_T) == 4 && IS_BF16<KM>;
constexpr float P_HEADROOM = IS_BF16<VM> ? 0.0f : HEADROOM;  // headroom of the weights
constexpr bool P_HAS_REST = sizeof(Q_T) == 4 && IS_BF16<VM>;
constexpr float P_LOW = sizeof(Q_T) == 4 && !IS_BF16<VM> ? REMAINDER_FACTOR : 1.0f;

// Results of 16-bit queries are rounded to 16 bits. Then sums may stay in the mma, which truncates
// below their last place, and integer codes may be read as subnormal f16.
constexpr bool Q_IS_16BIT = sizeof(Q_T) == 2;
template <typename T, bool> struct Encoding { using Type = T; };
template <> struct Encoding<i8, true> { using Type = Subnormal<i8>; };
template <> struct Encoding<i4, true> { using Type = Subnormal<i4>; };
using KE = Encoding<K_T, Q_IS_16BIT>::Type;
using VE = Encoding<V_T, Q_IS_16BIT>::Type;
constexpr bool K_IS_SUBNORMAL = SUBNORMAL_ZERO<KE> > 0.0f, V_IS_SUBNORMAL = SUBNORMAL_ZERO<VE> > 0.0f;
constexpr float SUBNORMAL_UNIT = 16777216.0f;  // 2^24
