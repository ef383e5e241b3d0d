// sample.cu: the most likely token, or a drawn one, of each row of logits.
//
// Arrays, row-major, contiguous (letters as in pykv/ops/sample.py):
//   out                  [B] int32; -1 for a row whose largest logit is not finite
//   logits        const  [B, V] float
//   temperature, top_p, min_p  const  [B] float
//   top_k, steps         const  [B] int32
//   seeds                const  [B] u64
// Scalars:  V, 1 .. 2^23
// Defines:  BLOCK = threads
// Launch:   grid (B), block (BLOCK): a block for each row, static shared memory of 17 KiB
// Traffic:  argmax reads 4 * B * V bytes. sample reads a row twice, three times more for each of
//           top_k and top_p that is on, once more where one of them cuts through equal levels; from
//           the second time on the row comes from the L2 cache
// Order:    integer sums, exact in any order: the same bits on every run, in every batch, and as
//           NumPy has them
//
// A token's level is how far its probability lies below the largest, in units of 2^-26 of a
// halving. Float arithmetic ends there: its weight is an integer function of the level, 2^40 at
// level 0.
// Filters keep a prefix of the tokens ordered by level and index. Where it ends is found without
// sorting: three rounds of histograms, each over eleven bits more of the level.
#include "order.cuh"
#include "reduce.cuh"

#ifndef BLOCK
#error "sample.cu needs BLOCK"
#endif
constexpr int THREADS = BLOCK;
constexpr int WARPS = THREADS / WARP;
static_assert(WARPS == WARP, "one lane for each warp's sum");
constexpr int BINS = 2048;
static_assert(BINS == 2 * THREADS, "two bins a thread");

constexpr int STEP_BITS = 26;                 // 2^26 levels halve the weight
constexpr u32 LAST_LEVEL = 40u << STEP_BITS;  // has weight 1; tokens past it are never drawn
constexpr u32 NO_LEVEL = 0xffffffffu;

struct Scratch {
    u64 sums[WARPS];
    u32 low[BINS], high[BINS];  // histogram of 64-bit sums, in halves: shared atomics have 32 bits
    u64 rest, sum;
    u32 digit;
};

// Index of the largest logit, the lowest where several are equal; -1 if it is infinite, or all are
// NaN. Leaves s.sums in use until the next barrier.
__device__ int largest_index(const float* __restrict__ logits, int V, Scratch& s) {
    u32 best = 0, at = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < V; i += THREADS) {
        const u32 order = ordered(__ldg(logits + i));
        if (order > best) best = order, at = i;
    }
    const u64 mine = warp_max((u64)best << 32 | ~at);  // ~: the lower index is the larger key
    if (threadIdx.x % WARP == 0) s.sums[threadIdx.x / WARP] = mine;
    __syncthreads();
    const u64 all = warp_max(s.sums[threadIdx.x % WARP]);
    const u32 order = (u32)(all >> 32);
    return order > ordered(-INF) && order < ordered(INF) ? (int)~(u32)all : -1;
}

// 2^40 * 2^(-level / 2^26), off by less than 5e-9 of itself and never rising with the level. The
// polynomial is 2^-y on 0 .. 1 in fixed point: minimax on condition that both ends are exact.
__device__ __forceinline__ u64 weight(u32 level) {
    const u32 y = level << (32 - STEP_BITS);  // the part after the point, as 32 bits
    u32 t = 470133u;
    t = 5481172u - __umulhi(y, t);
    t = 41149757u - __umulhi(y, t);
    t = 238335112u - __umulhi(y, t);
    t = 1031756795u - __umulhi(y, t);
    t = 2977044050u - __umulhi(y, t);
    const u64 power = (1ull << 32) - __umulhi(y, t);
    return power << 8 >> (level >> STEP_BITS);
}

// A row of logits and the tokens of it that may be drawn: those before `level`, and of those at it
// the ones up to `index`.
struct Row {
    const float* __restrict__ logits;
    int V;
    float largest, scale;  // scale = 2^26 * log2(e) / temperature
    u32 level;
    int index;

