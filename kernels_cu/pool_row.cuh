// pool_row.cuh: rows of N elements that WIDTH lanes load, quantize if need be, and store to a pool.
#include "quantize.cuh"

// A token's place in a pool: page and offset in it. A negative page means the row is not written.
struct Place { int page, offset; };

template <int TOKENS, typename T> __device__ __forceinline__ Place place_of_slot(T slot) {
    if (slot < 0) return Place{-1, 0};
    if (sizeof(slot) == 4) return Place{(int)((u32)slot / TOKENS), (int)((u32)slot % TOKENS)};
    return Place{(int)((u64)slot / TOKENS), (int)((u64)slot % TOKENS)};
}

// One lane's fragment of a row: piece i holds eight elements from column(i) on.
template <typename T, int N, int WIDTH> struct RowFragment {
    static constexpr int PIECES = (N / 8 + WIDTH - 1) / WIDTH;
    Eight<T> pieces[PIECES];

    static __device__ __forceinline__ u32 column(int piece) {
        return (piece * WIDTH + threadIdx.x % WIDTH) * 8;
    }
};

template <int N, int WIDTH, typename T>
__device__ __forceinline__ RowFragment<T, N, WIDTH> load_fragment(const T* from) {
    RowFragment<T, N, WIDTH> fragment = {};  // zeros do not change a maximum
#pragma unroll
    for (int i = 0; i < fragment.PIECES; i++) {
        if (fragment.column(i) < N) fragment.pieces[i] = get8_eager(from + fragment.column(i));
    }
    return fragment;
}

// The largest magnitude of a fragment, ordered as in quantize.cuh.
template <typename T, int N, int WIDTH>
__device__ __forceinline__ u32 max_magnitude(const RowFragment<T, N, WIDTH>& fragment) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < fragment.PIECES; i++) {
        largest = max(largest, max_magnitude(fragment.pieces[i]));
    }
    return largest;
}

// Stores a fragment with its bits, or rounded to another kind that holds floats.
template <typename To, typename T, int N, int WIDTH>
__device__ __forceinline__ void store_floats(To* to, const RowFragment<T, N, WIDTH>& fragment) {
#pragma unroll
    for (int i = 0; i < fragment.PIECES; i++) {
        if (fragment.column(i) >= N) continue;
        put8(to + fragment.column(i), convert8<To>(fragment.pieces[i]));
    }
}

// Quantizes and stores a fragment. DYNAMIC: the scale comes from the row's largest magnitude and is
// stored; else it is static, read from memory.
template <bool DYNAMIC, typename To, typename SCALE, typename T, int N, int WIDTH>
__device__ __forceinline__ void store_codes(To* to, SCALE* scale_at,
                                            RowFragment<T, N, WIDTH> fragment, u32 largest) {
    float inverse;
    bool clamps = !IS_FP8<To>;  // fp8 conversions saturate by themselves
    if constexpr (DYNAMIC) {
        const float amax = as_float<T>(largest);
        const SCALE scale = row_scale<To, SCALE>(__float_as_uint(amax));
        if (threadIdx.x % WIDTH == 0) *scale_at = scale;
        inverse = inverse_scale(scale);
        if (inverse == 0.0f) fragment = RowFragment<T, N, WIDTH>{};  // NaN and infinity too
        // A scale that is subnormal, or limited by its dtype, may be far below amax / LARGEST.
        clamps = clamps && amax * inverse > LARGEST<To> + 0.25f;
    } else {
        inverse = inverse_scale(*scale_at);
        if (inverse == 0.0f) fragment = RowFragment<T, N, WIDTH>{};
    }
#pragma unroll
    for (int i = 0; i < fragment.PIECES; i++) {
        if (fragment.column(i) >= N) continue;
        float x[8];
        unpack8(x, fragment.pieces[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            x[j] = __fmul_rn(x[j], inverse);
            if (!DYNAMIC && !IS_FP8<To> && x[j] != x[j]) x[j] = 0.0f;
        }
        if (clamps) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = fminf(fmaxf(x[j], -LARGEST<To>), LARGEST<To>);
        }
        store8(to + fragment.column(i) / PACKED<To>, x);
    }
}

// Stores a fragment of the row at a place of the pool, and its scale; strides in elements.
template <bool DYNAMIC, typename To, typename SCALE, typename T, int N, int WIDTH>
__device__ __forceinline__ void store_row(To* pool, i64 page_stride, i64 token_stride,
                                          i64 head_stride, SCALE* scales, i64 scale_page_stride,
                                          i64 scale_token_stride, i64 scale_head_stride,
                                          Place place, u32 head,
                                          const RowFragment<T, N, WIDTH>& fragment, u32 largest) {
    const u32 page = place.page, offset = place.offset;
    To* to = pool + page * page_stride + offset * token_stride + head * head_stride;
    if constexpr (LARGEST<To> > 0) {
        scales += page * scale_page_stride + offset * scale_token_stride + head * scale_head_stride;
        store_codes<DYNAMIC>(to, scales, fragment, largest);
    } else {
        store_floats(to, fragment);
    }
}
