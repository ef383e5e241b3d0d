// kv_select.cu: which rows of a cache are kept: those of the largest scores, of equal ones the
// first, and always sinks and the recent ones.
//
// Arrays, row-major (letters as in pykv/ops/kv_select.py):
//   kept             [R, S, C] int  slots that are kept, ascending, then -1
//   counts           [R, S] int     how many of each segment
//   scores    const  [R, S, C] float
//   lengths   const  [R, S] int     clamped to 0 .. C
//   budgets   const  [R] int        rows that the S segments keep together; null: no limit
//   tallies          [R, PASSES * DIGITS] int  of long groups: zeros at first; how often rows have
//                                          each digit
//   pairs            [R, S, parts] u64     of long groups: rows above the last one that is kept in
//                                          the upper half, and of its order, of each part
// Scalars:  sinks, recent: the first and the last rows of a segment, which pass before all others;
//           has_threshold, threshold: others are kept where their score exceeds it alone; slice:
//           scores of a part, whole tiles; digit: which one is counted
// Defines:  BLOCK = threads, a power of two from 128 to 1024; ITEMS, scores that each has at once;
//           TALLIES = PASSES * DIGITS
// Launch:   block (BLOCK). kv_select: grid (R). Of long groups grid (parts, S, R), parts = ceil(C /
//           slice): kv_select_count for each digit in turn, where there are budgets,
//           kv_select_pairs, kv_select_write
// Traffic:  scores once, then from the caches three times (of long groups four times); 4 bytes an
//           entry of `kept`
// Order:    atomics count integers alone: every run gives the same, by either way
//
// A score becomes a word that is ordered as the scores are: 0 of rows that may not be kept, all ones
// of those that must. The word of the last row that is kept is found digit by digit. Lanes that count
// the same digit are left to the hardware: adding them up first took a tenth longer (H200).
//
// A group's time grows with its scores while other SMs idle: those that are few and long are cut.
// Their blocks meet at the ends of launches alone, and all of them find the digits that were counted.
#include "ptx.cuh"
#include "types.cuh"

#if !defined(BLOCK) || !defined(ITEMS) || !defined(TALLIES)
#error "kv_select.cu needs BLOCK, ITEMS and TALLIES"
#endif
constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS;  // 32 bits are three digits, the last short
constexpr int WARPS = BLOCK / WARP, TILE = BLOCK * ITEMS, PASSES = (32 + DIGIT_BITS - 1) / DIGIT_BITS;
static_assert(TALLIES == PASSES * DIGITS, "the host allocates as much");
static_assert(DIGITS % BLOCK == 0 && BLOCK % WARP == 0, "threads share the digits evenly");

// What passes of a segment: its first rows, those from `recent` on, and what exceeds the threshold.
struct Rules {
    int sinks, recent, has_threshold;
    float threshold;
};

__device__ __forceinline__ u32 order_of(const float* scores, int i, const Rules& rules) {
    if (i < rules.sinks || i >= rules.recent) return 0xffffffffu;
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

// What is known of the last row that is kept: its order's upper digits, how many rows of these are
// kept still, or that all rows are kept that may be.
struct Cut {
    u32 last;
    int ties, takes_all;
};

__device__ __forceinline__ Cut first_cut(const int* budgets, i64 group) {
    const int ties = budgets ? max(budgets[group], 0) : 0x7fffffff;
    return {0, ties, ties == 0x7fffffff};
}

// The digit of a pass: its lowest bit, and how many bits it has.
__device__ __forceinline__ int low_of(int pass) { return max(32 - DIGIT_BITS * (pass + 1), 0); }
__device__ __forceinline__ int bits_of(int pass) { return min(DIGIT_BITS, 32 - DIGIT_BITS * pass); }

__device__ __forceinline__ void clear(int* histogram) {
    for (int i = threadIdx.x; i < DIGITS; i += BLOCK) histogram[i] = 0;
    __syncthreads();
}

// Adds the digits of rows begin .. end of a segment to a histogram, of rows that may be the last.
__device__ __forceinline__ void count_digits(int* histogram, const float* scores, int begin, int end,
                                             const Rules& rules, u32 last, int pass) {
    const int low = low_of(pass), bits = bits_of(pass);
    for (int tile = begin; tile < end; tile += TILE) {
        u32 orders[ITEMS];
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            const int i = tile + item * BLOCK + threadIdx.x;
            orders[item] = i < end ? order_of(scores, i, rules) : 0;
        }
#pragma unroll
        for (const u32 order : orders) {
            const bool is_open =
                low + bits == 32 || order >> (low + bits) == last >> (low + bits);
            if (order && is_open) atomicAdd(&histogram[order >> low & ((1u << bits) - 1)], 1);
        }
    }
}

