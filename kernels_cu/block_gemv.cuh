// block_gemv.cuh: few tokens times a matrix, on CUDA cores; a part of block_linear.cu and
// phase_program.cu.
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

// What warps of a block tell each other.
struct WarpSums { float partial[WARPS][SUMS], squares[WARPS][ROWS]; };

// The block's part of a product: outputs of one tile, for tokens t0 on. `await` comes before x and out
// are read, and behind the first loads of w; all threads call it once.
template <typename K, typename Source, typename Await>
__device__ __forceinline__ void
gemv_tile(float* staged, WarpSums& shared, X_T* out, const Source& x, const u8* w,
          const B_T* bias, const float* norm, int T, int O, int I, int W, i64 out_stride, int parts,
          int accumulate, int gate, float eps, int tile, int t0, Await await) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int part = warp % parts;

    // The second half of a warp's rows of weights follows the first, or is what it opens.
    const int outputs = gate ? OUTS / 2 : OUTS;
    const int o0 = (tile * (WARPS / parts) + warp / parts) * outputs;
    const int last = (gate ? 2 * O : O) - 1, second = o0 + (gate ? O : OUTS / 2);
    const int t = t0 + lane / OUTS, o = o0 + lane % OUTS;  // whose sum the lane gets
    const int of_row = lane % OUTS < OUTS / 2 ? o : second + lane % OUTS - OUTS / 2;

    if (norm && threadIdx.x * 32 < I) prefetch_l2(norm + threadIdx.x * 32);
    const float addend = bias ? to_float(bias[min(of_row, last)]) : 0.0f;
    const bool writes = part == 0 && lane < SUMS && lane % OUTS < outputs && o < O && t < T;
    float sums[SUMS] = {}, squares[ROWS] = {}, old = 0.0f;
    const auto begin = [&] {  // to read what may have been written just before
        await();
        if (accumulate && writes) old = to_float(out[t * out_stride + o]);
    };
    if (I == 0) begin();
#pragma unroll 1
    for (int i0 = 0; i0 < I; i0 += parts * SLICE) {
        const int first = i0 + part * SLICE;
        Share<K> shares[OUTS];
#pragma unroll
        for (int i = 0; i < OUTS; i++) {
            const int row = i < OUTS / 2 ? o0 + i : second + i - OUTS / 2;
            shares[i].load(w + (i64)min(row, last) * W, first, lane, I);
        }
        if (i0 == 0) {
            begin();
        } else {
            __syncthreads();  // all have read the previous slices
        }
        stage<K>(staged, squares, x, norm, t0, T, i0, I, parts);
        __syncthreads();
        const int g = min(first / GROUP + lane, I / GROUP - 1);
        multiply<K>(sums, shares, g, staged + part * ROWS * SLICE_FLOATS, lane);
    }

    float sum = warp_sums(sums);
    if (norm) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float total = group_sum<WARP>(squares[r]);
            if (lane == 0) shared.squares[warp][r] = total;
        }
    }
    if (parts > 1 && lane < SUMS) shared.partial[warp][lane] = sum;
    if (norm || parts > 1) __syncthreads();
    if (part > 0) return;
    if (parts > 1) {
        sum = 0.0f;
        for (int p = 0; p < parts; p++) sum += shared.partial[warp + p][lane % SUMS];
    }
    if (norm) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) total += shared.squares[i][lane / OUTS % ROWS];
        sum *= 1.0f / sqrtf(total / (float)I + eps);
    }
    if (bias) sum += addend;
    if (gate) sum = gated(gate, sum, __shfl_down_sync(FULL_MASK, sum, OUTS / 2));
    if (accumulate) sum += old;
    if (writes) out[t * out_stride + o] = from_float<X_T>(sum);
}
