// paged_convert.cu: move rows between paged pools of any kinds, layouts and scales.
//
// Dense arrays of floats are pools too, without scales and with pages that follow each other, so
// that one kernel gathers (code pool to float pool), scatters (float to code) and converts.
//
// Arrays (letters as in pykv/ops/paged_convert.py); a row is D contiguous elements:
//   k_dst, v_dst                [N', P, H]  rows of DST, updated in place
//   k_dst_scales, v_dst_scales  [N', P, H]  DST_SCALE; with FIND written, else read; null for floats
//   k_src, v_src         const  [N, P, H]   rows of SRC
//   k_src_scales, v_src_scales  [N, P, H]   SRC_SCALE; null for floats
//   dst_pages, src_pages const  [n] int32   page i goes from src_pages[i] to dst_pages[i]; null: i;
//                                           negative on either side: the page is skipped
//   indptr, starts       const  [B+1] int32 with SEQUENCES: pages indptr[b] to indptr[b+1] - 1 of the
//                                           list hold tokens starts[b] to starts[b+1] - 1 of dst,
//                                           below num_tokens, where a page is a token
// Strides in elements of the arrays, the same for K and V. The rows of a page are two loops, over
// tokens and heads in either order, `inner` the faster one; with SEQUENCES tokens are the outer.
// Divisors, below 2^31, come with magic and shift, see divide.cuh.
// Defines:  SRC, DST = float, f16, bf16, i8, i4, e4m3 or e5m2; SRC_SCALE, DST_SCALE = f16 or float;
//           HEAD_DIM = D, a multiple of 8 up to 512;
//           FIND = 1: dynamic scales, one for each row of codes; 0: static scales of DST;
//           MOVE = 1: bits and scales of rows stay as they are (SRC = DST, FIND as of SRC);
//           SEQUENCES = 1: dst is the tokens of sequences one after the other, 0: it has pages;
//           BLOCK = threads; LANES = how many of them share a row, a power of two up to 32;
//           ROWS = how many rows these have in flight
// Launch:   grid (ceil(num_rows / (BLOCK / LANES * ROWS)), 2), or (..., 1) for K alone;
//           block (BLOCK), no shared memory
// Traffic:  num_rows * (bytes of a row and its scale, of SRC and of DST) for each of K and V
// Order:    no atomics; bit-exact; undefined where a row is written twice, or is written and read,
//           unless by itself: DST may be SRC's memory if each row and its scale keep their bytes
#include "batch.cuh"
#include "divide.cuh"
#include "pool_row.cuh"
#include "reduce.cuh"

#if !defined(SRC) || !defined(DST) || !defined(SRC_SCALE) || !defined(DST_SCALE) || \
    !defined(FIND) || !defined(MOVE) || !defined(SEQUENCES) || !defined(ROWS)
#error "paged_convert.cu needs SRC, DST, SRC_SCALE, DST_SCALE, FIND, MOVE, SEQUENCES and ROWS"
#endif

struct Strides { i64 page, outer, inner; };

__device__ __forceinline__ i64 offset(Strides by, i64 page, u32 outer, u32 inner) {
    return page * by.page + outer * by.outer + inner * by.inner;
}

// A row without its scale. As f16 or bf16 a NaN of codes is the hardware's own, which the
// instruction keeps.
template <typename To>
__device__ __forceinline__ Fragment<To> decode(const Fragment<SRC>& row, SRC_SCALE scale) {
    Fragment<To> decoded;
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
        float x[8];
        unpack8(x, row.pieces[j]);
        if (LARGEST<SRC> > 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = __fmul_rn(x[i], to_float(scale));
        }
        if constexpr (LARGEST<SRC> > 0 && sizeof(To) == 2) pack8_halves(decoded.pieces[j], x);
        else pack8(decoded.pieces[j], x);
    }
    return decoded;
}

