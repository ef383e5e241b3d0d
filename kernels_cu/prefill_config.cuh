// prefill_config.cuh: operand types of prefill_mma, and where things lie in its shared memory.
#include "head_dim.cuh"
#include "mma_rows.cuh"
#include "softmax.cuh"
#include "warps.cuh"

static_assert(D % 16 == 0 && D <= 256, "whole steps of mma, and sums that fit the registers");
constexpr bool V_HAS_CODES = LARGEST<V_T> > 0.0f;
constexpr bool HAS_CODES = K_HAS_CODES || V_HAS_CODES;

// Terms of operands. Results of 16-bit queries are rounded to 16 bits, so their sums may stay in
// the mma, which truncates below their last place.
using VM = Operand<V_T>::Type;
constexpr int P_TERMS = Q_IS_16BIT ? 1 + (IS_BF16<VM> && !IS_BF16<Q_T>) : 2 + IS_BF16<VM>;

constexpr float P_HEADROOM = IS_BF16<VM> ? 0.0f : HEADROOM;  // headroom of the weights

constexpr float SMALLEST = 1.1754944e-38f;  // smallest normal number

constexpr int WARP_ROWS = ROWS / WARPS;
constexpr int ROW_TILES = WARP_ROWS / 16;  // matrices A that a warp has
static_assert(ROWS == WARPS * 16 * ROW_TILES && ROW_TILES <= 2, "whole tiles that registers hold");
static_assert(KEYS % 16 == 0 && KEYS <= (D <= 128 ? 64 : 32), "whole steps of mma");

template <typename T> constexpr int RAW_BYTES = D / PACKED<T> * (int)sizeof(T);  // bytes of a row

constexpr int WARP_KEYS = KEYS / WARPS;  // keys of a tile that a warp copies

constexpr int TILE_BYTES = KEYS * Halves::PITCH;
constexpr int Q_BYTES = Q_TERMS * WARP_ROWS * Halves::PITCH;  // bytes of a warp's queries
constexpr int K_AT = WARPS * Q_BYTES;
constexpr int V_AT = K_AT + (K_HAS_CODES ? 1 : 2) * TILE_BYTES;
constexpr int K_RAW_AT = V_AT + (V_HAS_CODES ? 1 : 2) * TILE_BYTES;
constexpr int V_RAW_AT = K_RAW_AT + (K_HAS_CODES ? KEYS * RAW_BYTES<K_T> : 0);
constexpr int SCALES_AT = V_RAW_AT + (V_HAS_CODES ? KEYS * RAW_BYTES<V_T> : 0);
constexpr int UNITS_AT = SCALES_AT + (HAS_CODES ? 8 * KEYS : 0);
static_assert(UNITS_AT + 4 * ROWS * !Q_IS_EXACT == SHARED_BYTES, "the parts are the whole");
