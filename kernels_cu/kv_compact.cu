// kv_compact.cu: compacts a paged cache in place: row kept[j] moves to slot j.
//
// Arrays (letters as in pykv/ops/kv_compact.py); strides of page, token and head in bytes:
//   k_pool, v_pool         [N, P, H, D] in any order, K_T and V_T, rows of K_UNITS * K_UNIT bytes (V
//                          likewise)
//   k_scales, v_scales     [N, P, H], likewise, SCALE_T; null where nothing moves
//   words                  [B * H, 1 + chunks] u32, zeros at first: a ticket, then whether a chunk is
//                          read; chunks = ceil(C / ROWS)
//   page_table      const  [B, M] int   pages to read from
//   out_table       const  [B, M] int   pages to write to: the same, or unused pages, see below
//   kept            const  [B, A, C] int  ascending; A = 1: the same rows for all heads, or A = H
//   counts          const  [B, A] int
// Scalars:  kept_head = C where A = H, else 0; counts_head likewise 1 or 0; turns: chunks that a block
//           takes at most, at least chunks / W
// Defines:  K_T, V_T = float, f16, bf16, i8, i4, e4m3 or e5m2; SCALE_T = f16 or float; K_UNIT, V_UNIT
//           = 4, 8 or 16, K_UNITS, V_UNITS; ROWS of a chunk; BLOCK = threads; BLOCKS_PER_SM
// Launch:   grid (B * H, W), W from 1 to BLOCK / 2, block (BLOCK): W blocks share a sequence and head
// Traffic:  kept rows that move, read and written once, with their scales; 4 bytes a kept row, and of
//           its page tables; 4 * (1 + chunks) bytes of words a sequence and head. Its ceiling is that
//           of a copy of the rows
// Order:    bit-exact, whichever block takes which chunk
//
// A row never moves to a later slot: kept[j] >= j. So a chunk may be written once all chunks before it
// are read, and reads never wait. Blocks take chunks in order by ticket, load one into registers, mark
// it as read, wait until those before it are read, and store it. No deadlock: a chunk that is waited
// for has a ticket, so its block is running and reads without waiting. A block holds two tickets at
// most, a chunk that waits and the next one. So it suffices to look at the 2 W chunks before: if an
// earlier one were unread, W blocks would hold the 2 W + 1 chunks from that one on.
#include "ptx.cuh"

#if !defined(K_T) || !defined(V_T) || !defined(SCALE_T) || !defined(K_UNIT) || !defined(V_UNIT) || \
    !defined(K_UNITS) || !defined(V_UNITS) || !defined(ROWS) || !defined(BLOCK) || \
    !defined(BLOCKS_PER_SM)
#error "kv_compact.cu needs K_T, V_T, SCALE_T, K_UNIT, V_UNIT, K_UNITS, V_UNITS, ROWS, BLOCK, BLOCKS_PER_SM"
#endif
static_assert(ROWS >= 1 && ROWS <= BLOCK, "a thread for each row's scale");

template <int BYTES> struct UnitOf;
template <> struct UnitOf<2> { using type = u16; };
template <> struct UnitOf<4> { using type = u32; };
template <> struct UnitOf<8> { using type = uint2; };
template <> struct UnitOf<16> { using type = uint4; };

struct Place { int page, token; };
struct Move { Place from, to; };  // of one row; from.token < 0 means that it stays

struct Strides {  // bytes
    i64 page, token, offset;  // offset of the head
    __device__ __forceinline__ i64 at(const Place& place) const {
        return place.page * page + place.token * token + offset;
    }
};

