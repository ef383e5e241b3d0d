// block_gemm.cuh: a tile of tokens by outputs, on tensor cores; a part of block_linear.cu.
//
// Weights are operand A, straight from global memory: lane 4 * g + t takes elements 4 t .. 4 t + 3
// of either half of a group of rows g and g + 8: word t of their nibbles, or 8 bytes of f16. Codes
// are exact in f16. x is operand B: in shared memory a lane's elements of both halves are 16 bytes
// of as many pieces as their sum needs to be x: for float two f16 of 22 bits, or three bf16. A power
// of two for each token keeps x below 2^15; if it grows beyond, the power shrinks, and the sums with
// it. K_WARPS warps share outputs and split I.
#if __CUDA_ARCH__ >= 750

template <typename K> struct PieceOf { using Type = f16; };
template <typename T> struct PieceOf<Plain<T>> { using Type = T; };
using Piece = PieceOf<K>::Type;  // what tensor cores multiply

constexpr int WARPS = BLOCK / WARP;
constexpr int PIECES = SAME<X_T, float>                      ? (IS_BF16<Piece> ? 3 : 2)
                       : IS_BF16<Piece> && SAME<X_T, f16> ? 2
                                                             : 1;
constexpr int SLICE = 2 * GROUP;  // of I, that a warp multiplies at a time
constexpr int QUADS = SLICE / 4;  // lanes that bring a slice of a token
constexpr int PITCH = PIECES * SLICE * 2 + 64;  // bytes: two tokens that follow are 16 banks apart
constexpr int N_TILES = TILE_T / 8;
constexpr int OWN_O = 16 * OWN_TILES;              // rows of weights of a warp
constexpr int TILE_O = OWN_O * (WARPS / K_WARPS);  // and of a block
constexpr float MOST = 32768.0f;                   // that x times its power stays below
static_assert(TILE_T % 8 == 0 && (K_WARPS == 1 || K_WARPS == WARPS), "whole tiles; one of outputs");
static_assert(sizeof(Piece) == 2, "F32 has no tiles");

struct Slice {  // of x: what a warp multiplies with
    u8 rows[TILE_T][PITCH];
    float totals[TILE_T][2 * 2];  // of groups and their halves
    float squares[TILE_T][2 * 2];
    float scale[TILE_T], shrunk[TILE_T];
};

// The power of two with which x of magnitude `largest` stays below MOST, given the last one.
__device__ __forceinline__ float power_for(float largest, float last) {
    if (largest * last < MOST) return last;
    const int exponent = (int)(__float_as_uint(largest) >> 23) - 127;  // 2^exponent <= largest
    return __uint_as_float((u32)(127 + min(11 - exponent, 126)) << 23);
}

// Bring elements i0 .. of all slices of TILE_T tokens, times `norm` if there is one, zeros outside,
// and find their powers. Squares are added to those of earlier slices.
__device__ __forceinline__ bool stage(Slice* slices, const X_T* x, const float* norm, i64 x_stride,
                                      int t0, int T, int i0, int I) {
    bool any_shrunk = false;
#pragma unroll 2
    for (int item = threadIdx.x; item < K_WARPS * TILE_T * QUADS; item += BLOCK) {
        const int quad_of = item % QUADS, token = item / QUADS % TILE_T;
        Slice& slice = slices[item / QUADS / TILE_T];
        const int t = t0 + token, i = i0 + item / QUADS / TILE_T * SLICE + quad_of * 4;
        float v[4] = {};
        if (t < T && i < I) load4(v, x + t * x_stride + i);
        if (norm) {
            const float total =
                group_sum<4>((v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]));
            if (quad_of % 4 == 0) slice.squares[token][quad_of / 4] += total;
            float by[4] = {};
            if (i < I) load4(by, norm + i);
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] *= by[j];
        }
        float largest = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (fabsf(v[j]) < INF) largest = fmaxf(largest, fabsf(v[j]));
        }
        largest = group_max<QUADS>(largest);
        const float last = slice.scale[token], power = power_for(largest, last);
        __syncwarp();  // all have read the last one
        if (quad_of == 0) {
            slice.scale[token] = power;
            slice.shrunk[token] = power / last;
        }
        any_shrunk |= power != last;
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] *= power;
        const float total = group_sum<4>((v[0] + v[1]) + (v[2] + v[3]));
        if (quad_of % 4 == 0) slice.totals[token][quad_of / 4] = total;
        u8* to = slice.rows[token] + quad_of / 8 * (PIECES * 64) + quad_of % 4 * 16 +
                 quad_of / 4 % 2 * 8;
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            float lower[2] = {v[0], v[1]}, upper[2] = {v[2], v[3]};
            const u32 a = split_halves<Piece>(lower), b = split_halves<Piece>(upper);
            *reinterpret_cast<uint2*>(to + p * 64) = uint2{a, b};
            const float rest[4] = {lower[0], lower[1], upper[0], upper[1]};
            // What an infinity leaves is a NaN: the first piece says it all.
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = fabsf(rest[j]) < INF ? rest[j] : 0.0f;
        }
    }
    return any_shrunk;
}

