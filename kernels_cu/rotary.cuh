// rotary.cuh: sine and cosine of rotary positions.
#include "types.cuh"

// Sine and cosine of `angle` radians, each with an absolute error below 1e-7 for |angle| up to
// 2^31. The reduction to [-pi / 4, pi / 4] is done in double; the first omitted term of the Taylor
// series is below 2e-9 there.
__device__ __forceinline__ void sin_cos(double angle, float& sine, float& cosine) {
    constexpr double HALF_PI = 1.5707963267948966, HALF_PI_REST = 6.123233995736766e-17;
    const double turns = rint(angle * 0.6366197723675814);  // quarters of a turn: 2 / pi
    const float x = (float)fma(-turns, HALF_PI_REST, fma(-turns, HALF_PI, angle));
    const float y = x * x;
    float s = 1.0f / 362880;
    s = s * y - 1.0f / 5040;
    s = s * y + 1.0f / 120;
    s = s * y - 1.0f / 6;
    s = s * y * x + x;
    float c = -1.0f / 3628800;
    c = c * y + 1.0f / 40320;
    c = c * y - 1.0f / 720;
    c = c * y + 1.0f / 24;
    c = c * y - 0.5f;
    c = c * y + 1.0f;
    const int quarter = (int)((i64)turns & 3);
    sine = quarter & 1 ? c : s;
    cosine = quarter & 1 ? s : c;
    if (quarter & 2) sine = -sine;
    if (quarter == 1 || quarter == 2) cosine = -cosine;
}
