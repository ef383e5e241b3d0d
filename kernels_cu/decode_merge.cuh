// decode_merge.cuh: paged_decode_mma's merge of softmax states.
#include "decode_products.cuh"
#include "decode_work.cuh"
#include "ptx.cuh"
#include "softmax.cuh"
#include "vector.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

// Four elements of a row's weighted sum of values, relative to 2^m, and the sum of its weights.
struct State { float m, l, x[4]; };

// Merges `count` states; at(i) points to the (maximum, sum) and the elements of state i. BATCH
// states are loaded before the first is used: a row may have a state of every SM, and the latency
// of L2 exceeds the arithmetic.
template <int BATCH, typename At> __device__ __forceinline__ State merge(int count, At at) {
    State s{-INF, 0.0f, {}};
#pragma unroll 1
    for (int first = 0; first < count; first += BATCH) {
        float2 stat[BATCH];
        float4 x[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const auto from = at(min(first + i, count - 1));
            stat[i] = *from.stat, x[i] = *from.x;
            if (first + i >= count) stat[i].x = -INF;  // a repeated state has no weight
        }
        float peak = s.m;
#pragma unroll
        for (int i = 0; i < BATCH; i++) peak = fmaxf(peak, stat[i].x);
        const float base = finite_base(peak), before = exp2_ftz(s.m - base);
        s.m = peak;
        s.l *= before;
#pragma unroll
        for (int j = 0; j < 4; j++) s.x[j] *= before;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const float rescale = exp2_ftz(stat[i].x - base);
            s.l += rescale * stat[i].y;
            s.x[0] += rescale * x[i].x, s.x[1] += rescale * x[i].y;
            s.x[2] += rescale * x[i].z, s.x[3] += rescale * x[i].w;
        }
    }
    return s;
}

// Where a row's (maximum, sum) and four of its elements are stored.
struct StateRef { const float2* stat; const float4* x; };

#if CLUSTER > 1
// Merges the states of CLUSTER adjacent lanes; each lane gets the result.
__device__ __forceinline__ State merge_lanes(State s) {
    float peak = s.m;
#pragma unroll
    for (int step = 1; step < CLUSTER; step *= 2) {
        peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, step));
    }
    const float rescale = exp2_ftz(s.m - finite_base(peak));
    s.m = peak;
    s.l *= rescale;
#pragma unroll
    for (float& x : s.x) x *= rescale;
#pragma unroll
    for (int step = 1; step < CLUSTER; step *= 2) {
        s.l += __shfl_xor_sync(FULL_MASK, s.l, step);
#pragma unroll
        for (float& x : s.x) x += __shfl_xor_sync(FULL_MASK, x, step);
    }
    return s;
}
#endif

// --- States of the warps, in shared memory -------------------------------------------------------

constexpr int PITCH = STATE_PITCH;  // floats
static_assert(PITCH >= D && PITCH % 32 == 16, "two rows fall on different banks");
constexpr bool REUSES_STAGES = !HAS_CP_ASYNC && !Q_IN_SHARED;

// Stores a lane's sums of one query row: those of lane t, from two columns each, stand together.
// `zero` is the part of a sum that the offset of integer codes added.
__device__ __forceinline__ void store_sums(float* row, const Sums& sums, float unit,
                                           float zero) {
    const int t = threadIdx.x % 4;
    const auto value = [&](int column, int c) {
        float x = sums.x[column][c];
        if constexpr (Q_IS_16BIT) x += sums.x[column][c + 2];
        if constexpr (V_IS_SUBNORMAL) {
            x = x * (SUBNORMAL_UNIT / subnormal_factor<VE>(column % (PER_WORD<V_T> / 2))) - zero;
        }
        return x * unit;
    };
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
        *(float4*)(row + i / 2 * 16 + 4 * t) =
            make_float4(value(i, 0), value(i + 1, 0), value(i, 1), value(i + 1, 1));
    }
}

// --- States of pieces, in the workspace ----------------------------------------------------------

__device__ __forceinline__ void store_state(float2* stats, float* x, const State& s, i64 at, int p) {
    *(float4*)(x + at * D + p) = make_float4(s.x[0], s.x[1], s.x[2], s.x[3]);
    if (p == 0) stats[at] = make_float2(s.m, s.l);
}

// The states of a piece's sequence, one a piece: their count, their slots, and the blocks that
// arrive with them.
struct RowStates {
    bool fixed, begins_within;  // begins_within: the first one is the second part of its range
    int first_range, arrivals, count, first_slot;

    __device__ __forceinline__ RowStates(const Piece& piece, int range, int begin, int end,
                                         int range_units, bool fixed) : fixed(fixed) {
        const int units = piece.visible.units;
        const bool is_whole = piece.start >= begin && piece.start + units <= end;
        first_range = is_whole ? range : piece.start / range_units;
        arrivals = is_whole ? 1 : (piece.start + units - 1) / range_units - first_range + 1;
        count = fixed ? units : arrivals;
        first_slot = fixed ? piece.start : 2 * first_range;
        begins_within = !fixed && piece.start != first_range * range_units;
    }
    __device__ __forceinline__ int slot(int i) const {
        return first_slot + (fixed ? i : 2 * i) + (i == 0 && begins_within);
    }
    __device__ __forceinline__ int own_slot(const Piece& piece, int range) const {
        return slot(fixed ? piece.unit - piece.start : range - first_range);
    }
};

// Whether this block is the last of `arrivals` blocks that have stored their states.
__device__ __forceinline__ bool is_last_block(int& is_last, int thread, int arrivals,
                                              u32* counter) {
    __syncthreads();
    if (thread == 0) {  // releases what the block stored, acquires what the others did
        is_last = arrivals == 1 || atomic_inc_acq_rel(counter, arrivals - 1) == arrivals - 1;
    }
    __syncthreads();
    return is_last;
}

// --- Results -------------------------------------------------------------------------------------

// Stores elements p .. p + 3 of a row's state, as store_sums placed them, as output and
// log-sum-exp. `row` counts the query rows of the KV head.
__device__ __forceinline__ void store_output(Q_T* out, float* lse, const float* sinks, State s,
                                             int b, int T, int G, int row, int kv_head, int p,
                                             float lse_unit) {
    const int head = kv_head * G + row % G;
#if SINKS
    const float sink = sinks[head] * LOG2_E, peak = fmaxf(s.m, sink);
    const float rescale = exp2_ftz(s.m - finite_base(peak));
    s.m = peak;
    s.l = s.l * rescale + exp2_ftz(sink - finite_base(peak));
#pragma unroll
    for (int i = 0; i < 4; i++) s.x[i] *= rescale;
#endif
    const i64 at = ((i64)b * T + row / G) * (gridDim.y * G) + head;
    const float inverse = s.l == 0.0f ? 0.0f : 1.0f / s.l;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        s.x[i] = Q_IS_16BIT ? s.x[i] * inverse : s.l == 0.0f ? 0.0f : s.x[i] / s.l;
    }
    constexpr int E = VFragment::ELEMENTS;
    const int i = p / 16 * 2, d = (i / E * 8 + p / 4 % 4 * 2) * E + i % E;
    store2(out + at * D + d, s.x[0], s.x[1]);
    store2(out + at * D + d + E, s.x[2], s.x[3]);
    if (lse && p == 0) lse[at] = s.l == 0.0f ? -INF : (s.m + log2f(s.l)) * lse_unit;
}

#endif
