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
#include "draw.cuh"
#include "order.cuh"

static_assert(WARPS == WARP, "one lane for each warp's sum");

struct Scratch {
    u64 sums[WARPS];
    u32 low[BINS], high[BINS];  // histogram of 64-bit sums, in halves: shared atomics have 32 bits
    Crossing at;
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
template <typename R, typename Measure, typename Goal>
__device__ __forceinline__ void keep_prefix(R& row, Measure measure, Goal goal, Scratch& s) {
    u32 found = 0;  // bits of the level where the prefix ends
    u64 rest = 0;   // of the goal, when all levels before `found` are in
    for (int round = 0; round < ROUNDS; round++) {
        const int shift = shift_of(round);
        const u32 mask = mask_of(round);
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
        const auto of = [&](u32 bin) { return bin_sum(s, bin); };
        const auto left = [&](u64 all) -> u64 { return round == 0 ? goal(all) : rest; };
        if (find_bin(s.at, s.sums, of, left) == 0) return;  // the whole block
        found |= s.at.bin << shift;
        rest = s.at.rest;
    }
    end_prefix(row, found, s.at, measure, s.sums);
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
    Row<true> row{row_logits, V, row_logits[best], __fdiv_rn(STEPS_PER_NAT, temperature[b]),
                  level_of_min_p(min_p[b]), V - 1};
    if (k > 0 && k < V) {
        keep_prefix(
            row, [](u32) -> u64 { return 1; }, [&](u64 tokens) { return goal_of_count(tokens, k); },
            s);
    }
    const float p = top_p[b];
    if (!(p >= 1.0f)) {
        keep_prefix(
            row, [](u32 level) { return weight(level); },
            [&](u64 mass) { return goal_of_mass(mass, p); }, s);
    }
    const u64 random = random_of(seeds[b], steps[b]);
    const int token = locate(
        row, 0, V, [&](u32 level, int i) -> u64 { return row.has(level, i) ? weight(level) : 0; },
        [&](u64 mass) { return __umul64hi(random, mass); }, s.sums);
    if (threadIdx.x == 0) out[b] = token;
}
