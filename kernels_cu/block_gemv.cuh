// block_gemv.cuh: few tokens times a matrix, on CUDA cores; a part of block_linear.cu and
// phase_program.cuh.
//
// A warp multiplies OUTS rows of weights by slices of 1024 elements, a lane 32 of them. Blocks: a
// group of 32, of which a lane loads 16 bytes of nibbles, 512 bytes a warp. Plain: four times eight
// elements, so that a warp loads 512 bytes of f16 as well. A lane's elements of x would be lines
// apart, so a block brings x to shared memory first, with gaps that let eight lanes read 16 bytes
// each without a conflict. `parts` warps share outputs and split I; the others of the block have
// outputs of their own.
#include "gate.cuh"
#include "plain.cuh"
#include "reduce.cuh"
#include "warps.cuh"

constexpr int SUMS = ROWS * OUTS;
constexpr int LANE = 32;  // elements of a lane
constexpr int SLICE = WARP * LANE;
constexpr int SLICE_FLOATS = SLICE + SLICE / 8;  // with its gaps
static_assert(SUMS <= WARP && (SUMS & (SUMS - 1)) == 0, "a lane for each sum");
static_assert(OUTS % 2 == 0, "as many gates as what they open");

// What a lane holds of a slice of a row of weights: eight quads.
template <typename K> struct Share {
    Codes<K::BITS> codes;
    typename K::Raw raw;

    // Past the edge the last group is read again; x is zero there.
    __device__ __forceinline__ void load(const u8* row, int first, int lane, int I) {
        const int G = I / GROUP, g = min(first / GROUP + lane, G - 1);
        codes.load(row, g, G);
        raw = K::load(row + (i64)G * Codes<K::BITS>::BYTES, g, G);
    }

    __device__ __forceinline__ void quad_of(float (&v)[4], int k) const {
        const u32 four = quad<K>(codes.word(k / 4, k % 4), codes.pairs[k / 4], codes.ones, k / 4,
                                 k % 4);
#pragma unroll
        for (int b = 0; b < 4; b++) v[b] = byte_to_float(four, b, (float)K::ZERO);
    }

    // Where element `at` of a slice of x lies in shared memory, and quad k of a lane.
    static __device__ __forceinline__ int place(int at) { return at / 32 * 36 + at % 32; }
    static __device__ __forceinline__ int place(int lane, int k) { return lane * 36 + k * 4; }
};

template <typename T> struct Share<Plain<T>> {
    Eight<T> eights[4];
    int raw;

    __device__ __forceinline__ void load(const u8* row, int first, int lane, int I) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = first + i * 256 + lane * 8;
            eights[i] = at < I ? get8(reinterpret_cast<const T*>(row) + at) : Eight<T>{};
        }
    }

    __device__ __forceinline__ void quad_of(float (&v)[4], int k) const {
        float eight[8];
        unpack8(eight, eights[k / 2]);
#pragma unroll
        for (int b = 0; b < 4; b++) v[b] = eight[k % 2 * 4 + b];
    }

    static __device__ __forceinline__ int place(int at) {
        return place(at % 256 / 8, at / 256 * 2 + at / 4 % 2) + at % 4;
    }
    static __device__ __forceinline__ int place(int lane, int k) {
        return k / 2 * 288 + k % 2 * 144 + lane * 4;
    }
};

// Rows of x in memory: a source of four elements at a time.
struct StoredRows {
    const X_T* x;
    i64 stride;
    __device__ __forceinline__ void load(float (&values)[4], int row, int i) const {
        load4(values, x + row * stride + i);
    }
};

