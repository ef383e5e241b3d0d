// block_scores.cu: scores of the blocks of a cache: products of the mean query of each KV head with the
// mean keys of its blocks.
//
// Arrays, row-major (letters as in pykv/ops/block_scores.py; R = B * H, row b * H + h):
//   scores         [R, K] float  0 of blocks that cannot be chosen
//   zeros          [Z] float     become zeros; may be null where Z = 0
//   q       const  [B, HQ, D]    Q_T; head h has the queries h * G ... h * G + G - 1
//   means   const  [R, K, D]     float, read of blocks that can be chosen alone
//   lengths const  [B] int       rows of each sequence
// Scalars:  H; G = HQ / H; recent: the last rows, in which no block can be chosen; block: rows of one
// Defines:  HEAD_DIM, a multiple of 8 up to 512; Q_T = float, f16 or bf16; BLOCK = threads; AHEAD =
//           rows of `means` that a group of lanes loads before it uses any; KEYS = blocks that
//           BLOCK threads score
// Launch:   grid (R * ceil(K / KEYS)), block (BLOCK). It may start early, hence no array is
//           __restrict__
// Traffic:  4 * D bytes a block that can be chosen, 4 * R * K + 4 * Z; queries once for each KEYS
//           blocks, from the caches
// Stack: 32 bytes, of rows above 256 elements, of which a lane has twice eight and 64 registers
// Order:    no atomics; float sums in the order of the queries, then in one set by HEAD_DIM alone
//
// All rows of a thread block are on their way at once, and eight such blocks on an SM: 128 KiB. So few
// long sequences take about the time of a round trip to memory.
#include "attention_rows.cuh"
#include "ptx.cuh"

#if !defined(AHEAD) || !defined(KEYS)
#error "block_scores.cu needs AHEAD and KEYS"
#endif
static_assert(KEYS == SLOTS * AHEAD, "a group of lanes scores AHEAD blocks");

extern "C" __global__ void __launch_bounds__(THREADS, 8)
block_scores(float* scores, float* zeros, const Q_T* q, const float* means, const int* lengths, int H,
             int G, int K, int Z, int recent, int block) {
    let_next_start();
    const int chunks = K / KEYS + (K % KEYS != 0);
    const int begin = blockIdx.x % chunks * KEYS, slot = threadIdx.x / KEY_LANES;
    const int r = blockIdx.x / chunks;
    const float* const of_head = means + (i64)r * K * D;
    await_previous();
    const int old = min(max(max(lengths[r / H], 0) - recent, 0) / block, K);

    float score[AHEAD] = {};
    if (begin < old) {
        Eight<float> rows[AHEAD][EIGHTS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int row = min(begin + i * SLOTS + slot, old - 1);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                rows[i][e] = get8_eager(of_head + (i64)row * D + safe_column(e));
            }
        }
        float sum[EIGHTS][8] = {};
#pragma unroll 2
        for (int g = 0; g < G; g++) {
            float query[EIGHTS][8];
            load_query(query, q + ((i64)r * G + g) * D, 1.0f);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
                for (int i = 0; i < 8; i++) sum[e][i] += query[e][i];
            }
        }
        const float share = 1.0f / G;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float row[EIGHTS][8];
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) unpack8(row[e], rows[i][e]);
            score[i] = dot(sum, row) * share;
        }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int row = begin + i * SLOTS + slot;
        const bool is_mine = threadIdx.x % KEY_LANES == 0 && row < K;
        if (is_mine) scores[(i64)r * K + row] = row < old ? score[i] : 0.0f;
    }
#pragma unroll 1
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < Z; i += (i64)gridDim.x * THREADS) {
        zeros[i] = 0.0f;
    }
}
