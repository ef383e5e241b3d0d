// softmax.cuh: constants and the base of an online softmax.
#include "types.cuh"

constexpr float LOG2_E = 1.442695040888963f;
constexpr float LN_2 = 0.693147180559945f;

// The base that is subtracted from exponents when the running maximum is m: 0 while no key is
// visible, because -INF - -INF is NaN.
__device__ __forceinline__ float finite_base(float m) { return m == -INF ? 0.0f : m; }
