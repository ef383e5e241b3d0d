// paged_decode.cu: attention of one query token a sequence over its paged keys and values.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/paged_decode.py):
//   out                     [B, HQ, D]     Q_T
//   lse                     [B, HQ] float  natural log of the sum of exp(scale * q.k); may be null
//   partials                [B, HQ, splits, D + 2] float  a split's weighted sum of values, maximum
//                           (base 2) and weight sum; touched where splits > 1 alone
//   q                const  [B, HQ, D]     Q_T, token stride q_stride elements
//   k_pool, v_pool   const  [N, P, H, D]   KV_T
//   page_table       const  [B, M] int32   read where the sequence has visible keys alone
//   lengths          const  [B] int32      clamped to 0 .. M * P
// Scalars:  window = number of last keys seen, INT_MAX for all; scale_log2 = scale * log2(e)
// Defines:  HEAD_DIM, a multiple of 8 up to 256; HEADS = query heads a block serves, 1 to 4;
//           Q_T, KV_T = float, f16 or bf16
// Launch:   paged_decode: grid (B * H * ceil(G / HEADS), splits), block (128)
//           paged_decode_merge: grid (B * HQ), block (128), where splits > 1
// Traffic:  2 * ceil(G / HEADS) * H * D * sizeof(KV_T) bytes a key, of which a group's later tiles
//           hit the L2 cache; 8 * (D + 2) bytes a query head and split
// Order:    no atomics; float accumulation in an order set by the sizes and the number of splits
//
// LANES lanes hold one key, eight elements each, and keep the state of an online softmax in
// registers: running maximum m (base 2), weight sum l, unscaled output acc. The block's SLOTS lane
// groups take keys in turn; their states are joined at the end, over lanes, warps, then splits.
#include "common.cuh"

#if !defined(HEAD_DIM) || !defined(HEADS) || !defined(Q_T) || !defined(KV_T)
#error "paged_decode.cu needs HEAD_DIM, HEADS, Q_T and KV_T"
#endif
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM >= 8 && HEAD_DIM <= 256, "lanes hold eight elements");
static_assert(HEADS >= 1 && HEADS <= 4, "q and acc of all heads stay in registers");

constexpr int D = HEAD_DIM;
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

__device__ constexpr int power_of_two_from(int n) {
    return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2);
}
constexpr int LANES = power_of_two_from(D / 8);
constexpr int SLOTS = THREADS / LANES;
constexpr int AHEAD = 4;  // keys a lane group loads at once; more would spill registers

constexpr float LN_2 = 0.693147180559945f;

// The finite number that exponents are taken relative to: 0 while no key has been seen.
__device__ __forceinline__ float finite_base(float m) { return m == -INF ? 0.0f : m; }

