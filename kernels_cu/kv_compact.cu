// kv_compact.cu: kept rows of a paged cache move together, in place: row kept[j] to slot j.
//
// Arrays (letters as in pykv/ops/kv_compact.py); strides of page, token and head in bytes:
//   k_pool, v_pool         [N, P, H, D] in any order, K_T and V_T, rows of K_UNITS * K_UNIT bytes (V
//                          likewise)
//   k_scales, v_scales     [N, P, H], likewise, SCALE_T; null where nothing moves
//   page_table      const  [B, M] int   pages that rows are read from
//   out_table       const  [B, M] int   pages that they are written to: the same, or pages that hold
//                                       nothing, see below
//   kept            const  [B, A, C] int  ascending; A = 1: the same rows of all heads, or A = H
//   counts          const  [B, A] int
// Scalars:  kept_head = C where A = H, else 0; counts_head likewise 1 or 0
// Defines:  K_T, V_T = float, f16, bf16, i8, i4, e4m3 or e5m2; SCALE_T = f16 or float; K_UNIT, V_UNIT
//           = 4, 8 or 16, K_UNITS, V_UNITS; BLOCK = threads, AHEAD = units that a thread holds
// Launch:   grid (B * H, 2 or 4), block (BLOCK): y is K, V, scales of K, scales of V
// Traffic:  kept rows that move, read and written once, with their scales; 4 bytes a kept row and
//           array of `kept`
// Order:    bit-exact
//
// A row never moves to a later slot: kept[j] >= j. So what slot j holds may be overwritten once the
// rows up to j are read, and reading ahead of the writes is always safe. A block takes the rows of a
// sequence, head and array in order, some at a time: all threads load, a barrier, all store.
#include "types.cuh"

#if !defined(K_T) || !defined(V_T) || !defined(SCALE_T) || !defined(K_UNIT) || \
    !defined(V_UNIT) || !defined(K_UNITS) || !defined(V_UNITS) || !defined(BLOCK) || !defined(AHEAD)
#error "kv_compact.cu needs K_T, V_T, SCALE_T, K_UNIT, V_UNIT, K_UNITS, V_UNITS, BLOCK and AHEAD"
#endif

template <int BYTES> struct UnitOf;
template <> struct UnitOf<2> { using type = u16; };
template <> struct UnitOf<4> { using type = u32; };
template <> struct UnitOf<8> { using type = uint2; };
template <> struct UnitOf<16> { using type = uint4; };

struct Rows {  // of a sequence and head
    const int *from_pages, *to_pages, *kept;
    int count, P;
};

struct Strides {  // bytes
    i64 page, token, offset;  // offset of the head
    __device__ __forceinline__ i64 at(const int* pages, int slot, int P) const {
        return pages[slot / P] * page + slot % P * token + offset;
    }
};

template <int BYTES, int UNITS, typename T>
__device__ __forceinline__ void move_rows(T* elements, const Rows& rows, const Strides& strides) {
    using Unit = typename UnitOf<BYTES>::type;
    u8* const array = reinterpret_cast<u8*>(elements);
    for (i64 begin = 0; begin < (i64)rows.count * UNITS; begin += AHEAD * BLOCK) {
        Unit held[AHEAD];
        u8* to[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const i64 unit = begin + a * BLOCK + threadIdx.x;
            const int j = (int)(unit / UNITS), byte = (int)(unit % UNITS) * BYTES;
            to[a] = nullptr;
            if (j >= rows.count) continue;
            const u8* from = array + strides.at(rows.from_pages, rows.kept[j], rows.P) + byte;
            u8* const there = array + strides.at(rows.to_pages, j, rows.P) + byte;
            if (from == there) continue;
            held[a] = *reinterpret_cast<const Unit*>(from);
            to[a] = there;
        }
        __syncthreads();
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (to[a]) *reinterpret_cast<Unit*>(to[a]) = held[a];
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
kv_compact(K_T* k_pool, V_T* v_pool, SCALE_T* k_scales, SCALE_T* v_scales,
           const int* __restrict__ page_table, const int* __restrict__ out_table, const int* __restrict__ kept,
           const int* __restrict__ counts, i64 k_pool_page, i64 k_pool_token, i64 k_pool_head,
           i64 v_pool_page, i64 v_pool_token, i64 v_pool_head, i64 k_scales_page,
           i64 k_scales_token, i64 k_scales_head, i64 v_scales_page, i64 v_scales_token,
           i64 v_scales_head, int H, int P, int M, i64 kept_sequence, i64 kept_head,
           int counts_sequence, int counts_head) {
    const int b = blockIdx.x / H, head = blockIdx.x % H;
    const Rows rows = {page_table + (i64)b * M, out_table + (i64)b * M,
                       kept + b * kept_sequence + head * kept_head,
                       counts[b * counts_sequence + head * counts_head], P};
    if (blockIdx.y == 0) {
        move_rows<K_UNIT, K_UNITS>(k_pool, rows, {k_pool_page, k_pool_token, head * k_pool_head});
    } else if (blockIdx.y == 1) {
        move_rows<V_UNIT, V_UNITS>(v_pool, rows, {v_pool_page, v_pool_token, head * v_pool_head});
    } else if (blockIdx.y == 2 && k_scales) {
        move_rows<sizeof(SCALE_T), 1>(k_scales, rows,
                                  {k_scales_page, k_scales_token, head * k_scales_head});
    } else if (blockIdx.y == 3 && v_scales) {
        move_rows<sizeof(SCALE_T), 1>(v_scales, rows,
                                  {v_scales_page, v_scales_token, head * v_scales_head});
    }
}
