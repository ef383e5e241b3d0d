// kvtc_codes.cuh: rows of ranges of coefficients to codes and back, bit for bit as the NumPy
// references of pykv/ops/kvtc_quantize.py, which has the formulas.
//
// A block holds a tile in shared memory: some rows of some ranges. Teams of lanes find the extremes
// of a row of a range and make its codes: a lane up to 16 columns, 8 lanes up to 128, a warp up to
// MEDIUM. Beyond, the block is the team, and takes pieces of up to PIECE columns, which it reads a
// second time, from L2, where there are several and extremes are asked for.
// Defines: BLOCK = threads; SMALL, MEDIUM = columns of tiles of single lanes and of larger teams;
//          PIECE, a multiple of 32
// Shared memory: floats for the widest tile of the launch: 32 * 132 for small ones, BLOCK / 32 *
//          (MEDIUM + 8) for medium ones, the widest range or PIECE and 8 for wide ones
#include "convert.cuh"
#include "quotient.cuh"

#if !defined(BLOCK) || !defined(SMALL) || !defined(MEDIUM) || !defined(PIECE)
#error "kvtc_codes.cuh needs BLOCK, SMALL, MEDIUM and PIECE"
#endif
constexpr int WARPS = BLOCK / WARP;
constexpr int CTAS = 640 / BLOCK;  // blocks that an SM holds
constexpr float LARGEST_FLOAT = 3.402823466e38f;
static_assert(BLOCK % WARP == 0 && SMALL + 3 <= 128 && PIECE % 32 == 0, "tiles fit");

struct alignas(16) Range { int start, end, bits, int_bits, index, before, row_bytes, unused; };

// Where a row of a range lies; null where there is no such thing.
struct Place { u8 *codes, *minima, *maxima; };

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

__device__ __forceinline__ void store_float(u8* at, float x) {
    const u32 word = __float_as_uint(x);
    if ((u64)at % 4 == 0) {
        *(u32*)at = word;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) at[i] = (u8)(word >> 8 * i);
    }
}

// Up to four bytes as loads leave them: a word, or each in a register of its own, so that nothing
// waits for the first before the last is on its way.
template <bool WORD> struct Bytes {
    u32 parts[WORD ? 1 : 4];
    __device__ void load(const u8* at, int n) {
        if constexpr (WORD) {
            parts[0] = *(const u32*)at;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) parts[i] = i < n ? at[i] : 0;
        }
    }
    __device__ u32 word() const {
        if constexpr (WORD) return parts[0];
        else return parts[0] | parts[1] << 8 | parts[2] << 16 | parts[3] << 24;
    }
};

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
    __device__ void join(const Extremes& other) {
        negated = fmaxf(negated, other.negated);
        high = fmaxf(high, other.high);
        odd += other.odd;
        count += other.count;
    }
    __device__ void join_lanes(int lanes) {
        for (int step = lanes / 2; step > 0; step /= 2) {
            join({__shfl_xor_sync(FULL_MASK, negated, step), __shfl_xor_sync(FULL_MASK, high, step),
                  __shfl_xor_sync(FULL_MASK, odd, step), __shfl_xor_sync(FULL_MASK, count, step)});
        }
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
#pragma unroll 2
    for (int i = lane; i < vectors; i += lanes) {
        const float4 four = ((const float4*)x)[i];
        to.add(four.x), to.add(four.y), to.add(four.z), to.add(four.w);
    }
    for (int i = vectors * 4 + lane; i < n; i += lanes) to.add(x[i]);
}

__device__ __forceinline__ float interval(float low, float high) {
    const float width = high - low;
    return width < 1e-10f ? 1.0f : width;
}

// --- Codes ---------------------------------------------------------------------------------------

struct Fp8 {
    __device__ u32 operator()(float x) const { return two_codes(x, 0.0f, e4m3{}) & 0xffu; }
};

// Codes between two extremes. The difference to the lower one is clamped before it is divided, which
// leaves the same codes, and quotients that decide about one are not small. Widths whose inverse
// is subnormal are scaled; of one that is no number, or infinite, all codes are 0.
struct Steps {
    float scale, offset, width, inverse, last;
    __device__ Steps(float low, float high, int bits) : last((float)((1 << bits) - 1)) {
        const float unscaled = interval(low, high);
        const bool is_finite = unscaled <= LARGEST_FLOAT;
        scale = unscaled <= 4e37f ? 1.0f : 0.25f;
        offset = is_finite ? -low * scale : -INF;
        width = is_finite ? unscaled * scale : 1.0f;
        inverse = 1.0f / width;
    }
    __device__ u32 operator()(float x) const {
        const float above = fminf(fmaxf(__fmaf_rn(x, scale, offset), 0.0f), width);  // NaN gives 0
        const float t = __fmul_rn(quotient(above, width, inverse), last);
        return (u32)(t + 0.49999997f);  // halves go up: the largest float below a half rounds so
    }
};