// What a lane holds of a group of one row of weights.
template <typename K> struct Weights {
    u32 words[K::BITS == 8 ? 2 : 1];
    Codes<K::BITS> high;
    typename K::Raw raw;

    __device__ __forceinline__ void load(const u8* row, int g, int I, int t) {
        const int G = I / GROUP;
        if (Codes<K::BITS>::WORDS) {
            const u32* at = reinterpret_cast<const u32*>(row) + (i64)g * Codes<K::BITS>::WORDS + t;
            words[0] = at[0];
            if (K::BITS == 8) words[K::BITS == 8] = at[4];
        }
        high.load_high(row + (i64)G * Codes<K::BITS>::WORDS * 4, g, G);
        raw = K::load(row + (i64)G * Codes<K::BITS>::BYTES, g, G);
    }

    // Elements 4 t .. 4 t + 3 of a half, less what stands for zero, as two pairs of f16.
    __device__ __forceinline__ void pairs(u32 (&to)[2], int half, int t) const {
        constexpr u32 BASE = 0x64006400u;  // 1024, whose lowest bit is 1
        constexpr u32 ZERO = BASE + K::ZERO * 0x10001u;
        const u32 word = Codes<K::BITS>::WORDS ? words[K::BITS == 8 ? half : 0] : 0u;
        const u32 four = quad<K>(word, high.pairs[half], high.ones, half, t);
        to[0] = sub_f16x2(__byte_perm(four, BASE, 0x5150), ZERO);
        to[1] = sub_f16x2(__byte_perm(four, BASE, 0x5352), ZERO);
    }
};

template <typename T> struct Weights<Plain<T>> {
    uint2 halves[2];
    int raw;

    __device__ __forceinline__ void load(const u8* row, int g, int I, int t) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = g * GROUP + half * 16 + t * 4;
            halves[half] = i < I ? *reinterpret_cast<const uint2*>(row + (i64)i * sizeof(T)) : uint2{};
        }
    }

    __device__ __forceinline__ void pairs(u32 (&to)[2], int half, int) const {
        to[0] = halves[half].x, to[1] = halves[half].y;
    }
};

using Sums = float[OWN_TILES][N_TILES][4];

// Sums of a warp's outputs and all tokens += the products of a group.
__device__ __forceinline__ void multiply(Sums& sums, const Weights<K> (&w)[OWN_TILES][2], int g,
                                         const Slice& slice, int group) {
    const int lane = threadIdx.x % WARP, row = lane / 4, t = lane % 4;
    u32 a[OWN_TILES][2][2][2];  // by tile, row, half
    float d[OWN_TILES][2][K::HALVES], m[OWN_TILES][2][K::HALVES];
#pragma unroll
    for (int o = 0; o < OWN_TILES; o++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            K::decode(d[o][r], m[o][r], w[o][r].raw, g);
            w[o][r].pairs(a[o][r][0], 0, t);
            w[o][r].pairs(a[o][r][1], 1, t);
        }
    }
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
        uint4 b[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            b[p] = *reinterpret_cast<const uint4*>(slice.rows[n * 8 + row] +
                                                   (group * PIECES + p) * 64 + t * 16);
        }
        float total[2][2] = {};  // by token of this lane, half
        if (K::HAS_ADDEND) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float* of_token = slice.totals[n * 8 + t * 2 + i] + group * 2;
                total[i][0] = of_token[0], total[i][1] = of_token[1];
                if (K::HALVES == 1) total[i][0] += total[i][1];
            }
        }
#pragma unroll
        for (int o = 0; o < OWN_TILES; o++) {
            float part[K::HALVES][4] = {};
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    mma_16x16<Piece>(part[K::HALVES == 2 ? half : 0], a[o][0][half][0],
                                     a[o][1][half][0], a[o][0][half][1], a[o][1][half][1],
                                     half ? b[p].z : b[p].x, half ? b[p].w : b[p].y);
                }
            }
#pragma unroll
            for (int h = 0; h < K::HALVES; h++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& sum = sums[o][n][i];
                    sum = fmaf(d[o][i / 2][h], part[h][i], sum);
                    if (K::HAS_ADDEND) sum = fmaf(m[o][i / 2][h], total[i % 2][h], sum);
                }
            }
        }
    }
}

#endif

