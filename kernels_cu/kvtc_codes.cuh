// kvtc_codes.cuh: rows of ranges of coefficients to codes, bit for bit as the NumPy references of
// pykv/ops/kvtc_quantize.py, which has the formulas.
//
// A block holds a tile in shared memory: some rows of some ranges. Teams of lanes find the extremes
// of a row of a range and make its codes: a lane up to 16 columns, 8 lanes up to 128, 16 up to 512,
// a warp up to 1024. Beyond, the block is the team, and takes pieces of up to PIECE columns, which
// it reads a second time, from L2, where there are several and extremes are asked for.
// Defines: BLOCK = threads; SMALL = columns of tiles of single lanes; PIECE, a multiple of 32
// Shared memory: floats for the widest tile of the launch: 32 * 132 for small ones, BLOCK / 32 *
//          (columns of a warp + 8) for medium ones, the widest range or PIECE and 8 for wide ones
#include "quotient.cuh"
#include "vector.cuh"

#if !defined(BLOCK) || !defined(SMALL) || !defined(PIECE)
#error "kvtc_codes.cuh needs BLOCK, SMALL and PIECE"
#endif
constexpr int WARPS = BLOCK / WARP;
// Blocks that an SM holds, for their tiles.
constexpr int CODING_CTAS = __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200 ? 5 : 3;
constexpr float LARGEST_FLOAT = 3.402823466e38f;
static_assert(BLOCK % WARP == 0 && SMALL + 3 <= 128 && PIECE % 32 == 0, "tiles fit");

struct alignas(16) Range { int start, end, bits, int_bits, index, before, row_bytes, unused; };

// Where a row of a range lies; null where there is no such thing.
struct Place {
    u8 *codes, *minima, *maxima;
    __device__ Place down(int rows, i64 row_bytes) const {
        return {codes + rows * row_bytes, minima + 4 * (i64)rows, maxima + 4 * (i64)rows};
    }
};

// The matrix that is read.
struct Rows {
    const float* x;
    i64 stride;
    int B, C;
    __device__ bool has_vectors() const { return stride % 4 == 0 && C % 4 == 0; }
    // Where column `start` lies in shared memory: vectors begin at multiples of 4.
    __device__ int offset(int start) const { return has_vectors() ? start % 4 : 0; }
};

// --- Bytes of any alignment ----------------------------------------------------------------------

// The lower N bytes of x, by one store where `at` is a multiple of N, else by halves.
template <int N> __device__ __forceinline__ void store_bytes(u8* at, u64 x) {
    if constexpr (N == 1) {
        *at = (u8)x;
    } else if ((u32)(u64)at % N == 0) {
        if constexpr (N == 8) *(u64*)at = x;
        else if constexpr (N == 4) *(u32*)at = (u32)x;
        else *(u16*)at = (u16)x;
    } else {
        store_bytes<N / 2>(at, x);
        store_bytes<N / 2>(at + N / 2, x >> 4 * N);
    }
}

// --- Extremes ------------------------------------------------------------------------------------

// Of a row of a range: -minimum, maximum, a NaN where a value is not finite, and how many are not.
struct Extremes {
    float negated, high, odd;
    int count;