// A chunk of an array between its load and its store, in the registers of a block.
template <int BYTES, int UNITS> struct Held {
    using Unit = typename UnitOf<BYTES>::type;
    static constexpr int COUNT = (ROWS * UNITS + BLOCK - 1) / BLOCK;
    Unit units[COUNT];

    // Calls act(unit, row, its byte) for each unit of this thread whose row moves.
    template <typename Act> __device__ __forceinline__ void each(const Move* moves, Act act) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int at = i * BLOCK + threadIdx.x, row = at / UNITS;
            if (row < ROWS && moves[row].from.token >= 0) act(units[i], row, at % UNITS * BYTES);
        }
    }

    template <typename T>
    __device__ __forceinline__ void load(const T* elements, const Move* moves, const Strides& strides) {
        const u8* const array = reinterpret_cast<const u8*>(elements);
        each(moves, [&](Unit& unit, int row, int byte) {
            unit = *reinterpret_cast<const Unit*>(array + strides.at(moves[row].from) + byte);
        });
    }

    template <typename T>
    __device__ __forceinline__ void store(T* elements, const Move* moves, const Strides& strides) {
        u8* const array = reinterpret_cast<u8*>(elements);
        each(moves, [&](const Unit& unit, int row, int byte) {
            *reinterpret_cast<Unit*>(array + strides.at(moves[row].to) + byte) = unit;
        });
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM)
kv_compact(K_T* k_pool, V_T* v_pool, SCALE_T* k_scales, SCALE_T* v_scales, u32* words,
           const int* __restrict__ page_table, const int* __restrict__ out_table,
           const int* __restrict__ kept, const int* __restrict__ counts, i64 k_pool_page,
           i64 k_pool_token, i64 k_pool_head, i64 v_pool_page, i64 v_pool_token, i64 v_pool_head,
           i64 k_scales_page, i64 k_scales_token, i64 k_scales_head, i64 v_scales_page,
           i64 v_scales_token, i64 v_scales_head, int H, int P, int M, i64 kept_sequence,
           i64 kept_head, int counts_sequence, int counts_head, int C, int turns) {
    __shared__ Move moves_of[2][ROWS];
    __shared__ int next;
    const int b = blockIdx.x / H, head = blockIdx.x % H;
    const int count = min(counts[b * counts_sequence + head * counts_head], C);
    u32* const ticket = words + (i64)blockIdx.x * (1 + (C - 1) / ROWS + 1);

    if (threadIdx.x == 0) next = (int)atomicAdd(ticket, 1u);
    __syncthreads();
    for (int turn = 0; turn < turns; turn++) {
        const int chunk = next;
        if ((i64)chunk * ROWS >= count) return;
        Move* const moves = moves_of[turn % 2];
        // Opaque: products of these would take registers through all of the loop.
        const int sequence = opaque(b), h = opaque(head);
        if (threadIdx.x < ROWS) {
            const int j = chunk * ROWS + threadIdx.x;
            Move move = {{0, -1}, {0, 0}};
            if (j < count) {
                const i64 pages = (i64)sequence * M;
                const int slot = kept[sequence * kept_sequence + h * kept_head + j];
                move = {{page_table[pages + slot / P], slot % P}, {out_table[pages + j / P], j % P}};
                if (slot == j && move.from.page == move.to.page) move.from.token = -1;
            }
            moves[threadIdx.x] = move;
        }
        __syncthreads();
        const Strides of_k = {k_pool_page, k_pool_token, h * k_pool_head};
        const Strides of_v = {v_pool_page, v_pool_token, h * v_pool_head};
        const Strides of_k_scales = {k_scales_page, k_scales_token, h * k_scales_head};
        const Strides of_v_scales = {v_scales_page, v_scales_token, h * v_scales_head};
        Held<K_UNIT, K_UNITS> k;
        Held<V_UNIT, V_UNITS> v;
        Held<sizeof(SCALE_T), 1> k_scale, v_scale;
        k.load(k_pool, moves, of_k);
        v.load(v_pool, moves, of_v);
        if (k_scales) k_scale.load(k_scales, moves, of_k_scales);
        if (v_scales) v_scale.load(v_scales, moves, of_v_scales);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicExch(ticket + 1 + chunk, 1u);
            if (turn + 1 < turns) next = (int)atomicAdd(ticket, 1u);
        }
        if (threadIdx.x < min((u32)chunk, 2 * gridDim.y)) {
            while (atomicAdd(ticket + chunk - threadIdx.x, 0u) == 0) {}
            __threadfence();
        }
        __syncthreads();
        k.store(k_pool, moves, of_k);
        v.store(v_pool, moves, of_v);
        if (k_scales) k_scale.store(k_scales, moves, of_k_scales);
        if (v_scales) v_scale.store(v_scales, moves, of_v_scales);
    }
}
