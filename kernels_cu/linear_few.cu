// linear_few.cu: out = x @ w.T + bias for 1 to 4 tokens and weights that are blocks, or gated pairs of
// these, in one launch: codes and tokens are multiplied as integers, by tensor cores.
//
// A warp multiplies 16 rows of w by 8 groups of 32 elements a step, 4 groups at a time: lane 4 * r + t
// has the codes of group t in rows r and r + 8, as they lie in memory. An mma, D = A B, takes 8 elements
// of each of these groups from A, which are codes, and adds up the products of all 32; but each group
// has a scale of its own. So B is zeros for the most part: of its columns 2 * t and 2 * t + 1 belong to
// group t, have the upper and the lower digit of a token where A has elements of group t, and 0 where it
// has those of others. Each column of D is a sum of one group then, and lane 4 * r + t gets the two
// columns of group t, in rows r and r + 8: those whose scales it has loaded.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/linear_few.py):
//   out               [T, O]  X_T at row stride out_stride; written, and where `accumulate` is 1
//                     also read and added to
//   x          const  [T, I]  X_T at row stride x_stride; base and rows 16-byte aligned
//   w          const  [R, W] u8  rows of planes of KIND (pykv/planes.py), 16-byte aligned; R = O, or
//                     with a gate 2 * O: gates, then what they open
//   bias       const  [R]     B_T, or null
//   norm       const  [I] float or null, 16-byte aligned: x is x / sqrt(mean(x^2) + eps) * norm, row
//                     by row
// Scalars:  gate = 0, or of gate.cuh 1 or 2
// Defines:  KIND = a kind of planes.cuh; X_T, B_T = float, f16 or bf16; TOKENS = 1, 2 or 4, at least T;
//           BLOCK = threads. From sm_80 on; below it does nothing
// Launch:   grid (up to ceil(tiles / (WARPS / parts))), tiles = ceil(R / 16), parts a power of two up to
//           WARPS and to ceil(I / 256); block (BLOCK). Dynamic shared memory: WARPS * STAGES steps of 16
//           rows' codes, 32 bytes, and 80 for each group of a token, ceil(I / 256) * 8 groups of each. It
//           may start early: before the kernel ahead has ended it reads w, bias and norm alone. Nothing
//           is __restrict__, so that every load stays on its side of the wait
// Limits:   w within 2^32 bytes
// Traffic:  R * W bytes of w once; x for each block, from L2
// Order:    x as integers of 16 bits, two digits of 8, by a power of two for each 32 elements, 2^-126 or
//           more: sums of groups are exact, then multiplied by their scales in float and added by lanes,
//           warps and parts in an order that the launch fixes: two runs agree in every bit. A token's
//           results do not depend on others
//           norm    x times norm is multiplied; the sum times the factor of the row, whose squares are
//                   summed in float; where they leave it, 0, whatever the sum is, as in norm.cu
// Stack: 32 bytes, of 4 tokens by Q6_K or Q3_K, whose halves have sums of their own
#include "gate.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "warps.cuh"
#include "weight_steps.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(TOKENS)
#error "linear_few.cu needs KIND, X_T, B_T and TOKENS"
#endif

#if __CUDA_ARCH__ >= 800
using K = KIND;
constexpr int TILE = 16;              // rows of w of a step
constexpr int STEP = GROUPS * GROUP;  // elements of each
constexpr int STAGES = 3;             // of a warp
constexpr int QUADS = 8;              // of four elements, in a group
constexpr int STEP_BYTES = TILE * GROUPS * CodesOf::BYTES;
constexpr int ZEROS_AT = WARPS * STAGES * STEP_BYTES, TOKENS_AT = ZEROS_AT + 32;  // in shared memory
static_assert(TOKENS <= 4, "a lane of each four has a token's outputs");

// A group of a token in shared memory: of four elements a word of each digit; then the power of two of
// a unit, and sums of the group, or its halves where these have scales of their own: of integers, times
// what stands for a weight of zero, or where weights have an addend as floats.
struct XGroup {
    u32 digits[2][QUADS];
    uint4 end;
};

// The rows of w of a tile, as bytes from w on.
struct Rows {
    u32 stride;
    int o0, O;
    bool has_gate;

    // Row r of 16: with a gate 8 gates, then what they open. Past the last output that one again, whose
    // sums are dropped.
    __device__ __forceinline__ u32 operator()(int r) const {
        const int row = has_gate ? min(o0 + r % 8, O - 1) + (r < 8 ? 0 : O) : min(o0 + r, O - 1);
        return row * stride;
    }
};

