// quotient.cuh: many divisions by one number, bit for bit as the hardware's.

// a / b to nearest even, where `inverse` is 1 / b to nearest even and nothing on the way under- or
// overflows: a quotient that its exact remainder corrects twice (Markstein, 1990). Half of what
// the compiler's division takes, which finds the inverse anew.
__device__ __forceinline__ float quotient(float a, float b, float inverse) {
    float q = __fmul_rn(a, inverse);
    q = __fmaf_rn(__fmaf_rn(-q, b, a), inverse, q);
    return __fmaf_rn(__fmaf_rn(-q, b, a), inverse, q);
}
