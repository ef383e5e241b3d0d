// epilogue.cuh: the end of a product: bias, what out holds already, rounding.
#include "convert.cuh"

template <typename X, typename B>
__device__ __forceinline__ void finish(X* out, float sum, const B* bias, int o, int accumulate) {
    if (bias) sum += to_float(bias[o]);
    if (accumulate) sum += to_float(*out);
    *out = from_float<X>(sum);
}
