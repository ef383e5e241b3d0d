// kv_select.cu: which rows of a cache are kept: those of the largest scores, of equal ones the
// first, and always sinks and the recent ones.
//
// Arrays, row-major (letters as in pykv/ops/kv_select.py):
//   kept             [R, S, C] int  slots that are kept, ascending, then -1
//   counts           [R, S] int     how many of each segment
//   scores    const  [R, S, C] float
//   lengths   const  [R, S] int     clamped to 0 .. C
//   budgets   const  [R] int        rows that the S segments keep together; null: no limit
// Scalars:  sinks, recent: the first and the last rows of a segment, which pass before all others;
//           has_threshold, threshold: others are kept where their score exceeds it alone
// Defines:  BLOCK = threads, a power of two from 128 to 1024; ITEMS, scores that each has at once
// Launch:   grid (R), block (BLOCK)
// Traffic:  scores once, then from the caches three times; 4 bytes an entry of `kept`
// Order:    atomics count integers alone: every run gives the same
//
// A score becomes a word that is ordered as the scores are: 0 of rows that may not be kept, all ones
// of those that must. The word of the last row that is kept is found digit by digit. Lanes that count
// the same digit are left to the hardware: adding them up first took a tenth longer (H200).
#include "types.cuh"

#if !defined(BLOCK) || !defined(ITEMS)
#error "kv_select.cu needs BLOCK and ITEMS"
#endif
constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS;  // 32 bits are three digits, the last short
constexpr int WARPS = BLOCK / WARP;
static_assert(DIGITS % BLOCK == 0 && BLOCK % WARP == 0, "threads share the digits evenly");

struct Rules {
    int sinks, recent, has_threshold;
    float threshold;
};

__device__ __forceinline__ u32 order_of(const float* scores, int i, int length, const Rules& rules) {
    if (i < rules.sinks || i >= length - rules.recent) return 0xffffffffu;
    const float score = scores[i];
    if (rules.has_threshold && !(score > rules.threshold)) return 0;
    const u32 bits = __float_as_uint(score == score ? score + 0.0f : -INF);  // -0 becomes 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The sum over a block of pairs of counts below 2^32, and of those of the threads before this one.
// All threads call it; `scratch` may be reused after a barrier.
__device__ __forceinline__ u64 counts_before(u64 own, u64* scratch, u64& total) {
    u64 sum = own;
#pragma unroll
    for (int lane = 1; lane < WARP; lane *= 2) {
        const u64 below = __shfl_up_sync(FULL_MASK, sum, lane);
        if (threadIdx.x % WARP >= lane) sum += below;
    }
    if (threadIdx.x % WARP == WARP - 1) scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    u64 before = sum - own;
    total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        if (warp == threadIdx.x / WARP) before += total;
        total += scratch[warp];
    }
    return before;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
kv_select(int* __restrict__ kept, int* __restrict__ counts, const float* __restrict__ scores,
          const int* __restrict__ lengths, const int* __restrict__ budgets, int S, int C, int sinks,
          int recent, int has_threshold, float threshold) {
    __shared__ int histogram[DIGITS];
    __shared__ u64 scratch[WARPS];
    __shared__ u32 found_digit;
    __shared__ int found_above;
    const Rules rules = {sinks, recent, has_threshold, threshold};
    const i64 group = (i64)blockIdx.x * S;
    const auto length_of = [&](int s) { return max(0, min(lengths[group + s], C)); };

    // `last` is the order of the last row that is kept, `ties` how many of that order are. A budget
    // that nobody reaches leaves last = 0: all that may be kept, which have an order above 0.
    int ties = budgets ? max(budgets[blockIdx.x], 0) : 0x7fffffff;
    u32 last = 0;
    bool takes_all = ties == 0x7fffffff;
    for (int shift = 32 - DIGIT_BITS; !takes_all && shift > -DIGIT_BITS; shift -= DIGIT_BITS) {
        const int low = max(shift, 0), bits = shift < 0 ? DIGIT_BITS + shift : DIGIT_BITS;
        for (int i = threadIdx.x; i < DIGITS; i += BLOCK) histogram[i] = 0;
        __syncthreads();
        for (int s = 0; s < S; s++) {
            const int length = length_of(s);
            for (int tile = 0; tile < length; tile += BLOCK * ITEMS) {
                u32 orders[ITEMS];
#pragma unroll
                for (int item = 0; item < ITEMS; item++) {
                    const int i = tile + item * BLOCK + threadIdx.x;
                    orders[item] = i < length ? order_of(scores + (group + s) * C, i, length, rules) : 0;
                }
#pragma unroll
                for (const u32 order : orders) {
                    const bool is_open =
                        low + bits == 32 || order >> (low + bits) == last >> (low + bits);
                    if (order && is_open) atomicAdd(&histogram[order >> low & ((1u << bits) - 1)], 1);
                }
            }
        }
        __syncthreads();
        // Threads count from the largest digit down: thread t has the t-th share of them.
        constexpr int SHARE = DIGITS / BLOCK;
        const int top = DIGITS - 1 - threadIdx.x * SHARE;
        u64 own = 0, total;
#pragma unroll
        for (int i = 0; i < SHARE; i++) own += histogram[top - i];
        u64 above = counts_before(own, scratch, total);
        if (total <= (u64)ties) {  // of the first digit alone: later ones hold more than `ties`
            takes_all = true;
        } else if (above <= (u64)ties && above + own > (u64)ties) {
            for (int i = 0; i < SHARE; i++) {
                const u64 here = histogram[top - i];
                if (above + here > (u64)ties) {
                    found_digit = top - i;
                    found_above = (int)above;
                    break;
                }
                above += here;
            }
        }
        __syncthreads();
        if (!takes_all) {
            last |= found_digit << low;
            ties -= found_above;
        }
    }
    if (takes_all) {
        last = 0;
        ties = 0;
    }

    u64 before = 0;  // rows of earlier tiles: above `last` in the upper half, of that order below
    for (int s = 0; s < S; s++) {
        const int length = length_of(s);
        const auto pair_of = [&](u32 order) {
            return (u64)(order > last) << 32 | (u64)(order == last && order);
        };
        const auto kept_of = [&](u64 pair) { return (int)(pair >> 32) + min((int)(u32)pair, ties); };
        const int segment_start = kept_of(before);
        int* const out = kept + (group + s) * C;
        for (int tile = 0; tile < length; tile += BLOCK * ITEMS) {
            const int first = tile + threadIdx.x * ITEMS;
            u32 orders[ITEMS];
            u64 own = 0, total;
#pragma unroll
            for (int item = 0; item < ITEMS; item++) {
                const int i = first + item;
                orders[item] = i < length ? order_of(scores + (group + s) * C, i, length, rules) : 0;
                own += pair_of(orders[item]);
            }
            u64 mine = before + counts_before(own, scratch, total);
#pragma unroll
            for (int item = 0; item < ITEMS; item++) {
                const u64 pair = pair_of(orders[item]);
                const bool is_kept = pair >> 32 || (pair && (int)(u32)mine < ties);
                if (is_kept) out[kept_of(mine) - segment_start] = first + item;
                mine += pair;
            }
            before += total;
            __syncthreads();  // `scratch` is read
        }
        const int count = kept_of(before) - segment_start;
        for (int i = count + threadIdx.x; i < C; i += BLOCK) out[i] = -1;
        if (threadIdx.x == 0) counts[group + s] = count;
    }
}