// Chunks of one plane that a lane copies in a step: the same of rows that are APART. place_of permutes
// these alike, and so their places differ by 512 bytes.
template <int CHUNKS> struct Plane {
    static constexpr int ROWS = TILE * CHUNKS / WARP, APART = WARP / CHUNKS;
    u32 rows[ROWS];  // where the lane's chunk of the first step lies, as bytes from w on
    int begin;       // the same from the row's begin on
    int last;        // chunk of a row, less the lane's: below 0 where the row is short
    int place;       // of the lane's chunk in shared memory

    // `plane` is where the plane begins in a row, of G groups, and becomes where the next does.
    __device__ __forceinline__ Plane(int& plane, int G, int lane)
        : begin(plane + lane % CHUNKS * 16),
          last((G * CHUNKS + GROUPS - 1) / GROUPS - 1 - lane % CHUNKS),
          place(opaque(place_of<CHUNKS>(lane / CHUNKS, lane % CHUNKS))) {
        plane += G * CHUNKS * 16 / GROUPS;
    }
    __device__ __forceinline__ void find(const Rows& rows_of, int lane) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) rows[i] = rows_of(lane / CHUNKS + i * APART) + begin;
    }
    // Past the end of a row its last chunk again. `from` may be negative: it and the sum are modulo 2^32.
    __device__ __forceinline__ void copy(u8*& to, const u8* w, int step) const {
        const u32 from = min(step * CHUNKS, last) * 16;
#pragma unroll
        for (int i = 0; i < ROWS; i++) cp_async16(to + (place + i * 512), w + (rows[i] + from));
        to += TILE * CHUNKS * 16;
    }
};
template <> struct Plane<0> {
    __device__ __forceinline__ Plane(int&, int, int) {}
    __device__ __forceinline__ void find(const Rows&, int) {}
    __device__ __forceinline__ void copy(u8*&, const u8*, int) const {}
};

// What a lane copies of a tile's codes.
struct Planes {
    Plane<WORDS> words;
    Plane<PAIRS> pairs;
    Plane<ONES> ones;

    __device__ __forceinline__ Planes(int G, int lane, int plane = 0)
        : words(plane, G, lane), pairs(plane, G, lane), ones(plane, G, lane) {}
    __device__ __forceinline__ void find(const Rows& rows, int lane) {
        words.find(rows, lane), pairs.find(rows, lane), ones.find(rows, lane);
    }
    __device__ __forceinline__ void copy(u8* to, const u8* w, int step) const {
        words.copy(to, w, step), pairs.copy(to, w, step), ones.copy(to, w, step);
    }
};

// Where the codes of group t and row r lie in a step, in bytes of each plane. Places of group t + 4 differ
// from those by one bit, also where place_of permutes, and those of row r + 8 are half a plane further.
struct Places {
    int words, pairs, ones;

    __device__ __forceinline__ Places(int r, int t)
        : words(opaque(place_of<WORDS>(r, t * WORDS / GROUPS))),
          pairs(opaque(place_of<PAIRS>(r, t / 2) + t % 2 * 8)),
          ones(opaque(place_of<ONES>(r, 0) + t * 4)) {}

    // The codes of group t + 4 * i and row r + 8 * h.
    __device__ __forceinline__ void read(CodesOf& to, const u8* codes, int i, int h) const {
        if constexpr (WORDS > 0) {
#pragma unroll
            for (int n = 0; n < CodesOf::WORDS; n += 4) {
                const u8* const from = codes + ((words ^ i * WORDS * 8 ^ n * 4) + h * WORDS * 128);
                const uint4 four = *reinterpret_cast<const uint4*>(from);
                to.words[n] = four.x, to.words[n + 1] = four.y;
                to.words[n + 2] = four.z, to.words[n + 3] = four.w;
            }
        }
        codes += TILE * WORDS * 16;
        if constexpr (PAIRS > 0) {
            const u8* const from = codes + ((pairs ^ i * PAIRS * 8) + h * PAIRS * 128);
            const uint2 two = *reinterpret_cast<const uint2*>(from);
            to.pairs[0] = two.x, to.pairs[1] = two.y;
        }
        codes += TILE * PAIRS * 16;
        if constexpr (ONES > 0) {
            to.ones = *reinterpret_cast<const u32*>(codes + ((ones ^ i * ONES * 8) + h * ONES * 128));
        }
    }
};

// The scales of a lane's groups of a step, of rows r and r + 8; past the edge those of the last group.
struct Scales {
    static constexpr int RAWS = K::SPAN == GROUPS ? 1 : GROUPS / 4;
    typename K::Raw raws[RAWS][2];

