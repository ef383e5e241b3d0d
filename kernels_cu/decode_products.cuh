// decode_products.cuh: paged_decode_mma's products of a tile: queries times keys, weights times
// values.
#include "decode_pipeline.cuh"
#include "vector.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

// One query row, as pairs of A in the order in which to_pairs pairs the elements of K. Rows of more
// than 128 elements stay in shared memory, because registers do not hold them.
constexpr int TERMS = 1 + Q_HAS_LOW + Q_HAS_REST;
constexpr bool Q_IN_SHARED = D > 128;
static_assert(Q_BYTES == (Q_IN_SHARED ? TERMS * D * 16 : 0), "of a warp");

struct Query {
    uint2 steps[TERMS][Q_IN_SHARED ? 1 : D / 16];  // four elements each
    uint2* shared;
    float unit;  // what the pairs count in: f16 cannot hold every q
    float sum;   // the pairs' sum

    __device__ __forceinline__ uint2 step(int term, int i) const {
        if constexpr (Q_IN_SHARED) return shared[(term * (D / 16) + i) * WARP];
        return steps[term][Q_IN_SHARED ? 0 : i];
    }
};

__device__ __forceinline__ void load_query(Query& q, const Q_T* row, bool is_row) {
    using S = KFragment;
    float x[D / 4];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < D / 4; i += 4) {
        const int d = i / S::ELEMENTS * S::ELEMENTS * 4 + threadIdx.x % 4 * S::ELEMENTS;
        float four[4] = {};
        if (is_row) load4(four, row + d + i % S::ELEMENTS);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[i + j] = four[j];
            largest = max(largest, __float_as_uint(four[j]) & 0x7fffffffu);
        }
    }
    float factor = 1.0f;
    q.unit = 1.0f;
    if constexpr (!Q_IS_EXACT) {  // scale the largest to 128 .. 256
        largest = max(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
        largest = max(largest, __shfl_xor_sync(FULL_MASK, largest, 2));
        const u32 exponent = max(largest >> 23, 8u);
        factor = __uint_as_float((261u - exponent) << 23);
        q.unit = __uint_as_float((exponent - 7u) << 23);
    }
    q.sum = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        u32 pairs[TERMS][2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            constexpr int WORD_PAIRS = PER_WORD<K_T> / 2;
            const int p = 2 * i + j, word = p / WORD_PAIRS * PER_WORD<K_T>;
            float two[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                two[k] = x[word + element_of_pair<KE>(p % WORD_PAIRS, k)] * factor;
                two[k] *= 1.0f / subnormal_factor<KE>(p % WORD_PAIRS);
                q.sum += two[k] * subnormal_factor<KE>(p % WORD_PAIRS);
            }
#pragma unroll
            for (int term = 0; term < TERMS; term++) pairs[term][j] = split_halves<KM>(two);
            // The remainder of rounding is no part of the products.
            q.sum -= (two[0] + two[1]) * subnormal_factor<KE>(p % WORD_PAIRS);
        }
#pragma unroll
        for (int term = 0; term < TERMS; term++) {
            const uint2 step = make_uint2(pairs[term][0], pairs[term][1]);
            if constexpr (Q_IN_SHARED) q.shared[(term * (D / 16) + i) * WARP] = step;
            else q.steps[term][Q_IN_SHARED ? 0 : i] = step;
        }
    }
    if constexpr (K_IS_SUBNORMAL) {
        q.sum += __shfl_xor_sync(FULL_MASK, q.sum, 1);
        q.sum += __shfl_xor_sync(FULL_MASK, q.sum, 2);
    }
}

// Row g times the keys 8n + 2t and 8n + 2t + 1 of a tile, in units of the query.
__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 4], const Query& q,
                                              const Keys& keys) {
    using S = KFragment;
    constexpr int WORD_PAIRS = PER_WORD<K_T> / 2;
    constexpr int FIT = 32 / (KEYS / 8 * WORD_PAIRS);  // words whose pairs occupy 32 registers
    constexpr int AT_ONCE = S::WORDS < FIT ? S::WORDS : FIT;
    static_assert(AT_ONCE * WORD_PAIRS > 1 && S::WORDS % AT_ONCE == 0, "a step of mma takes two pairs");
    float d[KEYS / 8][4] = {}, odd[KEYS / 8][4] = {};
#pragma unroll
    for (int word = 0; word < S::COUNT * S::WORDS; word += AT_ONCE) {
        u32 pairs[KEYS / 8][AT_ONCE][WORD_PAIRS];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int w = 0; w < AT_ONCE; w++) {
                const int at = word + w;
                to_pairs(pairs[n][w], keys.words[n][at / S::WORDS][at % S::WORDS], KE{});
            }
        }
