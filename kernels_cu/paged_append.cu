// paged_append.cu: write new key and value rows into the pages of a pool, as what its kinds hold.
//
// Arrays (letters as in pykv/ops/paged_append.py); strides are counted in elements of an array:
//   k_pool, v_pool             pages of K_T, V_T, updated in place: strides page, token, head; the
//                              elements of a row are contiguous
//   k_scales, v_scales         SCALE_T, dynamic (written) or static (read), by SCALES: strides
//                              page, token, head, 0 where they have no such dimension. Null for
//                              float kinds
//                              head, 0 where they have no such dimension. Null for float kinds
//   k, v                const  [T, H, D] NEW_T: strides token, head
//   rows                const  by ADDRESS:
//     SLOTS    [T] ROW_T       page * PAGE + offset
//     RAGGED   [B+1] ROW_T     request b brings rows rows[b] ... rows[b+1] - 1
//     INDEXED  [T] ROW_T       the request of each row
//     DECODE                   null: row b is request b's
//   indices             const  [I] int    pages of all requests; null for SLOTS, like the next two
//   indptr              const  [B+1] int  request b has pages indices[indptr[b] ... indptr[b+1] - 1]
//   counts                     DECODE, RAGGED: [B] int, tokens in a request's last page; those
//                              before the call, or after it where AFTER. INDEXED: [T] int,
//                              positions. ADVANCE adds 1 where a row was written
// Scalars:  num_rows = T * H; num_requests = B, for RAGGED alone
// Defines:  NEW_T = float, f16 or bf16; K_T, V_T = those or i8, i4, e4m3, e5m2; SCALE_T = f16 or
//           float; HEAD_DIM = D, a multiple of 8; HEADS = H; PAGE = tokens a page; ROW_T = int or
//           i64; ADDRESS, SCALES = DYNAMIC or STATIC, AFTER and ADVANCE = 0 or 1;
//           BLOCK = threads; LANES = how many of them share a row, a power of two up to 32; ROWS =
//           rows of a block, BLOCK / LANES, but with ADVANCE those of a token
// Launch:   grid (T * H / ROWS rounded up), block (BLOCK), no dynamic shared memory
// Traffic:  T * H * (2 * D * sizeof(NEW_T) + bytes of a row of K and V with its scales) bytes
// Order:    no atomics; bit-exact; two rows for one slot leave either row, or a mixture
// Skipped:  rows whose slot, request or page is negative, or whose position lies outside their
//           request's pages; RAGGED: rows past those of the last request
#include "batch.cuh"
#include "pool_write.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

#define SLOTS 0
#define DECODE 1
#define RAGGED 2
#define INDEXED 3
#if !defined(ADDRESS) || !defined(AFTER) || !defined(ADVANCE) || !defined(ROWS)
#error "paged_append.cu needs ADDRESS, AFTER, ADVANCE and ROWS"
#endif
static_assert(ROWS == (ADVANCE ? H : GROUPS), "a row of each group, or all of a token");
static_assert(!ADVANCE || ADDRESS == DECODE || ADDRESS == INDEXED, "one token a request");

// --- Where a row goes ----------------------------------------------------------------------------

__device__ __forceinline__ Place place_of(const int* indices, const int* indptr, int request,
                                          int position) {
    const int listed = indptr[request] + position / PAGE;
    if (position < 0 || listed >= indptr[request + 1]) return Place{-1, 0};
    return Place{indices[listed], position % PAGE};
}

// Tokens of a request whose last page has `last`.
__device__ __forceinline__ int length_of(const int* indptr, int request, int last) {
    return (indptr[request + 1] - indptr[request] - 1) * PAGE + last;
}

__device__ __forceinline__ Place find_place(const ROW_T* rows, const int* indices,
                                            const int* indptr, const int* counts,
                                            int num_requests, int token) {
#if ADDRESS == SLOTS
    return place_of_slot(rows[token]);
#elif ADDRESS == DECODE
    return place_of(indices, indptr, token, length_of(indptr, token, counts[token] - AFTER));
#elif ADDRESS == RAGGED
    const int request = count_passing<LANES>(
        num_requests, [&](int b) { return rows[b + 1] <= token; });
    if (request >= num_requests) return Place{-1, 0};
    const int before = (int)(token - rows[AFTER ? request + 1 : request]);
    return place_of(indices, indptr, request, length_of(indptr, request, counts[request] + before));
#else
    const int request = (int)rows[token];
    if (request < 0) return Place{-1, 0};
    return place_of(indices, indptr, request, counts[token]);
#endif
}

extern "C" __global__ void __launch_bounds__(BLOCK)
paged_append(K_T* __restrict__ k_pool, V_T* __restrict__ v_pool, SCALE_T* __restrict__ k_scales,
             SCALE_T* __restrict__ v_scales, const NEW_T* __restrict__ k,
             const NEW_T* __restrict__ v, const ROW_T* __restrict__ rows,
             const int* __restrict__ indices, const int* __restrict__ indptr,
             int* __restrict__ counts,
             i64 k_pool_page, i64 k_pool_token, i64 k_pool_head,
             i64 v_pool_page, i64 v_pool_token, i64 v_pool_head,
             i64 k_scales_page, i64 k_scales_token, i64 k_scales_head,
             i64 v_scales_page, i64 v_scales_token, i64 v_scales_head,
             i64 k_token, i64 k_head, i64 v_token, i64 v_head, int num_rows, int num_requests) {
    const Pool<K_T> k_to{k_pool, k_pool_page, k_pool_token, k_pool_head,
                         k_scales, k_scales_page, k_scales_token, k_scales_head};
    const Pool<V_T> v_to{v_pool, v_pool_page, v_pool_token, v_pool_head,
                         v_scales, v_scales_page, v_scales_token, v_scales_head};
    // Groups without a row repeat the last one of their block: no lane leaves its warp, and no
    // block reads a count that another block advances.
    const u32 last_row = ADVANCE ? (blockIdx.x + 1) * ROWS - 1 : num_rows - 1;
    bool written = false;
#pragma unroll 1
    for (u32 start = 0; start < ROWS; start += GROUPS) {
        const u32 of_block = start + threadIdx.x / LANES;
        const u32 row = blockIdx.x * ROWS + of_block;
        const bool wanted = ADVANCE ? of_block < H : row < num_rows;
        const u32 known = wanted ? row : last_row;
        const u32 token = known / H, head = known % H;
        const auto k_row = load_fragment(k + token * k_token + head * k_head);
        const auto v_row = load_fragment(v + token * v_token + head * v_head);
        schedule_fence();  // issue the loads of rows before those of their addresses
        const Place place = find_place(rows, indices, indptr, counts, num_requests, token);
        u32 largest[2] = {};
        if constexpr (HAS_DYNAMIC_SCALE<K_T>) largest[0] = max_magnitude(k_row);
        if constexpr (HAS_DYNAMIC_SCALE<V_T>) largest[1] = max_magnitude(v_row);
        if constexpr (HAS_DYNAMIC_SCALE<K_T> || HAS_DYNAMIC_SCALE<V_T>) group_max<LANES>(largest);
        if (!wanted || place.page < 0) continue;
        written = true;
        k_to.store(place, head, k_row, largest[0]);
        v_to.store(place, head, v_row, largest[1]);
    }
    if constexpr (ADVANCE) {
        __syncthreads();  // all threads have read the count
        if (threadIdx.x == 0 && written) counts[blockIdx.x] += 1;
    }
}
