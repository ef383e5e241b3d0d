// block_gemv.cuh: few tokens times a matrix, on CUDA cores; a part of block_linear.cu and
// phase_program.cuh.
//
// A warp multiplies OUTS rows of weights by slices of 1024 elements, a lane 32 of them. Blocks: a
// group of 32, of which a lane loads 16 bytes of nibbles, 512 bytes a warp. Plain: four times eight
// elements, so that a warp loads 512 bytes of f16 as well. A lane's elements of x would be lines
// apart, so a block brings x to shared memory first, with gaps that let eight lanes read 16 bytes
// each without a conflict. `parts` warps share outputs and split I; the others of the block have
// outputs of their own.
//
// Codes are small integers, so a group of x becomes integers as well: of 24 bits, by a power of two
// that the largest of the group sets. Three digits of 8 bits each are multiplied by the codes, four
// products an instruction (dp4a), and their sums are exact.
#include "gate.cuh"
#include "plain.cuh"
#include "reduce.cuh"
#include "warps.cuh"

constexpr int SUMS = ROWS * OUTS;
constexpr int LANE = 32;  // elements of a lane
constexpr int SLICE = WARP * LANE;
constexpr int LANE_WORDS = LANE + 4;  // of x in shared memory, at most
constexpr int SLICE_WORDS = WARP * LANE_WORDS;
static_assert(SUMS <= WARP && (SUMS & (SUMS - 1)) == 0, "a lane for each sum");
static_assert(OUTS % 2 == 0, "as many gates as what they open");

// Four words of shared memory, aligned to 16 bytes.
__device__ __forceinline__ void load_words(u32* words, const u32* shared) {
    const uint4 four = *reinterpret_cast<const uint4*>(shared);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
}

// How x lies in shared memory for codes. Of a lane's 32 elements: word 8 * d + k has digit d of quad k;
// then the sums of each half that has a scale of its own, and the power of two.
template <typename K> struct Digits {
    static constexpr int DIGITS = 3, QUADS = 8, RUN = QUADS / K::HALVES;
    static constexpr int SUMS_AT = DIGITS * QUADS, SUMS_OF_HALF = K::HAS_ADDEND ? 1 : DIGITS;
    static constexpr int UNIT_AT = SUMS_AT + K::HALVES * SUMS_OF_HALF;
    static constexpr int WORDS = UNIT_AT < 28 ? 28 : 36;  // an odd number of 16 bytes
    static_assert(UNIT_AT < WORDS && WORDS <= LANE_WORDS, "room for all");
    static constexpr float TOP = 8323072.0f;  // 2^23 - 2^16

    // Elements at .. at + 3 of a slice of x, by eight lanes that have a group.
    static __device__ __forceinline__ void put(float* slice, int at, const float (&values)[4]) {
        u32 largest[1] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            largest[0] = max(largest[0], __float_as_uint(values[j]) & 0x7fffffffu);
        }
        group_max<QUADS>(largest);
        // The exponent leaves the top digit below 128; the largest floats have 255. Beside an infinity
        // or NaN all else is 0.
        const bool is_finite = largest[0] < 0x7f800000u;
        const u32 exponent = max(largest[0] + 0x20000u >> 23, 23u);
        const float up = __uint_as_float(is_finite ? 276u - exponent << 23 : 0x200u);
        u32 shifted[4];  // the lower digits without a sign
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float value = fminf(fmaxf(values[j] * up, -TOP), TOP);
            shifted[j] = (u32)(int)rintf(value) + 0x8080u;
        }
        u32 digits[DIGITS];
        const u32 low = __byte_perm(shifted[0], shifted[1], 0x5140);
        const u32 next = __byte_perm(shifted[2], shifted[3], 0x5140);
        digits[0] = __byte_perm(__byte_perm(shifted[0], shifted[1], 0x0062),
                                __byte_perm(shifted[2], shifted[3], 0x0062), 0x5410);
        digits[1] = __byte_perm(low, next, 0x7632) ^ 0x80808080u;
        digits[2] = __byte_perm(low, next, 0x5410) ^ 0x80808080u;

        u32* words = reinterpret_cast<u32*>(slice) + at / LANE * WORDS;
        const int k = at % LANE / 4;
        int sums[DIGITS];
