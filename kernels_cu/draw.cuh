// draw.cuh: how likely tokens are, in integers, where a list of the likeliest ends, and which token a
// random number draws; of sample.cu and phase_draw.cuh.
//
// A token's level is how far its probability lies below the largest, in units of 2^-26 of a
// halving. Float arithmetic ends there: its weight is an integer function of the level, 2^40 at
// level 0. So sums are exact in any order.
// Filters keep a prefix of the tokens ordered by level and index. Where it ends is found without
// sorting: three rounds of histograms, each over eleven bits more of the level.
#include "reduce.cuh"
#include "warps.cuh"

constexpr int BINS = 2048, ROUNDS = 3;
static_assert(BINS % THREADS == 0 && WARPS <= WARP, "whole bins a thread, a lane for each warp's sum");

constexpr int STEP_BITS = 26;                 // of a halving
constexpr u32 LAST_LEVEL = 40u << STEP_BITS;  // of weight 1; below it no token is drawn
constexpr u32 NO_LEVEL = 0xffffffffu;
constexpr float STEPS_PER_NAT = 1.4426950408889634f * (1 << STEP_BITS);

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
// the ones up to `index`. FIXED: nothing writes the logits as long as the kernel runs.
template <bool FIXED> struct Row {
    const float* logits;
    int V;
    float largest, scale;  // scale = 2^26 * log2(e) / temperature
    u32 level;
    int index;

    __device__ __forceinline__ u32 level_of(int i) const {
        const float logit = FIXED ? __ldg(logits + i) : logits[i];
        if (logit == largest) return 0;  // where scale is infinite, too
        const float steps = __fmul_rn(__fsub_rn(largest, logit), scale);
        return steps <= (float)LAST_LEVEL ? (u32)steps : NO_LEVEL;  // NaN has no level
    }
    __device__ __forceinline__ bool has(u32 of, int i) const {
        return of < level || (of == level && i <= index);
    }
};

// The sum of a warp's value over the warps up to each, by lane; one for the lanes that have no warp.
__device__ __forceinline__ u64 scan_warps(const u64* of_warps, u64& mine) {
    const int lane = threadIdx.x % WARP;
    mine = lane < WARPS ? of_warps[lane] : 0;
    return warp_scan(mine);
}

// The first of `length` tokens from `begin` on at which the sum of `measure(level, index)` over the
// tokens so far, in index order, exceeds `goal(sum over all)`. Each round finds the part of the range,
// one of as many as there are warps, with that token.
template <typename R, typename Measure, typename Goal>
__device__ __forceinline__ int locate(const R& row, int begin, int length, Measure measure, Goal goal,
                                      u64* of_warps) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
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
        if (lane == WARP - 1) of_warps[warp] = sum;
        __syncthreads();
        u64 mine;
        const u64 through = scan_warps(of_warps, mine);
        if (first) rest = goal(__shfl_sync(FULL_MASK, through, WARP - 1));
        int at = through <= rest;  // parts that end too early
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) at += __shfl_xor_sync(FULL_MASK, at, step);
        const u64 before = __shfl_sync(FULL_MASK, through - mine, at);
        rest -= before;
        begin += at * part;
        length = min(part, length - at * part);
    }
    return begin;
}

// --- Where a prefix ends --------------------------------------------------------------------------

// Of the level, what a round counts by: bits from `shift` on, of levels that have those of `mask` as
// found so far.
__device__ __forceinline__ int shift_of(int round) { return round == 2 ? 0 : 21 - 11 * round; }
__device__ __forceinline__ u32 mask_of(int round) {
    return round == 0 ? 0 : (u32)(BINS - 1) << 21 | (round == 2 ? (u32)(BINS - 1) << 10 : 0);
}

struct Crossing {
    u64 rest, sum;  // of the goal, ahead of the bin; in the bin
    u32 bin;
};

// The first bin at which the sum of `of(bin)` over the bins so far reaches `goal(sum over all)`, which
// is returned; where that is 0 there is none. `of_warps` and `at` are in use until the next barrier.
template <typename Of, typename Goal>
__device__ __forceinline__ u64 find_bin(Crossing& at, u64* of_warps, Of of, Goal goal) {
    constexpr int EACH = BINS / THREADS;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 bin = threadIdx.x * EACH;
    u64 own = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) own += of(bin + e);
    u64 through = warp_scan(own);
    if (lane == WARP - 1) of_warps[warp] = through;
    __syncthreads();
    u64 mine;
    const u64 warps = scan_warps(of_warps, mine);
    through += __shfl_sync(FULL_MASK, warps - mine, warp);
    const u64 rest = goal(__shfl_sync(FULL_MASK, warps, WARP - 1));
    if (rest == 0) return 0;  // the whole block
    u64 before = through - own;
    if (before < rest && rest <= through) {  // one thread
        u64 sum = of(bin);
        for (; before + sum < rest; sum = of(++bin)) before += sum;
        at = {rest - before, sum, bin};
    }
    __syncthreads();
    return rest;
}

// Ends the row's prefix at the level that the last round has found, with as many of its tokens as reach
// what is left of the goal.
template <typename R, typename Measure>
__device__ __forceinline__ void end_prefix(R& row, u32 found, const Crossing& at, Measure measure,
                                           u64* of_warps) {
    const u64 each = measure(found);
    const u64 count = (at.rest + each - 1) / each;  // tokens to keep of those at the level found
    int index = found == row.level ? row.index : row.V - 1;
    if (count * each < at.sum) {
        index = locate(
            row, 0, row.V,
            [&](u32 level, int i) -> u64 { return level == found && row.has(level, i); },
            [&](u64) { return count - 1; }, of_warps);
    }
    row.level = found;
    row.index = index;
}

// --- Goals, and random numbers --------------------------------------------------------------------

// Of top_k: tokens to keep of so many; 0: all.
__device__ __forceinline__ u64 goal_of_count(u64 tokens, int k) { return tokens > (u64)k ? k : 0; }

// Of top_p below 1: 2^64 * p is an integer up to rounding below 2^-40.
__device__ __forceinline__ u64 goal_of_mass(u64 mass, float p) {
    const u64 goal = __umul64hi((u64)(fmaxf(p, 0.0f) * 18446744073709551616.0f), mass);
    return goal > 1 ? goal : 1;
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

// The last level that min_p leaves.
__device__ __forceinline__ u32 level_of_min_p(float min_p) {
    const float least = fminf(fmaxf(min_p, 0.0f), 1.0f);  // NaN becomes 0
    if (!(least > 0.0f)) return LAST_LEVEL;
    const u64 floor = (u64)(least * (float)(1ull << 40));  // exact: a power of two
    return level_of_weight(floor > 1 ? floor : 1);
}

// The finaliser of splitmix64 (Steele, Lea and Flood, 2014).
__device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

__device__ __forceinline__ u64 random_of(u64 seed, int step) {
    return mix(mix(seed) + ((u64)(i64)step + 1) * 0x9e3779b97f4a7c15ull);
}
