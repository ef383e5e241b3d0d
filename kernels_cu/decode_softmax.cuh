// decode_softmax.cuh: paged_decode_mma's online softmax over the tiles of a warp.
//
// m is the running maximum of a query row to within a factor of 2^8 of the weights, so that it
// seldom changes; l is the sum of the weights of this lane's keys. Values are weighted relative to
// `scale_unit`, a power of two above all their scales so far, because f16 cannot hold every scale.
#include "decode_products.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

// The key of a lane's score i within the tile.
__device__ __forceinline__ int key_of_score(int i) {
    return i / 2 * 8 + 2 * (threadIdx.x % 4) + i % 2;
}

// Products become scores, as exponents of 2: scale, soft cap, ALiBi bias.
__device__ __forceinline__ void scale_scores(float (&scores)[KEYS / 4], int tile, float factor,
                                             float zero_score, float k_scale, float cap,
                                             float slope, int position) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        const int k = key_of_score(i);
        float& s = scores[i];
        s = s * factor - zero_score;
        if (K_ROW_SCALES) s *= __shfl_sync(FULL_MASK, k_scale, k);
#if LOGITS_SOFT_CAP
        s = tanhf(s) * cap;
#endif
#if ALIBI
        s += slope * (tile * KEYS + k - position);
#endif
    }
}

// A query row sees the keys row_first .. position; with TREE, of the last causal_offset + 1 keys
// those whose bit is set in `ancestors`.
__device__ __forceinline__ void mask_scores(float (&scores)[KEYS / 4], int tile, int row_first,
                                            int position, int length, int causal_offset,
                                            u64 ancestors) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        const int key = tile * KEYS + key_of_score(i);
        bool is_visible = key >= row_first && key <= position;
#if TREE
        const int branch = key - (length - 1 - causal_offset);
        if (branch >= 0) is_visible = key < length && (ancestors >> (branch & 63) & 1);
#endif
        if (!is_visible) scores[i] = -INF;
    }
}

// The largest of this lane's scores.
__device__ __forceinline__ float largest_of(const float (&scores)[KEYS / 4]) {
    float largest = -INF;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) largest = fmaxf(largest, scores[i]);
    return largest;
}

// Raises m to the largest score of the row's four lanes; returns the factor of what was summed
// before.
__device__ __forceinline__ float raise_maximum(float& m, float& l, float& largest) {
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 2));
    const float peak = fmaxf(m, largest);
    const float rescale = exp2_ftz(m - finite_base(peak));
    m = peak;
    l *= rescale;
    return rescale;
}

__device__ __forceinline__ void scale_sums(Sums& sums, float rescale) {
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        for (float& x : sums.x[i]) x *= rescale;
    }
    for (float& x : sums.weights) x *= rescale;
}

// Scores become weights of values; `v_scale` is that of this lane's value, in units of scale_unit.
__device__ __forceinline__ void scores_to_weights(float (&scores)[KEYS / 4], float m, float& l,
                                                  float v_scale) {
    const float base = finite_base(m);
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        const float weight = exp2_ftz(scores[i] - base);
        l += weight;
        scores[i] = weight;
        if (V_ROW_SCALES) scores[i] *= __shfl_sync(FULL_MASK, v_scale, key_of_score(i));
    }
}

#endif