// Elements i0 .. i0 + parts * SLICE - 1 of ROWS rows of x, times `norm` if there is one, zeros past
// I; their squares are added to `squares`. Past T the last row is read again, and its sum dropped.
template <typename K, typename Source>
__device__ __forceinline__ void stage(float* staged, float (&squares)[ROWS], const Source& x,
                                      const float* norm, int t0, int T, int i0, int I, int parts) {
    constexpr int STEP = BLOCK * 4, AHEAD = ROWS <= 2 && 2 * STEP <= SLICE ? 2 : 1;  // loads in flight
    static_assert(SLICE % (AHEAD * STEP) == 0, "whole steps");
    for (int first = threadIdx.x * 4; first < parts * SLICE; first += AHEAD * STEP) {
        float values[AHEAD][ROWS][4], factors[AHEAD][4];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int i = min(i0 + first + a * STEP, I - 4);
            if (norm) load4(factors[a], norm + i);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                x.load(values[a][r], min(t0 + r, T - 1), i);
            }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int at = first + a * STEP;
            float* slice = staged + at / SLICE * (ROWS * SLICE_FLOATS) + Share<K>::place(at % SLICE);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                u32 words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float value = i0 + at < I ? values[a][r][j] : 0.0f;
                    if (norm) {
                        squares[r] = fmaf(value, value, squares[r]);
                        value *= factors[a][j];
                    }
                    words[j] = __float_as_uint(value);
                }
                store16_shared(slice + r * SLICE_FLOATS,
                               uint4{words[0], words[1], words[2], words[3]});
            }
        }
    }
}

// sums[r * OUTS + o] += the products of a lane's weights, which are of group g, and its elements of
// row r of x.
template <typename K>
__device__ __forceinline__ void multiply(float (&sums)[SUMS], const Share<K> (&w)[OUTS], int g,
                                         const float* x, int lane) {
    constexpr int RUN = 8 / K::HALVES;  // quads that share a scale
    float dots[SUMS], total[ROWS];
    float d[OUTS][K::HALVES], m[OUTS][K::HALVES];
#pragma unroll
    for (int o = 0; o < OUTS; o++) K::decode(d[o], m[o], w[o].raw, g);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        if (k % RUN == 0) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) dots[i] = 0.0f;
#pragma unroll
            for (int r = 0; r < ROWS; r++) total[r] = 0.0f;
        }
        float values[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            load4(values[r], x + r * SLICE_FLOATS + Share<K>::place(lane, k));
            if (K::HAS_ADDEND) {
                total[r] += (values[r][0] + values[r][1]) + (values[r][2] + values[r][3]);
            }
        }
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            float codes[4];
            w[o].quad_of(codes, k);
#pragma unroll
            for (int b = 0; b < 4; b++) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    dots[r * OUTS + o] = fmaf(codes[b], values[r][b], dots[r * OUTS + o]);
                }
            }
        }
        if (k % RUN == RUN - 1) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                const int o = i % OUTS;
                sums[i] = fmaf(d[o][k / RUN], dots[i], sums[i]);
                if (K::HAS_ADDEND) sums[i] = fmaf(m[o][k / RUN], total[i / OUTS], sums[i]);
            }
        }
    }
}

// What warps of a block tell each other; partial sums of a tile stay while those of the next come.
struct WarpSums { float partial[2][WARPS][SUMS], squares[WARPS][ROWS]; };

// Tiles of outputs that a block multiplies: the first, and each `step` further, below `end`.
struct Tiles { int first, step, end; };

// A round of a tile, in which each warp multiplies a slice.
struct Round {
    int tile, index;
    __device__ __forceinline__ void advance(int rounds, int step) {
        if (++index == rounds) index = 0, tile += step;
    }
};