// The codes, 2^LOG bits each, of n floats in shared memory to the bytes from `to` on, by
// neighbouring lanes of a warp or a block. A lane makes words of four bytes, from four floats at a
// time; each begins with another four of its word, so that lanes read from different banks.
template <int LOG, typename Code>
__device__ __forceinline__ void pack(u8* to, const float* x, int n, int lane, int lanes,
                                     Code code) {
    constexpr int BITS = 1 << LOG, FOURS = 8 / BITS;
    const int bytes = (n * BITS + 7) / 8, turn = lane % 8 * FOURS / 8;
    const bool has_vectors = (u64)x % 16 == 0;
    for (int at = 4 * lane; at < bytes; at += 4 * lanes) {
        u32 word = 0;
#pragma unroll 2  // eight divisions at once
        for (int i = 0; i < FOURS; i++) {
            const int nth = (i + turn) % FOURS, column = at * (8 / BITS) + 4 * nth;
            u32 codes = 0;
            if (has_vectors && column + 4 <= n) {
                const float4 four = *(const float4*)(x + column);
                codes = code(four.x) | code(four.y) << BITS | code(four.z) << 2 * BITS |
                        code(four.w) << 3 * BITS;
            } else {
#pragma unroll 1
                for (int k = 0; k < 4 && column + k < n; k++) codes |= code(x[column + k]) << k * BITS;
            }
            word |= codes << nth * (4 * BITS);
        }
        u8* const first = to + at;
        if (at + 4 <= bytes && (u64)first % 4 == 0) {
            *(u32*)first = word;
        } else if (at + 4 <= bytes && (u64)first % 2 == 0) {
            ((u16*)first)[0] = (u16)word, ((u16*)first)[1] = (u16)(word >> 16);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (at + i < bytes) first[i] = (u8)(word >> 8 * i);
            }
        }
    }
}

__device__ __forceinline__ void put_codes(u8* to, const float* x, int n, int bits, float low,
                                          float high, int lane, int lanes) {
    if (bits == 0) return pack<3>(to, x, n, lane, lanes, Fp8{});
    const Steps steps(low, high, bits);
    if (bits == 1) pack<0>(to, x, n, lane, lanes, steps);
    else if (bits == 2) pack<1>(to, x, n, lane, lanes, steps);
    else if (bits == 4) pack<2>(to, x, n, lane, lanes, steps);
    else pack<3>(to, x, n, lane, lanes, steps);
}

// --- Quantize ------------------------------------------------------------------------------------

// What becomes of extremes.
enum Mode { GIVEN, ALL, FINITE };  // range is read; is that of all values; of the finite ones

// Columns start .. end - 1 of `rows` rows to shared memory, `pitch` floats a row, and a barrier.
__device__ __forceinline__ void stage(float* tile, const Rows& from, int start, int end, i64 row,
                                      int rows, int pitch) {
    __syncthreads();  // all have read what was there
    const int offset = from.offset(start), width = offset + end - start;
    const int lanes = rows == 1 ? BLOCK : WARP;
    for (int i = threadIdx.x / lanes; i < rows; i += BLOCK / lanes) {
        const float* x = from.x + (row + i) * from.stride + (start - offset);
        float* to = tile + i * pitch;
        if (from.has_vectors()) {
            for (int k = threadIdx.x % lanes * 4; k < width; k += lanes * 4) {
                cp_async16(to + k, x + k);
            }
        } else {
            for (int k = threadIdx.x % lanes; k < width; k += lanes) to[k] = x[k];
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
    store_float(to.minima, low);
    store_float(to.maxima, high);
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
            if (piece != held) stage(tile, from, begin, end, row, 1, 0);
            held = piece;
            if (pass < 2) {
                add_all(found, x, end - begin, threadIdx.x, BLOCK, pass == 1);
            } else {
                u8* codes = to.codes + (i64)piece * (PIECE / 8) * (r.bits ? r.bits : 8);
                put_codes(codes, x, end - begin, r.bits, low, high, threadIdx.x, BLOCK);
            }
        }
        if (pass == 2) return;
        found.join_lanes(WARP);
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
    stage(tile, from, start, end, row, rows, pitch);

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
            found.join_lanes(team);
            if (mode == FINITE && __any_sync(FULL_MASK, found.is_odd())) {
                found = NOTHING;
                add_all(found, x, n, lane, team, true);
                found.join_lanes(team);
            }
            put_extremes(to, found, mode, low, high, lane == 0 && n, nonfinite, row + nth);
        }
        if (to.codes && n) put_codes(to.codes, x, n, r.bits, low, high, lane, team);
    }
}

