// epilogue.cuh: the end of a product: bias, what out holds already, rounding.
#include "gate.cuh"
#include "convert.cuh"

template <typename X, typename B>
__device__ __forceinline__ void finish(X* out, float sum, const B* bias, int o, int accumulate) {
    if (bias) sum += to_float(bias[o]);
    if (accumulate) sum += to_float(*out);
    *out = from_float<X>(sum);
}

// Two sums of a row of O outputs, of which b is what a opens if there is a gate: else both are
// written, where they are not past the end.
template <typename X, typename B>
__device__ __forceinline__ void finish_two(X* row, float a, float b, const B* bias, int of_a,
                                           int of_b, int O, int accumulate, int gate) {
    if (of_a >= O) return;
    if (gate) {
        if (bias) a += to_float(bias[of_a]), b += to_float(bias[of_b]);
        finish(row + of_a, gated(gate, a, b), (const B*)nullptr, 0, accumulate);
        return;
    }
    finish(row + of_a, a, bias, of_a, accumulate);
    if (of_b < O) finish(row + of_b, b, bias, of_b, accumulate);
}