// The block's part of a product, for tokens t0 on. Weights of two rounds are on their way at once, and
// x stays in shared memory if that holds all rounds of a tile, `held`. `await` comes before x and out
// are read, and behind the first loads of w; all threads call it once.
template <typename K, typename Source, typename Await>
__device__ __forceinline__ void
gemv_tiles(float* staged, WarpSums& shared, X_T* out, const Source& x, const u8* w,
           const B_T* bias, const float* norm, int T, int O, int I, int W, i64 out_stride, int parts,
           int held, int accumulate, int gate, float eps, Tiles tiles, int t0, Await await) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int part = warp % parts;
    const int outputs = gate ? OUTS / 2 : OUTS;
    const int last = (gate ? 2 * O : O) - 1;
    const int rounds = max((I + parts * SLICE - 1) / (parts * SLICE), 1);
    const int t = t0 + lane / OUTS;  // whose sum the lane gets
    const bool has_sum = part == 0 && lane < SUMS && lane % OUTS < outputs && t < T;

    // The first output of a warp, and its rows of weights, whose second half follows the first or is
    // what that opens.
    const auto first_of = [&](int tile) {
        return (tile * (WARPS / parts) + warp / parts) * outputs;
    };
    const auto row_of = [&](int o0, int i) {
        return min(o0 + i + (gate && i >= OUTS / 2 ? O - OUTS / 2 : 0), last);
    };
    const auto fetch = [&](Share<K> (&shares)[OUTS], const Round& round) {
        if (round.tile >= tiles.end || I == 0) return;
        const int o0 = first_of(round.tile);
#pragma unroll
        for (int i = 0; i < OUTS; i++) {
            shares[i].load(w + (i64)row_of(o0, i) * W, (round.index * parts + part) * SLICE, lane, I);
        }
    };

    if (norm && threadIdx.x * 32 < I) prefetch_l2(norm + threadIdx.x * 32);
    Share<K> shares[2][OUTS] = {};  // or their registers are taken in all phases of a program
    Round round{tiles.first, 0}, ahead = round;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        fetch(shares[i], ahead);
        ahead.advance(rounds, tiles.step);
    }
    await();

    float sums[SUMS] = {}, squares[ROWS] = {}, factor = 1.0f, addend = 0.0f, old = 0.0f;
    int parity = 0;
    const auto begin = [&] {  // a tile
        const int o0 = first_of(round.tile), o = o0 + lane % OUTS;
        if (bias) addend = to_float(bias[row_of(o0, lane % OUTS)]);
        if (accumulate && has_sum && o < O) old = to_float(out[t * out_stride + o]);
    };
    const auto finish = [&] {
        float sum = warp_sums(sums);
        const bool has_squares = norm && round.tile == tiles.first;  // of this tile alone
        if (has_squares) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float total = group_sum<WARP>(squares[r]);
                if (lane == 0) shared.squares[warp][r] = total;
            }
        }
        if (parts > 1 && lane < SUMS) shared.partial[parity][warp][lane] = sum;
        if (has_squares || parts > 1) __syncthreads();
        if (has_squares) {
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) total += shared.squares[i][lane / OUTS % ROWS];
            factor = 1.0f / sqrtf(total / (float)I + eps);
        }
        if (parts > 1) {
            sum = 0.0f;
            for (int p = 0; p < parts; p++) {
                sum += shared.partial[parity][warp - part + p][lane % SUMS];
            }
            parity ^= 1;
        }
        sum = sum * factor + addend;
        if (gate) sum = gated(gate, sum, __shfl_down_sync(FULL_MASK, sum, OUTS / 2));
        const int o = first_of(round.tile) + lane % OUTS;
        if (has_sum && o < O) out[t * out_stride + o] = from_float<X_T>(sum + old);
#pragma unroll
        for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;
    };
#pragma unroll 1
    while (round.tile < tiles.end) {
        const int slice = round.index * parts + part;
        if (round.index == 0) begin();
        const bool renews_x = rounds > held || round.tile == tiles.first;
        if (I > 0 && renews_x && round.index % held == 0) {
            __syncthreads();  // all have read the previous slices
            stage<K>(staged, squares, x, norm, t0, T, (slice - part) * SLICE, I,
                     parts * min(held, rounds - round.index));
            __syncthreads();
        }
        if (I > 0) {
            const float* of_slice = staged + slice % (held * parts) * (ROWS * SLICE_FLOATS);
            multiply<K>(sums, shares[0], min(slice * WARP + lane, I / GROUP - 1), of_slice, lane);
        }
#pragma unroll
        for (int i = 0; i < OUTS; i++) shares[0][i] = shares[1][i];
        fetch(shares[1], ahead);
        ahead.advance(rounds, tiles.step);
        if (round.index + 1 == rounds) finish();
        round.advance(rounds, tiles.step);
    }
}
