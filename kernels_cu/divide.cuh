// divide.cuh: whole numbers divided by one that the host has prepared.
#include "types.cuh"

// As pykv.cuda.divisor has it: shift is ceil(log2 n), magic ceil(2^(31 + shift) / n).
struct Divisor { u32 n, magic, shift; };

// x / by.n, exact for x below 2^31.
__device__ __forceinline__ u32 divide(u32 x, Divisor by) {
    return __umulhi(2 * x, by.magic) >> by.shift;
}
