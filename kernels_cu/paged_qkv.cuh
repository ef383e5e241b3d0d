// paged_qkv.cuh: heads of a token's Q, K and V: normalised, rotated, and written where they belong; a
// part of paged_qkv.cu and phase_program.cuh.
#include "head_row.cuh"
#include "pool_write.cuh"
#include "reduce.cuh"
#include "rotary.cuh"

#if !defined(W_T) || !defined(Q_HEADS) || !defined(NORM) || !defined(HADAMARD)
#error "paged_qkv.cuh needs W_T, Q_HEADS, NORM and HADAMARD"
#endif
constexpr int HQ = Q_HEADS;

// What an append reads and writes: as the kernel of paged_qkv.cu takes it.
struct Append {
    NEW_T* q_out;
    K_T* k_pool;
    V_T* v_pool;
    SCALE_T *k_scales, *v_scales;
    const NEW_T* qkv;
    const ROW_T* slots;
    const int* positions;
    const float* inv_freq;
    const W_T *q_norm, *k_norm;
    i64 k_pool_page, k_pool_token, k_pool_head, v_pool_page, v_pool_token, v_pool_head;
    i64 k_scales_page, k_scales_token, k_scales_head, v_scales_page, v_scales_token, v_scales_head;
    i64 q_token, q_head, qkv_token;
    float eps;
};

__device__ __forceinline__ void normalise(float (&x)[PIECES][8], const W_T* weight, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) squares += x[i][j] * x[i][j];
    }
    const float scale = 1.0f / sqrtf(group_sum<LANES>(squares) / (float)D + eps);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (column(i) >= D) continue;
        float w[8];
        load8(w, weight + column(i));
#pragma unroll
        for (int j = 0; j < 8; j++) x[i][j] *= scale * w[j];
    }
}

// What lanes of a block tell each other.
struct AppendShared {
    static constexpr bool EXCHANGES = PAIRS > 0 && !IN_LANE;
    Rotation rotations[PAIRS ? PAIRS : 1];
    __align__(16) float exchange[EXCHANGES ? GROUPS : 1][EXCHANGES ? D : 4];
};

#if NORM || PAIRS > 0 || HADAMARD
using HeadRow = Fragment<float>;  // what lanes hold of a head of Q or K
#else
using HeadRow = Fragment<NEW_T>;
#endif
#if HADAMARD
using HeadValue = Fragment<float>;  // what lanes hold of a head of V
#else
using HeadValue = Fragment<NEW_T>;
#endif

// Makes a head of a token what queries, keys and values are: normalised, rotated and mixed. All lanes
// of a block call it, LANES of them with one head, which is known; store(row, value, largest) gets
// the lane's fragment of a head of Q or K, that of a head of V, and the largest magnitude where that
// decides a scale.
template <typename Store>
__device__ __forceinline__ void make_head(AppendShared& shared, const Append& p, u32 token, u32 known,
                                          Store store) {
    const u32 group = threadIdx.x / LANES;
    const Fragment<NEW_T> loaded = load_fragment(p.qkv + token * p.qkv_token + known * D);
    const bool is_value = known >= HQ + H;

#if NORM || PAIRS > 0 || HADAMARD
    float x[PIECES][8];
    HeadRow row;
#if PAIRS > 0
    const double position = p.positions[token];
    for (int j = threadIdx.x; j < PAIRS; j += BLOCK) {
        Rotation& by = shared.rotations[j];
        sin_cos(position * p.inv_freq[j], by.sine, by.cosine);
    }
    __syncthreads();
#endif
#pragma unroll
    for (int i = 0; i < PIECES; i++) unpack8(x[i], loaded.pieces[i]);
    if constexpr (NORM) normalise(x, known < HQ ? p.q_norm : p.k_norm, p.eps);
#if PAIRS > 0
    rotate_pairs(x, shared.rotations, shared.exchange[IN_LANE ? 0 : group]);
#endif
#if HADAMARD
    if (is_value) {  // undo the norm and rotation that the whole warp ran
#pragma unroll
        for (int i = 0; i < PIECES; i++) unpack8(x[i], loaded.pieces[i]);
    }
    hadamard_transform(x);
#endif
#pragma unroll
    for (int i = 0; i < PIECES; i++) pack8(row.pieces[i], x[i]);
#else
    const HeadRow& row = loaded;
#endif
#if HADAMARD
    const HeadValue& value = row;
#else
    const HeadValue& value = loaded;
#endif

    u32 largest[1] = {};
    if (HAS_DYNAMIC_SCALE<K_T> && !is_value) largest[0] = max_magnitude(row);
    if (HAS_DYNAMIC_SCALE<V_T> && is_value) largest[0] = max_magnitude(value);
    if constexpr (HAS_DYNAMIC_SCALE<K_T> || HAS_DYNAMIC_SCALE<V_T>) group_max<LANES>(largest);
    store(row, value, largest[0]);
}

// Stores a head of K or V, known >= HQ, in its place.
__device__ __forceinline__ void store_head(const Append& p, Place place, u32 known,
                                           const HeadRow& row, const HeadValue& value, u32 largest) {
    if (place.page < 0) return;
    if (known < HQ + H) {
        const Pool<K_T> to{p.k_pool, p.k_pool_page, p.k_pool_token, p.k_pool_head,
                           p.k_scales, p.k_scales_page, p.k_scales_token, p.k_scales_head};
        to.store(place, known - HQ, row, largest);
    } else {
        const Pool<V_T> to{p.v_pool, p.v_pool_page, p.v_pool_token, p.v_pool_head,
                           p.v_scales, p.v_scales_page, p.v_scales_token, p.v_scales_head};
        to.store(place, known - HQ - H, value, largest);
    }
}

// The block's part of an append: GROUPS heads of a token, from heads * GROUPS on. All threads call it.
__device__ __forceinline__ void append_heads(AppendShared& shared, const Append& p, u32 token,
                                             u32 heads) {
    const u32 head = heads * GROUPS + threadIdx.x / LANES;
    const u32 known = head < HQ + 2 * H ? head : HQ + 2 * H - 1;  // idle lanes do the last head
    const Place place = place_of_slot(p.slots[token]);
    make_head(shared, p, token, known, [&](const HeadRow& row, const HeadValue& value, u32 largest) {
        if (head < HQ) {
            store_fragment(p.q_out + token * p.q_token + head * p.q_head, row);
        } else if (head < HQ + 2 * H) {
            store_head(p, place, head, row, value, largest);
        }
    });
}
