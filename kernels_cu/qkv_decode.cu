// qkv_decode.cu: paged_qkv and paged_decode_mma in one launch, for the next token of one sequence: heads of
// Q, K and V, normalised, rotated and mixed; K and V into their pages; attention of Q.
//
// Arrays (letters as in pykv/ops/qkv_decode.py):
//   out                        [1, HQ, D] Q_T, row-major
//   k_pool, v_pool             [N, P, H, D] in any order, as of paged_decode_mma.cu: K_T, V_T; rows
//                              at `slots` are written, others read
//   k_scales, v_scales         [N, P, H], likewise: SCALE_T, dynamic (written) or static, by SCALES
//   workspace                  as of paged_decode_mma.cu
//   qkv                 const  [HQ + 2H, D] NEW_T: heads of Q, then K, then V
//   slots               const  [1] ROW_T  page * PAGE + offset of the last key, that is key lengths[0]
//                              - 1; negative: K and V are not written
//   positions           const  [1] int; null where PAIRS is 0
//   inv_freq            const  [PAIRS] float  radians per position; null where PAIRS is 0
//   q_norm, k_norm      const  [D] W_T, 16-byte aligned; null where NORM is 0
//   page_table, lengths const  as of paged_decode_mma.cu
// Scalars:  those of paged_decode_mma.cu and paged_qkv.cu, by the same names; piece_tiles = 0
// Defines:  those of both; G = HQ / H is at most ROWS, Q_T = NEW_T, ALONE = 1
// Launch:   as of paged_decode_mma.cu, with B = T = 1. It may start early, hence no pointer is
//           __restrict__: no load moves ahead of the wait
// Traffic:  K and V once, scales and page table; a KV head's rows of qkv once for each piece of it
// Order:    as of paged_decode_mma.cu; K and V bit for bit as of paged_qkv.cu
//
// Each block makes the queries of the KV head that it reads. The one whose range ends with the last
// key makes that key and its value, too, and reads the tile behind that: no other block does, as one
// tile has all rows of a KV head.
#include "decode_range.cuh"
#include "paged_qkv.cuh"
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches
static_assert(HQ / H <= ROWS, "a block has all query rows of a KV head");

// What threads of a block tell each other.
struct QueriesShared {
    AppendShared append;
    __align__(16) Q_T rows[ROWS][D];
};

// Stores a query in shared memory.
__device__ __forceinline__ void share(Q_T* to, const HeadRow& made) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (column(i) < D) *(Eight<Q_T>*)(to + column(i)) = convert8<Q_T>(made.pieces[i]);
    }
}

// Makes the queries of a block, and the last key and value. All its threads call it, once.
struct MadeQueries {
    static constexpr bool ARE_MADE = true;
    static constexpr int G = HQ / H;
    QueriesShared& shared;
    const Append& append;

    // Row g of the queries of a KV head.
    __device__ __forceinline__ const Q_T* make(const Piece& piece, int kv_head, int g) const {
        const bool has_last = piece.tile < piece.tile_end && piece.tile_end == piece.visible.tile_end;
        const u32 count = has_last ? G + 2 : G, group = threadIdx.x / LANES;
        const Place place = place_of_slot(has_last ? append.slots[0] : (ROW_T)-1);
        for (u32 first = 0; first < count; first += GROUPS) {
            const u32 row = min(first + group, count - 1);  // idle lanes do the last one
            const u32 known = row < G ? kv_head * G + row : HQ + (row - G) * H + kv_head;
            const bool is_own = first + group < count;
            make_head(shared.append, append, 0, known,
                      [&](const HeadRow& made, const HeadValue& value, u32 largest) {
                if (!is_own) return;
                if (row < G) share(shared.rows[row], made);
                else store_head(append, place, known, made, value, largest);
            });
            __syncthreads();
        }
        return shared.rows[min(g, G - 1)];
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
qkv_decode(Q_T* out, K_T* k_pool, V_T* v_pool, SCALE_T* k_scales, SCALE_T* v_scales,
           float* workspace, const NEW_T* qkv, const ROW_T* slots, const int* positions,
           const float* inv_freq, const W_T* q_norm, const W_T* k_norm, const int* page_table,
           const int* lengths, i64 k_pool_page, i64 k_pool_token, i64 k_pool_head, i64 v_pool_page,
           i64 v_pool_token, i64 v_pool_head, i64 k_scales_page, i64 k_scales_token,
           i64 k_scales_head, i64 v_scales_page, i64 v_scales_token, i64 v_scales_head,
           int B, int G, int M, int capacity, int window, int piece_tiles, int num_slots,
           float score_scale, float cap, float eps) {
#if __CUDA_ARCH__ >= 750
    __shared__ QueriesShared made;
    __shared__ int is_last;
    await_previous();
    const Append append{nullptr, k_pool, v_pool, k_scales, v_scales, qkv, slots, positions, inv_freq,
                        q_norm, k_norm, k_pool_page, k_pool_token, k_pool_head, v_pool_page,
                        v_pool_token, v_pool_head, k_scales_page, k_scales_token, k_scales_head,
                        v_scales_page, v_scales_token, v_scales_head, 0, 0, 0, eps};
    decode_range(Decode{out, nullptr, workspace, nullptr, k_pool, v_pool, k_scales, v_scales,
                        page_table, lengths, nullptr, nullptr, nullptr, 0, 0, k_pool_head,
                        v_pool_head, k_scales_head, v_scales_head, (int)k_pool_page,
                        (int)k_pool_token, (int)v_pool_page, (int)v_pool_token, (int)k_scales_page,
                        (int)k_scales_token, (int)v_scales_page, (int)v_scales_token, B, 1, 0, G, M,
                        capacity, window, piece_tiles, num_slots, score_scale, cap, 1.0f},
                 is_last, MadeQueries{made, append});
#endif
}
