// phase_program.cuh: phases of a model's step, and how the blocks of a cooperative launch run them;
// shared by phase_program.cu and resident_program.cu.
//
// Each phase has tiles, which blocks take in turn. Independent phases form a stage, and a grid barrier
// ends each stage; while a block waits there, the weights of its next tile and the next phase are
// being copied. A block may not arrive at a barrier before it has waited at the one before: the counter
// knows how many blocks have arrived, not which.
#if !defined(KINDS) || !defined(X_T) || !defined(B_T) || !defined(BLOCK) || !defined(ROWS) || \
    !defined(OUTS)
#error "phase_program.cuh needs KINDS, X_T, B_T, BLOCK, ROWS and OUTS"
#endif

#include "block_gemv.cuh"
#include "block_rows.cuh"
#include "grid_barrier.cuh"
#include "order.cuh"
#include "peaks.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#ifdef HEAD_DIM
#include "paged_decode.cuh"
#include "paged_qkv.cuh"
#endif
#ifdef DRAWS
#include "phase_draw.cuh"
#endif

enum Op { PRODUCT, EMBED, ADD_NORM, APPEND, ATTEND, PEAKS, ARGMAX, ADJUST, FILTER, DRAW, LOGPROBS };

// Arguments of a phase, as pykv/ops/phase_program.py packs them.
struct Product {
    X_T* out;
    const X_T* x;
    const u8* w;
    const B_T* bias;
    const float* norm;
    int T, O, I, W;
    i64 x_stride, out_stride;
    int parts, held, tiles, accumulate, gate;
    float eps;
    const float* states;  // attention states of splits, which merge into x; null: x is stored
    int splits;
};

struct Embed {
    X_T* out;
    const u8* w;
    const int* ids;
    int O, I, W;  // rows of w; elements and bytes of a row
    float scale;
};

// x += y / sqrt(mean(y^2) + eps) * norm, row by row.
struct AddNorm {
    X_T* x;
    const X_T* y;
    const float* norm;
    int I;
    float eps;
};

// The index of the largest of V logits; first of each of `parts` parts of a row.
struct Argmax {
    int* out;
    const float* logits;
    u64* keys;  // [T, parts]
    int V, parts;
};

#ifdef HEAD_DIM
// New rows of a cache and attention over its pages.
struct Attention {
    Append append;
    Attend attend;
    int merges;  // 1: the last block of a head merges its splits; 0: products merge while they read
};

// Whether append and attention are one phase: a block has all query rows of a KV head, and a group of
// lanes for each of its heads. Else they are two phases.
constexpr bool AT_ONCE = HQ / H <= QUERY_ROWS && GROUPS >= HQ / H + 2;
#endif

struct Phase {
    int op, kind;  // of KINDS
    int stage;     // number of its stage, from 0; grows by 1 at most from phase to phase
    int tiles;
    union {
        u64 words[64];
        Product product;
        Embed embed;
        AddNorm add_norm;
        Argmax argmax;
#ifdef HEAD_DIM
        Attention attention;
#endif
#ifdef DRAWS
        Adjust adjust;
        Draw draw;
        Logprobs logprobs;
#endif
    };
};
static_assert(sizeof(Phase) == 528, "as the host packs it");

// Rows of x: stored, or merged from splits of attention.
struct SourceRows {
    StoredRows stored;
    const float* states;  // [T, HQ, splits, D + 2]
    int splits;

    __device__ __forceinline__ void load(float (&values)[4], int row, int i) const {
#ifdef HEAD_DIM
        if (states) {
            merge(values, states + ((i64)row * HQ + i / D) * splits * (D + 2), i % D);
            return;
        }
#endif
        stored.load(values, row, i);
    }

#ifdef HEAD_DIM
    // What merge_splits does for all elements of a head.
    __device__ __forceinline__ void merge(float (&values)[4], const float* state, int d) const {
        float peak = -INF, sum = 0.0f;
#pragma unroll 4
        for (int s = 0; s < splits; s++) peak = fmaxf(peak, state[s * (D + 2) + D]);
        const float base = finite_base(peak);
#pragma unroll
        for (int j = 0; j < 4; j++) values[j] = 0.0f;
#pragma unroll 4
        for (int s = 0; s < splits; s++, state += D + 2) {
            const float weight = exp2f(state[D] - base);
            sum += weight * state[D + 1];
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const auto two = *reinterpret_cast<const Vector<float, 2>*>(state + d + j);
                values[j] += weight * two.elements[0];
                values[j + 1] += weight * two.elements[1];
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) values[j] = sum == 0.0f ? 0.0f : values[j] / sum;
    }
#endif
};