    __device__ void add(float x) {
        negated = fmaxf(negated, -x);
        high = fmaxf(high, x);
        odd += x * 0.0f;
    }
    __device__ void add(const float4& x) {
        negated = fmaxf(negated, fmaxf(fmaxf(-x.x, -x.y), fmaxf(-x.z, -x.w)));
        high = fmaxf(high, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
        odd += x.x * 0.0f, odd += x.y * 0.0f, odd += x.z * 0.0f, odd += x.w * 0.0f;
    }
    __device__ void join(const Extremes& other) {
        negated = fmaxf(negated, other.negated);
        high = fmaxf(high, other.high);
        odd += other.odd;
        count += other.count;
    }
    // Of neighbouring lanes; `odd` of all lanes of the warp, and `count` where there may be some.
    __device__ void join_lanes(int lanes, bool counts) {
        for (int step = lanes / 2; step > 0; step /= 2) {
            negated = fmaxf(negated, __shfl_xor_sync(FULL_MASK, negated, step));
            high = fmaxf(high, __shfl_xor_sync(FULL_MASK, high, step));
            if (counts) count += __shfl_xor_sync(FULL_MASK, count, step);
        }
        if (__any_sync(FULL_MASK, is_odd())) odd = __uint_as_float(0x7fc00000u);
    }
    __device__ bool is_odd() const { return odd != odd; }
    __device__ float low() const { return -negated + 0.0f; }  // + 0.0f turns -0.0 into 0.0
    __device__ float top() const { return high + 0.0f; }
};
constexpr Extremes NOTHING = {-LARGEST_FLOAT, -LARGEST_FLOAT, 0.0f, 0};

// Adds of n floats in shared memory those of one of `lanes`; with `finite`, counts what is not finite.
__device__ __forceinline__ void add_all(Extremes& to, const float* x, int n, int lane, int lanes,
                                        bool finite) {
    if (finite) {
        for (int i = lane; i < n; i += lanes) {
            if (fabsf(x[i]) <= LARGEST_FLOAT) to.add(x[i]);
            else to.count++;
        }
        return;
    }
    const int vectors = (u64)x % 16 == 0 ? n / 4 : 0;
#pragma unroll 4
    for (int i = lane; i < vectors; i += lanes) {
        const float4 four = ((const float4*)x)[i];
        to.add(four);
    }
    for (int i = vectors * 4 + lane; i < n; i += lanes) to.add(x[i]);
}

__device__ __forceinline__ float interval(float low, float high) {
    const float width = high - low;
    return width < 1e-10f ? 1.0f : width;
}

// --- Codes ---------------------------------------------------------------------------------------

constexpr float INTEGERS = 8388608.0f;  // 2^23: a code is the lower bits of its sum with it

// Kinds of codes: one by the definition, and eight at once as two fours, of 4 * BITS bits each and
// anything above; false where some are left to the definition.
struct Fp8 {
    static constexpr int BITS = 8;
    __device__ u32 operator()(float x) const { return two_codes(x, 0.0f, e4m3{}) & 0xffu; }
    __device__ bool eight(const float (&x)[2][4], u32 (&fours)[2]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fours[i] = two_codes(x[i][0], x[i][1], e4m3{}) |
                       two_codes(x[i][2], x[i][3], e4m3{}) << 16;
        }
        return true;
    }
};

// Codes between two extremes. The difference to the lower one is clamped before it is divided, which
// leaves the same codes, and quotients that decide about one are not small. Widths whose inverse
// is subnormal are scaled; of one that is no number, or infinite, all codes are 0.
template <int BITS_> struct Steps {
    static constexpr int BITS = BITS_;
    static constexpr float LAST = (float)((1 << BITS) - 1);
    float scale, offset, width, inverse;
    __device__ Steps(float low, float high) {
        const float unscaled = interval(low, high);
        const bool is_finite = unscaled <= LARGEST_FLOAT;
        scale = unscaled <= 4e37f ? 1.0f : 0.25f;
        offset = is_finite ? -low * scale : -INF;
        width = is_finite ? unscaled * scale : 1.0f;
        inverse = 1.0f / width;
    }
    __device__ float above(float x) const { return __fmaf_rn(x, scale, offset); }
    __device__ u32 operator()(float x) const {
        const float clamped = fminf(fmaxf(above(x), 0.0f), width);  // NaN gives 0
        const float t = __fmul_rn(quotient(clamped, width, inverse), LAST);
        return (u32)(t + 0.49999997f);  // halves go up: the largest float below a half rounds so
    }
    // By the inverse alone, which is off by 2^-24 of it, as is its product; the definition rounds
    // twice. So both differ by 2^-22 * LAST at most, and round alike if no half is that near; a
    // quarter more is for what the distance itself is off by.
    __device__ bool eight(const float (&x)[2][4], u32 (&fours)[2]) const {
        constexpr float SURE = 0.5f - 1.25f * LAST / 4194304.0f;
        constexpr float BASE = (float)(1 << BITS);
        bool is_sure = true;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float y[4], negated[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float part = __saturatef(__fmul_rn(above(x[i][j]), inverse));  // NaN gives 0
                y[j] = __fmaf_rn(part, LAST, INTEGERS);
                negated[j] = INTEGERS - y[j];
                is_sure &= fabsf(__fmaf_rn(part, LAST, negated[j])) < SURE;
            }
            const u32 lower = __float_as_uint(__fmaf_rn(negated[1], -BASE, y[0]));
            const u32 upper = __float_as_uint(__fmaf_rn(negated[3], -BASE, y[2]));
            if constexpr (BITS == 8) fours[i] = __byte_perm(lower, upper, 0x5410);
            else fours[i] = lower + (upper << 2 * BITS);
        }
        return is_sure;
    }
};

