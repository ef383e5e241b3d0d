// batch.cuh: which sequence of a batch an item belongs to.
#include "types.cuh"

// Index of the last of n >= 1 ascending entries that is at most x; 0 if none is.
__device__ __forceinline__ int last_up_to(const int* entries, int n, i64 x) {
    int low = 0;
    for (int end = n; end - low > 1;) {
        const int middle = low + (end - low) / 2;
        if (entries[middle] <= x) low = middle; else end = middle;
    }
    return low;
}

// A block of SIZE rows of a ragged batch. Sequence b has (starts[b + 1] - starts[b]) * G rows; its
// blocks start at starts[b] * G / SIZE + b, which leaves room for a partial one per sequence.
struct RowBlock {
    int b, start, num_queries;  // the sequence, its first query and how many it has
    int first_row, num_rows;    // in the sequence; num_rows below 1: the block is empty
};

// 32-ary search by a whole warp: few dependent loads.
template <int SIZE>
__device__ __forceinline__ RowBlock row_block(const int* starts, int B, int G, int block) {
    const auto first_block = [&](int b) { return (int)((i64)starts[b] * G / SIZE) + b; };
    int b = 0;
    for (int left = B; left > 1;) {
        const int step = (left + WARP - 1) / WARP, ahead = threadIdx.x % WARP * step;
        const bool begins = ahead < left && first_block(b + ahead) <= block;
        const int passed = (__popc(__ballot_sync(FULL_MASK, begins)) - 1) * step;
        b += passed;
        left = min(step, left - passed);
    }
    const int start = starts[b], num_queries = starts[b + 1] - start;
    const int first_row = (block - first_block(b)) * SIZE;
    return {b, start, num_queries, first_row, min(SIZE, num_queries * G - first_row)};
}