// The digit at which a cut lies, and how many rows have larger ones.
struct Found {
    u32 digit;
    int above;
};

// Adds to a cut what a histogram of all rows says. All threads call it, between barriers.
__device__ __forceinline__ void cut_deeper(Cut& cut, const int* histogram, u64* scratch, Found& found,
                                           int pass) {
    // Threads count from the largest digit down: thread t has the t-th share of them.
    constexpr int SHARE = DIGITS / BLOCK;
    const int top = DIGITS - 1 - threadIdx.x * SHARE;
    const u64 ties = cut.ties;
    u64 own = 0, total;
#pragma unroll
    for (int i = 0; i < SHARE; i++) own += histogram[top - i];
    u64 above = counts_before(own, scratch, total);
    if (total <= ties) {  // only at the first digit: later ones hold more than `ties`
        cut.takes_all = true;
    } else if (above <= ties && above + own > ties) {
        for (int i = 0; i < SHARE; i++) {
            const u64 here = histogram[top - i];
            if (above + here > ties) {
                found = {(u32)(top - i), (int)above};
                break;
            }
            above += here;
        }
    }
    __syncthreads();
    if (!cut.takes_all) {
        cut.last |= found.digit << low_of(pass);
        cut.ties -= found.above;
    }
}

// Pairs of counts: rows above the last one that is kept in the upper half, of its order below.
struct Pairs {
    u32 last;
    int ties;
    // A budget that nobody reaches leaves last = 0: all that may be kept have an order above 0.
    __device__ explicit Pairs(const Cut& cut)
        : last(cut.takes_all ? 0 : cut.last), ties(cut.takes_all ? 0 : cut.ties) {}
    __device__ u64 of(u32 order) const {
        return (u64)(order > last) << 32 | (u64)(order == last && order);
    }
    __device__ int kept(u64 pair) const { return (int)(pair >> 32) + min((int)(u32)pair, ties); }
};

// The orders of ITEMS rows from `first` on, and the sum of their pairs.
__device__ __forceinline__ u64 load_orders(u32 (&orders)[ITEMS], const float* scores, int first,
                                           int end, const Rules& rules, const Pairs& pairs) {
    u64 own = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int i = first + item;
        orders[item] = i < end ? order_of(scores, i, rules) : 0;
        own += pairs.of(orders[item]);
    }
    return own;
}