// Calls work.run<K>() with the type of kind number `kind`. `work` is a struct because NVRTC 13.0
// refuses template lambdas.
template <typename K, typename... Others, typename Work>
__device__ __forceinline__ void with_kind(int kind, const Work& work) {
    if constexpr (sizeof...(Others) > 0) {
        if (kind > 0) {
            with_kind<Others...>(kind - 1, work);
            return;
        }
    }
    work.template run<K>();
}

struct Quad {
    float (&values)[4];
    const u8* row;
    int i, I;
    template <typename K> __device__ __forceinline__ void run() const {
        RowQuad<K>::load(values, row, i, I);
    }
};

// Embedding: a thread writes four elements of a token's row.
__device__ __forceinline__ void embed_tile(const Embed& p, int kind, int tile) {
    const int tiles = (p.I / 4 + BLOCK - 1) / BLOCK;  // of a row
    const int token = tile / tiles, i = (tile % tiles * BLOCK + threadIdx.x) * 4;
    if (i >= p.I) return;
    const int id = p.ids[token];
    float values[4] = {};
    if (id >= 0 && id < p.O) {
        with_kind<KINDS>(kind, Quad{values, p.w + (i64)id * p.W, i, p.I});
#pragma unroll
        for (int b = 0; b < 4; b++) values[b] = __fmul_rn(values[b], p.scale);
    }
    store4(p.out + (i64)token * p.I + i, values);
}

// AddNorm for one token, by a block.
__device__ __forceinline__ void add_norm_tile(const AddNorm& p, int token, float* of_warps) {
    const X_T* y = p.y + (i64)token * p.I;
    X_T* x = p.x + (i64)token * p.I;
    float squares = 0.0f, v[4], w[4], sum[4];
    for (int i = threadIdx.x * 4; i < p.I; i += BLOCK * 4) {
        load4(v, y + i);
#pragma unroll
        for (int j = 0; j < 4; j++) squares = fmaf(v[j], v[j], squares);
    }
    const float scale = 1.0f / sqrtf(block_sum<BLOCK>(squares, of_warps) / (float)p.I + p.eps);
    for (int i = threadIdx.x * 4; i < p.I; i += BLOCK * 4) {
        load4(v, y + i);
        load4(w, p.norm + i);
        load4(sum, x + i);
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] += v[j] * (scale * w[j]);
        store4(x + i, sum);
    }
}

// The key of a part of a row: its largest logit, and the lowest index of that.
__device__ __forceinline__ void peak_tile(const Argmax& p, int tile, u64* of_warps) {
    const int token = tile / p.parts, share = (p.V + p.parts - 1) / p.parts;
    const int begin = tile % p.parts * share, end = min(begin + share, p.V);
    u64 key = 0;
    for (int i = begin + threadIdx.x; i < end; i += BLOCK) {
        const u64 other = (u64)ordered(p.logits[(i64)token * p.V + i]) << 32 | ~(u32)i;
        key = key > other ? key : other;
    }
    key = block_peak(key, of_warps);
    if (threadIdx.x == 0) p.keys[tile] = key;
}

// The token of a row; -1 if its largest logit is infinite, or all are NaN.
__device__ __forceinline__ void argmax_tile(const Argmax& p, int token, u64* of_warps) {
    u64 key = 0;
    for (int i = threadIdx.x; i < p.parts; i += BLOCK) {
        const u64 other = p.keys[(i64)token * p.parts + i];
        key = key > other ? key : other;
    }
    key = block_peak(key, of_warps);
    const u32 order = (u32)(key >> 32);
    const bool is_finite = order > ordered(-INF) && order < ordered(INF);
    if (threadIdx.x == 0) p.out[token] = is_finite ? (int)~(u32)key : -1;
}