    __device__ __forceinline__ u32 level_of(int i) const {
        const float logit = __ldg(logits + i);
        if (logit == largest) return 0;  // where scale is infinite, too
        const float steps = __fmul_rn(__fsub_rn(largest, logit), scale);
        return steps <= (float)LAST_LEVEL ? (u32)steps : NO_LEVEL;  // NaN has no level
    }
    __device__ __forceinline__ bool has(u32 of, int i) const {
        return of < level || (of == level && i <= index);
    }
};

// The first token at which the sum of `measure(level, index)` over the tokens so far, in index
// order, exceeds `goal(sum over all)`. Each round finds the 32nd part of the range with that token.
template <typename Measure, typename Goal>
__device__ __forceinline__ int locate(const Row& row, Measure measure, Goal goal, Scratch& s) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int begin = 0, length = row.V;
    u64 rest = 0;
    for (bool first = true; first || length > 1; first = false) {
        const int part = (length + WARPS - 1) / WARPS;
        const int end = begin + min(length, (warp + 1) * part);
        u64 sum = 0;
#pragma unroll 4
        for (int i = begin + warp * part + lane; i < end; i += WARP) {
            sum += measure(row.level_of(i), i);
        }
        sum = warp_scan(sum);
        __syncthreads();  // all have read the sums of the last round
        if (lane == WARP - 1) s.sums[warp] = sum;
        __syncthreads();
        const u64 through = warp_scan(s.sums[lane]);
        if (first) rest = goal(__shfl_sync(FULL_MASK, through, WARP - 1));
        int at = through <= rest;  // parts that end too early
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) at += __shfl_xor_sync(FULL_MASK, at, step);
        const u64 before = __shfl_sync(FULL_MASK, through - s.sums[lane], at);
        rest -= before;
        begin += at * part;
        length = min(part, length - at * part);
    }
    return begin;
}

__device__ __forceinline__ void add_to_bin(Scratch& s, u32 bin, u64 x) {
    const u32 low = (u32)x;
    const u32 carry = atomicAdd(&s.low[bin], low) > ~low;
    const u32 high = (u32)(x >> 32) + carry;
    if (high) atomicAdd(&s.high[bin], high);
}

__device__ __forceinline__ u64 bin_sum(const Scratch& s, u32 bin) {
    return (u64)s.high[bin] << 32 | s.low[bin];
}

// Shorten the row's kept tokens, ordered by level and index, to the shortest prefix whose sum of
// `measure(level)` reaches `goal(sum over all)`; a goal of 0 keeps all.
template <typename Measure, typename Goal>
__device__ __forceinline__ void keep_prefix(Row& row, Measure measure, Goal goal, Scratch& s) {
    u32 found = 0, mask = 0;  // bits of the level where the prefix ends
    u64 rest = 0;             // what the goal lacks once all levels before `found` are taken
    for (int round = 0; round < 3; round++) {
        const int shift = round == 2 ? 0 : 21 - 11 * round;
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) s.low[bin] = s.high[bin] = 0;
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < row.V; i += THREADS) {
            const u32 level = row.level_of(i);
            if (row.has(level, i) && (level & mask) == found) {
                add_to_bin(s, level >> shift & (BINS - 1), measure(level));
            }
        }
        __syncthreads();
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        const u32 bin = 2 * threadIdx.x;
        const u64 left = bin_sum(s, bin), right = bin_sum(s, bin + 1);
        u64 through = warp_scan(left + right);
        if (lane == WARP - 1) s.sums[warp] = through;
        __syncthreads();
        const u64 warps = warp_scan(s.sums[lane]);
        through += __shfl_sync(FULL_MASK, warps - s.sums[lane], warp);
        if (round == 0) rest = goal(__shfl_sync(FULL_MASK, warps, WARP - 1));
        if (rest == 0) return;  // all threads of the block
        const u64 before = through - left - right;
        if (before < rest && rest <= through) {  // true in one thread
            const bool second = rest > before + left;
            s.digit = bin + second;
            s.sum = second ? right : left;
            s.rest = rest - before - (second ? left : 0);
        }
        __syncthreads();
        found |= s.digit << shift;
        mask |= (u32)(BINS - 1) << shift;
        rest = s.rest;
    }
    const u64 each = measure(found);
    const u64 count = (rest + each - 1) / each;  // tokens to keep of those at the level found
    int index = found == row.level ? row.index : row.V - 1;
    if (count * each < s.sum) {
        index = locate(
            row, [&](u32 level, int i) -> u64 { return level == found && row.has(level, i); },
            [&](u64) { return count - 1; }, s);
    }
    row.level = found;
    row.index = index;
}

