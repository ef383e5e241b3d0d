// page_table.cu: the dense page table of requests whose pages are listed one after another.
//
// Arrays (letters as in pykv/ops/page_table.py):
//   table                  [B, M] int  pages in order, then -1
//   lengths                [B] int     tokens of each request
//   indices         const  [I] int     pages of all requests
//   indptr          const  [B+1] int   request b has pages indices[indptr[b] ... indptr[b+1] - 1]
//   last_page_len   const  [B] int     tokens in each request's last page
// Defines:  BLOCK = threads
// Launch:   block (BLOCK), no dynamic shared memory; grid (M / BLOCK rounded up, B)
// Traffic:  up to 8 * B * M bytes
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