constexpr int RESIDENT = K_WARPS > 1 ? 4 : 2;  // blocks on an SM that registers allow

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)
gemm(X_T* out, const X_T* x, const u8* __restrict__ w,
     const B_T* __restrict__ bias, const float* __restrict__ norm, int T, int O, int I, int W,
     i64 x_stride, i64 out_stride, int accumulate, int gate, float eps) {
#if __CUDA_ARCH__ >= 750
    __shared__ __align__(16) Slice slices[K_WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = lane / 4, t = lane % 4;
    const int t0 = blockIdx.y * TILE_T;
    const int G = (I + GROUP - 1) / GROUP;
    Slice& own = slices[warp % K_WARPS];

    // Of a warp's rows, in eights, the second half follows the first or is what it opens.
    const int outputs = gate ? OWN_O / 2 : OWN_O;
    const int o0 = blockIdx.x * (gate ? TILE_O / 2 : TILE_O) + warp / K_WARPS * outputs;
    const int last = (gate ? 2 * O : O) - 1, second = o0 + (gate ? O : OWN_O / 2);

    let_next_start();
    for (int i = threadIdx.x; i < K_WARPS * TILE_T; i += BLOCK) {
        Slice& slice = slices[i / TILE_T];
        slice.scale[i % TILE_T] = 0x1p126f;
#pragma unroll
        for (int j = 0; j < 4; j++) slice.squares[i % TILE_T][j] = 0.0f;
    }
    __syncthreads();
    if (I == 0) await_previous();
    Sums sums = {};
#pragma unroll 1
    for (int i0 = 0; i0 < I; i0 += K_WARPS * SLICE) {
        // Past the edges the last row and group are read again; x is zero there, or the sum dropped.
        const int first = i0 / GROUP + warp % K_WARPS * 2;
        Weights<K> weights[2][OWN_TILES][2];
#pragma unroll
        for (int group = 0; group < 2; group++) {
#pragma unroll
            for (int i = 0; i < OWN_TILES * 2; i++) {
                const int o = (i < OWN_TILES ? o0 : second) + i % OWN_TILES * 8 + row;
                weights[group][i / 2][i % 2].load(w + (i64)min(o, last) * W,
                                                  min(first + group, G - 1), I, t);
            }
        }
        if (i0 == 0) await_previous();
        const bool shrunk = stage(slices, x, norm, x_stride, t0, T, i0, I);
        if (__syncthreads_or(shrunk)) {
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
#pragma unroll
                for (int i = 0; i < OWN_TILES * 4; i++) {
                    sums[i / 4][n][i % 4] *= own.shrunk[n * 8 + t * 2 + i % 2];
                }
            }
        }
#pragma unroll
        for (int group = 0; group < 2; group++) {
            multiply(sums, weights[group], min(first + group, G - 1), own, group);
        }
        __syncthreads();  // all have read the slices
    }

    // The factors of tokens: of one slice for all, where the norm needs their squares.
    if (norm) {
        if (threadIdx.x < TILE_T) {
            float total = 0.0f;
            for (int i = 0; i < K_WARPS * 4; i++) {
                total += slices[i / 4].squares[threadIdx.x][i % 4];
            }
            slices[0].squares[threadIdx.x][0] = 1.0f / sqrtf(total / (float)I + eps);
        }
        __syncthreads();
    }
    // Warps that share outputs leave their sums where x was.
    float (*const shared_sums)[OWN_O] = reinterpret_cast<float (*)[OWN_O]>(own.rows[0]);
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
#pragma unroll
        for (int i = 0; i < OWN_TILES * 4; i++) {
            const int token = n * 8 + t * 2 + i % 2;
            float& sum = sums[i / 4][n][i % 4];
            sum /= own.scale[token];
            if (norm) sum *= slices[0].squares[token][0];
            if (K_WARPS > 1) shared_sums[token][i / 4 * 16 + i % 4 / 2 * 8 + row] = sum;
        }
    }
    if (K_WARPS == 1) {
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int i = 0; i < OWN_TILES * 2; i++) {  // a row of the first half and of the second
                const int token = t0 + n * 8 + t * 2 + i % 2, at = i / 2 * 8 + row;
                const float a = sums[i / 4][n][i % 4];
                const float b = sums[(i + OWN_TILES * 2) / 4][n][(i + OWN_TILES * 2) % 4];
                if (token < T) {
                    finish_two(out + token * out_stride, a, b, bias, o0 + at, second + at, O,
                               accumulate, gate);
                }
            }
        }
        return;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_T * (OWN_O / 2); i += BLOCK) {
        const int token = i / (OWN_O / 2), at = i % (OWN_O / 2);
        float a = 0.0f, b = 0.0f;
#pragma unroll
        for (int k = 0; k < K_WARPS; k++) {
            const float* of_warp =
                reinterpret_cast<const float (*)[OWN_O]>(slices[k].rows[0])[token];
            a += of_warp[at], b += of_warp[OWN_O / 2 + at];
        }
        if (t0 + token < T) {
            finish_two(out + (t0 + token) * out_stride, a, b, bias, o0 + at, second + at, O,
                       accumulate, gate);
        }
    }
#endif
}