// --- Dequantize ----------------------------------------------------------------------------------

// COUNT neighbouring columns of some rows, all of range r; `from` is where the first row lies. WORD:
// codes of each row are an aligned word; FLOATS: extremes are. Bytes that are put together at once
// would have each row wait for memory before the next one's loads begin.
template <int COUNT, bool WORD, bool FLOATS>
__device__ __forceinline__ void dequantize_columns(float* out, i64 stride, Place from,
                                                   const Range& r, int column, int rows) {
    constexpr int AT_ONCE = FLOATS ? 4 : 2;  // rows whose loads are on their way together
    const int bits = r.bits ? r.bits : 8, bit = (column - r.start) * bits, shift = bit % 8;
    const int bytes = (shift + COUNT * bits + 7) / 8;
    const u32 last = (1u << bits) - 1;
    const float steps = (float)last, inverse = 1.0f / steps;
#pragma unroll 1
    for (int first = 0; first < rows; first += AT_ONCE) {
        Bytes<WORD> codes[AT_ONCE];
        Bytes<FLOATS> minima[AT_ONCE], maxima[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const i64 row = min(first + i, rows - 1);
            codes[i].load(from.codes + row * r.row_bytes + bit / 8, bytes);
            if (r.bits) minima[i].load(from.minima + 4 * row, 4);
            if (r.bits) maxima[i].load(from.maxima + 4 * row, 4);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i == rows) return;
            const u32 word = codes[i].word() >> shift;
            float y[COUNT];
            if (r.bits) {
                const float low = __uint_as_float(minima[i].word());
                const float width = interval(low, __uint_as_float(maxima[i].word()));
#pragma unroll
                for (int k = 0; k < COUNT; k++) {
                    const float all = __fmul_rn((float)(word >> k * bits & last), width);
                    const bool is_finite = all <= LARGEST_FLOAT;  // else it stays as it is
                    y[k] = (is_finite ? quotient(all, steps, inverse) : all) + low;
                }
            } else {
#pragma unroll
                for (int k = 0; k < COUNT; k++) y[k] = to_float(e4m3{(u8)(word >> 8 * k)});
            }
            float* to = out + (first + i) * stride + column;
            if constexpr (COUNT == 4) *(float4*)to = make_float4(y[0], y[1], y[2], y[3]);
            else *to = y[0];
        }
    }
}

// Four columns a thread, as far as they are in start .. end - 1, of some rows a block.
template <typename RangeAt, typename PlaceAt>
__device__ __forceinline__ void dequantize(float* out, i64 stride, int B, int C, int start, int end,
                                           int rows, int column_blocks, RangeAt range_at,
                                           PlaceAt place_at) {
    const int block = (int)(blockIdx.x % column_blocks);
    const i64 row = (i64)(blockIdx.x / column_blocks) * rows;
    const int column = start / 4 * 4 + (block * BLOCK + threadIdx.x) * 4;
    const int from = max(column, start), to = min(column + 4, end);
    if (from >= to) return;
    rows = (int)min((i64)rows, B - row);
    out += row * stride;
    Range r = range_at(from);
    if (to - from == 4 && to <= r.end && stride % 4 == 0 && C % 4 == 0) {
        const Place place = place_at(r, row);
        const bool floats = r.bits == 0 || ((u64)place.minima | (u64)place.maxima) % 4 == 0;
        const u64 first = (u64)place.codes + (column - r.start);
        const bool word = r.bits % 8 == 0 && (first | r.row_bytes) % 4 == 0;
        if (word && floats) dequantize_columns<4, true, true>(out, stride, place, r, column, rows);
        else if (floats) dequantize_columns<4, false, true>(out, stride, place, r, column, rows);
        else dequantize_columns<4, false, false>(out, stride, place, r, column, rows);
        return;
    }
    for (int c = from; c < to; c++) {
        if (c >= r.end) r = range_at(c);
        dequantize_columns<1, false, false>(out, stride, place_at(r, row), r, c, rows);
    }
}
