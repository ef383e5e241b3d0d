// page_table.cu: dense page tables, of requests whose pages are listed one after another, and of
// chosen blocks of a sequence.
//
// Arrays (letters as in pykv/ops/page_table.py):
//   table                  [B, M] int  pages in order, then -1
//   lengths                [B] int     tokens of each request
//   indices         const  [I] int     pages of all requests
//   indptr          const  [B+1] int   request b has pages indices[indptr[b] ... indptr[b+1] - 1]
//   last_page_len   const  [B] int     tokens in each request's last page
// of page_table_of_blocks:
//   table                  [B * H, M] int  pages of the chosen blocks, then of the rows behind all
//                                          old blocks, then -1; page p of head h is p * unit + h
//   lengths                [B * H] int     rows of these
//   page_table      const  [B, K] int      pages of the sequences
//   rows            const  [B] int         rows of each, at most K * P
//   chosen          const  [B * H, C] int  blocks, ascending; counts of them count
//   counts          const  [B * H] int
//   old             const  [B * H] int     blocks that could be chosen
// Scalars:  block_pages = pages of a block
// Defines:  BLOCK = threads
// Launch:   block (BLOCK), no dynamic shared memory; grid (M / BLOCK rounded up, B), of blocks
//           (M / BLOCK rounded up, B * H)
// Traffic:  up to 8 * B * M bytes, of blocks times H
// Order:    no atomics, bit-exact
#include "types.cuh"

#ifndef BLOCK
#error "page_table.cu needs BLOCK"
#endif

extern "C" __global__ void __launch_bounds__(BLOCK)
page_table(int* __restrict__ table, int* __restrict__ lengths, const int* __restrict__ indices,
           const int* __restrict__ indptr, const int* __restrict__ last_page_len, int M,
           int page_size) {
    const int b = blockIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
    const int first = indptr[b], pages = indptr[b + 1] - first;
    if (column < M) table[(i64)b * M + column] = column < pages ? indices[first + column] : -1;
    if (column == 0) {
        const int length = pages > 0 ? (pages - 1) * page_size + last_page_len[b] : 0;
        lengths[b] = max(length, 0);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
page_table_of_blocks(int* __restrict__ table, int* __restrict__ lengths,
                     const int* __restrict__ page_table, const int* __restrict__ rows,
                     const int* __restrict__ chosen, const int* __restrict__ counts,
                     const int* __restrict__ old, int H, int M, int K, int C, int P,
                     int block_pages, int unit) {
    const int row = blockIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
    const int b = row / H, head = row % H;
    const int length = max(0, min(rows[b], K * P));
    const int first = min(counts[row], C) * block_pages;  // page of the rows behind old blocks
    const int behind = old[row] * block_pages, pages = first + (length + P - 1) / P - behind;
    if (column < M) {
        int page = -1;
        if (column < pages) {
            const int block = column < first ? chosen[(i64)row * C + column / block_pages] : 0;
            const int at = column < first ? block * block_pages + column % block_pages
                                          : behind + column - first;
            page = page_table[(i64)b * K + at] * unit + head;
        }
        table[(i64)row * M + column] = page;
    }
    if (column == 0) lengths[row] = max(first * P + length - behind * P, 0);
}