#pragma unroll
        for (int d = 0; d < DIGITS; d++) {
            words[d * QUADS + k] = digits[d];
            sums[d] = dp4a_unsigned(0x01010101u, digits[d], 0);
#pragma unroll
            for (int i = 1; i < RUN; i *= 2) sums[d] += __shfl_xor_sync(FULL_MASK, sums[d], i);
        }
        // An infinity or NaN of x makes itself the unit.
        const u32 unit = is_finite ? exponent - 22 << 23 : largest[0];
        if (k == 0) words[UNIT_AT] = unit;
        if (k % RUN > 0) return;
        u32* of_half = words + SUMS_AT + k / RUN * SUMS_OF_HALF;
        if (K::HAS_ADDEND) {
            of_half[0] = __float_as_uint(__uint_as_float(unit) * join(sums));
        } else {
#pragma unroll
            for (int d = 0; d < DIGITS; d++) of_half[d] = -K::ZERO * sums[d];
        }
    }

    // The sum that its digits' sums make; those are below 2^21.
    static __device__ __forceinline__ float join(const int (&digits)[DIGITS]) {
        return fmaf((float)(digits[0] * 256 + digits[1]), 256.0f, (float)digits[2]);
    }
};

// For floats: as they are.
template <typename T> struct Digits<Plain<T>> {
    static __device__ __forceinline__ void put(float* slice, int at, const float (&values)[4]) {
        u32 words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) words[j] = __float_as_uint(values[j]);
        float* place = slice + at / 256 * 288 + at / 4 % 2 * 144 + at % 256 / 8 * 4;
        store16_shared(place, uint4{words[0], words[1], words[2], words[3]});
    }
};

// A lane's elements of slices of OUTS rows of weights. Codes come by way of shared memory where the SM
// copies by itself: registers for two rounds of them would leave room for few warps.
template <typename K> struct Shares {
    using CodesOf = Codes<K::BITS>;
    static constexpr bool IS_COPIED = __CUDA_ARCH__ >= 800;
    static constexpr int BYTES = CodesOf::BYTES * WARP;  // of a row, in shared memory

    u8* copied;
    CodesOf codes[IS_COPIED ? 1 : OUTS];
    typename K::Raw raw[OUTS];

    // Past the edge the last group is read again; x is zero there.
    __device__ __forceinline__ void load(const u8* const (&rows)[OUTS], int first, int lane, int I) {
        const int G = I / GROUP, g = min(first / GROUP + lane, G - 1);
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            if (IS_COPIED) {
                CodesOf::copy(copied + o * BYTES, rows[o], first / GROUP, G, lane);
            } else {
                codes[o].load(rows[o], g, G);
            }
            raw[o] = K::load(rows[o] + (i64)G * CodesOf::BYTES, g, G);
        }
    }

    __device__ __forceinline__ CodesOf codes_of(int o, int lane) const {
        if (!IS_COPIED) return codes[o];
        CodesOf read;
        read.read(copied + o * BYTES, lane);
        return read;
    }
};

template <typename T> struct Shares<Plain<T>> {
    static constexpr bool IS_COPIED = __CUDA_ARCH__ >= 800 && sizeof(T) == 2 && ROWS < 8;
    static constexpr int BYTES = LANE * sizeof(T) * WARP;

    u8* copied;
    Eight<T> eights[IS_COPIED ? 1 : OUTS][4];

    __device__ __forceinline__ void load(const u8* const (&rows)[OUTS], int first, int lane, int I) {
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const T* row = reinterpret_cast<const T*>(rows[o]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = first + i * 256 + lane * 8;
                if constexpr (IS_COPIED) {
                    u8* place = copied + o * BYTES + (i * WARP + lane) * 16;
                    cp_async16_or_zero(place, row + min(at, I - 8), at < I);
                } else {
                    eights[o][i] = at < I ? get8(row + at) : Eight<T>{};
                }
            }
        }
    }

    __device__ __forceinline__ Eight<T> eight(int o, int i, int lane) const {
        if constexpr (IS_COPIED) {
            return *reinterpret_cast<const Eight<T>*>(copied + o * BYTES + (i * WARP + lane) * 16);
        } else {
            return eights[o][i];
        }
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
    for (int at = threadIdx.x * 4; at < parts * SLICE; at += BLOCK * 4) {
        const int i = min(i0 + at, I - 4);
        float values[ROWS][4], factors[4];
        if (norm) load4(factors, norm + i);
#pragma unroll
        for (int r = 0; r < ROWS; r++) x.load(values[r], min(t0 + r, T - 1), i);
        float* slice = staged + at / SLICE * (ROWS * SLICE_WORDS);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float of_row[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                of_row[j] = i0 + at < I ? values[r][j] : 0.0f;
                if (norm) {
                    const float nothing = of_row[j] * 0.0f;  // NaN of infinities
                    squares[r] = fmaf(of_row[j], of_row[j], squares[r] + nothing);
                    of_row[j] *= factors[j];
                }
            }
            Digits<K>::put(slice + r * SLICE_WORDS, at % SLICE, of_row);
        }
    }
}

