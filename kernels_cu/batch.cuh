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

// Number of n items for which passes(i) holds: those before some first one, and none from it on.
// Searched by the WIDTH lanes of a group, which cut what is left into WIDTH + 1 parts each round,
// so that few loads depend on another. All groups of a warp call it, each with a question of its
// own.
template <int WIDTH, typename N, typename Passes>
__device__ __forceinline__ N count_passing(N n, Passes passes) {
    const int lane = threadIdx.x % WIDTH, first = threadIdx.x % WARP - lane;
    N low = 0;
    for (N left = n + 1; left > 1;) {
        left = (left + WIDTH) / (WIDTH + 1);
        const i64 probe = low + (i64)(lane + 1) * left - 1;
        const u32 passed = __ballot_sync(FULL_MASK, probe < n && passes((N)probe));
        low += __popc(passed >> first & (FULL_MASK >> (WARP - WIDTH))) * left;
    }
    return low;
}

// A block of SIZE rows of a ragged batch. Sequence b has (starts[b + 1] - starts[b]) * G rows; its
// blocks start at starts[b] * G / SIZE + b, which leaves room for a partial one per sequence.
struct RowBlock {
    int b, start, num_queries;  // the sequence, its first query and how many it has
    int first_row, num_rows;    // in the sequence; num_rows below 1: the block is empty
};

// A whole warp calls it.
template <int SIZE>
__device__ __forceinline__ RowBlock row_block(const int* starts, int B, int G, int block) {
    const auto first_block = [&](int b) { return (int)((i64)starts[b] * G / SIZE) + b; };
    const int b = count_passing<WARP>(B, [&](int i) { return first_block(i) <= block; }) - 1;
    const int start = starts[b], num_queries = starts[b + 1] - start;
    const int first_row = (block - first_block(b)) * SIZE;
    return {b, start, num_queries, first_row, min(SIZE, num_queries * G - first_row)};
}
