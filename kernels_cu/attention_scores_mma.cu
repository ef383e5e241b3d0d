// attention_scores_mma.cu: attention_scores.cu on tensor cores, for many query rows of a KV head; from
// sm_75 on, bf16 pools from sm_80 on.
//
// Arrays and scalars: as of attention_scores.cu; addresses and strides of k_pool are multiples of 16
//           bytes
// Defines:  HEAD_DIM, a multiple of 16 up to 256; Q_T = float, f16 or bf16; K_T = f16, bf16, i8, i4,
//           e4m3 or e5m2; SCALE_T = f16 or float; LOGITS_SOFT_CAP, ALIBI, TREE = 0 or 1; BLOCK =
//           threads; KEYS of a block, a multiple of 64
// Launch:   grid (B * H * ceil(C / KEYS)), block (BLOCK)
// Traffic:  K once; query rows for each block of keys, from the caches; 4 bytes a key of `scores`
// Order:    no atomics; a warp adds its rows in order, then come its lanes and the block's warps
//
// The keys of a block lie in shared memory as f16 or bf16. Its warps share out 64 keys each, and the
// query rows of the KV head by 16: scores on tensor cores, weights, sums over the rows. The
// remainder of rounding a query is kept in further terms, so that scores are as precise as those of
// floats.
#include "attention.cuh"
#include "head_dim.cuh"
#include "mma_rows.cuh"
#include "ptx.cuh"
#include "softmax.cuh"
#include "vector.cuh"
#include "warps.cuh"

#ifndef KEYS
#error "attention_scores_mma.cu needs KEYS"
#endif
constexpr int WARP_KEYS = 64;
constexpr int KEY_WARPS = KEYS / WARP_KEYS, ROW_WARPS = WARPS / KEY_WARPS;
static_assert(D % 16 == 0 && KEYS % WARP_KEYS == 0 && KEYS <= THREADS, "whole steps of mma");
static_assert(WARPS == KEY_WARPS * ROW_WARPS, "every warp has keys");

#if __CUDA_ARCH__ >= 750
// Two lines of query rows, of which a lane has columns 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16.
struct Rows {
    const Q_T* at[2];
    float factor[2], unit[2];  // unit = 1 / factor, which brings the largest element to 128 .. 256

    __device__ __forceinline__ void find_units() {
        if constexpr (!Q_IS_EXACT) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 largest = 0;
                for (int column = threadIdx.x % 4 * 2; column < D; column += 8) {
                    const auto two = *reinterpret_cast<const Vector<Q_T, 2>*>(at[i] + column);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const float x = to_float(two.elements[j]);
                        largest = max(largest, __float_as_uint(x) << 1 >> 1);
                    }
                }
                largest = max(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
                largest = max(largest, __shfl_xor_sync(FULL_MASK, largest, 2));
                const u32 exponent = max(largest >> 23, 8u);
                factor[i] = __uint_as_float((261u - exponent) << 23);
                unit[i] = __uint_as_float((exponent - 7u) << 23);
            }
        } else {
            factor[0] = factor[1] = unit[0] = unit[1] = 1.0f;
        }
    }

    // The operands of step `step` over the columns, by terms.
    __device__ __forceinline__ void load(u32 (&a)[Q_TERMS][4], int step) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const Q_T* from = at[j % 2] + step * 16 + j / 2 * 8 + threadIdx.x % 4 * 2;
            if constexpr (Q_IS_EXACT) {
                a[0][j] = *reinterpret_cast<const u32*>(from);
            } else {
                const auto two = *reinterpret_cast<const Vector<Q_T, 2>*>(from);
                float x[2] = {to_float(two.elements[0]) * factor[j % 2],
                              to_float(two.elements[1]) * factor[j % 2]};
#pragma unroll
                for (int term = 0; term < Q_TERMS; term++) a[term][j] = split_halves<KM>(x);
            }
        }
    }
};

using Scores = float[WARP_KEYS / 8][4];