// sums[r * OUTS + o] += the products of a lane's weights and its elements of row r of x. A slice has
// whole blocks of weights, so a lane says which group of its block the weights are.
template <typename K>
__device__ __forceinline__ void multiply(float (&sums)[SUMS], const Shares<K>& w, const float* x,
                                         int lane) {
    using D = Digits<K>;
    const u32* of_lane = reinterpret_cast<const u32*>(x) + lane * D::WORDS;
    // Digits of few rows of x stay in registers; of more, codes do.
    constexpr int AT_ONCE = ROWS <= 2 ? 1 : OUTS;
#pragma unroll
    for (int o0 = 0; o0 < OUTS; o0 += AT_ONCE) {
        Codes<K::BITS> codes[AT_ONCE];
        int dots[ROWS][AT_ONCE][D::DIGITS];
#pragma unroll
        for (int o = 0; o < AT_ONCE; o++) codes[o] = w.codes_of(o0 + o, lane);
#pragma unroll
        for (int k = 0; k < D::QUADS; k += 4) {
            const int half = k / D::RUN;
            u32 quads[AT_ONCE][4];
#pragma unroll
            for (int o = 0; o < AT_ONCE; o++) {
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    quads[o][s] = quad<K>(codes[o].word(k / 4, s), codes[o].pairs[k / 4],
                                          codes[o].ones, k / 4, s);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const u32* words = of_lane + r * SLICE_WORDS;
                const u32* of_half = words + D::SUMS_AT + half * D::SUMS_OF_HALF;
#pragma unroll
                for (int n = 0; n < D::DIGITS; n++) {
                    u32 digits[4];
                    load_words(digits, words + n * D::QUADS + k);
#pragma unroll
                    for (int o = 0; o < AT_ONCE; o++) {
                        int& dot = dots[r][o][n];
                        if (k % D::RUN == 0) dot = K::HAS_ADDEND ? 0 : (int)of_half[n];
#pragma unroll
                        for (int s = 0; s < 4; s++) dot = dp4a_unsigned(quads[o][s], digits[s], dot);
                    }
                }
                if ((k + 4) % D::RUN > 0) continue;
                const float unit = __uint_as_float(words[D::UNIT_AT]);
#pragma unroll
                for (int o = 0; o < AT_ONCE; o++) {
                    float& sum = sums[r * OUTS + o0 + o];
                    float d[K::HALVES], m[K::HALVES];
                    K::decode(d, m, w.raw[o0 + o], lane);
                    sum = fmaf(d[half] * unit, D::join(dots[r][o]), sum);
                    if (K::HAS_ADDEND) sum = fmaf(m[half], __uint_as_float(of_half[0]), sum);
                }
            }
        }
    }
}

// The same of floats.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[SUMS], const Shares<Plain<T>>& w,
                                         const float* x, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float values[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float half[4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                load4(half, x + r * SLICE_WORDS + i * 288 + h * 144 + lane * 4);
#pragma unroll
                for (int b = 0; b < 4; b++) values[r][h * 4 + b] = half[b];
            }
        }
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            float eight[8];
            unpack8(eight, w.eight(o, i, lane));
#pragma unroll
            for (int b = 0; b < 8; b++) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    sums[r * OUTS + o] = fmaf(eight[b], values[r][b], sums[r * OUTS + o]);
                }
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