// The codes of two fours, the lower first, in the lower 8 * BITS bits.
template <int BITS> __device__ __forceinline__ u64 join_fours(u32 lower, u32 upper) {
    if constexpr (BITS == 8) return lower | (u64)upper << 32;
    else if constexpr (BITS == 4) return __byte_perm(lower, upper, 0x5410);
    else if constexpr (BITS == 2) return __byte_perm(lower, upper, 0x0040);
    else return (lower & 15u) | upper << 4;
}

// Up to eight codes by the definition.
template <typename Code>
__device__ __forceinline__ u64 pack_few(const float* x, int n, const Code& code) {
    u64 codes = 0;
#pragma unroll 1
    for (int i = 0; i < n; i++) codes |= (u64)code(x[i]) << i * Code::BITS;
    return codes;
}

// The codes of n floats in shared memory to the bytes from `to` on, by neighbouring lanes of a warp
// or a block, eight at a time. Half of the lanes begin with the other four, so that lanes that read
// together read from different banks.
template <typename Code>
__device__ __forceinline__ void pack(u8* to, const float* x, int n, int lane, int lanes,
                                     const Code& code) {
    constexpr int BITS = Code::BITS;
    const bool has_vectors = (u32)(u64)x % 16 == 0;
    const int turn = lane % 8 / 4, other = 4 - 8 * turn;
    const int whole = n / 8, left = n % 8;
    const float* from = x + 8 * lane + 4 * turn;  // the four that it begins with
    u8* at = to + BITS * lane;
#pragma unroll 1
    for (int i = lane; i < whole; i += lanes) {
        float some[2][4];
        if (has_vectors) {
            load4(some[0], from);
            load4(some[1], from + other);
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++) some[0][k] = from[k], some[1][k] = from[other + k];
        }
        u32 fours[2];
        const bool is_sure = code.eight(some, fours);
        u64 codes = turn ? join_fours<BITS>(fours[1], fours[0])
                         : join_fours<BITS>(fours[0], fours[1]);
        if (!is_sure) codes = pack_few(from - 4 * turn, 8, code);
        store_bytes<BITS>(at, codes);
        from += 8 * lanes;
        at += BITS * lanes;
    }
    if (left == 0 || lane != whole % lanes) return;
    const u64 codes = pack_few(from - 4 * turn, left, code);
    for (int i = 0; 8 * i < left * BITS; i++) at[i] = (u8)(codes >> 8 * i);
}

__device__ __forceinline__ void put_codes(u8* to, const float* x, int n, int bits, float low,
                                          float high, int lane, int lanes) {
    if (bits == 0) pack(to, x, n, lane, lanes, Fp8{});
    else if (bits == 1) pack(to, x, n, lane, lanes, Steps<1>(low, high));
    else if (bits == 2) pack(to, x, n, lane, lanes, Steps<2>(low, high));
    else if (bits == 4) pack(to, x, n, lane, lanes, Steps<4>(low, high));
    else pack(to, x, n, lane, lanes, Steps<8>(low, high));
}

// --- Quantize ------------------------------------------------------------------------------------

// What becomes of extremes.
enum Mode { GIVEN, ALL, FINITE };  // range is read; is that of all values; of the finite ones

