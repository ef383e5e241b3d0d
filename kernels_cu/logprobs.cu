// logprobs.cu: the log probability of one token of each row of logits, and the likeliest tokens.
//
// Arrays, row-major, contiguous (letters as in pykv/ops/logprobs.py):
//   out           [B] float: of `tokens`
//   top_ids       [B, K] int32, likeliest first, the lowest index first among equals; may be null
//   top_logprobs  [B, K] float; may be null where K = 0
//   logits  const [B, V] float
//   tokens  const [B] int32; outside 0 .. V - 1: none
//   wanted  const [B] int32: of the likeliest tokens that a row wants; negative: nothing at all
// Scalars:  V, K
// Defines:  BLOCK = threads
// Launch:   grid (B), block (BLOCK): a block for each row
// Traffic:  4 * B * V bytes, and again from the L2 cache; a token more reads V / BLOCK logits
// Order:    float sums by thread, warp and block, in an order that V alone decides: the same bits on
//           every run and in every batch
//
// What is missing (ids -1, log probabilities -inf): tokens of probability zero, more tokens than are
// wanted, and all of a row whose largest logit is not finite.
#include "order.cuh"
#include "reduce.cuh"
#include "softmax.cuh"

#ifndef BLOCK
#error "logprobs.cu needs BLOCK"
#endif
constexpr int THREADS = BLOCK;
static_assert(THREADS == WARP * WARP, "one lane for each warp's result");

// The largest key of the block. The next call takes another scratch, whose barrier tells that all
// have read this one.
__device__ __forceinline__ u64 block_max(u64 key, u64* scratch) {
    key = warp_max(key);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = key;
    __syncthreads();
    return warp_max(scratch[threadIdx.x % WARP]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
logprobs(float* __restrict__ out, int* __restrict__ top_ids, float* __restrict__ top_logprobs,
         const float* __restrict__ logits, const int* __restrict__ tokens,
         const int* __restrict__ wanted, int V, int K) {
    __shared__ u64 best_of_warps[WARP], next_of_warps[WARP];
    __shared__ float sums[WARP];
    const int b = blockIdx.x;
    const float* row = logits + (i64)b * V;
    const i64 place = (i64)b * K;
    int found = 0;  // how many of the likeliest tokens; the same in all threads
    float logprob = -INF;

    if (wanted[b] >= 0) {
        u64 mine = 0;  // the best of this thread's tokens that is not listed yet
#pragma unroll 4
        for (int i = threadIdx.x; i < V; i += THREADS) mine = max(mine, key_of(__ldg(row + i), i));
        u64 best = block_max(mine, best_of_warps);
        if (best && (u32)(best >> 32) < ordered(INF)) {
            const float largest = row[index_of(best)];
            float sum = 0.0f;
#pragma unroll 4
            for (int i = threadIdx.x; i < V; i += THREADS) {
                const float x = __ldg(row + i);
                sum += x == x ? exp2f((x - largest) * LOG2_E) : 0.0f;
            }
            const float log_sum = log2f(block_sum<THREADS>(sum, sums)) * LN_2;
            const int token = tokens[b];
            const float x = token >= 0 && token < V ? row[token] : -INF;
            if (x == x) logprob = (x - largest) - log_sum;

            const int most = min(wanted[b], K);
            while (found < most && best) {
                const int index = index_of(best);
                if (threadIdx.x == 0) {
                    top_ids[place + found] = index;
                    top_logprobs[place + found] = (row[index] - largest) - log_sum;
                }
                if (++found == most) break;
                // All look at the tokens of the thread that had the best one.
                const int owner = index % THREADS;
                u64 next = 0;
#pragma unroll 1  // one turn suffices up to a million tokens; unrolled turns spill
                for (i64 i = owner + (i64)THREADS * threadIdx.x; i < V; i += THREADS * THREADS) {
                    const u64 key = key_of(row[i], (int)i);
                    if (key < best) next = max(next, key);
                }
                next = block_max(next, next_of_warps);
                if (threadIdx.x == owner) mine = next;
                best = block_max(mine, best_of_warps);
            }
        }
    }
    if (threadIdx.x == 0) out[b] = logprob;
    for (int k = found + threadIdx.x; k < K; k += THREADS) {
        top_ids[place + k] = -1;
        top_logprobs[place + k] = -INF;
    }
}