    __device__ __forceinline__ void load(const u8* const (&scales)[2], int step, int t, int G) {
#pragma unroll
        for (int i = 0; i < RAWS; i++) {
            const int g = RAWS == 1 ? step * GROUPS : min(step * GROUPS + i * 4 + t, G - 1);
#pragma unroll
            for (int h = 0; h < 2; h++) raws[i][h] = K::load(scales[h], g, G);
        }
    }
};

// Four elements of a token, as eight lanes have them that share a group, to place `quad` of it.
__device__ __forceinline__ void put(XGroup& to, int quad, const float (&values)[4]) {
    constexpr float TOP = 32512.0f;  // 2^15 - 2^8
    u32 largest[1] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        largest[0] = max(largest[0], __float_as_uint(values[j]) & 0x7fffffffu);
    }
    group_max<QUADS>(largest);
    // The exponent leaves the upper digit below 128; the largest floats have 255. Beside an infinity or
    // NaN all else is 0, and it makes itself the unit.
    const bool is_finite = largest[0] < 0x7f800000u;
    const u32 exponent = max(largest[0] + 0x20000u >> 23, 15u);
    const float up = __uint_as_float(is_finite ? 268u - exponent << 23 : 0x200u);
    const float unit = __uint_as_float(is_finite ? exponent - 14 << 23 : largest[0]);
    u32 shifted[4];  // the lower digits without a sign
    int sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int value = (int)rintf(fminf(fmaxf(values[j] * up, -TOP), TOP));
        shifted[j] = (u32)value + 0x80u;
        sum += value;
    }
    const u32 low = __byte_perm(shifted[0], shifted[1], 0x5140);
    const u32 next = __byte_perm(shifted[2], shifted[3], 0x5140);
    to.digits[0][quad] = __byte_perm(low, next, 0x7632);
    to.digits[1][quad] = __byte_perm(low, next, 0x5410) ^ 0x80808080u;
    constexpr int RUN = QUADS / K::HALVES;
#pragma unroll
    for (int i = 1; i < RUN; i *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, i);
    const int upper = __shfl_down_sync(FULL_MASK, sum, QUADS / 2);
    const auto kept = [&](int of_half) {
        return K::HAS_ADDEND ? __float_as_uint(unit * (float)of_half) : (u32)(-K::ZERO * of_half);
    };
    if (quad == 0) to.end = uint4{__float_as_uint(unit), kept(sum), kept(upper), 0};
}

// Tokens to shared memory, times norm if there is one, zeros past I; a thread's squares of them.
__device__ __forceinline__ void stage(XGroup* to, float (&squares)[TOKENS], const X_T* x, i64 x_stride,
                                      const float* norm, int T, int I, int steps) {
    constexpr int TURN = BLOCK * 4, AT_ONCE = 4 / TOKENS;  // elements; turns that are loaded together
#pragma unroll 1
    for (int first = threadIdx.x * 4; first < steps * STEP; first += TURN * AT_ONCE) {
        float values[AT_ONCE][TOKENS][4], factors[AT_ONCE][4];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const int i = min(first + n * TURN, I - 4);
            if (norm) load4(factors[n], norm + i);
#pragma unroll
            for (int k = 0; k < TOKENS; k++) load4(values[n][k], x + min(k, T - 1) * x_stride + i);
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const int at = first + n * TURN;
            if (at >= steps * STEP) break;
#pragma unroll
            for (int k = 0; k < TOKENS; k++) {
                float of_token[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    of_token[j] = at < I ? values[n][k][j] : 0.0f;
                    if (norm) {
                        const float nothing = of_token[j] * 0.0f;  // NaN of infinities
                        squares[k] = fmaf(of_token[j], of_token[j], squares[k] + nothing);
                        of_token[j] *= factors[n][j];
                    }
                }
                put(to[k * steps * GROUPS + at / GROUP], at % GROUP / 4, of_token);
            }
        }
    }
}

// What a lane reads of tokens, in bytes of shared memory: of B the digits of its column where that has
// group t, and zeros elsewhere.
struct Columns {
    int own;     // group t
    int digits;  // of the column, or 32 bytes of zeros
    int stride;  // from a group's digits to the next group's, or 0