// Columns start .. end - 1 of `rows` rows to shared memory, `pitch` floats a row, by LANES threads a
// row; and a barrier.
template <int LANES>
__device__ __forceinline__ void stage(float* tile, const Rows& from, int start, int end, i64 row,
                                      int rows, int pitch) {
    __syncthreads();  // all have read what was there
    const int offset = from.offset(start), width = offset + end - start;
    for (int i = threadIdx.x / LANES; i < rows; i += BLOCK / LANES) {
        const float* x = from.x + (row + i) * from.stride + (start - offset);
        float* to = tile + i * pitch;
        const int lane = threadIdx.x % LANES, n = from.has_vectors() ? (width + 3) / 4 : width;
        if (from.has_vectors()) {
            x += 4 * lane, to += 4 * lane;
#pragma unroll 4
            for (int k = lane; k < n; k += LANES, x += 4 * LANES, to += 4 * LANES) cp_async16(to, x);
        } else {
            x += lane, to += lane;
#pragma unroll 4
            for (int k = lane; k < n; k += LANES, x += LANES, to += LANES) *to = *x;
        }
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

// What a row has of extremes: to low and high and, by the lane that `writes`, to memory.
__device__ __forceinline__ void put_extremes(const Place& to, const Extremes& found, Mode mode,
                                             float& low, float& high, bool writes, int* nonfinite,
                                             i64 row) {
    low = found.low(), high = found.top();
    if (mode == FINITE && low > high) low = high = __uint_as_float(0x7fc00000u);  // nothing is finite
    if (!writes) return;
    store_bytes<4>(to.minima, __float_as_uint(low));
    store_bytes<4>(to.maxima, __float_as_uint(high));
    if (found.count && nonfinite) atomicAdd(nonfinite + row, found.count);
}

// One row of a range that is wider than a tile, by the whole block, piece by piece.
__device__ __forceinline__ void quantize_wide(float* tile, Extremes (&of_warps)[WARPS], Mode mode,
                                              const Rows& from, const Range& r, const Place& to,
                                              i64 row, int* nonfinite) {
    const int n = r.end - r.start, pieces = (n + PIECE - 1) / PIECE;
    const float* x = tile + from.offset(r.start);
    float low = 0.0f, high = 0.0f;
    if (mode == GIVEN && r.bits) low = *(const float*)to.minima, high = *(const float*)to.maxima;

    // Passes: 0 extremes of all values, 1 of the finite ones where some are not, 2 codes. The last
    // goes backwards, as the latest pieces are in shared memory and in L2.
    int held = -1;
#pragma unroll 1
    for (int pass = mode == GIVEN || !r.bits ? 2 : 0; pass < 3; pass++) {
        if (pass == 2 && !to.codes) return;
        Extremes found = NOTHING;
#pragma unroll 1
        for (int i = 0; i < pieces; i++) {
            const int piece = pass == 2 ? pieces - 1 - i : i;
            const int begin = r.start + piece * PIECE, end = min(begin + PIECE, r.end);
            if (piece != held) stage<BLOCK>(tile, from, begin, end, row, 1, 0);
            held = piece;
            if (pass < 2) {
                add_all(found, x, end - begin, threadIdx.x, BLOCK, pass == 1);
            } else {
                u8* codes = to.codes + (i64)piece * (PIECE / 8) * (r.bits ? r.bits : 8);
                put_codes(codes, x, end - begin, r.bits, low, high, threadIdx.x, BLOCK);
            }
        }
        if (pass == 2) return;
        found.join_lanes(WARP, pass == 1);
        __syncthreads();  // all have read what warps found before
        if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = found;
        __syncthreads();
        found = of_warps[0];
        for (int warp = 1; warp < WARPS; warp++) found.join(of_warps[warp]);
        if (pass == 0 && mode == FINITE && found.is_odd()) continue;
        put_extremes(to, found, mode, low, high, threadIdx.x == 0, nonfinite, row);
        pass = 1;  // the loop goes on with pass 2
    }
}

// Some rows of some ranges, a team of lanes to each row of a range.
template <typename RangeAt, typename PlaceAt>
__device__ __forceinline__ void quantize_tile(float* tile, Mode mode, const Rows& from, int ranges,
                                              int team, i64 row, RangeAt range_at,
                                              PlaceAt place_at, int* nonfinite) {
    const int start = range_at(0).start, end = range_at(ranges - 1).end;
    const int width = from.offset(start) + end - start;
    const int rows = (int)min((i64)(team == 1 ? WARP : WARPS), from.B - row);
    const int pitch = team == 1 ? (width + 31) / 32 * 32 + 4 : (width + 3) / 4 * 4 + 4;
    stage<WARP>(tile, from, start, end, row, rows, pitch);

    const int lane = threadIdx.x % team, groups = (rows * team + WARP - 1) / WARP;
    for (int item = threadIdx.x / WARP; item < ranges * groups; item += WARPS) {
        const Range r = range_at(item / groups);
        const int nth = item % groups * (WARP / team) + threadIdx.x % WARP / team;
        const int n = nth < rows ? r.end - r.start : 0;  // the others join the shuffles
        const float* x = tile + nth * pitch + (from.offset(start) + r.start - start);
        const Place to = place_at(r, row + nth);
        float low = 0.0f, high = 0.0f;
        if (mode == GIVEN && r.bits && n) {
            low = *(const float*)to.minima, high = *(const float*)to.maxima;
        } else if (mode != GIVEN && r.bits) {
            Extremes found = NOTHING;
            add_all(found, x, n, lane, team, false);
            found.join_lanes(team, false);
            if (mode == FINITE && found.is_odd()) {
                found = NOTHING;
                add_all(found, x, n, lane, team, true);
                found.join_lanes(team, true);
            }
            put_extremes(to, found, mode, low, high, lane == 0 && n, nonfinite, row + nth);
        }
        if (to.codes && n) put_codes(to.codes, x, n, r.bits, low, high, lane, team);
    }
}