// Scores of 16 rows and the keys that `of_keys` reads. Further terms are summed apart, so that what
// the mma truncates stays small.
__device__ __forceinline__ void multiply(Scores& x, const Rows& rows, const Reader& of_keys) {
    Scores low = {};
#pragma unroll 2
    for (int step = 0; step < D / 16; step++) {
        u32 a[Q_TERMS][4];
        rows.load(a, step);
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 8; n += 2) {
            u32 b[4];
            ldmatrix_x4(b, of_keys.at(step) + 8 * n * Halves::PITCH);
#pragma unroll
            for (int term = Q_TERMS - 1; term >= 0; term--) {
                const u32(&f)[4] = a[term];
                auto& d = !Q_IS_16BIT && term ? low : x;
                mma_16x16<KM>(d[n], f[0], f[1], f[2], f[3], b[0], b[1]);
                mma_16x16<KM>(d[n + 1], f[0], f[1], f[2], f[3], b[2], b[3]);
            }
        }
    }
    if (!Q_IS_16BIT) {
#pragma unroll
        for (int i = 0; i < WARP_KEYS / 2; i++) x[i / 4][i % 4] += low[i / 4][i % 4];
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 3)
attention_scores_mma(float* __restrict__ scores, const Q_T* __restrict__ q,
                     const K_T* __restrict__ k_pool, const SCALE_T* __restrict__ k_scales,
                     const int* __restrict__ page_table, const int* __restrict__ lengths,
                     const float* __restrict__ lse, const float* __restrict__ alibi_slopes,
                     const u64* __restrict__ tree, i64 q_stride, i64 q_token_stride,
                     i64 k_pool_page, i64 k_pool_token, i64 k_pool_head, i64 k_scales_page,
                     i64 k_scales_token, i64 k_scales_head, int T, int causal_offset, int HQ, int H,
                     int P, int M, int capacity, int window, int accumulate, float score_scale,
                     float cap, float lse_unit) {
#if __CUDA_ARCH__ >= 750
    __shared__ __align__(128) u8 keys[KEYS * Halves::PITCH];  // see Swizzled
    __shared__ float scales[KEYS], sums[ROW_WARPS][KEYS];
    const int G = HQ / H;
    const int chunks = capacity / KEYS + (capacity % KEYS != 0);
    const int begin = blockIdx.x % chunks * KEYS;
    const int kv_head = blockIdx.x / chunks % H;
    const int b = blockIdx.x / chunks / H;
    const int length = max(0, min(lengths[b], capacity));
    const int first_key = (int)max((i64)length - causal_offset - window, (i64)0);
    const bool has_seen = begin < length && begin + KEYS > first_key;

    if (has_seen) {
        const auto place_of = [&](int i, i64 page_step, i64 token_step, i64 head_step) {
            const u32 safe = max(first_key, min(begin + i, length - 1));
            const i64 page = page_table[(i64)b * M + safe / P];
            return page * page_step + safe % P * token_step + kv_head * head_step;
        };
#pragma unroll 4
        for (int i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
            const int row = i / (D / 8), chunk = i % (D / 8);
            const K_T* from = k_pool + place_of(row, k_pool_page, k_pool_token, k_pool_head) +
                              chunk * (8 / PACKED<K_T>);
            uint4& to = *reinterpret_cast<uint4*>(keys + Halves::place(row, chunk));
            if constexpr (K_HAS_CODES) {
                to = to_halves<K_T>(get8(from));
            } else {
                to = *reinterpret_cast<const uint4*>(from);
            }
        }
        if (K_HAS_CODES && threadIdx.x < KEYS) {
            scales[threadIdx.x] = to_float(
                k_scales[place_of(threadIdx.x, k_scales_page, k_scales_token, k_scales_head)]);
        }
        __syncthreads();

        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const int g = lane / 4, t = lane % 4;  // as in the fragments of mma
        const int first = warp % KEY_WARPS * WARP_KEYS;
        const Reader of_keys(keys + first * Halves::PITCH, lane / 16 * 8 + lane % 8, lane / 8 % 2);
        float own[WARP_KEYS / 8][2] = {};  // sums of keys 8n + 2t and the next
#pragma unroll 1
        for (int row0 = warp / KEY_WARPS * 16; row0 < G * T; row0 += ROW_WARPS * 16) {
            Rows rows;
            int position[2];
            float row_lse[2], slope[2];
            u64 branches[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = min(row0 + 8 * i + g, G * T - 1);
                const int token = row / G, head = kv_head * G + row % G;
                rows.at[i] = q + b * q_stride + token * q_token_stride + (i64)head * D;
                position[i] = length - 1 - max(causal_offset - token, 0);
                // A row past the last one gets no weight, and none that sees no key.
                row_lse[i] = lse[((i64)b * T + token) * HQ + head] * lse_unit;
                if (row_lse[i] == -INF || row0 + 8 * i + g >= G * T) row_lse[i] = INF;
                slope[i] = ALIBI ? alibi_slopes[head] * LOG2_E : 0.0f;
                branches[i] = TREE ? tree[(i64)b * T + token] : 0;
            }
            rows.find_units();
            Scores x = {};
            multiply(x, rows, of_keys);
#pragma unroll
            for (int i = 0; i < WARP_KEYS / 2; i++) {
                const int n = i / 4, c = i % 4, at = 8 * n + 2 * t + c % 2;
                const int key = begin + first + at;
                float score = x[n][c] * (1.0f / PAIR_UNIT<K_T>);
                if (!Q_IS_EXACT) score *= rows.unit[c / 2];
                if (K_HAS_CODES) score *= scales[first + at];
                score *= score_scale;
                if (LOGITS_SOFT_CAP) score = tanhf(score) * cap;
                score += slope[c / 2] * (key - position[c / 2]);
                bool is_visible = key <= position[c / 2] && position[c / 2] - key < window;
                const int branch = key - (length - 1 - causal_offset);
                if (TREE && branch >= 0) {
                    is_visible = key < length && branches[c / 2] >> (branch & 63) & 1;
                }
                if (is_visible && row_lse[c / 2] < INF) {
                    own[n][c % 2] += weight_of(score - row_lse[c / 2]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < WARP_KEYS / 4; i++) {
            float& sum = own[i / 2][i % 2];
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, step);
            if (g == 0) sums[warp / KEY_WARPS][first + i / 2 * 8 + 2 * t + i % 2] = sum;
        }
    }
    __syncthreads();
    const int i = threadIdx.x;
    if (i >= min(KEYS, capacity - begin)) return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < ROW_WARPS; w++) sum += has_seen ? sums[w][i] : 0.0f;
    float* const to = scores + ((i64)b * H + kv_head) * capacity + begin + i;
    *to = accumulate ? *to + sum : sum;
#endif
}
