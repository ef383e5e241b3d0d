// prefill_steps.cuh: prefill_mma's steps over a tile of keys, and the store of its results.
#include "batch.cuh"
#include "prefill_config.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

constexpr int R = 2 * ROW_TILES;  // rows of a lane: 8 * r + g of its warp's

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
                                                  const float (&factor)[R], float cap) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float base = finite_base(m[r]);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int c = r % 2 * 2; c < r % 2 * 2 + 2; c++) {
                float& weight = x[r / 2][n][c];
                weight = exp2_ftz(fmaf(weight, LOGITS_SOFT_CAP ? cap : factor[r], -base));
                l[r] += weight;
            }
        }
    }
}

// The largest score of this lane for each row; whether one exceeds m by more than a factor of 2^8.
__device__ __forceinline__ bool largest_scores(float (&largest)[R],
                                               const float (&x)[ROW_TILES][KEYS / 8][4],
                                               const float (&m)[R], const float (&factor)[R],
                                               float cap) {
    bool grows = false;
#pragma unroll
    for (int r = 0; r < R; r++) {
        float peak = -INF;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            const float(&four)[4] = x[r / 2][n];
            peak = fmaxf(peak, fmaxf(four[r % 2 * 2], four[r % 2 * 2 + 1]));
        }
        largest[r] = peak * (LOGITS_SOFT_CAP ? cap : factor[r]);
        grows |= largest[r] > m[r] + 8.0f;
    }
    return grows;
}

// Raises m to the largest score of a row's four lanes, and rescales what was summed before.
__device__ __forceinline__ void rescale_sums(float (&sums)[ROW_TILES][D / 8][4], float (&m)[R],
                                             float (&l)[R], const float (&largest)[R],
                                             float rescale_values) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        float peak = fmaxf(m[r], largest[r]);
        peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, 2));
        const float rescale = exp2_ftz(m[r] - finite_base(peak));
        m[r] = peak;
        l[r] *= rescale;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float(&four)[4] = sums[r / 2][n];
            four[r % 2 * 2] *= rescale * rescale_values;
            four[r % 2 * 2 + 1] *= rescale * rescale_values;
        }
    }
}

#endif
