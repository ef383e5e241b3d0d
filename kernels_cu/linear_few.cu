// linear_few.cu: out = x @ w.T + bias for 1 to 4 tokens and weights that are blocks, or gated pairs of
// these, in one launch: codes and tokens are multiplied as integers, by tensor cores.
//
// A warp multiplies 16 rows of w by 8 groups of 32 elements a step, 4 groups at a time: lane 4 * r + t
// has the codes of group t in rows r and r + 8, as they lie in memory. Of an mma, whose sums are over
// the elements of all four groups, column 2 * t + d of B holds digit d of a token where group t has its
// elements, and 0 elsewhere: so each column is a sum of one group, and a lane gets those of its own.
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
//           rows' codes, and 80 bytes for each group of a token, ceil(I / 256) * 8 groups of each. It
//           may start early: before the kernel ahead has ended it reads w, bias and norm alone. Nothing
//           is __restrict__, so that every load stays on its side of the wait
// Traffic:  R * W bytes of w once; x for each block, from L2
// Order:    x as integers of 16 bits, by a power of two for each 32 elements: sums of groups are exact,
//           then multiplied by their scales in float and added by lanes, warps and parts in an order that
//           the launch fixes: two runs agree in every bit. A token's results do not depend on others
//           norm    x times norm is multiplied; the sum times the factor of the row, whose squares are
//                   summed in float; where they leave it, 0, whatever the sum is, as in norm.cu
#include "gate.cuh"
#include "planes.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "warps.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(TOKENS)
#error "linear_few.cu needs KIND, X_T, B_T and TOKENS"
#endif

#if __CUDA_ARCH__ >= 800
using K = KIND;
using CodesOf = Codes<K::BITS>;
constexpr int TILE = 16, GROUPS = 8;  // rows of w, and groups of each, of a step
constexpr int STEP = GROUPS * GROUP;  // elements
constexpr int STAGES = 3;             // of a warp
constexpr int QUADS = 8;              // of four elements, in a group
constexpr int STEP_BYTES = TILE * GROUPS * CodesOf::BYTES;
static_assert(TOKENS <= 4, "a lane of each four has a token's outputs");

// A group of a token in shared memory: of four elements a word of each digit; then the power of two of
// a unit, and sums of the group, or its halves where these have scales of their own: of integers, times
// what stands for a weight of zero, or where weights have an addend as floats.
struct XGroup {
    u32 digits[2][QUADS];
    uint4 end;
};

// Where a chunk of 16 bytes of a plane lies, CHUNKS of a row in a step, so that what a warp reads
// together, 32 codes of each of 8 rows and 4 groups, lies in different banks.
template <int CHUNKS> __device__ __forceinline__ int place_of(int row, int chunk) {
    constexpr int ROW = CHUNKS >= 8 ? 1 : CHUNKS == 4 ? 2 : 4;
    constexpr int BIT = CHUNKS == 8 ? 4 : CHUNKS == 4 ? 2 : 1;
    return (row * CHUNKS + (chunk ^ (row & ROW ? BIT : 0))) * 16;
}

// A warp's rows of w.
struct Rows {
    static constexpr int WORDS = CodesOf::WORDS / 4 * GROUPS, PAIRS = CodesOf::HAS_PAIRS * GROUPS / 2;
    static constexpr int ONES = CodesOf::HAS_ONES * GROUPS / 4;  // chunks of a row

    const u8* first;
    i64 stride, opened;  // bytes from a row to the next, and from a gate to what it opens, or 0
    int last, G;         // how many outputs follow the first; groups of a row

    // Row r of 16: with a gate 8 gates, then what they open. Past the last output that one again, whose
    // sums are dropped.
    __device__ __forceinline__ const u8* row(int r) const {
        if (opened) return first + min(r % 8, last) * stride + (r < 8 ? 0 : opened);
        return first + min(r, last) * stride;
    }

