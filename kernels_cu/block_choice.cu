// block_choice.cu: page tables of the best blocks of sequences, for each KV head its own, and of all
// rows behind the blocks that could be chosen.
//
// Arrays, row-major (letters as in pykv/ops/block_choice.py; R = B * H, row b * H + h):
//   table              [R, M] int  pages of the best blocks in the order of the sequence, then of the
//                                  rows behind, then -1; page p of head h is p * unit + h
//   rows               [R] int     rows of these
//   page_table  const  [B, N] int  pages of the sequences
//   lengths     const  [B] int     rows of each, clamped to 0 .. capacity
//   scores      const  [R, K] float  read of blocks that can be chosen alone
// Scalars:  H; capacity = N * P; block: rows of one; block_pages = block / P; recent: the last rows, in
//           which no block can be chosen; blocks: how many are chosen
// Defines:  BLOCK = threads, a power of two up to 1024; ITEMS, scores that each has at once
// Launch:   grid (R), block (BLOCK). It may start early, hence no array is __restrict__
// Traffic:  4 * K bytes a row, of blocks past the first TILE from the caches up to three times more; up to
//           8 * M bytes
// Order:    atomics count integers alone; of equal scores the first are chosen: the same in every run
//
// How many blocks are chosen is known before which: the rows behind have their places at once.
#if !defined(BLOCK) || !defined(ITEMS)
#error "block_choice.cu needs BLOCK and ITEMS"
#endif

#include "largest.cuh"
#include "ptx.cuh"
#include "types.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 1)
block_choice(int* table, int* rows, const int* page_table, const int* lengths, const float* scores,
             int H, int M, int N, int K, int P, int capacity, int block, int block_pages, int unit,
             int recent, int blocks) {
    __shared__ int histogram[DIGITS];
    __shared__ u64 scratch[WARPS];
    __shared__ Found found;
    await_previous();
    const int r = blockIdx.x, head = r % H, length = max(0, min(lengths[r / H], capacity));
    const int old = min(max(length - recent, 0) / block, K), count = min(old, blocks);
    const int first = count * block_pages, behind = old * block_pages;  // pages of the rows behind
    const int pages = first + length / P + (length % P != 0) - behind;
    page_table += (i64)(r / H) * N;
    table += (i64)r * M;
    scores += (i64)r * K;

    const Rules none = {0, K, 0, 0.0f};
    u32 orders[ITEMS];  // of the first blocks, most often of all
    load_orders<1>(orders, scores, threadIdx.x * ITEMS, old, none);
    for (int column = first + threadIdx.x; column < M; column += BLOCK) {
        table[column] = column < pages ? page_table[behind + column - first] * unit + head : -1;
    }
    if (threadIdx.x == 0) rows[r] = length - (old - count) * block;

    Cut cut = old == count ? Cut{0, 0, true} : Cut{0, count, false};
    for (int pass = 0; !cut.is_found && pass < PASSES; pass++) {
        clear(histogram);
        count_orders(histogram, orders, cut.last, pass);
        count_digits(histogram, scores, TILE, old, none, cut.last, pass);
        __syncthreads();
        cut_deeper(cut, histogram, scratch, found, pass);
    }
    const auto keep = [=](int n, int chosen) {
#pragma unroll 4
        for (int i = 0; i < block_pages; i++) {
            const int column = n * block_pages + i;
            if (column < M) table[column] = page_table[chosen * block_pages + i] * unit + head;
        }
    };
    const Pairs pairs(cut);
    u64 before = 0;
    keep_orders(orders, threadIdx.x * ITEMS, pairs, before, scratch, keep);
    keep_rows(scores, TILE, old, none, pairs, before, scratch, keep);
}