    static __device__ __forceinline__ void load(u32 (&to)[QUADS], const u8* from) {
#pragma unroll
        for (int i = 0; i < QUADS; i += 4) {
            const uint4 four = reinterpret_cast<const uint4*>(from)[i / 4];
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    }
};

// sums[k][h] += the products of a lane's groups of a step, of token k and row r + 8 * h.
__device__ __forceinline__ void multiply(float (&sums)[TOKENS][2], const u8* shared, int codes,
                                         const Places& places, const Scales& scales,
                                         const Columns& columns, int groups, int step, int t) {
    constexpr int RUN = QUADS / K::HALVES;
#pragma unroll
    for (int i = 0; i < GROUPS / 4; i++) {
        u32 quads[QUADS][2];
        float d[2][K::HALVES], m[2][K::HALVES];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            CodesOf own;
            places.read(own, shared + codes, i, h);
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                quads[k][h] = quad<K>(own.word(k / 4, k % 4), own.pairs[k / 4], own.ones, k / 4, k % 4);
            }
            K::decode(d[h], m[h], scales.raws[i % Scales::RAWS][h], i * 4 + t);
        }
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            const int group = token * groups + step * GROUPS + i * 4;
            u32 digits[QUADS];
            Columns::load(digits, shared + (columns.digits + group * columns.stride));
            const u8* const own = shared + (columns.own + group * (int)sizeof(XGroup));
            const uint4 end = reinterpret_cast<const XGroup*>(own)->end;
            const float unit = __uint_as_float(end.x);
#pragma unroll
            for (int half = 0; half < K::HALVES; half++) {
                const u32 sum = half ? end.z : end.y;
                const int zero = K::HAS_ADDEND ? 0 : (int)sum;
                int dots[4] = {0, zero, 0, zero};
#pragma unroll
                for (int k = half * RUN; k < (half + 1) * RUN; k += 2) {
                    mma_m16n8k32_u8_s8(
                        dots, {quads[k][0], quads[k][1], quads[k + 1][0], quads[k + 1][1]},
                        {digits[k], digits[k + 1]});
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float dot = (float)(dots[2 * h] * 256 + dots[2 * h + 1]);
                    sums[token][h] = fmaf(d[h][half] * unit, dot, sums[token][h]);
                    if (K::HAS_ADDEND) {
                        sums[token][h] = fmaf(m[h][half], __uint_as_float(sum), sums[token][h]);
                    }
                }
            }
        }
    }
}

// What warps tell each other; sums of a tile stay while those of the next come.
struct Told { float sums[2][WARPS][TOKENS][TILE], squares[WARPS][TOKENS]; };

