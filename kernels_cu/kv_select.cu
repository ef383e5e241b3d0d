// kv_select.cu: selects the rows of a cache to keep: those of the largest scores, ties by position, and
// always sinks and recent rows.
//
// Arrays, row-major (letters as in pykv/ops/kv_select.py):
//   kept             [R, S, C] int  slots to keep, ascending, then -1
//   counts           [R, S] int     number of slots to keep
//   scores    const  [R, S, C] float
//   lengths   const  [R, S] int     clamped to 0 .. C
//   budgets   const  [R] int        rows that the S segments keep together; null: no limit
//   tallies          [R, PASSES * DIGITS] int  of long groups: histogram of digits, zeros at first
//   pairs            [R, S, parts] u64     of long groups, for each part: in the upper half the rows
//                                          above the last score that is kept, in the lower those equal
// Scalars:  sinks, recent: how many first and last rows of a segment rank before all others;
//           has_threshold, threshold: keep other rows only if their score exceeds it; slice: scores
//           of a part, whole tiles; digit: which digit is counted
// Defines:  BLOCK = threads, a power of two from 128 to 1024; ITEMS, scores that each has at once;
//           TALLIES = PASSES * DIGITS
// Launch:   block (BLOCK). kv_select: grid (R). Of long groups grid (parts, S, R), parts = ceil(C /
//           slice): kv_select_count for each digit in turn, where there are budgets,
//           kv_select_pairs, kv_select_write
// Traffic:  scores once, then from the caches three times (of long groups four times); 4 bytes an
//           entry of `kept`
// Stack: 8 bytes, on sm_86 and sm_89, of kv_select_write, whose four scores are on their way at once
// Order:    atomics count integers alone: every run gives the same, by either way
//
// A group's time grows with its scores while other SMs idle: those that are few and long are cut.
// Their blocks meet at the ends of launches alone, and all of them find the digits that were counted.
#if !defined(BLOCK) || !defined(ITEMS) || !defined(TALLIES)
#error "kv_select.cu needs BLOCK, ITEMS and TALLIES"
#endif

#include "largest.cuh"
#include "ptx.cuh"
#include "types.cuh"

static_assert(TALLIES == PASSES * DIGITS, "the host allocates as much");

__device__ __forceinline__ Cut first_cut(const int* budgets, i64 group) {
    const int ties = budgets ? max(budgets[group], 0) : 0x7fffffff;
    return ties == 0x7fffffff ? Cut{0, 0, true} : Cut{0, ties, false};
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
    for (int pass = 0; !cut.is_found && pass < PASSES; pass++) {
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
        keep_rows(scores + (group + s) * C, 0, length, rules_of(length), pairs, before, scratch,
                  [first = out - start](int n, int row) { first[n] = row; });
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
    for (int pass = 0; !cut.is_found && pass < passes; pass++) {
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
    if (cut.is_found) return;
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
    for (int tile = part.begin; tile < part.end; tile += TILE) {
        u32 orders[ITEMS];
        load_orders<BLOCK>(orders, scores + part.segment * C, tile + threadIdx.x, part.end, rules);
#pragma unroll
        for (const u32 order : orders) own += of_rows.of(order);
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
    keep_rows(scores, part.begin, part.end, rules, of_rows, sums[1], scratch,
              [first = kept - start](int n, int row) { first[n] = row; });
}
