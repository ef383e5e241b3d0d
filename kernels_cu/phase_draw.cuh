// phase_draw.cuh: phases that draw a token of each row of logits, of programs that ask for more than
// the likeliest one: penalties and biases, filters and the draw, log probabilities. A part of
// phase_program.cuh. Tokens and log probabilities are the bits of sample.cu, adjust_logits.cu and
// logprobs.cu, whatever the grid is.
//
// Tiles are parts of a row. What a phase finds in all of them is put together by the block that ends a
// row last, for the phase behind: `counters` have a word for each row, zero before and behind.
#include "draw.cuh"
#include "order.cuh"
#include "peaks.cuh"
#include "penalties.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "warps.cuh"

constexpr int PARTS = WARP;                   // of a row: a lane for each
constexpr int SUM_THREADS = 1024;             // of logprobs.cu, in whose order floats are added
constexpr int SUM_TILES = SUM_THREADS / BLOCK;
constexpr int SUMS_OF_ROW = SUM_THREADS / WARP;

// logits of penalties and biases; a token that was drawn is counted before.
struct Adjust {
    float* out;
    const float* logits;
    int* tallies;            // [T, V], as of adjust_logits.cu
    const float* penalties;  // [T, 3]
    const int* tokens;       // [T]
    const float* biases;     // [T, V]
    int V;
};

// Where the filters of a row have come to.
struct Kept {
    u64 rest;          // of a filter's goal, when all levels before `found` are in; 0: it keeps all
    u32 found, level;  // bits of the level where it ends; tokens are kept up to this level, and of it
    int index;         // up to this index
};

// A round of top_k or of top_p, or the draw.
struct Draw {
    int* out;
    const float* logits;
    const int* best;  // [T], the likeliest token, -1 where logits are not finite
    const float *temperature, *top_p, *min_p;  // [T], as of sample.cu
    const int* top_k;
    const u64* seeds;
    const int *lengths, *origins;  // [T]: the step is their difference
    u64 *bins, *sums;              // [T, BINS], zero before and behind; [T, PARTS]
    Kept* kept;                    // [T]
    u32* counters;
    int V;
    int is_first, by_mass, round;  // min_p is the first one's; by_mass: of top_p
};

// The log probabilities of a row's token and of its likeliest ones.
struct Logprobs {
    u32* out;  // [T, 1 + 2 K]: of the token; ids of the likeliest; theirs
    const float* logits;
    const int *tokens, *best, *wanted;  // [T], as of logprobs.cu; `best` as of Draw
    float* sums;                        // [T, SUMS_OF_ROW]
    u64* keys;                          // [T, SUM_TILES, K]
    u32* counters;
    int V, K;
};

struct DrawShared {
    u64 of_warps[WARPS], next_of_warps[WARPS];
    Crossing at;
    int is_last;
};

#if __CUDA_ARCH__ >= 700  // as phases have
// Whether the block is the last one of `tiles` to end its row; then it sees what the others wrote.
__device__ __forceinline__ bool ends_row(DrawShared& shared, u32* counter, int tiles) {
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.is_last = atomic_inc_acq_rel(counter, tiles - 1) == (u32)tiles - 1;
    }
    __syncthreads();
    return shared.is_last;
}

__device__ __forceinline__ void adjust_tile(const Adjust& p, int tile) {
    const int row = tile / PARTS, share = (p.V + PARTS - 1) / PARTS;
    const int begin = tile % PARTS * share, end = min(begin + share, p.V);
    const int token = p.tokens[row];
    for (int id = begin + threadIdx.x; id < end; id += BLOCK) {
        const i64 at = (i64)row * p.V + id;
        const float given = p.logits[at], bias = p.biases[at];
        int tally = p.tallies[at];
        if (id == token) p.tallies[at] = tally += 2;
        float logit = given;
        if (tally) logit = penalised(logit, tally, p.penalties + 3 * row);
        if (bias != 0.0f) logit = __fadd_rn(logit, bias);
        p.out[at] = given == given ? logit : given;  // the NaN that it was
    }
}