// The last level whose weight is at least `floor`, 1 .. 2^40.
__device__ __forceinline__ u32 level_of_weight(u64 floor) {
    u32 level = 0, past = LAST_LEVEL + 1;
    while (past - level > 1) {
        const u32 middle = level + (past - level) / 2;
        if (weight(middle) >= floor) level = middle;
        else past = middle;
    }
    return level;
}

// The finaliser of splitmix64 (Steele, Lea and Flood, 2014).
__device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
argmax(int* __restrict__ out, const float* __restrict__ logits, int V) {
    __shared__ Scratch s;
    const int index = largest_index(logits + (i64)blockIdx.x * V, V, s);
    if (threadIdx.x == 0) out[blockIdx.x] = index;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(int* __restrict__ out, const float* __restrict__ logits,
       const float* __restrict__ temperature, const int* __restrict__ top_k,
       const float* __restrict__ top_p, const float* __restrict__ min_p,
       const u64* __restrict__ seeds, const int* __restrict__ steps, int V) {
    __shared__ Scratch s;
    const int b = blockIdx.x;
    const float* row_logits = logits + (i64)b * V;
    const int best = largest_index(row_logits, V, s);
    const int k = top_k[b];
    if (!(temperature[b] > 0.0f) || k == 1 || best < 0) {  // all threads of the block alike
        if (threadIdx.x == 0) out[b] = best;
        return;
    }
    const float largest = row_logits[best];
    constexpr float LOG2_E = 1.4426950408889634f;
    Row row{row_logits, V, largest, __fdiv_rn(LOG2_E * (1 << STEP_BITS), temperature[b]),
            LAST_LEVEL, V - 1};

    const float least = fminf(fmaxf(min_p[b], 0.0f), 1.0f);  // NaN becomes 0
    if (least > 0.0f) {
        const u64 floor = (u64)(least * (float)(1ull << 40));  // exact: a power of two
        row.level = level_of_weight(floor > 1 ? floor : 1);
    }
    if (k > 0 && k < V) {
        keep_prefix(
            row, [](u32) -> u64 { return 1; },
            [&](u64 tokens) -> u64 { return tokens > (u64)k ? k : 0; }, s);
    }
    const float p = fmaxf(top_p[b], 0.0f);
    if (p < 1.0f) {  // 2^64 * p is an integer up to rounding below 2^-40
        const u64 fraction = (u64)(p * 18446744073709551616.0f);
        keep_prefix(
            row, [](u32 level) { return weight(level); },
            [&](u64 mass) -> u64 {
                const u64 goal = __umul64hi(fraction, mass);
                return goal > 1 ? goal : 1;
            },
            s);
    }
    const u64 step = (u64)(i64)steps[b];
    const u64 random = mix(mix(seeds[b]) + (step + 1) * 0x9e3779b97f4a7c15ull);
    const int token = locate(
        row, [&](u32 level, int i) -> u64 { return row.has(level, i) ? weight(level) : 0; },
        [&](u64 mass) { return __umul64hi(random, mass); }, s);
    if (threadIdx.x == 0) out[b] = token;
}