// A step of a tile. Warps that share a tile take steps in turn.
struct Place {
    int tile, step;
    __device__ __forceinline__ void advance(int part, int parts, int steps, int tiles) {
        step += parts;
        if (step >= steps) step = part, tile += tiles;
    }
};
#endif

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
linear_few(X_T* out, const X_T* x, const u8* w, const B_T* bias, const float* norm, int T, int O, int I,
           i64 w_stride, i64 x_stride, i64 out_stride, int parts, int accumulate, int gate, float eps) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) u8 shared[];
    __shared__ Told told;
    let_next_start();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, r = lane / 4, t = lane % 4;
    const int part = warp % parts, outputs = gate ? TILE / 2 : TILE, steps = (I + STEP - 1) / STEP;
    const int tiles = WARPS / parts;  // of a block at a time
    const int end = ((O + outputs - 1) / outputs + tiles - 1) / tiles * tiles;
    const int first_codes = opaque(warp * STAGES * STEP_BYTES);  // the warp's ring, in shared memory
    const int last_codes = first_codes + (STAGES - 1) * STEP_BYTES;
    XGroup* const tokens = reinterpret_cast<XGroup*>(shared + TOKENS_AT);
    const auto rows_of = [&](int tile) {
        return Rows{(u32)w_stride, min(tile * outputs, O - 1), O, gate != 0};
    };
    const int G = I / GROUP;
    Place now{(int)blockIdx.x * tiles + warp / parts, part}, ahead = now;
    int slot = first_codes;  // of the ring, of the place ahead
    Planes planes(G, lane);
    const auto copy_next = [&] {
        if (ahead.tile < end) {
            if (ahead.step == part) planes.find(rows_of(ahead.tile), lane);
            planes.copy(shared + slot, w, ahead.step);
            ahead.advance(part, parts, steps, gridDim.x * tiles);
        }
        slot = slot == last_codes ? first_codes : slot + STEP_BYTES;
        cp_async_commit();
    };
    const u8* scales_of[2];  // of rows r and r + 8
    const auto find_scales = [&](int tile) {
        const Rows rows = rows_of(tile);
#pragma unroll
        for (int h = 0; h < 2; h++) scales_of[h] = w + rows(r + h * 8) + (i64)G * CodesOf::BYTES;
    };

    if (norm && threadIdx.x * 32 < I) prefetch_l2(norm + threadIdx.x * 32);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy_next();
    Scales next;
    find_scales(now.tile);
    next.load(scales_of, now.step, t, G);
    if (threadIdx.x < 2) reinterpret_cast<uint4*>(shared + ZEROS_AT)[threadIdx.x] = uint4{};
    await_previous();
    float squares[TOKENS] = {}, sums[TOKENS][2] = {}, addends[2] = {}, there[2] = {}, factor = 1.0f;
    stage(tokens, squares, x, x_stride, norm, T, I, steps);
    __syncthreads();

    // Column r of B is of group r / 2 and digit r % 2.
    const bool has_column = r / 2 == t;
    const int own = TOKENS_AT + t * (int)sizeof(XGroup);
    const Columns columns = {opaque(own), opaque(has_column ? own + r % 2 * QUADS * 4 : ZEROS_AT),
                             opaque(has_column ? (int)sizeof(XGroup) : 0)};
    // A lane's outputs are o and o + 8 of token t, with a gate o alone.
    const bool has_token = part == 0 && t < TOKENS && t < T;
    const auto begin = [&] {
        const int o = now.tile * outputs + r;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (bias && o + (gate ? 0 : h * 8) < O) addends[h] = to_float(bias[o + h * (gate ? O : 8)]);
            if (!accumulate || !has_token || o + h * 8 >= O) continue;
            if (h == 0 || !gate) there[h] = to_float(out[t * out_stride + o + h * 8]);
        }
    };
    int parity = 0;
    const auto finish = [&](bool is_first) {
#pragma unroll
        for (int k = 0; k < TOKENS; k++) {
#pragma unroll
            for (int h = 0; h < 2; h++) sums[k][h] = group_sum<4>(sums[k][h]);
            if (parts > 1 && t == 0) {
                told.sums[parity][warp][k][r] = sums[k][0];
                told.sums[parity][warp][k][r + 8] = sums[k][1];
            }
        }
        const bool has_squares = norm && is_first;
        if (has_squares) {
#pragma unroll
            for (int k = 0; k < TOKENS; k++) {
                const float total = group_sum<WARP>(squares[k]);
                if (lane == 0) told.squares[warp][k] = total;
            }
        }
        if (has_squares || parts > 1) __syncthreads();
        if (has_squares) {
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) total += told.squares[i][t % TOKENS];
            factor = 1.0f / sqrtf(total / (float)I + eps);
        }
        float two[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            two[h] = sums[0][h];
#pragma unroll
            for (int k = 1; k < TOKENS; k++) two[h] = t == k ? sums[k][h] : two[h];
            if (parts > 1) {
                two[h] = 0.0f;
                const auto* const of_part = told.sums[parity] + (warp - part);
#pragma unroll 1
                for (int p = 0; p < parts; p += 2) {  // of a power of two
                    const float next = of_part[p + 1][t % TOKENS][r + h * 8];
                    two[h] += of_part[p][t % TOKENS][r + h * 8], two[h] += next;
                }
            }
            // The factor is 0 if squares of the token left float; the sum may have left it, too.
            two[h] = (factor == 0.0f ? 0.0f : two[h] * factor) + addends[h];
        }
        parity ^= 1;
        if (gate) two[0] = gated(gate, two[0], two[1]);
        const int o = now.tile * outputs + r;
        X_T* const to = out + t * out_stride + o;
        if (has_token && o < O) to[0] = from_float<X_T>(two[0] + there[0]);
        if (has_token && !gate && o + 8 < O) to[8] = from_float<X_T>(two[1] + there[1]);
#pragma unroll
        for (int k = 0; k < TOKENS; k++) sums[k][0] = sums[k][1] = 0.0f;
    };

    bool is_first = true;
    const Places places(r, t);
    int codes = first_codes;
#pragma unroll 1
    while (now.tile < end) {
        if (now.step == part) begin();
        cp_async_wait<STAGES - 2>();
        __syncwarp();  // copies of all lanes are there, and all have read what the next ones replace
        copy_next();
        const Scales scales = next;
        Place after = now;
        after.advance(part, parts, steps, gridDim.x * tiles);
        const bool is_last = after.tile != now.tile;
        if (after.tile < end) {
            if (is_last) find_scales(after.tile);
            next.load(scales_of, after.step, t, G);
        }
        multiply(sums, shared, codes, places, scales, columns, steps * GROUPS, now.step, t);
        codes = codes == last_codes ? first_codes : codes + STEP_BYTES;
        if (is_last) finish(is_first), is_first = false;
        now = after;
    }
#endif
}
