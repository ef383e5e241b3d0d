// plain.cuh: rows of floats as kinds of weights, beside those of planes.cuh: a code is an element,
// and its scale is 1.
#include "planes.cuh"

template <typename T> struct Plain {
    static constexpr int BITS = 8 * sizeof(T), HALVES = 1;
    static constexpr bool HAS_ADDEND = false;
    using Raw = int;  // nothing is loaded

    static __device__ __forceinline__ void decode(float (&d)[1], float (&)[1], Raw, int) {
        d[0] = 1.0f;
    }
};

using F32 = Plain<float>;
using F16 = Plain<f16>;
using BF16 = Plain<bf16>;