#ifdef HEAD_DIM
// Shared memory of attention. It overlays that of products, in dynamic shared memory: an SM may lack
// room for both.
struct AttentionShared {
    AppendShared append;
    AttendShared attend;
    __align__(16) Q_T queries[QUERY_ROWS][D];
    int is_last;
};
static_assert(sizeof(AttentionShared) <= ATTENTION_BYTES, "as the host reckons");

// Makes the queries of a share. The share with the last key also writes the new row of key and value.
__device__ __forceinline__ const Q_T* make_queries(AttentionShared& shared, const Append& p,
                                                   const KeyShare& share) {
    constexpr u32 G = HQ / H;
    const u32 group = threadIdx.x / LANES;
    const u32 known = group < G ? share.kv_head * G + group
                                : HQ + share.kv_head + (group == G ? 0 : H);
    const bool has_last = share.begin < share.end && share.end == share.length;
    const Place place = place_of_slot(p.slots[share.b]);
    make_head(shared.append, p, share.b, known,
              [&](const HeadRow& row, const HeadValue& value, u32 largest) {
        if (group < G) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                float x[8];
                unpack8(x, row.pieces[i]);
                if (column(i) < D) store8(&shared.queries[group][column(i)], x);
            }
        } else if (has_last && group < G + 2) {
            store_head(p, place, known, row, value, largest);
        }
    });
    __syncthreads();
    return &shared.queries[0][0];
}

// Prefetches the rows of a share into L2; all but the last were written by earlier launches or stages.
__device__ __forceinline__ void ask_for_rows(const Attend& p, const KeyShare& share) {
    constexpr int LINE = 128;
    for (int key = share.begin + threadIdx.x; key < share.end; key += THREADS) {
        const i64 page = p.page_table[(i64)share.b * p.M + key / p.P], token = key % p.P;
        const K_T* k = p.k_pool + page * p.k_pool_page + token * p.k_pool_token +
                       share.kv_head * p.k_pool_head;
        const V_T* v = p.v_pool + page * p.v_pool_page + token * p.v_pool_token +
                       share.kv_head * p.v_pool_head;
        for (int i = 0; i < (int)sizeof(K_T) * D / PACKED<K_T>; i += LINE) prefetch_l2((const u8*)k + i);
        for (int i = 0; i < (int)sizeof(V_T) * D / PACKED<V_T>; i += LINE) prefetch_l2((const u8*)v + i);
    }
}

// Attention over a split of the keys; the last block to finish merges the splits of its query rows. The
// workspace has a counter for each tile, zero before and after.
template <typename Await>
__device__ __forceinline__ void attention_tile(AttentionShared& shared, const Attention& p, int tile,
                                               Await await) {
    const KeyShare share = share_of(p.attend, tile);
    ask_for_rows(p.attend, share);
    await();
    attend_split(shared.attend, p.attend, share, [&] {
        return AT_ONCE ? make_queries(shared, p.append, share) : stored_queries(p.attend, share);
    });
    const int splits = p.attend.splits, G = p.attend.HQ / p.attend.H;
    if (!p.merges) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = reinterpret_cast<u32*>(p.attend.workspace) + tile / splits;
        shared.is_last = atomic_inc_acq_rel(counter, splits - 1) == (u32)splits - 1;
    }
    __syncthreads();
    if (!shared.is_last) return;
    const int tiles = (G + QUERY_ROWS - 1) / QUERY_ROWS;  // of a KV head
    const int first = tile / splits % tiles * QUERY_ROWS, heads = tile / splits / tiles * G;
    for (int row = first; row < min(first + QUERY_ROWS, G); row++) {
        merge_splits(p.attend, heads + row);
    }
}
#endif

#if __CUDA_ARCH__ >= 700
// The block starts to copy phase i; it may be read after cp_async_wait and a barrier.
__device__ __forceinline__ void ask_for(Phase& held, const u64* program, int i) {
    constexpr int PIECES_OF_PHASE = sizeof(Phase) / 16;
    if (threadIdx.x < PIECES_OF_PHASE) {
        const u64* from = program + (i64)i * (sizeof(Phase) / 8) + threadIdx.x * 2;
        cp_async16(reinterpret_cast<u8*>(&held) + threadIdx.x * 16, from);
    }
    cp_async_commit();
}