template <typename To>
__device__ __forceinline__ void store(To* to, const Fragment<SRC>& row, SRC_SCALE scale,
                                      DST_SCALE new_scale) {
    if constexpr (LARGEST<To> > 0) {
        store_codes<FIND>(to, new_scale, decode<float>(row, scale), true);
    } else {
        store_fragment(to, decode<To>(row, scale));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
paged_convert(DST* k_dst, DST* v_dst, DST_SCALE* k_dst_scales, DST_SCALE* v_dst_scales,
              const SRC* k_src, const SRC* v_src,
              const SRC_SCALE* k_src_scales, const SRC_SCALE* v_src_scales,
              const int* dst_pages, const int* src_pages, const int* indptr, const int* starts,
              int num_sequences, int page_size, int num_tokens,
              i64 dst_page, i64 dst_outer, i64 dst_inner,
              i64 dst_scales_page, i64 dst_scales_outer, i64 dst_scales_inner,
              i64 src_page, i64 src_outer, i64 src_inner,
              i64 src_scales_page, i64 src_scales_outer, i64 src_scales_inner,
              u32 num_rows, u32 page_rows, u32 page_rows_magic, u32 page_rows_shift,
              u32 inner_rows, u32 inner_rows_magic, u32 inner_rows_shift) {
    const bool is_v = blockIdx.y;
    DST* const dst = is_v ? v_dst : k_dst;
    DST_SCALE* const dst_scales = is_v ? v_dst_scales : k_dst_scales;
    const SRC* const src = is_v ? v_src : k_src;
    const SRC_SCALE* const src_scales = is_v ? v_src_scales : k_src_scales;

    const Divisor by_page{page_rows, page_rows_magic, page_rows_shift};
    const Divisor by_inner{inner_rows, inner_rows_magic, inner_rows_shift};
    const Strides to{dst_page, dst_outer, dst_inner};
    const Strides to_scale{dst_scales_page, dst_scales_outer, dst_scales_inner};
    const Strides from{src_page, src_outer, src_inner};
    const Strides from_scale{src_scales_page, src_scales_outer, src_scales_inner};

    const bool is_first = threadIdx.x % LANES == 0;
    const u32 first = blockIdx.x * (GROUPS * ROWS) + threadIdx.x / LANES;
    bool exists[ROWS];
    u32 outers[ROWS], inners[ROWS];
    int to_pages[ROWS], from_pages[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const u32 row = min(first + r * GROUPS, num_rows - 1);
        const u32 item = divide(row, by_page), in_page = row - item * page_rows;
        outers[r] = divide(in_page, by_inner), inners[r] = in_page - outers[r] * inner_rows;
        from_pages[r] = src_pages ? src_pages[item] : (int)item;
        exists[r] = first + r * GROUPS < num_rows && from_pages[r] >= 0;
#if SEQUENCES
        const int b = last_up_to(indptr, num_sequences, item);
        const int nth = (int)item - indptr[b];  // page of the sequence
        const i64 token = starts[b] + (i64)nth * page_size;
        exists[r] &= nth >= 0 && (int)item < indptr[b + 1];
        exists[r] &= token + outers[r] < min(starts[b + 1], num_tokens);
        to_pages[r] = (int)token;
#else
        to_pages[r] = dst_pages ? dst_pages[item] : (int)item;
        exists[r] &= to_pages[r] >= 0;
#endif
    }

    Fragment<SRC> rows[ROWS] = {};  // zeros where there is no element
    SRC_SCALE scales[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const SRC* const from_row = src + offset(from, from_pages[r], outers[r], inners[r]);
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            if (!exists[r] || column(j) >= D) continue;
            rows[r].pieces[j] = get8(from_row + column(j) / PACKED<SRC>);
        }
        if (LARGEST<SRC> > 0 && exists[r]) {
            scales[r] = src_scales[offset(from_scale, from_pages[r], outers[r], inners[r])];
        }
    }
    const auto scale_at = [&](int r) {
        return dst_scales + offset(to_scale, to_pages[r], outers[r], inners[r]);
    };
#if MOVE
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (!exists[r]) continue;
        store_fragment(dst + offset(to, to_pages[r], outers[r], inners[r]), rows[r]);
        if (FIND && is_first) *scale_at(r) = scales[r];
    }
#else
    DST_SCALE new_scales[ROWS] = {};
#if FIND
    u32 largest[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) largest[r] = max_magnitude(decode<float>(rows[r], scales[r]));
    group_max<LANES>(largest);
    __syncwarp();  // all lanes have read the old scales, which new ones may overwrite
#endif
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (!exists[r]) continue;
#if FIND
        new_scales[r] = row_scale<DST, DST_SCALE>(largest[r] >> 1);
        if (is_first) *scale_at(r) = new_scales[r];
#else
        if (LARGEST<DST> > 0) new_scales[r] = *scale_at(r);
#endif
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (!exists[r]) continue;
        DST* const to_row = dst + offset(to, to_pages[r], outers[r], inners[r]);
        store(to_row, rows[r], scales[r], new_scales[r]);
    }
#endif
}