// Whether the likeliest token is drawn, or none can be.
__device__ __forceinline__ bool takes_best(const Draw& p, int row) {
    return !(p.temperature[row] > 0.0f) || p.top_k[row] == 1 || p.best[row] < 0;
}

// What the phases ahead have kept of a row.
__device__ __forceinline__ Kept kept_of(const Draw& p, int row) {
    return p.is_first ? Kept{0, 0, level_of_min_p(p.min_p[row]), p.V - 1} : p.kept[row];
}

__device__ __forceinline__ Row<false> row_of(const Draw& p, int row, const Kept& kept) {
    const float* logits = p.logits + (i64)row * p.V;
    const float scale = __fdiv_rn(STEPS_PER_NAT, p.temperature[row]);
    return {logits, p.V, logits[p.best[row]], scale, kept.level, kept.index};
}

// A round of a filter over a part of a row.
__device__ __forceinline__ void filter_tile(DrawShared& shared, const Draw& p, int tile) {
    const int b = tile / PARTS, share = (p.V + PARTS - 1) / PARTS;
    const bool by_mass = p.by_mass;
    const int round = p.round, k = p.top_k[b];
    if (takes_best(p, b)) return;  // the whole block
    Kept& kept = p.kept[b];
    const Kept before = kept_of(p, b);
    if (by_mass ? p.top_p[b] >= 1.0f : k <= 0 || k >= p.V) {
        if (p.is_first && tile % PARTS == 0 && threadIdx.x == 0) kept = before;
        return;
    }
    if (round > 0 && before.rest == 0) return;
    Row<false> row = row_of(p, b, before);
    u64* const bins = p.bins + (i64)b * BINS;
    const u32 found = round > 0 ? before.found : 0, mask = mask_of(round);
    const int shift = shift_of(round), begin = tile % PARTS * share;
#pragma unroll 4
    for (int i = begin + threadIdx.x; i < min(begin + share, p.V); i += BLOCK) {
        const u32 level = row.level_of(i);
        if (row.has(level, i) && (level & mask) == found) {
            atomicAdd(bins + (level >> shift & (BINS - 1)), by_mass ? weight(level) : 1);
        }
    }
    if (!ends_row(shared, p.counters + b, PARTS)) return;
    const auto of = [&](u32 bin) { return bins[bin]; };
    const u64 rest = find_bin(shared.at, shared.of_warps, of, [&](u64 all) {
        if (round > 0) return before.rest;
        return by_mass ? goal_of_mass(all, p.top_p[b]) : goal_of_count(all, k);
    });
    const u32 bits = rest > 0 ? found | shared.at.bin << shift : 0;
    if (rest > 0 && round == ROUNDS - 1) {
        end_prefix(row, bits, shared.at, [&](u32 level) -> u64 { return by_mass ? weight(level) : 1; },
                   shared.of_warps);
    }
    __syncthreads();  // all have read the bins
    for (int bin = threadIdx.x; bin < BINS; bin += BLOCK) bins[bin] = 0;
    if (threadIdx.x == 0) kept = {rest > 0 ? shared.at.rest : 0, bits, row.level, row.index};
}

// The mass of a part of a row; whoever has the last one draws.
__device__ __forceinline__ void draw_tile(DrawShared& shared, const Draw& p, int tile) {
    const int b = tile / PARTS, share = (p.V + PARTS - 1) / PARTS, lane = threadIdx.x % WARP;
    if (takes_best(p, b)) {  // the whole block
        if (tile % PARTS == 0 && threadIdx.x == 0) p.out[b] = p.best[b];
        return;
    }
    const Row<false> row = row_of(p, b, kept_of(p, b));
    const auto measure = [&](u32 level, int i) -> u64 { return row.has(level, i) ? weight(level) : 0; };
    int begin = tile % PARTS * share;
    u64 sum = 0;
#pragma unroll 4
    for (int i = begin + threadIdx.x; i < min(begin + share, p.V); i += BLOCK) {
        sum += measure(row.level_of(i), i);
    }
    sum = warp_scan(sum);
    if (lane == WARP - 1) shared.of_warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    u64 mine;
    sum = scan_warps(shared.of_warps, mine);
    if (threadIdx.x == WARP - 1) p.sums[tile] = sum;
    if (!ends_row(shared, p.counters + b, PARTS)) return;
    mine = p.sums[b * PARTS + lane];
    const u64 through = warp_scan(mine), all = __shfl_sync(FULL_MASK, through, WARP - 1);
    const u64 goal = __umul64hi(random_of(p.seeds[b], max(p.lengths[b] - p.origins[b], 0)), all);
    const int at = __popc(__ballot_sync(FULL_MASK, through <= goal));  // parts that end too early
    const u64 before = __shfl_sync(FULL_MASK, through - mine, at);
    begin = at * share;
    const int token = locate(row, begin, min(share, p.V - begin), measure,
                             [&](u64) { return goal - before; }, shared.of_warps);
    if (threadIdx.x == 0) p.out[b] = token;
}

