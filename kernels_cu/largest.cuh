// largest.cuh: the largest of many scores, of equal ones the first, which a block finds by the digits
// of their orders.
//
// A score becomes a word that is ordered as the scores are: 0 of rows that may not be kept, all ones
// of those that must. The word of the last row that is kept is found digit by digit, until the rows
// that share its upper digits are all kept. Lanes that count the same digit are left to the hardware:
// adding them up first took a tenth longer (H200).
#include "types.cuh"
#include "warps.cuh"

#ifndef ITEMS
#error "largest.cuh needs ITEMS, scores that each thread has at once"
#endif
constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS;  // 32 bits are three digits, the last short
constexpr int TILE = THREADS * ITEMS, PASSES = (32 + DIGIT_BITS - 1) / DIGIT_BITS;
static_assert(DIGITS % THREADS == 0, "threads share the digits evenly");

// What passes of a segment: its first rows, those from `recent` on, and what exceeds the threshold.
struct Rules {
    int sinks, recent, has_threshold;
    float threshold;
};

// The order of row i.
__device__ __forceinline__ u32 order_of(float score, int i, const Rules& rules) {
    if (i < rules.sinks || i >= rules.recent) return 0xffffffffu;
    if (rules.has_threshold && !(score > rules.threshold)) return 0;
    const u32 bits = __float_as_uint(score == score ? score + 0.0f : -INF);  // -0 becomes 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The orders of ITEMS rows, STEP apart from `first` on, 0 past `end`. All of their scores are on their
// way before one is used.
template <int STEP>
__device__ __forceinline__ void load_orders(u32 (&orders)[ITEMS], const float* scores, int first,
                                            int end, const Rules& rules) {
    float loaded[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int i = first + item * STEP;
        loaded[item] = i < end ? scores[i] : 0.0f;
    }
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int i = first + item * STEP;
        orders[item] = i < end ? order_of(loaded[item], i, rules) : 0;
    }
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

// What is known of the last row that is kept: its order's upper digits, how many of the rows that
// share these are kept still, and whether no further digit is needed. Where all rows are kept that
// may be, `last` and `ties` are 0: their orders are above that.
struct Cut {
    u32 last;
    int ties, is_found;
};

// The digit of a pass: its lowest bit, and how many bits it has.
__device__ __forceinline__ int low_of(int pass) { return max(32 - DIGIT_BITS * (pass + 1), 0); }
__device__ __forceinline__ int bits_of(int pass) { return min(DIGIT_BITS, 32 - DIGIT_BITS * pass); }

__device__ __forceinline__ void clear(int* histogram) {
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) histogram[i] = 0;
    __syncthreads();
}

// Adds the digits of orders to a histogram, of rows that may be the last.
__device__ __forceinline__ void count_orders(int* histogram, const u32 (&orders)[ITEMS], u32 last,
                                             int pass) {
    const int low = low_of(pass), bits = bits_of(pass);
#pragma unroll
    for (const u32 order : orders) {
        const bool is_open = low + bits == 32 || order >> (low + bits) == last >> (low + bits);
        if (order && is_open) atomicAdd(&histogram[order >> low & ((1u << bits) - 1)], 1);
    }
}

// The same of rows begin .. end of a segment.
__device__ __forceinline__ void count_digits(int* histogram, const float* scores, int begin, int end,
                                             const Rules& rules, u32 last, int pass) {
    for (int tile = begin; tile < end; tile += TILE) {
        u32 orders[ITEMS];
        load_orders<THREADS>(orders, scores, tile + threadIdx.x, end, rules);
        count_orders(histogram, orders, last, pass);
    }
}

// The digit at which a cut lies, how many rows have larger ones, and how many have it.
struct Found {
    u32 digit;
    int above, here;
};

// Adds to a cut what a histogram of all rows says. All threads call it, between barriers.
__device__ __forceinline__ void cut_deeper(Cut& cut, const int* histogram, u64* scratch, Found& found,
                                           int pass) {
    // Threads count from the largest digit down: thread t has the t-th share of them.
    constexpr int SHARE = DIGITS / THREADS;
    const int top = DIGITS - 1 - threadIdx.x * SHARE;
    const u64 ties = cut.ties;
    u64 own = 0, total;
#pragma unroll
    for (int i = 0; i < SHARE; i++) own += histogram[top - i];
    u64 above = counts_before(own, scratch, total);
    const bool takes_all = total <= ties;  // only at the first digit: later ones hold more than `ties`
    if (!takes_all && above <= ties && above + own > ties) {
        for (int i = 0; i < SHARE; i++) {
            const u64 here = histogram[top - i];
            if (above + here > ties) {
                found = {(u32)(top - i), (int)above, (int)here};
                break;
            }
            above += here;
        }
    }
    __syncthreads();
    if (takes_all) {
        cut = {0, 0, true};
    } else {
        cut.last |= found.digit << low_of(pass);
        cut.ties -= found.above;
        cut.is_found = found.here == cut.ties;
    }
}

// Pairs of counts: rows above the last one that is kept in the upper half, of its order below.
struct Pairs {
    u32 last;
    int ties;
    __device__ explicit Pairs(const Cut& cut) : last(cut.last), ties(cut.ties) {}
    __device__ u64 of(u32 order) const {
        return (u64)(order > last) << 32 | (u64)(order == last && order);
    }
    __device__ int kept(u64 pair) const { return (int)(pair >> 32) + min((int)(u32)pair, ties); }
};

// Calls keep(n, row) of the rows of a tile that are kept, the n-th of their group, this thread's with
// `orders` from `first` on; `before` are the pairs of all earlier rows of the group, to which it adds
// theirs.
template <typename Keep>
__device__ __forceinline__ void keep_orders(const u32 (&orders)[ITEMS], int first, const Pairs& pairs,
                                            u64& before, u64* scratch, Keep keep) {
    u64 own = 0, total;
#pragma unroll
    for (const u32 order : orders) own += pairs.of(order);
    u64 mine = before + counts_before(own, scratch, total);
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const u64 pair = pairs.of(orders[item]);
        const bool is_kept = pair >> 32 || (pair && (int)(u32)mine < pairs.ties);
        if (is_kept) keep(pairs.kept(mine), first + item);
        mine += pair;
    }
    before += total;
    __syncthreads();  // all have read `scratch`
}

// The same of rows begin .. end of a segment.
template <typename Keep>
__device__ __forceinline__ void keep_rows(const float* scores, int begin, int end, const Rules& rules,
                                          const Pairs& pairs, u64& before, u64* scratch, Keep keep) {
    for (int tile = begin; tile < end; tile += TILE) {
        const int first = tile + threadIdx.x * ITEMS;
        u32 orders[ITEMS];
        load_orders<1>(orders, scores, first, end, rules);
        keep_orders(orders, first, pairs, before, scratch, keep);
    }
}
