// kvtc_code.cu: coefficients of K and V to rows of packed codes, and back.
//
// Groups of 32 components share a width b of 8 ... 1 bits, which falls along a row. With the step s
// of its component a coefficient x becomes
//
//   code = clip(floor(x / s), -h, h - 1), h = 2^(b-1)        and comes back as (code + 1/2) * s
//
// A group is b little-endian words: component j has bits j * b ... j * b + b - 1, which hold
// code + h. A row is the words of K's groups, then of V's. Components behind the last group are not
// stored. A group of zeros is NaN, and stands for coefficients of which one is not finite; the first
// of finite ones gets 1 where all would be 0.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/kvtc_code.py):
//   rows                      [T, W] words of four bytes, at a stride of `row_words`
//   k, v                      [T, C] float (encode, const), X_T (decode); C may differ between them
//   k_steps, v_steps   const  [C] float
// Scalars:  T; row_words; v_start = words of K in a row; k_columns, v_columns = C, a multiple of
//           32; k_upper, k_lower, v_upper, v_lower: counts of groups with 8 ... 5 bits, and with 4
//           ... 1, 16 bits each, the first one lowest
// Defines:  X_T = float or f16 of decoded coefficients; BLOCK = threads; TOKENS of a block
// Launch:   grid (ceil(T / TOKENS), ceil(max C / (8 * BLOCK)), 2), block (BLOCK); z: K, V
// Traffic:  encode  T * (4 * C + bytes of a row) for K and V; decode sizeof(X_T) in place of 4
// Order:    no atomics, no sums; bit-exact
#include "vector.cuh"

#if !defined(X_T) || !defined(BLOCK) || !defined(TOKENS)
#error "kvtc_code.cu needs X_T, BLOCK and TOKENS"
#endif
constexpr int OF_GROUP = 32, WARPS = BLOCK / WARP;
constexpr int MOST = WARP * 8 / OF_GROUP * 8;  // words that the groups of a warp have
constexpr int ENCODING_CTAS = 7;  // blocks that an SM has registers for
static_assert(BLOCK % WARP == 0, "whole warps");

// What a lane has of a row: eight components of `bits`, in as many bytes from `byte` on of its
// warp's `words`, which are those of the row from `first` on.
struct Share { int column, bits, byte, first, words; };

__device__ __forceinline__ Share share_of_lane(u64 upper, u64 lower) {
    const int column = (blockIdx.y * BLOCK + threadIdx.x) * 8;
    const int group = column / OF_GROUP;
    int wide = 0, start = 0, bits = 0;  // wide: how many groups have b bits or more
#pragma unroll
    for (int b = 8; b > 0; b--) {
        wide += (int)((b > 4 ? upper : lower) >> (8 - b) % 4 * 16 & 0xffffu);
        start += min(group, wide);
        bits += group < wide;
    }
    const int first = __shfl_sync(FULL_MASK, start, 0);
    const int end = __shfl_sync(FULL_MASK, start + bits, WARP - 1);
    const int byte = (start - first) * 4 + (int)threadIdx.x % 4 * bits;
    return Share{column, bits, byte, first, end - first};
}

constexpr float INTEGERS = 8388608.0f;  // 2^23: a code is the lower bits of its sum with it

// Codes + h of eight coefficients, as many bits each, the first lowest. With n = 2h - 1 that is
// x / s + h - 1/2 rounded to nearest, from (x / (s * n) + 1/2) * n with the quotient by an inverse.
struct Coder {
    float inverses[8], last, sure;
    int bits;