// Sums of a part of a row, in the order of logprobs.cu, whose threads these are, and its likeliest
// tokens; whoever has the last one puts them together.
__device__ __forceinline__ void logprobs_tile(DrawShared& shared, const Logprobs& p, int tile) {
    const int b = tile / SUM_TILES, part = tile % SUM_TILES, best = p.best[b];
    const int thread = part * BLOCK + threadIdx.x, most = min(p.wanted[b], p.K);
    const float* row = p.logits + (i64)b * p.V;
    u32* const out = p.out + (i64)b * (1 + 2 * p.K);
    if (best < 0 || most < 0) {  // the whole block
        if (part == 0) {
            for (int i = threadIdx.x; i < 1 + 2 * p.K; i += BLOCK) {
                out[i] = i == 0 || i > p.K ? __float_as_uint(-INF) : ~0u;
            }
        }
        return;
    }
    const float largest = row[best];
    float sum = 0.0f;
    u64 mine = 0;  // the best of this thread's tokens that is not listed yet
#pragma unroll 4
    for (int i = thread; i < p.V; i += SUM_THREADS) {
        const float x = row[i];
        sum += x == x ? exp2f((x - largest) * LOG2_E) : 0.0f;
        mine = max(mine, key_of(x, i));
    }
    sum = group_sum<WARP>(sum);
    if (thread % WARP == 0) p.sums[b * SUMS_OF_ROW + thread / WARP] = sum;
    u64* const keys = p.keys + (i64)b * SUM_TILES * p.K;
    for (int n = 0; n < most; n++) {
        const u64 key = block_peak(mine, shared.of_warps);
        if (threadIdx.x == 0) keys[part * p.K + n] = key;
        // All look at the tokens of the thread that had the best one.
        const int owner = index_of(key) % SUM_THREADS;
        u64 next = 0;
        for (i64 i = owner + (i64)SUM_THREADS * threadIdx.x; key && i < p.V; i += SUM_THREADS * BLOCK) {
            const u64 other = key_of(row[i], (int)i);
            if (other < key) next = max(next, other);
        }
        next = block_peak(next, shared.next_of_warps);
        if (thread == owner) mine = next;
    }
    if (!ends_row(shared, p.counters + b, SUM_TILES)) return;
    sum = 0.0f;
    for (int warp = 0; warp < SUMS_OF_ROW; warp++) sum += p.sums[b * SUMS_OF_ROW + warp];
    const float log_sum = log2f(sum) * LN_2;
    const auto logprob = [&](int token) {
        const float x = token >= 0 && token < p.V ? row[token] : -INF;
        return __float_as_uint(x == x ? (x - largest) - log_sum : -INF);
    };
    if (threadIdx.x == 0) out[0] = logprob(p.tokens[b]);
    u64 last = ~0ull;
    for (int n = 0; n < p.K; n++) {
        u64 key = 0;
        for (int i = threadIdx.x; n < most && i < SUM_TILES * most; i += BLOCK) {
            const u64 other = keys[i / most * p.K + i % most];
            if (other < last) key = max(key, other);
        }
        last = block_peak(key, shared.of_warps);
        __syncthreads();  // all have read the warps' keys
        if (threadIdx.x == 0) {
            const int token = last ? index_of(last) : -1;
            out[1 + n] = (u32)token;
            out[1 + p.K + n] = logprob(token);
        }
    }
}
#endif
