// epilogue.cuh: the end of a product: bias, what out holds already, rounding.
#include "vector.cuh"

template <typename X, typename B>
__device__ __forceinline__ void finish(X* out, float sum, const B* bias, int o, int accumulate) {
    if (bias) sum += to_float(bias[o]);
    if (accumulate) sum += to_float(*out);
    *out = from_float<X>(sum);
}

// Two outputs that follow each other, aligned to two elements.
template <typename X, typename B>
__device__ __forceinline__ void finish_pair(X* out, float a, float b, const B* bias, int o,
                                            int accumulate) {
    if (bias) a += to_float(bias[o]), b += to_float(bias[o + 1]);
    if (accumulate) {
        const auto there = *reinterpret_cast<const Vector<X, 2>*>(out);
        a += to_float(there.elements[0]), b += to_float(there.elements[1]);
    }
    store2(out, a, b);
}
