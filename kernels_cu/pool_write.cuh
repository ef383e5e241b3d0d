// pool_write.cuh: new rows of keys and values into the pages of a pool, in its kinds.
#include "pool_row.cuh"

#define DYNAMIC 0
#define STATIC 1
#if !defined(NEW_T) || !defined(K_T) || !defined(V_T) || !defined(SCALE_T) || !defined(SCALES) || \
    !defined(HEADS) || !defined(PAGE) || !defined(ROW_T)
#error "pool_write.cuh needs NEW_T, K_T, V_T, SCALE_T, SCALES, HEADS, PAGE and ROW_T"
#endif
constexpr int H = HEADS;
static_assert(D <= 16 * LANES, "two pieces a lane at most");

template <typename T> constexpr bool HAS_DYNAMIC_SCALE = LARGEST<T> > 0 && SCALES == DYNAMIC;

// A token's place in a pool: page and offset in it. A negative page means the row is not written.
struct Place { int page, offset; };

__device__ __forceinline__ Place place_of_slot(ROW_T slot) {
    if (slot < 0) return Place{-1, 0};
    if (sizeof(slot) == 4) return Place{(int)((u32)slot / PAGE), (int)((u32)slot % PAGE)};
    return Place{(int)((u64)slot / PAGE), (int)((u64)slot % PAGE)};
}

// The rows of a pool and their scales; strides in elements.
template <typename To> struct Pool {
    To* rows;
    i64 page, token, head;
    SCALE_T* scales;
    i64 scale_page, scale_token, scale_head;

    // Stores a fragment of the row of a head, and the row's scale where that is dynamic.
    template <typename T>
    __device__ __forceinline__ void store(Place place, u32 of_head, const Fragment<T>& fragment,
                                          u32 largest) const {
        const u32 of_page = place.page, of_token = place.offset;
        To* to = rows + of_page * page + of_token * token + of_head * head;
        if constexpr (LARGEST<To> > 0) {
            SCALE_T* scale_at = scales + of_page * scale_page + of_token * scale_token +
                                of_head * scale_head;
            if constexpr (SCALES == DYNAMIC) {
                const float amax = as_float<T>(largest);
                const SCALE_T scale = row_scale<To, SCALE_T>(__float_as_uint(amax));
                if (threadIdx.x % LANES == 0) *scale_at = scale;
                // A scale that is subnormal, or limited by its dtype, may be far below the ratio.
                const bool clamps = amax * inverse_scale(scale) > LARGEST<To> + 0.25f;
                store_codes<true>(to, scale, fragment, clamps);
            } else {
                store_codes<false>(to, *scale_at, fragment, true);
            }
        } else {
            store_fragment(to, fragment);
        }
    }
};