// The block's part of a product, for tokens t0 on. Weights of the next round are on their way while
// those of one are multiplied, and x stays in shared memory if that holds all rounds of a tile, `held`;
// `staged` has room for both. `await` comes before x and out are read, and behind the first loads of w;
// all threads call it once.
template <typename K, typename Source, typename Await>
__device__ __forceinline__ void
gemv_tiles(float* staged, WarpSums& shared, X_T* out, const Source& x, const u8* w,
           const B_T* bias, const float* norm, int T, int O, int I, int W, i64 out_stride, int parts,
           int held, int accumulate, int gate, float eps, Tiles tiles, int t0, Await await) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int part = warp % parts, parts_bits = 31 - __clz(parts);
    const int outputs = gate ? OUTS / 2 : OUTS;
    const int last = (gate ? 2 * O : O) - 1;
    const int rounds = max((I + parts * SLICE - 1) / (parts * SLICE), 1);
    const int t = t0 + lane / OUTS;  // whose sum the lane gets
    const bool has_sum = part == 0 && lane < SUMS && lane % OUTS < outputs && t < T;

    // The first output of a warp, and its rows of weights, whose second half follows the first or is
    // what that opens.
    const auto first_of = [&](int tile) {
        return ((tile * WARPS >> parts_bits) + (warp >> parts_bits)) * outputs;
    };
    const auto row_of = [&](int o0, int i) {
        return min(o0 + i + (gate && i >= OUTS / 2 ? O - OUTS / 2 : 0), last);
    };
    Round round{tiles.first, 0}, ahead = round;
    u8* copied = reinterpret_cast<u8*>(staged + held * parts * ROWS * SLICE_WORDS) +
                 warp * OUTS * Shares<K>::BYTES;
    Shares<K> now, next;
    next.copied = copied;
    const u8* rows[OUTS];  // of weights, of the round ahead
    const auto load_next = [&] {
        if (ahead.tile < tiles.end && I > 0) {
            if (ahead.index == 0) {
#pragma unroll
                for (int i = 0; i < OUTS; i++) {
                    rows[i] = w + (i64)row_of(first_of(ahead.tile), i) * W;
                }
            }
            next.load(rows, (ahead.index * parts + part) * SLICE, lane, I);
            ahead.advance(rounds, tiles.step);
        }
        cp_async_commit();
    };

    if (norm && threadIdx.x * 32 < I) prefetch_l2(norm + threadIdx.x * 32);
    load_next();
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
            const auto& partial = shared.partial[parity];
#pragma unroll 1
            for (int p = warp - part; p < warp - part + parts; p += 2) {  // of a power of two
                const float two[2] = {partial[p][lane % SUMS], partial[p + 1][lane % SUMS]};
                sum += two[0], sum += two[1];
            }
            parity ^= 1;
        }
        // The factor is 0 if squares of the row left float; the sum may have left it, too.
        sum = (factor == 0.0f ? 0.0f : sum * factor) + addend;
        if (gate) sum = gated(gate, sum, __shfl_down_sync(FULL_MASK, sum, OUTS / 2));
        const int o = first_of(round.tile) + lane % OUTS;
        if (has_sum && o < O) out[t * out_stride + o] = from_float<X_T>(sum + old);
#pragma unroll
        for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;
    };
    int place = 0;  // round.index % held: whose slice of those in shared memory
#pragma unroll 1
    while (round.tile < tiles.end) {
        if (round.index == 0) begin();
        now = next;
        __syncwarp();  // all have read what the next copies replace
        next.copied = copied + (now.copied == copied ? WARPS * OUTS * Shares<K>::BYTES : 0);
        load_next();
        const bool renews_x = rounds > held || round.tile == tiles.first;
        if (I > 0 && renews_x && place == 0) {
            __syncthreads();  // all have read the previous slices
            stage<K>(staged, squares, x, norm, t0, T, round.index * parts * SLICE, I,
                     parts * min(held, rounds - round.index));
            __syncthreads();
        }
        if (I > 0) {
            cp_async_wait<1>();
            __syncwarp();
            multiply(sums, now, staged + (place * parts + part) * (ROWS * SLICE_WORDS), lane);
        }
        if (++place == held) place = 0;
        if (round.index + 1 == rounds) finish(), place = 0;
        round.advance(rounds, tiles.step);
    }
}
