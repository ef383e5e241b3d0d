// adjust_logits.cu: penalties, biases and masks of rows of logits.
//
// Arrays, row-major, contiguous (letters as in pykv/ops/adjust_logits.py):
//   out                  [B, V] float; may be `logits`
//   tallies              [N, V] int32, updated: twice a token's count in the answer, + 1 where the
//                               prompt has it; null: no row is penalised
//   logits        const  [B, V] float
//   penalties     const  [B, 3] float: repetition, presence, frequency
//   tally_rows    const  [B] int32; outside 0 .. N - 1: no penalties. Others are distinct
//   tokens        const  [B] int32, counted before they are judged; outside 0 .. V - 1: none
//   bias_indptr   const  [B + 1] int32; null: no biases
//   bias_ids      const  [E] int32, distinct within a row; those outside 0 .. V - 1 are of no token
//   bias_values   const  [E] float
//   masks         const  [M, ceil(V / 32)] u32: bit i % 32 of word i / 32 allows token i; may be null
//   mask_rows     const  [B] int32; outside 0 .. M - 1: all tokens are allowed
// Scalars:  V, N, E, M
// Defines:  BLOCK = threads, ITEMS = tokens of a thread
// Launch:   grid (B * ceil(V / (BLOCK * ITEMS))), block (BLOCK): blocks share a row
// Traffic:  8 * B * V bytes, 4 * V more for a row with penalties and V / 8 for one with a mask. In
//           place, a row that asks for nothing is not touched
// Order:    no atomics; operations on each logit in the order of the definition, rounded one by one:
//           the bits of NumPy
#include "types.cuh"

#if !defined(BLOCK) || !defined(ITEMS)
#error "adjust_logits.cu needs BLOCK and ITEMS"
#endif
constexpr int CHUNK = BLOCK * ITEMS;

__device__ __forceinline__ float penalised(float logit, int tally, const float* penalties) {
    const float repetition = penalties[0], presence = penalties[1], frequency = penalties[2];
    logit = logit > 0.0f ? __fdiv_rn(logit, repetition) : __fmul_rn(logit, repetition);
    const int count = tally >> 1;
    if (count <= 0) return logit;
    return __fsub_rn(logit, __fadd_rn(presence, __fmul_rn(frequency, (float)count)));
}

// `out` and `logits` may be one array: each thread reads an element before it writes it.
extern "C" __global__ void __launch_bounds__(BLOCK)
adjust_logits(float* out, int* __restrict__ tallies, const float* logits,
              const float* __restrict__ penalties, const int* __restrict__ tally_rows,
              const int* __restrict__ tokens, const int* __restrict__ bias_indptr,
              const int* __restrict__ bias_ids, const float* __restrict__ bias_values,
              const int* __restrict__ masks, const int* __restrict__ mask_rows,
              int V, int N, int E, int M) {
    __shared__ float bias[CHUNK];
    const int chunks = (V + CHUNK - 1) / CHUNK;
    const int b = blockIdx.x / chunks, begin = blockIdx.x % chunks * CHUNK;

    const int tally_row = tallies ? tally_rows[b] : -1;
    int* tally = tally_row >= 0 && tally_row < N ? tallies + (i64)tally_row * V : nullptr;
    const int mask_row = masks ? mask_rows[b] : -1;
    const int* mask =
        mask_row >= 0 && mask_row < M ? masks + (i64)mask_row * ((V + 31) / 32) : nullptr;
    const int first = bias_indptr ? max(bias_indptr[b], 0) : 0;
    const int last = bias_indptr ? min(bias_indptr[b + 1], E) : 0;
    const bool has_bias = first < last;
    if (!tally && !mask && !has_bias && out == logits) return;

    if (has_bias) {  // the whole block
        for (int i = threadIdx.x; i < CHUNK; i += BLOCK) bias[i] = 0.0f;
        __syncthreads();
        for (int e = first + threadIdx.x; e < last; e += BLOCK) {
            const int id = bias_ids[e];
            if (id >= begin && id - begin < CHUNK) bias[id - begin] = bias_values[e];
        }
        __syncthreads();
    }
    const int token = tally ? tokens[b] : -1;
    for (int i = threadIdx.x; i < CHUNK && begin + i < V; i += BLOCK) {
        const int id = begin + i;
        const float given = logits[(i64)b * V + id];
        float logit = given;
        if (tally) {
            int n = tally[id];
            if (id == token) tally[id] = n += 2;
            if (n) logit = penalised(logit, n, penalties + 3 * b);
        }
        if (has_bias && bias[i] != 0.0f) logit = __fadd_rn(logit, bias[i]);
        if (given != given) logit = given;  // the NaN that it was
        if (mask && !(mask[id / 32] >> id % 32 & 1)) logit = -INF;
        out[(i64)b * V + id] = logit;
    }
}
