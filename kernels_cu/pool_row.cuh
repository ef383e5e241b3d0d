// pool_row.cuh: rows of HEAD_DIM elements that LANES lanes load, quantize if need be, and store.
#include "head_dim.cuh"
#include "quantize.cuh"

#if !defined(HEAD_DIM) || !defined(BLOCK) || !defined(LANES)
#error "pool_row.cuh needs HEAD_DIM, BLOCK and LANES"
#endif
constexpr int GROUPS = BLOCK / LANES;
constexpr int PIECES = (D / 8 + LANES - 1) / LANES;  // a lane's pieces of eight elements
static_assert(D % 8 == 0 && D > 0, "rows move in pieces of eight elements");
static_assert(BLOCK % WARP == 0 && WARP % LANES == 0, "whole warps of whole groups");

// The column at which a piece of this lane begins.
__device__ __forceinline__ u32 column(int piece) {
    return (piece * LANES + threadIdx.x % LANES) * 8;
}

// One lane's fragment of a row.
template <typename T> struct Fragment { Eight<T> pieces[PIECES]; };

template <typename T> __device__ __forceinline__ Fragment<T> load_fragment(const T* from) {
    Fragment<T> fragment = {};  // zeros do not change a maximum
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (column(i) < D) fragment.pieces[i] = get8_eager(from + column(i));
    }
    return fragment;
}

// The largest magnitude of a fragment, ordered as in quantize.cuh.
template <typename T> __device__ __forceinline__ u32 max_magnitude(const Fragment<T>& fragment) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++) largest = max(largest, max_magnitude(fragment.pieces[i]));
    return largest;
}

// Stores a fragment with its bits, or rounded to another kind that holds floats.
template <typename To, typename T>
__device__ __forceinline__ void store_fragment(To* to, const Fragment<T>& fragment) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (column(i) >= D) continue;
        put8(to + column(i) / PACKED<To>, convert8<To>(fragment.pieces[i]));
    }
}

// Stores a fragment as codes of a scale, DYNAMIC or not. `clamps`: some may exceed the largest
// code; fp8 conversions saturate by themselves.
template <bool DYNAMIC, typename To, typename SCALE, typename T>
__device__ __forceinline__ void store_codes(To* to, SCALE scale, Fragment<T> fragment,
                                            bool clamps) {
    const float inverse = inverse_scale(scale);
    if (inverse == 0.0f) fragment = {};  // NaN and infinity too
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (column(i) >= D) continue;
        float x[8];
        unpack8(x, fragment.pieces[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            x[j] = __fmul_rn(x[j], inverse);
            if (!DYNAMIC && !IS_FP8<To> && x[j] != x[j]) x[j] = 0.0f;
        }
        if (clamps && !IS_FP8<To>) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = fminf(fmaxf(x[j], -LARGEST<To>), LARGEST<To>);
        }
        store8(to + column(i) / PACKED<To>, x);
    }
}
