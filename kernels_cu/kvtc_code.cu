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
// Stack: 8 bytes, of encode on sm_52 to sm_61 by NVRTC 12.4
#include "quotient.cuh"
#include "vector.cuh"

#if !defined(X_T) || !defined(BLOCK) || !defined(TOKENS)
#error "kvtc_code.cu needs X_T, BLOCK and TOKENS"
#endif
constexpr int OF_GROUP = 32, WARPS = BLOCK / WARP;
constexpr int MOST = WARP * 8 / OF_GROUP * 8;  // words that the groups of a warp have
static_assert(BLOCK % WARP == 0, "whole warps");

// What a lane has of a row: eight components of `bits`, in as many bytes from `byte` on of its
// warp's `words`, which are those of the row from `first` on.
struct Share { int column, bits, byte, first, words; };

__device__ __forceinline__ Share share_of_lane(u64 upper, u64 lower) {
    const int column = (blockIdx.y * BLOCK + threadIdx.x) * 8;
    int group = column / OF_GROUP, start = 0, bits = 0;
#pragma unroll
    for (int b = 8; b > 0; b--) {
        const int count = (int)((b > 4 ? upper : lower) >> (8 - b) % 4 * 16 & 0xffffu);
        if (bits == 0) {
            const int before = min(group, count);
            start += before * b;
            group -= before;
            if (before < count) bits = b;
        }
    }
    const int first = __shfl_sync(FULL_MASK, start, 0);
    const int end = __shfl_sync(FULL_MASK, start + bits, WARP - 1);
    const int byte = (start - first) * 4 + (int)threadIdx.x % 4 * bits;
    return Share{column, bits, byte, first, end - first};
}

// Codes + h of eight coefficients, as many bits each, the first lowest. Where all steps allow it,
// quotients come from inverses: of coefficients that are clamped first, which leaves the same codes,
// and times 2^64, so that no remainder is subnormal.
struct Coder {
    float steps[8], inverses[8];
    bool has_inverses;

    __device__ Coder(const float* from) {
        load8(steps, from);
        has_inverses = true;
#pragma unroll
        for (int j = 0; j < 8; j++) has_inverses &= steps[j] >= 1e-15f && steps[j] <= 1e15f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (has_inverses) steps[j] *= SCALE;
            inverses[j] = 1.0f / steps[j];
        }
    }
    __device__ u64 operator()(const float (&x)[8], int bits) const {
        const int half = 1 << bits >> 1;
        const float largest = (float)half;
        u32 packed[2] = {0, 0};
        if (has_inverses) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float most = largest * steps[j];
                const float clamped = fminf(fmaxf(x[j] * SCALE, -most), most);  // NaN gives -most
                const int level = (int)floorf(quotient(clamped, steps[j], inverses[j]));
                packed[j / 4] |= (u32)(min(level, half - 1) + half) << j % 4 * bits;
            }
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float level = floorf(__fdiv_rn(x[j], steps[j]));
                const float code = fminf(fmaxf(level, -largest), largest - 1.0f);
                packed[j / 4] |= (u32)(code + largest) << j % 4 * bits;
            }
        }
        return packed[0] | (u64)packed[1] << 4 * bits;
    }
    static constexpr float SCALE = 18446744073709551616.0f;
};

// Whether a lane of this one's group says so; a group has four lanes.
__device__ __forceinline__ bool any_of_group(bool says) {
    return __any_sync(0xfu << threadIdx.x % WARP / 4 * 4, says);
}

__device__ __forceinline__ bool is_finite(const float (&x)[8]) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < 8; j++) all &= fabsf(x[j]) < INF;
    return all;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
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
    const int t0 = blockIdx.x * TOKENS, tokens = min(TOKENS, T - t0);

    if (mine.bits > 0) {
        float x[TOKENS][8];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) load8(x[t], from + (i64)min(t0 + t, T - 1) * columns);
        u32 taken = 0;  // bits of tokens whose group may be zeros, or is none
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (!any_of_group(!is_finite(x[t]))) continue;
            taken |= 1u << t;
#pragma unroll
            for (int j = 0; j < 8; j++) x[t][j] = -INF;  // which has the lowest code
        }
        const Coder coder((is_v ? v_steps : k_steps) + mine.column);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const u64 packed = coder(x[t], mine.bits);
            taken |= (u32)(packed != 0) << t;
            u8* const bytes = reinterpret_cast<u8*>(staged[warp][t]) + mine.byte;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i < mine.bits) bytes[i] = (u8)(packed >> 8 * i);
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const bool is_taken = any_of_group(taken >> t & 1u);
            u8* const bytes = reinterpret_cast<u8*>(staged[warp][t]) + mine.byte;
            if (!is_taken && threadIdx.x % 4 == 0) bytes[0] = 1;
        }
    }
    __syncwarp();
    u32* const to = reinterpret_cast<u32*>(rows) + (is_v ? v_start : 0) + mine.first;
    for (int t = 0; t < tokens; t++) {
        for (int i = lane; i < mine.words; i += WARP) {
            to[(i64)(t0 + t) * row_words + i] = staged[warp][t][i];
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
    if (mine.bits == 0) return;
    float steps[8];
    load8(steps, (is_v ? v_steps : k_steps) + mine.column);
    X_T* const to = (is_v ? v : k) + mine.column;
    const float offset = (float)(1 << mine.bits >> 1) - 0.5f;
    const u32 mask = (1u << mine.bits) - 1;
    const int word = mine.byte / 4, last = (mine.byte + mine.bits - 1) / 4;
    for (int t = 0; t < tokens; t++) {
        const u32* const own = staged[warp][t];
        const u64 upper = own[min(word + 2, last)];
        const u64 both = own[word] | (u64)own[min(word + 1, last)] << 32;
        const int shift = mine.byte % 4 * 8;
        const u64 packed = shift ? both >> shift | upper << (64 - shift) : both;
        const bool is_nan = !any_of_group(packed << (64 - 8 * mine.bits) != 0);
        const u32 halves[2] = {(u32)packed, (u32)(packed >> 4 * mine.bits)};
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 code = halves[j / 4] >> j % 4 * mine.bits & mask;
            x[j] = is_nan ? __uint_as_float(0x7fc00000u) : __fmul_rn((float)(int)code - offset, steps[j]);
        }
        store8(to + (i64)(t0 + t) * columns, x);
    }
}