// Static shared memory of the phases.
union Shared {
    WarpSums sums;
    u64 keys[WARPS];
    float of_warps[WARPS];
#ifdef DRAWS
    DrawShared draw;
#endif
};

template <typename Await> struct ProductTiles {
    const Product& p;
    float* staged;
    WarpSums& sums;
    const Await& await;
    template <typename K> __device__ __forceinline__ void run() const {
        const SourceRows x{{p.x, p.x_stride}, p.states, p.splits};
        gemv_tiles<K>(staged, sums, p.out, x, p.w, p.bias, p.norm, p.T, p.O, p.I, p.W,
                      p.out_stride, p.parts, p.held, p.accumulate, p.gate, p.eps,
                      Tiles{(int)blockIdx.x, (int)gridDim.x, p.tiles}, 0, await);
    }
};

// Runs the block's tiles of a product.
template <typename Await>
__device__ __forceinline__ void multiply_tiles(const Phase& p, float* staged, WarpSums& sums,
                                               const Await& await) {
    if (blockIdx.x >= p.tiles) return;
    with_kind<KINDS>(p.kind, ProductTiles<Await>{p.product, staged, sums, await});
}

// Runs a tile of any other phase. Calls `await` before it reads what other phases write.
template <typename Await>
__device__ __forceinline__ void run_tile(const Phase& p, int tile, float* staged, Shared& shared,
                                         Await await) {
#ifdef HEAD_DIM
    AttentionShared& of_heads = *reinterpret_cast<AttentionShared*>(staged);
    if (p.op == ATTEND) {
        attention_tile(of_heads, p.attention, tile, await);
        return;
    }
#endif
    await();
    if (p.op == EMBED) embed_tile(p.embed, p.kind, tile);
    if (p.op == ADD_NORM) add_norm_tile(p.add_norm, tile, shared.of_warps);
    if (p.op == PEAKS) peak_tile(p.argmax, tile, shared.keys);
    if (p.op == ARGMAX) argmax_tile(p.argmax, tile, shared.keys);
#ifdef DRAWS
    if (p.op == ADJUST) adjust_tile(p.adjust, tile);
    if (p.op == FILTER) filter_tile(shared.draw, p.draw, tile);
    if (p.op == DRAW) draw_tile(shared.draw, p.draw, tile);
    if (p.op == LOGPROBS) logprobs_tile(shared.draw, p.logprobs, tile);
#endif
#ifdef HEAD_DIM
    constexpr int OF_TOKEN = (HQ + 2 * H + GROUPS - 1) / GROUPS;
    if (p.op == APPEND) {
        append_heads(of_heads.append, p.attention.append, tile / OF_TOKEN, tile % OF_TOKEN);
    }
#endif
}

// Runs the block's tiles of all phases; ask_for() has begun to copy the first. `over` counts the
// barriers that the launch has passed. Returns the count after these phases.
__device__ __forceinline__ int run_phases(Phase (&held)[2], float* staged, Shared& shared,
                                          const u64* program, u32* counters, int phases, int over) {
    int stage = 0;
    for (int i = 0; i < phases; i++) {
        cp_async_wait<0>();
        __syncthreads();  // phase i has arrived, and all threads are done with the one before
        if (i + 1 < phases) ask_for(held[(i + 1) % 2], program, i + 1);
        const Phase& p = held[i % 2];
        bool waits = p.stage != stage;
        stage = p.stage;
        if (waits) grid_arrive(counters);
        const auto await = [&] {
            if (waits) {
                grid_wait(counters, over + stage);
            } else {
                __syncthreads();  // all threads have read the last tile's shared memory
            }
            waits = false;
        };
        if (p.op == PRODUCT) {
            multiply_tiles(p, staged, shared.sums, await);
        } else {
            for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
                run_tile(p, tile, staged, shared, await);
            }
        }
        if (waits) await();  // for a block without tiles
    }
    return over + stage;
}
#endif
