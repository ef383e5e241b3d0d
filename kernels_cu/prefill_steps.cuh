// prefill_steps.cuh: prefill_mma's steps over a tile of keys, and the store of its results.
#include "batch.cuh"
#include "prefill_config.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

constexpr int R = 2 * ROW_TILES;  // rows of a lane: 8 * r + g of its warp's
constexpr float LARGE_SCORE = 4194304.0f;  // 2^22, half of whose last place is a fourth

// Rows of results in shared memory, of the output's type.
using Outputs = Swizzled<D * (int)sizeof(Q_T)>;
static_assert(WARP_ROWS * Outputs::PITCH <= Q_BYTES, "they fit where the queries were");

// Copies this warp's rows from there to `out`, in whole lines.
__device__ __forceinline__ void store_rows(Q_T* out, const u8* results, const RowBlock& rows,
                                           int warp_row, int HQ, int G, int kv_head) {
    const int lane = threadIdx.x % WARP;
#pragma unroll 4
    for (int i = lane; i < WARP_ROWS * Outputs::CHUNKS; i += WARP) {
        const int row = i / Outputs::CHUNKS, chunk = i % Outputs::CHUNKS;
        const int in_group = rows.first_row + warp_row + row;
        if (warp_row + row < rows.num_rows) {
            const i64 at = (i64)(rows.start + in_group / G) * HQ + kv_head * G + in_group % G;
            *(uint4*)((u8*)(out + at * D) + chunk * 16) =
                *(const uint4*)(results + Outputs::place(row, chunk));
        }
    }
}

// Adds further terms to the scores x, multiplies them by the scales of their keys, and caps them.
__device__ __forceinline__ void scale_scores(float (&x)[ROW_TILES][KEYS / 8][4],
                                             const float (&low)[ROW_TILES][KEYS / 8][4],
                                             const float (&factor)[R],
                                             const float* k_scales) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        float2 scale;
        if (K_HAS_CODES) scale = *(const float2*)(k_scales + 8 * n + 2 * t);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float& score = x[i][n][c];
                if (!Q_IS_16BIT) score += low[i][n][c];
                if (K_HAS_CODES) score *= c % 2 ? scale.y : scale.x;
#if LOGITS_SOFT_CAP
                score = tanhf(score * factor[2 * i + c / 2]);
#endif
            }
        }
    }
}

// Scores become weights of values, and add to the sums l of this lane's keys.
__device__ __forceinline__ void scores_to_weights(float (&x)[ROW_TILES][KEYS / 8][4],
                                                  const float (&m)[R], float (&l)[R],
                                                  const float (&factor)[R]) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float base = finite_base(m[r]);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int c = r % 2 * 2; c < r % 2 * 2 + 2; c++) {
                float& weight = x[r / 2][n][c];
                weight = exp2_ftz(fmaf(weight, factor[r], -base));
                l[r] += weight;
            }
        }
    }
}

// The largest score of this lane for each row; whether one exceeds m by more than `lag`.
__device__ __forceinline__ bool largest_scores(float (&largest)[R],
                                               const float (&x)[ROW_TILES][KEYS / 8][4],
                                               const float (&m)[R], const float (&factor)[R],
                                               float lag) {
    bool grows = false;
#pragma unroll
    for (int r = 0; r < R; r++) {
        float peak = -INF;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            const float(&four)[4] = x[r / 2][n];
            peak = fmaxf(peak, fmaxf(four[r % 2 * 2], four[r % 2 * 2 + 1]));
        }
        largest[r] = peak * factor[r];
        grows |= largest[r] > m[r] + lag;
    }
    return grows;
}

// Rounds the products of rows with large scores as their base is, and leaves 1 for the factor. Later
// fmaf would not round them: half of a last place from the base, above 2^24 more than a weight holds.
__device__ __forceinline__ void round_large_scores(float (&x)[ROW_TILES][KEYS / 8][4],
                                                   float (&factor)[R],
                                                   const float (&largest)[R]) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (!(fabsf(largest[r]) > LARGE_SCORE)) continue;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int c = r % 2 * 2; c < r % 2 * 2 + 2; c++) x[r / 2][n][c] *= factor[r];
        }
        factor[r] = 1.0f;
    }
}