__device__ __forceinline__ float natural_lse(float m, float l) {
    return l == 0.0f ? -INF : m * LN_2 + logf(l);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
paged_decode(Q_T* __restrict__ out, float* __restrict__ lse, float* __restrict__ partials,
             const Q_T* __restrict__ q, const KV_T* __restrict__ k_pool,
             const KV_T* __restrict__ v_pool, const int* __restrict__ page_table,
             const int* __restrict__ lengths, i64 q_stride, int HQ, int H, int P, int M, int window,
             float scale_log2) {
    __shared__ __align__(16) float warp_acc[WARPS][HEADS][D];
    __shared__ float warp_m[WARPS][HEADS], warp_l[WARPS][HEADS];

    const int G = HQ / H;
    const int tiles = (G + HEADS - 1) / HEADS;
    const int tile = blockIdx.x % tiles;
    const int kv_head = blockIdx.x / tiles % H;
    const int b = blockIdx.x / tiles / H;
    const i64 first_row = (i64)b * HQ + kv_head * G + tile * HEADS;  // of out and lse
    const int num_heads = min(HEADS, G - tile * HEADS);

    // This split's share of the visible keys, in whole steps of the block.
    const int length = (int)max((i64)0, min((i64)lengths[b], (i64)M * P));
    const int first_key = length > window ? length - window : 0;
    const int steps = (length - first_key + SLOTS * AHEAD - 1) / (SLOTS * AHEAD);
    const int splits = gridDim.y;
    const int share = (steps + splits - 1) / splits * (SLOTS * AHEAD);
    const int begin = (int)min(first_key + (i64)blockIdx.y * share, (i64)length);
    const int end = min(begin + share, length);

    const int warp = threadIdx.x / WARP;
    const int slot = threadIdx.x / LANES;
    const int d = threadIdx.x % LANES * 8;
    const bool active = d < D;  // else the lane pads a head size that is no power of two
    const int safe_d = active ? d : 0;

    float query[HEADS][8], acc[HEADS][8] = {}, m[HEADS], l[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        m[h] = -INF;
        l[h] = 0.0f;
        const int head = kv_head * G + tile * HEADS + min(h, num_heads - 1);
        load8(query[h], q + b * q_stride + (i64)head * D + safe_d);
#pragma unroll
        for (int i = 0; i < 8; i++) query[h][i] *= scale_log2;
    }

    for (int step = begin; step < end; step += SLOTS * AHEAD) {
        const int key = step + slot;  // of this lane group: key, key + SLOTS, ...
        float k[AHEAD][8], v[AHEAD][8];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            // Lanes past the end read the last key again: loads without branches overlap.
            const u32 position = min(key + u * SLOTS, end - 1);
            const i64 page = page_table[(i64)b * M + position / P];
            const i64 at = ((page * P + position % P) * H + kv_head) * D + safe_d;
            load8(k[u], k_pool + at);
            load8(v[u], v_pool + at);
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score[AHEAD], peak = m[h];
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) dot += query[h][i] * k[u][i];
                if (!active) dot = 0.0f;
#pragma unroll
                for (int lane = LANES / 2; lane > 0; lane /= 2) {
                    dot += __shfl_xor_sync(FULL_MASK, dot, lane);
                }
                score[u] = key + u * SLOTS < end ? dot : -INF;
                peak = fmaxf(peak, score[u]);
            }
            const float base = finite_base(peak);
            const float keep = exp2f(m[h] - base);
            m[h] = peak;
            l[h] *= keep;
#pragma unroll
            for (int i = 0; i < 8; i++) acc[h][i] *= keep;
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const float weight = exp2f(score[u] - base);
                l[h] += weight;
#pragma unroll
                for (int i = 0; i < 8; i++) acc[h][i] += weight * v[u][i];
            }
        }
    }

    // Join the lane groups of a warp, then leave one state a warp in shared memory.
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float peak = m[h];
#pragma unroll
        for (int lane = LANES; lane < WARP; lane *= 2) {
            peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, lane));
        }
        const float keep = exp2f(m[h] - finite_base(peak));
        l[h] *= keep;
#pragma unroll
        for (int i = 0; i < 8; i++) acc[h][i] *= keep;
#pragma unroll
        for (int lane = LANES; lane < WARP; lane *= 2) {
            l[h] += __shfl_xor_sync(FULL_MASK, l[h], lane);
#pragma unroll
            for (int i = 0; i < 8; i++) acc[h][i] += __shfl_xor_sync(FULL_MASK, acc[h][i], lane);
        }
        if (threadIdx.x % WARP < LANES && active) {
            store8(&warp_acc[warp][h][d], acc[h]);
            if (d == 0) {
                warp_m[warp][h] = peak;
                warp_l[warp][h] = l[h];
            }
        }
    }
    __syncthreads();

    // Join the warps, one output element a thread.
    for (int i = threadIdx.x; i < num_heads * D; i += THREADS) {
        const int h = i / D;
        float peak = -INF, sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, warp_m[w][h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float keep = exp2f(warp_m[w][h] - finite_base(peak));
            sum += keep * warp_l[w][h];
            value += keep * warp_acc[w][h][i % D];
        }
        const i64 row = first_row + h;
        if (splits > 1) {
            float* partial = partials + (row * splits + blockIdx.y) * (D + 2);
            partial[i % D] = value;
            if (i % D == 0) {
                partial[D] = peak;
                partial[D + 1] = sum;
            }
        } else {
            out[row * D + i % D] = from_float<Q_T>(sum == 0.0f ? 0.0f : value / sum);
            if (lse && i % D == 0) lse[row] = natural_lse(peak, sum);
        }
    }
}

// Join the splits of one query head.
extern "C" __global__ void __launch_bounds__(THREADS)
paged_decode_merge(Q_T* __restrict__ out, float* __restrict__ lse,
                   const float* __restrict__ partials, int splits) {
    const i64 row = blockIdx.x;
    const float* partial = partials + row * splits * (D + 2);

    float peak = -INF;
    for (int s = 0; s < splits; s++) peak = fmaxf(peak, partial[s * (D + 2) + D]);
    const float base = finite_base(peak);
    for (int d = threadIdx.x; d < D; d += THREADS) {
        float sum = 0.0f, value = 0.0f;
        for (int s = 0; s < splits; s++) {
            const float* p = partial + s * (D + 2);
            const float keep = exp2f(p[D] - base);
            sum += keep * p[D + 1];
            value += keep * p[d];
        }
        out[row * D + d] = from_float<Q_T>(sum == 0.0f ? 0.0f : value / sum);
        if (lse && d == 0) lse[row] = natural_lse(peak, sum);
    }
}
