// weight_steps.cuh: codes of rows of w in shared memory, where kernels copy and read GROUPS groups of
// each row at a time: chunks of 16 bytes of each plane, plane behind plane.
#include "planes.cuh"

#ifndef KIND
#error "weight_steps.cuh needs KIND"
#endif
using CodesOf = Codes<KIND::BITS>;
constexpr int GROUPS = 8;
// Chunks of a row: of bytes or nibbles, of pairs, of ones.
constexpr int WORDS = CodesOf::WORDS / 4 * GROUPS, PAIRS = CodesOf::HAS_PAIRS * GROUPS / 2;
constexpr int ONES = CodesOf::HAS_ONES * GROUPS / 4;

// Where a chunk of a plane lies, CHUNKS of each row. Chunks of a row are permuted by the row, so that what
// a warp reads together, the codes of 4 groups in 8 rows, lies in different banks.
template <int CHUNKS> __device__ __forceinline__ int place_of(int row, int chunk) {
    constexpr int ROW = CHUNKS >= 8 ? 1 : CHUNKS == 4 ? 2 : 4;
    constexpr int BIT = CHUNKS == 8 ? 4 : CHUNKS == 4 ? 2 : 1;
    return (row * CHUNKS + (chunk ^ (row & ROW ? BIT : 0))) * 16;
}