    __device__ Coder(const float* steps, int bits) : last((float)((1 << bits) - 1)), bits(bits) {
        load8(inverses, steps);
        bool has_inverses = true;  // far from what over- or underflows
#pragma unroll
        for (int j = 0; j < 8; j++) {
            inverses[j] = inverse_ftz(inverses[j] * last);
            has_inverses &= inverses[j] >= 1e-30f && inverses[j] <= 1e30f;
        }
        sure = has_inverses ? 0.5f - 2.0f / INTEGERS * last : -1.0f;
    }
    // Whether the codes are sure. x * inverse is 1/2 at most between the first code and the last, and
    // an inverse off by 1.5 * 2^-23 of it: with the sum's rounding that makes 2 * 2^-24 * n, and x / s
    // in the definition half of 2^-24 * n. `sure` leaves 4, for what the distance itself is off by, too.
    __device__ bool operator()(const float (&x)[8], u64& codes) const {
        const float base = (float)(1 << bits);
        u32 fours[2];
        bool is_sure = true;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float y[4], negated[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float part = __saturatef(__fmaf_rn(x[4 * i + j], inverses[4 * i + j], 0.5f));
                y[j] = __fmaf_rn(part, last, INTEGERS);
                negated[j] = INTEGERS - y[j];
                is_sure &= fabsf(__fmaf_rn(part, last, negated[j])) < sure;
            }
            const u32 lower = __float_as_uint(__fmaf_rn(negated[1], -base, y[0])) & 0xffffu;
            const u32 upper = __float_as_uint(__fmaf_rn(negated[3], -base, y[2])) & 0xffffu;
            fours[i] = lower | upper << 2 * bits;
        }
        codes = fours[0] | (u64)fours[1] << 4 * bits;
        return is_sure;
    }
};

// The same by the definition, of coefficients that are finite.
__device__ __forceinline__ u64 exact_codes(const float* x, const float* steps, int bits) {
    const float half = (float)(1 << bits >> 1);
    u64 codes = 0;
#pragma unroll 1
    for (int j = 0; j < 8; j++) {
        const float level = floorf(__fdiv_rn(x[j], steps[j]));
        codes |= (u64)(fminf(fmaxf(level, -half), half - 1.0f) + half) << j * bits;
    }
    return codes;
}

// The bits that lanes of this one's group have; a group has four lanes. Whole warps call it.
__device__ __forceinline__ u32 of_group(u32 bits) {
    bits |= __shfl_xor_sync(FULL_MASK, bits, 1);
    return bits | __shfl_xor_sync(FULL_MASK, bits, 2);
}

__device__ __forceinline__ bool is_finite(const float (&x)[8]) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < 8; j++) all &= fabsf(x[j]) < INF;
    return all;
}

