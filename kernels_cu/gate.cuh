// gate.cuh: activations of gated layers, in float.
#include "ptx.cuh"

// 1 / (1 + exp(-x)) without overflow.
__device__ __forceinline__ float sigmoid(float x) {
    const float z = expf(-fabsf(x)), above = x < 0.0f ? z : 1.0f, below = 1.0f + z;
    // above / below, to the last bit or one beside it, without its branch for quotients that are not
    // normal numbers: where these are, `below` is 1 and all steps are exact.
    float inverse = inverse_ftz(below);
    inverse = fmaf(inverse, fmaf(-below, inverse, 1.0f), inverse);
    const float quotient = above * inverse;
    return fmaf(inverse, fmaf(-below, quotient, above), quotient);
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// The tanh approximation of GELU, with (1 + tanh(u)) / 2 = sigmoid(2 u), which does not cancel.
__device__ __forceinline__ float gelu(float x) {
    constexpr float TWICE_ROOT_2_PI = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
    return x * sigmoid(TWICE_ROOT_2_PI * (x + 0.044715f * x * x * x));
}

// 1 is SwiGLU, 2 GeGLU.
__device__ __forceinline__ float activated(int kind, float gate) {
    return kind == 1 ? silu(gate) : gelu(gate);
}

// What a gate lets through of `up`.
__device__ __forceinline__ float gated(int kind, float gate, float up) {
    return activated(kind, gate) * up;
}