// Writes which rows begin .. end of a segment are kept, `before` being the pairs of all earlier rows
// of the group; adds theirs. `out` is where the group's first kept row would go.
__device__ __forceinline__ void write_rows(int* out, const float* scores, int begin, int end,
                                           const Rules& rules, const Pairs& pairs, u64& before,
                                           u64* scratch) {
    for (int tile = begin; tile < end; tile += TILE) {
        const int first = tile + threadIdx.x * ITEMS;
        u32 orders[ITEMS];
        u64 total;
        const u64 own = load_orders(orders, scores, first, end, rules, pairs);
        u64 mine = before + counts_before(own, scratch, total);
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            const u64 pair = pairs.of(orders[item]);
            const bool is_kept = pair >> 32 || (pair && (int)(u32)mine < pairs.ties);
            if (is_kept) out[pairs.kept(mine)] = first + item;
            mine += pair;
        }
        before += total;
        __syncthreads();  // all have read `scratch`
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
kv_select(int* __restrict__ kept, int* __restrict__ counts, const float* __restrict__ scores,
          const int* __restrict__ lengths, const int* __restrict__ budgets, int S, int C, int sinks,
          int recent, int has_threshold, float threshold) {
    __shared__ int histogram[DIGITS];
    __shared__ u64 scratch[WARPS];
    __shared__ Found found;
    const i64 group = (i64)blockIdx.x * S;
    const auto length_of = [&](int s) { return max(0, min(lengths[group + s], C)); };
    const auto rules_of = [&](int length) {
        return Rules{sinks, length - recent, has_threshold, threshold};
    };

    Cut cut = first_cut(budgets, blockIdx.x);
    for (int pass = 0; !cut.takes_all && pass < PASSES; pass++) {
        clear(histogram);
        for (int s = 0; s < S; s++) {
            const int length = length_of(s);
            count_digits(histogram, scores + (group + s) * C, 0, length, rules_of(length),
                         cut.last, pass);
        }
        __syncthreads();
        cut_deeper(cut, histogram, scratch, found, pass);
    }

    const Pairs pairs(cut);
    u64 before = 0;
    for (int s = 0; s < S; s++) {
        const int length = length_of(s), start = pairs.kept(before);
        int* const out = kept + (group + s) * C;
        write_rows(out - start, scores + (group + s) * C, 0, length, rules_of(length), pairs,
                   before, scratch);
        const int count = pairs.kept(before) - start;
        for (int i = count + threadIdx.x; i < C; i += BLOCK) out[i] = -1;
        if (threadIdx.x == 0) counts[group + s] = count;
    }
}

// --- Long groups ----------------------------------------------------------------------------------

// A part of a segment: block (part, segment, group).
struct Part {
    i64 segment;              // number of the segment among those of all groups
    int begin, end, length;   // the part's rows, and how many the segment has
    __device__ Part(const int* lengths, int S, int C, int slice) {
        segment = (i64)blockIdx.z * S + blockIdx.y;
        length = max(0, min(lengths[segment], C));
        begin = min((int)blockIdx.x * slice, length);
        end = min(slice, length - begin) + begin;
    }
};

// The cut of this block's group after some passes; without budgets nothing was counted.
__device__ __forceinline__ Cut cut_after(int passes, const int* tallies, const int* budgets,
                                         u64* scratch, Found& found) {
    Cut cut = first_cut(budgets, blockIdx.z);
    for (int pass = 0; !cut.takes_all && pass < passes; pass++) {
        const int* const histogram = tallies + ((i64)blockIdx.z * PASSES + pass) * DIGITS;
        cut_deeper(cut, histogram, scratch, found, pass);
    }
    return cut;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
kv_select_count(int* tallies, const float* scores, const int* lengths, const int* budgets, int S,
                int C, int sinks, int recent, int has_threshold, float threshold, int slice,
                int digit) {
    __shared__ int histogram[DIGITS];
    __shared__ u64 scratch[WARPS];
    __shared__ Found found;
    await_previous();
    const Cut cut = cut_after(digit, tallies, budgets, scratch, found);
    if (cut.takes_all) return;
    clear(histogram);
    const Part part(lengths, S, C, slice);
    const Rules rules = {sinks, part.length - recent, has_threshold, threshold};
    count_digits(histogram, scores + part.segment * C, part.begin, part.end, rules, cut.last, digit);
    __syncthreads();
    int* const all = tallies + ((i64)blockIdx.z * PASSES + digit) * DIGITS;
    for (int i = threadIdx.x; i < DIGITS; i += BLOCK) {
        if (histogram[i]) atomicAdd(all + i, histogram[i]);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
kv_select_pairs(u64* pairs, const int* tallies, const float* scores, const int* lengths,
                const int* budgets, int S, int C, int sinks, int recent, int has_threshold,
                float threshold, int slice) {
    __shared__ u64 scratch[WARPS];
    __shared__ Found found;
    await_previous();
    const Pairs of_rows(cut_after(PASSES, tallies, budgets, scratch, found));
    const Part part(lengths, S, C, slice);
    const Rules rules = {sinks, part.length - recent, has_threshold, threshold};
    u64 own = 0, total;
    for (int i = part.begin + threadIdx.x; i < part.end; i += BLOCK) {
        own += of_rows.of(order_of(scores + part.segment * C, i, rules));
    }
    counts_before(own, scratch, total);
    if (threadIdx.x == 0) pairs[part.segment * gridDim.x + blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
kv_select_write(int* kept, int* counts, const u64* pairs, const int* tallies, const float* scores,
                const int* lengths, const int* budgets, int S, int C, int sinks, int recent,
                int has_threshold, float threshold, int slice) {
    __shared__ u64 scratch[WARPS];
    __shared__ Found found;
    await_previous();
    const Pairs of_rows(cut_after(PASSES, tallies, budgets, scratch, found));
    const Part part(lengths, S, C, slice);
    const Rules rules = {sinks, part.length - recent, has_threshold, threshold};
    scores += part.segment * C;
    kept += part.segment * C;

    // Pairs of the group before its segment, before this part, and up to the segment's end.
    const int parts = gridDim.x, first = blockIdx.y * parts;
    const u64* const group = pairs + (i64)blockIdx.z * S * parts;
    u64 sums[3] = {};
    for (int i = threadIdx.x; i < first + parts; i += BLOCK) {
        const u64 pair = group[i];
        sums[0] += i < first ? pair : 0;
        sums[1] += i < first + (int)blockIdx.x ? pair : 0;
        sums[2] += pair;
    }
#pragma unroll
    for (u64& sum : sums) {
        u64 total;
        counts_before(sum, scratch, total);
        sum = total;
        __syncthreads();  // all have read `scratch`
    }

    const int start = of_rows.kept(sums[0]), count = of_rows.kept(sums[2]) - start;
    const int behind = blockIdx.x * slice, end = min(slice, C - behind) + behind;
    for (int i = max(behind, count) + threadIdx.x; i < end; i += BLOCK) kept[i] = -1;
    if (blockIdx.x == 0 && threadIdx.x == 0) counts[part.segment] = count;
    write_rows(kept - start, scores, part.begin, part.end, rules, of_rows, sums[1], scratch);
}
