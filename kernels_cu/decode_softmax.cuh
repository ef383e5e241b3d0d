// decode_softmax.cuh: paged_decode_mma's online softmax over the tiles of a warp.
//
// m is the base of a query row's weights, see softmax.cuh; l the sum of the weights of this lane's
// keys.
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

// The keys that a query row sees: first .. position; with TREE, of the keys from branch_first to
// length - 1 those whose bit is set in `ancestors`.
struct Sight {
    int first, position, length, branch_first;
    u64 ancestors;

    __device__ __forceinline__ bool sees(int key) const {
        const int branch = key - branch_first;
        if (TREE && branch >= 0) return key < length && (ancestors >> (branch & 63) & 1);
        return key >= first && key <= position;
    }
};

__device__ __forceinline__ void mask_scores(float (&scores)[KEYS / 4], int tile,
                                            const Sight& sight) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        if (!sight.sees(tile * KEYS + key_of_score(i))) scores[i] = -INF;
    }
}

// The largest of this lane's scores.
__device__ __forceinline__ float largest_of(const float (&scores)[KEYS / 4]) {
    float largest = -INF;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) largest = fmaxf(largest, scores[i]);
    return largest;
}

// The largest product of weight and scale instead, as a binary logarithm less HEADROOM.
__device__ __forceinline__ float largest_product(const float (&scores)[KEYS / 4], float v_scale) {
    const float exponent = scale_exponent(v_scale);
    float largest = -INF;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        const float of_key = __shfl_sync(FULL_MASK, exponent, key_of_score(i));
        largest = fmaxf(largest, scores[i] + of_key);
    }
    return largest;
}

// Raises m to the largest of the row's four lanes where it lags too far behind; returns the factor
// of what was summed before. So the bits of a row depend on the keys that it sees, whatever the
// others do.
__device__ __forceinline__ float raise_maximum(float& m, float& l, float& largest) {
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 2));
    const float peak = largest > m + LAG ? largest : m;
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

// Scores become weights of values; `v_scale` is that of this lane's value.
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

// --- Values that are not finite -------------------------------------------------------------------
//
// A product of matrices multiplies hidden values by weights of 0, which a NaN or infinity survives.
// In tiles that not all rows see, such values, or all of a row with such a scale, become 0, and are
// added to the sums of the rows that see them.

// Clears such values in this lane's fragments; whether there were any.
__device__ __forceinline__ bool clear_special_values(Values& values) {
    using S = VFragment;
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < KEYS / 4 * S::COUNT * S::WORDS; i++) {
        u32& word = values.words[i / (S::COUNT * S::WORDS)][i / S::WORDS % S::COUNT][i % S::WORDS];
        found |= special_elements<V_T>(word);
        word = without_special<V_T>(word);
    }
    return found;
}

__device__ __forceinline__ float element(const i8* row, int d) { return (float)row[d]; }
__device__ __forceinline__ float element(const i4* row, int d) {
    return (float)((int)((u32)row[d / 2].bits << (d % 2 ? 24 : 28)) >> 28);
}
template <typename T> __device__ __forceinline__ float element(const T* row, int d) {
    return to_float(row[d]);
}

// Adds them to the sums of this lane's row, as they lie in the pool. Column i of the sums holds the
// elements that store_output says.
__device__ __forceinline__ void add_special_values(Sums& sums, const Source& source,
                                                   const Table& table, int tile,
                                                   const Sight& sight) {
    constexpr int E = VFragment::ELEMENTS;
#pragma unroll 1
    for (int key = tile * KEYS; key < tile * KEYS + KEYS; key++) {
        if (!sight.sees(key)) continue;
        const int page = table.page(key);
        const V_T* row = source.values.row(page, key);
        const float scale = V_ROW_SCALES ? to_float(*source.value_scales.row(page, key)) : 1.0f;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int d = (i / E * 8 + threadIdx.x % 4 * 2 + c) * E + i % E;
                const float value = element(row, d) * scale;
                if (!is_finite(value)) sums.x[i][c] += value;
            }
        }
    }
}

#endif