// The largest product of weight and scale instead, as a binary logarithm less HEADROOM.
__device__ __forceinline__ void largest_products(float (&largest)[R],
                                                 const float (&x)[ROW_TILES][KEYS / 8][4],
                                                 const float (&factor)[R],
                                                 const float* v_scales) {
#pragma unroll
    for (int r = 0; r < R; r++) largest[r] = -INF;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        const float2 scale = *(const float2*)(v_scales + 8 * n + 2 * (threadIdx.x % 4));
        const float exponent[2] = {scale_exponent(scale.x), scale_exponent(scale.y)};
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float score = x[r / 2][n][r % 2 * 2 + c];
                largest[r] = fmaxf(largest[r], fmaf(score, factor[r], exponent[c]));
            }
        }
    }
}

// Raises m to the largest of a row's four lanes where it lags too far behind, and rescales what was
// summed before. So the bits of a row depend on the keys that it sees, whatever the warp's others do.
__device__ __forceinline__ void rescale_sums(float (&sums)[ROW_TILES][D / 8][4], float (&m)[R],
                                             float (&l)[R], const float (&largest)[R]) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        float peak = fmaxf(largest[r], __shfl_xor_sync(FULL_MASK, largest[r], 1));
        peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, 2));
        if (!(peak > m[r] + LAG)) peak = m[r];
        // Of no keys the sums are 0, or not finite: see add_special_values.
        const float rescale = m[r] == -INF ? 1.0f : exp2_ftz(m[r] - finite_base(peak));
        m[r] = peak;
        l[r] *= rescale;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float(&four)[4] = sums[r / 2][n];
            four[r % 2 * 2] *= rescale;
            four[r % 2 * 2 + 1] *= rescale;
        }
    }
}

// --- Values that are not finite -------------------------------------------------------------------
//
// A product of matrices multiplies hidden values by weights of 0, which a NaN or infinity survives.
// In tiles that not all rows of a block see, such values, or all of a row with such a scale, are
// added to the sums of the rows that see them, then become 0.

constexpr bool V_HAS_SPECIAL = SPECIAL_BITS<V_T> > 0u;

// Whether a tile has such values.
__device__ __forceinline__ bool has_special_values(const u8* v_tile, const float* v_scales) {
    bool found = false;
    if (V_HAS_CODES && threadIdx.x < KEYS) found = !is_finite(v_scales[threadIdx.x]);
    if constexpr (V_HAS_SPECIAL) {
        u32 bits = 0;
#pragma unroll
        for (int i = 0; i < KEYS * (D / 8); i += THREADS) {
            const int at = i + threadIdx.x, row = at / (D / 8), chunk = at % (D / 8);
            if (KEYS * (D / 8) % THREADS && at >= KEYS * (D / 8)) break;
            // Swizzled rows have no gaps, and any order will do.
            const int place = Halves::HAS_SWIZZLE ? at * 16 : Halves::place(row, chunk);
            const uint4 a = *(const uint4*)(v_tile + place);
            bits |= special_elements<VM>(a.x) | special_elements<VM>(a.y) |
                    special_elements<VM>(a.z) | special_elements<VM>(a.w);
        }
        found |= bits != 0;
    }
    return found;
}

// Adds them to the sums of this lane's rows; row r sees the keys after last[r] - window to last[r]
// of a tile that begins at `first`.
__device__ __forceinline__ void add_special_values(float (&sums)[ROW_TILES][D / 8][4],
                                                   const u8* v_tile, const float* v_scales,
                                                   int first, const int (&last)[R], int window) {
#pragma unroll 1
    for (int key = 0; key < KEYS; key++) {
        const float scale = V_HAS_CODES ? v_scales[key] : 1.0f;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const u32 pair = *(const u32*)(v_tile + Halves::place(key, n) + 4 * (threadIdx.x % 4));
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float value = to_float(VM{(u16)(pair >> 16 * c)}) * scale;
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const bool is_visible = first + key <= last[r] && first + key > last[r] - window;
                    if (is_visible && !is_finite(value)) sums[r / 2][n][r % 2 * 2 + c] += value;
                }
            }
        }
    }
}

__device__ __forceinline__ void clear_special_values(u8* v_tile, float* v_scales) {
    if (V_HAS_CODES && threadIdx.x < KEYS && !is_finite(v_scales[threadIdx.x])) {
        v_scales[threadIdx.x] = 0.0f;
    }
    if constexpr (V_HAS_SPECIAL) {
#pragma unroll 1
        for (int i = threadIdx.x; i < KEYS * (D / 2); i += THREADS) {
            u32* word = (u32*)(v_tile + Halves::place(i / (D / 2), i / 4 % (D / 8))) + i % 4;
            *word = without_special<VM>(*word);
        }
    }
}

#endif