#pragma unroll
        for (int p = 0; p < AT_ONCE * WORD_PAIRS; p += 2) {
            // A single term leaves rows 8 to 15 of A free. They hold the next step, so that two
            // steps share the registers of one; each uses its own half of the sums.
            const int step = (word * WORD_PAIRS + p) / 2;
            const int even = TERMS == 1 ? step / 2 * 2 : step;
            const int next = TERMS == 1 ? min(even + 1, D / 16 - 1) : step;
            const uint2 upper = q.step(0, even), lower = q.step(TERMS > 1 ? 1 : 0, next);
            const uint2 rest = Q_HAS_REST ? q.step(TERMS - 1, step) : make_uint2(0, 0);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                const u32 b0 = pairs[n][p / WORD_PAIRS][p % WORD_PAIRS];
                const u32 b1 = pairs[n][(p + 1) / WORD_PAIRS][(p + 1) % WORD_PAIRS];
                mma_16x16<KM>(step == even ? d[n] : odd[n], upper.x, lower.x, upper.y, lower.y, b0,
                             b1);
                if constexpr (Q_HAS_REST) mma_16x16<KM>(d[n], rest.x, 0, rest.y, 0, b0, b1);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        scores[i] = d[i / 2][i % 2] + (TERMS == 1 ? odd : d)[i / 2][i % 2 + 2];
    }
}

// Sums of values, by the columns of mma's fragments: first those of row g, then further terms of
// the same. `weights` are sums of the weights, which correct the offset of integer codes.
__device__ __forceinline__ float (&pick(float (&x)[4], float (&)[4]))[4] { return x; }
__device__ __forceinline__ float (&pick(float (&)[2], float (&x)[4]))[4] { return x; }

struct Sums { float x[D / 8][Q_IS_16BIT ? 4 : 2], weights[4]; };

// Adds the tile's values, weighted by `weights` of the keys 8n + 2t and 8n + 2t + 1. Lane 4g + t
// holds of row g the elements with which lanes 2t and 2t + 1 of a row's eight began.
__device__ __forceinline__ void add_values(Sums& sums, const float (&weights)[KEYS / 4],
                                           const Values& values) {
    using S = VFragment;
    constexpr int WORD_PAIRS = PER_WORD<V_T> / 2;
    u32 high[KEYS / 8], low[KEYS / 8], rest[KEYS / 8];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        float two[2] = {weights[2 * n], weights[2 * n + 1]};
        high[n] = split_halves<VM>(two);
        two[0] *= P_LOW, two[1] *= P_LOW;
        low[n] = split_halves<VM>(two);
        if constexpr (P_HAS_REST) rest[n] = split_halves<VM>(two);
    }
    if constexpr (V_IS_SUBNORMAL) {
        constexpr u32 ONES = 0x3c003c00u;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            mma_16x16<VM>(sums.weights, high[n], low[n], high[n + 1], low[n + 1], ONES, ONES);
        }
    }
#pragma unroll
    for (int i = 0; i < S::COUNT; i++) {
#pragma unroll
        for (int w = 0; w < 2 * S::WORDS; w++) {  // half words
            u32 b[KEYS / 8][WORD_PAIRS];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                const u32 two = zip<VE>(values.words[2 * n][i][w / 2],
                                        values.words[2 * n + 1][i][w / 2], w % 2);
                to_pairs(b[n], two, VE{});
            }
#pragma unroll
            for (int p = 0; p < WORD_PAIRS; p++) {
                float of_tile[4] = {};  // for 32-bit queries: float additions do not truncate
                float (&x)[Q_IS_16BIT ? 4 : 2] = sums.x[i * S::ELEMENTS + w * WORD_PAIRS + p];
                float (&d)[4] = pick(x, of_tile);
#pragma unroll
                for (int n = 0; n < KEYS / 8; n += 2) {
                    mma_16x16<VM>(d, high[n], low[n], high[n + 1], low[n + 1], b[n][p], b[n + 1][p]);
                    if constexpr (P_HAS_REST) {
                        mma_16x16<VM>(d, rest[n], 0, rest[n + 1], 0, b[n][p], b[n + 1][p]);
                    }
                }
                if constexpr (!Q_IS_16BIT) {
                    x[0] += fmaf(d[2], 1.0f / P_LOW, d[0]);
                    x[1] += fmaf(d[3], 1.0f / P_LOW, d[1]);
                }
            }
        }
    }
}

#endif