    template <int CHUNKS> __device__ __forceinline__ void copy_plane(u8*& to, int& plane, int step,
                                                                     int lane) const {
        if constexpr (CHUNKS > 0) {
            const int chunk = lane % CHUNKS;
            const int end = (G * CHUNKS + GROUPS - 1) / GROUPS - 1;  // past the end that one again
            const int from = plane + min(step * CHUNKS + chunk, end) * 16;
#pragma unroll
            for (int r = lane / CHUNKS; r < TILE; r += WARP / CHUNKS) {
                cp_async16(to + place_of<CHUNKS>(r, chunk), row(r) + from);
            }
            to += TILE * CHUNKS * 16, plane += G * CHUNKS * 16 / GROUPS;
        }
    }
    __device__ __forceinline__ void copy(u8* to, int step, int lane) const {
        int plane = 0;
        copy_plane<WORDS>(to, plane, step, lane);
        copy_plane<PAIRS>(to, plane, step, lane);
        copy_plane<ONES>(to, plane, step, lane);
    }
    // The codes of group g of a step, of row r.
    static __device__ __forceinline__ void read(CodesOf& to, const u8* codes, int r, int g) {
#pragma unroll
        for (int i = 0; i < CodesOf::WORDS; i += 4) {
            const u8* const at = codes + place_of<WORDS>(r, (g * CodesOf::WORDS + i) / 4);
            const uint4 four = *reinterpret_cast<const uint4*>(at);
            to.words[i] = four.x, to.words[i + 1] = four.y;
            to.words[i + 2] = four.z, to.words[i + 3] = four.w;
        }
        codes += TILE * WORDS * 16;
        if constexpr (PAIRS > 0) {
            const u8* const at = codes + place_of<PAIRS>(r, g / 2) + g % 2 * 8;
            const uint2 two = *reinterpret_cast<const uint2*>(at);
            to.pairs[0] = two.x, to.pairs[1] = two.y;
        }
        codes += TILE * PAIRS * 16;
        if constexpr (ONES > 0) {
            to.ones = *reinterpret_cast<const u32*>(codes + place_of<ONES>(r, g / 4) + g % 4 * 4);
        }
    }
    // The scales of a lane's groups of a step, of rows r and r + 8; past the edge those of the last group.
    __device__ __forceinline__ void load(typename K::Raw (&raws)[GROUPS / 4][2], int step, int r,
                                         int t) const {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u8* const scales = row(r + h * 8) + (i64)G * CodesOf::BYTES;
#pragma unroll
            for (int i = 0; i < GROUPS / 4; i++) {
                raws[i][h] = K::load(scales, min(step * GROUPS + i * 4 + t, G - 1), G);
            }
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

// What a lane reads of tokens: of B the digits of its column where it has the group's elements.
struct Columns {
    const XGroup* own;  // those of group t
    const u32* digits;  // of the column, or zeros
    int stride;         // words from a group's digits to the next group's, or 0
    int groups;         // of a token

    __device__ __forceinline__ void read(u32 (&to)[QUADS], int group, int token) const {
        const u32* const from = digits + (token * groups + group) * stride;
#pragma unroll
        for (int i = 0; i < QUADS; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(from + (stride ? i : 0));
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    }
};

// sums[k][h] += the products of a lane's groups of a step, of token k and row r + 8 * h.
__device__ __forceinline__ void multiply(float (&sums)[TOKENS][2], const u8* codes,
                                         const typename K::Raw (&raws)[GROUPS / 4][2],
                                         const Columns& columns, int step, int r, int t) {
    constexpr int RUN = QUADS / K::HALVES;
#pragma unroll
    for (int i = 0; i < GROUPS / 4; i++) {
        u32 quads[QUADS][2];
        float d[2][K::HALVES], m[2][K::HALVES];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            CodesOf own;
            Rows::read(own, codes, r + h * 8, i * 4 + t);
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                quads[k][h] = quad<K>(own.word(k / 4, k % 4), own.pairs[k / 4], own.ones, k / 4, k % 4);
            }
            K::decode(d[h], m[h], raws[i][h], i * 4 + t);
        }
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            const int group = step * GROUPS + i * 4;
            u32 digits[QUADS];
            columns.read(digits, group, token);
            const uint4 end = columns.own[token * columns.groups + group].end;
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
    __shared__ uint4 nothing;
    let_next_start();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, r = lane / 4, t = lane % 4;
    const int part = warp % parts, outputs = gate ? TILE / 2 : TILE, steps = (I + STEP - 1) / STEP;
    const int tiles = WARPS / parts;  // of a block at a time
    const int end = ((O + outputs - 1) / outputs + tiles - 1) / tiles * tiles;
    u8* const ring = shared + warp * (STAGES * STEP_BYTES);
    XGroup* const tokens = reinterpret_cast<XGroup*>(shared + WARPS * STAGES * STEP_BYTES);
    const auto rows_of = [&](int tile) {
        const int o0 = min(tile * outputs, O - 1);
        return Rows{w + o0 * w_stride, w_stride, gate ? O * w_stride : 0, O - 1 - o0, I / GROUP};
    };
    Place now{(int)blockIdx.x * tiles + warp / parts, part}, ahead = now;
    int slot = 0;  // of the ring, of the place ahead
    const auto copy_next = [&] {
        if (ahead.tile < end) {
            rows_of(ahead.tile).copy(ring + slot * STEP_BYTES, ahead.step, lane);
            ahead.advance(part, parts, steps, gridDim.x * tiles);
        }
        if (++slot == STAGES) slot = 0;
        cp_async_commit();
    };

    if (norm && threadIdx.x * 32 < I) prefetch_l2(norm + threadIdx.x * 32);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy_next();
    typename K::Raw next[GROUPS / 4][2];
    rows_of(now.tile).load(next, now.step, r, t);
    if (threadIdx.x == 0) nothing = uint4{};
    await_previous();
    float squares[TOKENS] = {}, sums[TOKENS][2] = {}, addends[2] = {}, there[2] = {}, factor = 1.0f;
    stage(tokens, squares, x, x_stride, norm, T, I, steps);
    __syncthreads();

    // Column lane / 4 of B is of group r / 2 and digit r % 2.
    const u32* const digits = r / 2 == t ? tokens[t].digits[r % 2] : reinterpret_cast<u32*>(&nothing);
    const Columns columns = {tokens + t, digits, r / 2 == t ? (int)sizeof(XGroup) / 4 : 0,
                             steps * GROUPS};
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
#pragma unroll 1
                for (int p = 0; p < parts; p++) {
                    two[h] += told.sums[parity][warp - part + p][t % TOKENS][r + h * 8];
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
    int read = 0;  // slot of the ring
#pragma unroll 1
    while (now.tile < end) {
        if (now.step == part) begin();
        cp_async_wait<STAGES - 2>();
        __syncwarp();  // copies of all lanes are there, and all have read what the next ones replace
        copy_next();
        typename K::Raw raws[GROUPS / 4][2];
#pragma unroll
        for (int i = 0; i < GROUPS / 4; i++) raws[i][0] = next[i][0], raws[i][1] = next[i][1];
        Place after = now;
        after.advance(part, parts, steps, gridDim.x * tiles);
        if (after.tile < end) rows_of(after.tile).load(next, after.step, r, t);
        multiply(sums, ring + read * STEP_BYTES, raws, columns, now.step, r, t);
        if (++read == STAGES) read = 0;
        if (after.tile != now.tile) finish(is_first), is_first = false;
        now = after;
    }
#endif
}