extern "C" __global__ void __launch_bounds__(BLOCK, ENCODING_CTAS)
encode(u8* __restrict__ rows, const float* __restrict__ k, const float* __restrict__ v,
       const float* __restrict__ k_steps, const float* __restrict__ v_steps, int T, int row_words,
       int v_start, int k_columns, int v_columns, u64 k_upper, u64 k_lower, u64 v_upper,
       u64 v_lower) {
    __shared__ u32 staged[WARPS][TOKENS][MOST];
    const bool is_v = blockIdx.z;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int columns = is_v ? v_columns : k_columns;
    const Share mine = share_of_lane(is_v ? v_upper : k_upper, is_v ? v_lower : k_lower);
    const float* const from = (is_v ? v : k) + mine.column;
    const float* const steps = (is_v ? v_steps : k_steps) + mine.column;
    const int t0 = blockIdx.x * TOKENS, tokens = min(TOKENS, T - t0);

    float x[TOKENS][8];
    u32 odd = 0, taken = 0;  // bits of tokens: one of their group is not finite, some code is not 0
    if (mine.bits > 0) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) load8(x[t], from + (i64)min(t0 + t, T - 1) * columns);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) odd |= (u32)!is_finite(x[t]) << t;
    }
    odd = of_group(odd);
    if (mine.bits > 0) {
        const Coder coder(steps, mine.bits);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            u64 codes = 0;
            if (!(odd >> t & 1u) && !coder(x[t], codes)) {
                codes = exact_codes(from + (i64)min(t0 + t, T - 1) * columns, steps, mine.bits);
            }
            taken |= (u32)(codes != 0) << t;
            u8* const bytes = reinterpret_cast<u8*>(staged[warp][t]) + mine.byte;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i < mine.bits) bytes[i] = (u8)(codes >> 8 * i);
            }
        }
    }
    taken = of_group(taken) | odd;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const bool is_first = mine.bits > 0 && threadIdx.x % 4 == 0;
        if (is_first && !(taken >> t & 1u)) reinterpret_cast<u8*>(staged[warp][t])[mine.byte] = 1;
    }
    __syncwarp();
    u32* const to = reinterpret_cast<u32*>(rows) + (is_v ? v_start : 0) + mine.first;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int i = lane; i < MOST; i += WARP) {
            if (t < tokens && i < mine.words) to[(i64)(t0 + t) * row_words + i] = staged[warp][t][i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
decode(X_T* __restrict__ k, X_T* __restrict__ v, const u8* __restrict__ rows,
       const float* __restrict__ k_steps, const float* __restrict__ v_steps, int T, int row_words,
       int v_start, int k_columns, int v_columns, u64 k_upper, u64 k_lower, u64 v_upper,
       u64 v_lower) {
    __shared__ u32 staged[WARPS][TOKENS][MOST];
    const bool is_v = blockIdx.z;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int columns = is_v ? v_columns : k_columns;
    const Share mine = share_of_lane(is_v ? v_upper : k_upper, is_v ? v_lower : k_lower);
    const int t0 = blockIdx.x * TOKENS, tokens = min(TOKENS, T - t0);

    const u32* const from =
        reinterpret_cast<const u32*>(rows) + (is_v ? v_start : 0) + mine.first;
    u32 words[TOKENS][MOST / WARP];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {  // all loads before the first store
#pragma unroll
        for (int i = 0; i < MOST / WARP; i++) {
            const int word = lane + i * WARP;
            if (t < tokens && word < mine.words) {
                words[t][i] = from[(i64)(t0 + t) * row_words + word];
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int i = 0; i < MOST / WARP; i++) {
            const int word = lane + i * WARP;
            if (t < tokens && word < mine.words) staged[warp][t][word] = words[t][i];
        }
    }
    __syncwarp();
    const int bits = mine.bits, shift = mine.byte % 4 * 8;
    const int word = mine.byte / 4, last = (mine.byte + bits - 1) / 4;
    u64 packed[TOKENS];
    u32 taken = 0;  // bits of tokens: some code of their group is not 0
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        if (t >= tokens || bits == 0) break;
        const u32* const own = staged[warp][t];
        const u32 second = own[min(word + 1, last)], third = own[min(word + 2, last)];
        const u32 lower = (u32)((own[word] | (u64)second << 32) >> shift);
        const u32 upper = (u32)((second | (u64)third << 32) >> shift);
        packed[t] = lower | (u64)upper << 32;
        taken |= (u32)((packed[t] & ~(u64)0 >> (64 - 8 * bits)) != 0) << t;
    }
    taken = of_group(taken);
    if (bits == 0) return;
    float steps[8];
    load8(steps, (is_v ? v_steps : k_steps) + mine.column);
    // From bit 1 on of a float between 2^22 and twice as much, whose last place is 1/2, lies a code.
    constexpr u32 HALVES = 0x4a800000u;
    const u32 mask = ((1u << bits) - 1) << 1;
    const float middle = __uint_as_float(HALVES) + (float)(1 << bits >> 1);
    X_T* const to = (is_v ? v : k) + (i64)t0 * columns + mine.column;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        if (t >= tokens) return;
        const u32 fours[2] = {(u32)packed[t], (u32)(packed[t] >> 4 * bits)};
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 four = fours[j / 4];
            const u32 code = (j % 4 ? four >> (j % 4 * bits - 1) : four << 1) & mask;
            x[j] = __fmul_rn(__uint_as_float(code | HALVES | 1u) - middle, steps[j]);
        }
        Eight<X_T> eight;
        if constexpr (SAME<X_T, f16>) pack8_halves(eight, x);
        else pack8(eight, x);
#pragma unroll
        for (int i = 0; i < (int)sizeof(eight) / 4; i++) {
            if (!(taken >> t & 1u)) eight.words[i] = SAME<X_T, f16> ? 0x7e007e00u : 0x7fc00000u;
        }
        put8(to + (i64)t * columns, eight);
    }
}
