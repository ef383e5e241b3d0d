// ptx.hpp: C++ twins of the wrappers around inline PTX in kernels_cu/ptx.cuh, which says what
// each does. Same names, signatures and results, bit for bit; integer arithmetic where an
// instruction rounds, because not every compiler has 16-bit floats.
#pragma once

namespace simt {

// --- Small floats: `mantissa` bits of mantissa, exponent bias `bias`, no sign --------------------

constexpr unsigned NAN_BITS = 0x7fffffffu;  // the NaN that NVIDIA's instructions make

inline bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }

// The finite value of a code.
inline float decode(unsigned code, int mantissa, int bias) {
    const unsigned exponent = code >> mantissa, fraction = code & ((1u << mantissa) - 1);
    const unsigned significand = exponent ? fraction | 1u << mantissa : fraction;
    const int scale = (int)(exponent ? exponent : 1) - bias - mantissa;
    return (float)significand * __uint_as_float((unsigned)(scale + 127) << 23);
}

// The code nearest to |x|, ties to even, as if the exponent had no upper limit; x is no NaN.
inline unsigned encode(float x, int mantissa, int bias) {
    const int exponent = (int)(__float_as_uint(x) >> 23 & 0xffu) - 127;
    const unsigned significand = (__float_as_uint(x) & 0x7fffffu) | 0x800000u;
    const int target = exponent > 1 - bias ? exponent : 1 - bias;  // of the code's leading bit
    const int dropped = 23 - mantissa + target - exponent;
    if (dropped > 24) return 0;  // below half the smallest subnormal, as zero and float's own are
    const unsigned rest = significand & ((1u << dropped) - 1), half = 1u << (dropped - 1);
    unsigned kept = significand >> dropped;
    kept += rest > half || (rest == half && (kept & 1));
    return ((unsigned)(target + bias - 1) << mantissa) + kept;  // the leading bit adds one exponent
}

inline unsigned float_to_fp8(float x, int mantissa, int bias, unsigned largest) {
    if (is_nan(x)) return 0x7fu;
    const unsigned code = encode(x, mantissa, bias);
    return (__float_as_uint(x) >> 24 & 0x80u) | (code < largest ? code : largest);
}

inline float bf16_bits_to_float(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
}  // namespace simt

inline float f16_bits_to_float(unsigned short x) {
    const unsigned sign = (unsigned)(x & 0x8000) << 16, code = x & 0x7fffu;
    if (code > 0x7c00u) return __uint_as_float(simt::NAN_BITS);
    if (code == 0x7c00u) return __uint_as_float(sign | 0x7f800000u);
    return __uint_as_float(sign | __float_as_uint(simt::decode(code, 10, 15)));
}

inline unsigned short float_to_f16_bits(float x) {
    if (simt::is_nan(x)) return 0x7fff;
    const unsigned code = simt::encode(x, 10, 15);
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000u;
    return (unsigned short)(sign | (code < 0x7c00u ? code : 0x7c00u));
}

inline unsigned floats_to_f16x2(float lower, float upper) {
    return float_to_f16_bits(lower) | (unsigned)float_to_f16_bits(upper) << 16;
}

inline unsigned floats_to_bf16x2(float lower, float upper) {
    unsigned y = 0;
    for (int i = 0; i < 2; i++) {
        const unsigned u = __float_as_uint(i ? upper : lower);
        const unsigned half =
            simt::is_nan(i ? upper : lower) ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
        y |= half << 16 * i;
    }
    return y;
}

inline unsigned short floats_to_e4m3x2(float lower, float upper) {
    return (unsigned short)(simt::float_to_fp8(lower, 3, 7, 0x7e) |
                            simt::float_to_fp8(upper, 3, 7, 0x7e) << 8);
}

inline unsigned short floats_to_e5m2x2(float lower, float upper) {
    return (unsigned short)(simt::float_to_fp8(lower, 2, 15, 0x7b) |
                            simt::float_to_fp8(upper, 2, 15, 0x7b) << 8);
}

inline unsigned e4m3x2_to_f16x2(unsigned short x) {
    unsigned y = 0;
    for (int i = 0; i < 2; i++) {
        const unsigned sign = x >> 8 * i & 0x80u, code = x >> 8 * i & 0x7fu;
        const unsigned half =
            code == 0x7fu ? 0x7fffu : sign << 8 | float_to_f16_bits(simt::decode(code, 3, 7));
        y |= half << 16 * i;
    }
    return y;
}

inline void e4m3x4_to_f16x4(unsigned (&pairs)[2], unsigned word) {
    pairs[0] = e4m3x2_to_f16x2((unsigned short)word);
    pairs[1] = e4m3x2_to_f16x2((unsigned short)(word >> 16));
}

// --- Copies and fragments ------------------------------------------------------------------------

namespace simt {
// The address of an instruction that takes one state space alone.
template <typename T> __attribute__((always_inline)) inline T* in_global(T* at) {
    require_space(at, false);
    return at;
}
template <typename T> __attribute__((always_inline)) inline T* in_shared(T* at) {
    require_space(at, true);
    return at;
}
}  // namespace simt

template <typename T> inline T load_eager(const T* p) { return *simt::in_global(p); }

inline uint4 load16_eager(const void* p) { return *(const uint4*)simt::in_global(p); }

inline void store16(void* p, const uint4& x) { *(uint4*)simt::in_global(p) = x; }
inline void store16_shared(void* p, const uint4& x) { *(uint4*)simt::in_shared(p) = x; }

inline void cp_async16(void* shared, const void* global) {
    simt::copy_later(simt::in_shared(shared), simt::in_global(global), 16);
}

inline void cp_async16_or_zero(void* shared, const void* global, bool exists) {
    static const uint4 zero = {0, 0, 0, 0};
    if (exists) {
        cp_async16(shared, global);
    } else {
        *(uint4*)simt::in_shared(shared) = zero;
    }
}

template <int BYTES> inline void cp_async(void* shared, const void* global) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what the instruction copies");
    simt::copy_later(simt::in_shared(shared), simt::in_global(global), BYTES);
}

inline void cp_async_commit() { simt::commit_copies(); }

template <int N> inline void cp_async_wait() { simt::wait_for_copies(N); }

inline void mbarrier_init(unsigned long long* barrier, unsigned arrivals, SIMT_SITE) {
    simt::make_mbarrier(barrier, arrivals, file, line);
}
__attribute__((always_inline)) inline void mbarrier_arrive(unsigned long long* barrier, bool arrives) {
    if (arrives) simt::arrive_at_mbarrier(barrier, 0);
}
__attribute__((always_inline)) inline void mbarrier_arrive_expecting(unsigned long long* barrier,
                                                                     unsigned bytes) {
    simt::arrive_at_mbarrier(barrier, bytes);
}
__attribute__((always_inline)) inline void mbarrier_arrive_behind_copies(unsigned long long* barrier) {
    simt::arrive_behind_copies(barrier);
}
inline void mbarrier_wait(unsigned long long* barrier, unsigned parity, SIMT_SITE) {
    simt::wait_for_mbarrier(barrier, parity, file, line);
}
__attribute__((always_inline)) inline void copy_bulk(void* shared, const void* global, unsigned bytes,
                                                     unsigned long long* barrier) {
    simt::copy_in_bulk(simt::in_shared(shared), simt::in_global(global), bytes, barrier);
}

namespace simt {
using Rows = const char (*)[VALUE_BYTES];  // what the 32 lanes of an ldmatrix point at

inline Rows rows_of_lanes(const void* row, const char* file, int line) {
    const uint4 mine = *(const uint4*)in_shared(row);
    return meet_lanes("a warp-wide instruction", ~0u, &mine, sizeof mine, file, line);
}

__attribute__((no_sanitize("thread"))) inline unsigned word(Rows rows, int lane, int i) {
    return reinterpret_cast<const unsigned*>(rows[lane])[i];
}
}  // namespace simt

inline void ldmatrix_x4(unsigned (&r)[4], const void* row, SIMT_SITE) {
    const simt::Rows rows = simt::rows_of_lanes(row, file, line);
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < 4; i++) r[i] = simt::word(rows, 8 * i + g, t);
}

inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, SIMT_SITE) {
    const simt::Rows rows = simt::rows_of_lanes(row, file, line);
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < 4; i++) {
        const unsigned lower = simt::word(rows, 8 * i + 2 * t, g / 2) >> g % 2 * 16 & 0xffffu;
        const unsigned upper = simt::word(rows, 8 * i + 2 * t + 1, g / 2) >> g % 2 * 16 & 0xffffu;
        r[i] = lower | upper << 16;
    }
}

namespace simt {
// D += A B for a 16 x K matrix A and a K x 8 matrix B of 16-bit floats. The sums are taken in
// double and rounded once. What it touches are registers and lanes' copies: nothing to watch.
template <int K, class ToFloat>
__attribute__((no_sanitize("thread"), no_sanitize("undefined")))
void mma(float (&d)[4], const unsigned (&a)[K / 4], const unsigned (&b)[K / 8], ToFloat to_float,
         const char* file, int line) {
    struct Elements { float a[K / 2], b[K / 4]; } mine;
    static_assert(sizeof mine <= VALUE_BYTES, "fits a lane's slot");
    for (int i = 0; i < K / 2; i++) mine.a[i] = to_float((unsigned short)(a[i / 2] >> i % 2 * 16));
    for (int i = 0; i < K / 4; i++) mine.b[i] = to_float((unsigned short)(b[i / 2] >> i % 2 * 16));
    const auto lanes = meet_lanes("a warp-wide instruction", ~0u, &mine, sizeof mine, file, line);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; i++) {
        const char* const row = lanes[4 * g];  // of A, one of two in the same lanes
        const char* const column = lanes[4 * (2 * t + i % 2)];
        double sum = d[i];
        for (int k = 0; k < K; k += 2) {  // registers of A: rows by 8, then columns by 8
            const int of_lane = k % 8 / 2 * VALUE_BYTES, part = k / 8;
            const float* const x = ((const Elements*)(row + of_lane))->a + 4 * part + i / 2 * 2;
            const float* const y = ((const Elements*)(column + of_lane))->b + 2 * part;
            sum += (double)x[0] * y[0];
            sum += (double)x[1] * y[1];
        }
        d[i] = sum == sum ? (float)sum : __uint_as_float(NAN_BITS);
    }
}
}  // namespace simt

inline void mma_m16n8k8_f16(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1],
                            SIMT_SITE) {
    simt::mma<8>(d, a, b, f16_bits_to_float, file, line);
}

inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             SIMT_SITE) {
    simt::mma<16>(d, a, b, f16_bits_to_float, file, line);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                              SIMT_SITE) {
    simt::mma<16>(d, a, b, simt::bf16_bits_to_float, file, line);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline void wgmma_fence() { simt::fence_products(); }
inline void wgmma_commit() { simt::commit_products(); }
template <int N> inline void wgmma_wait() { simt::wait_for_products(N); }
inline void fence_async_proxy() { simt::fence_proxy(); }
template <int N> inline void wgmma_results(float (&d)[N]) {}

struct WgmmaMatrix { const char* start; unsigned leading; };

namespace simt {
// Rows row .. row + 15 of 16 elements, or columns if COLUMNS, as the lanes of a warp load them; where
// there are but `rows`, those again and again.
template <bool COLUMNS> void load_rows(float (&to)[16][16], const WgmmaMatrix& from, int row,
                                       float (*to_float)(unsigned short), const char* file, int line,
                                       int rows = 16) {
    const int i = lane() / 2 % rows, part = lane() % 2;  // COLUMNS: element i of eight of the columns
    const int of_row = COLUMNS ? i : row + i, chunk = COLUMNS ? row % 64 / 8 + part : part;
    unsigned long at = (unsigned long)from.start + (COLUMNS ? row / 64 * from.leading : 0) +
                       of_row * 128 + chunk * 16;
    at ^= (at >> 7 & 7) << 4;
    read_later((const void*)at, 16, file, line);
    const Rows all = rows_of_lanes((const void*)at, file, line);
    for (int n = 0; n < WARP; n++) {
        for (int j = 0; j < 8; j++) {
            const float x = to_float((unsigned short)(word(all, n, j / 2) >> j % 2 * 16));
            (COLUMNS ? to[n % 2 * 8 + j][n / 2] : to[n / 2][n % 2 * 8 + j]) = x;
        }
    }
}
}  // namespace simt

inline WgmmaMatrix wgmma_matrix(const void* shared, unsigned leading) {
    return {(const char*)simt::in_shared(shared), leading};
}

inline WgmmaMatrix wgmma_matrix(WgmmaMatrix from, unsigned bytes) {
    return {from.start + bytes, from.leading};
}

template <bool BF16, bool COLUMNS>
__attribute__((no_sanitize("thread"), no_sanitize("undefined")))
inline void wgmma_m64n128k16(float (&d)[64], WgmmaMatrix a, WgmmaMatrix b, SIMT_SITE) {
    const auto to_float = BF16 ? simt::bf16_bits_to_float : f16_bits_to_float;
    float rows[16][16], columns[16][16];
    float* const sums = simt::sums_later(d, 64, file, line);
    simt::load_rows<false>(rows, a, threadIdx.x / simt::WARP % 4 * 16, to_float, file, line);
    for (int n = 0; n < 64; n++) {
        if (n % 8 == 0) simt::load_rows<COLUMNS>(columns, b, n * 2, to_float, file, line);
        const int row = simt::lane() / 4 + n / 2 % 2 * 8;
        const int column = n / 4 % 2 * 8 + simt::lane() % 4 * 2 + n % 2;
        double sum = sums[n];
        for (int k = 0; k < 16; k++) sum += (double)rows[row][k] * columns[column][k];
        sums[n] = (float)sum;
    }
}

template <int SUMS>
__attribute__((no_sanitize("thread"), no_sanitize("undefined")))
inline void wgmma_m64k16(float (&d)[SUMS], const unsigned (&a)[4], WgmmaMatrix b, SIMT_SITE) {
    float rows[16][16], columns[16][16];
    float* const sums = simt::sums_later(d, SUMS, file, line);
    simt::hold_later(a, sizeof a);
    const auto lanes = simt::meet_lanes("a warp-wide instruction", ~0u, &a, sizeof a, file, line);
    for (int n = 0; n < simt::WARP; n++) {
        for (int i = 0; i < 8; i++) {  // registers of A: rows by 8, then columns by 8
            rows[n / 4 + i / 2 % 2 * 8][i / 4 * 8 + n % 4 * 2 + i % 2] =
                f16_bits_to_float((unsigned short)(simt::word(lanes, n, i / 2) >> i % 2 * 16));
        }
    }
    for (int n = 0; n < SUMS; n++) {
        if (n % 8 == 0) {
            simt::load_rows<false>(columns, b, n * 2, f16_bits_to_float, file, line, SUMS == 4 ? 8 : 16);
        }
        const int row = simt::lane() / 4 + n / 2 % 2 * 8;
        const int column = n / 4 % 2 * 8 + simt::lane() % 4 * 2 + n % 2;
        double sum = sums[n];
        for (int k = 0; k < 16; k++) sum += (double)rows[row][k] * columns[column][k];
        sums[n] = (float)sum;
    }
}

inline void wgmma_operands(unsigned (&a)[2][4]) {}
#endif

// --- Pairs of f16 --------------------------------------------------------------------------------

namespace simt {
// To nearest even. What float drops is kept as its lowest bit, so that the second rounding is right.
inline unsigned short double_to_f16_bits(double x) {
    float y = (float)x;
    if (x == x && (double)y != x) {
        if (fabs((double)y) > fabs(x)) y = nextafterf(y, 0.0f);
        y = __uint_as_float(__float_as_uint(y) | 1u);
    }
    return float_to_f16_bits(y);
}

template <class F> unsigned of_halves(F f) { return f(0) | (unsigned)f(16) << 16; }
inline double half_at(unsigned x, int shift) { return f16_bits_to_float((unsigned short)(x >> shift)); }
}  // namespace simt

inline unsigned lower_twice(unsigned x) { return (x & 0xffffu) * 0x10001u; }
inline unsigned upper_twice(unsigned x) { return (x >> 16) * 0x10001u; }

inline unsigned sub_f16x2(unsigned a, unsigned b) {
    return simt::of_halves([=](int i) {
        return simt::double_to_f16_bits(simt::half_at(a, i) - simt::half_at(b, i));
    });
}

// A product has 22 bits. Where it and c do not fit into a double, one is far below half a unit of
// the other, or the result is infinite.
inline unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
    return simt::of_halves([=](int i) {
        return simt::double_to_f16_bits(fma(simt::half_at(a, i), simt::half_at(b, i),
                                            simt::half_at(c, i)));
    });
}

inline void prefetch_l2(const void* global) {}

// Kernels of the machine run one after another.
inline void let_next_start() {}
inline void await_previous() { simt::await_previous(); }

inline void schedule_fence() {}

inline int opaque(int x) { return x; }

template <typename T> inline T opaque_pointer(T x) { return x; }

// Always inlined, because the machine takes the caller for the place.
__attribute__((always_inline)) inline unsigned atomic_inc_acq_rel(unsigned* at, unsigned most) {
    return simt::atomic(
        simt::in_global(at), [most](unsigned old) { return old >= most ? 0 : old + 1; },
        simt::ACQUIRE | simt::RELEASE);
}

__attribute__((always_inline)) inline void add_release(unsigned* at, unsigned x) {
    simt::atomic(simt::in_global(at), [x](unsigned old) { return old + x; }, simt::RELEASE);
}

__attribute__((always_inline)) inline unsigned load_acquire(const unsigned* at, SIMT_SITE) {
    simt::poll(simt::in_global(at), "load_acquire", file, line);
    return simt::strong_load(at, simt::ACQUIRE);
}

__attribute__((always_inline)) inline unsigned long long load_host(const unsigned long long* at, SIMT_SITE) {
    simt::poll(simt::in_global(at), "load_host", file, line);
    return simt::strong_load(at, 0);
}

__attribute__((always_inline)) inline void store_host(unsigned long long* at, unsigned long long x) {
    simt::strong_store(simt::in_global(at), x, 0);
}

inline unsigned long long global_timer() { return simt::global_timer(); }

inline unsigned long long load_relaxed(unsigned long long* at) {
    return atomicOr(simt::in_global(at), 0ull);
}
inline void store_relaxed(unsigned long long* at, unsigned long long x) {
    atomicExch(simt::in_global(at), x);
}

// --- Clusters ------------------------------------------------------------------------------------

inline void cluster_arrive(SIMT_SITE) { simt::arrive_at_cluster("cluster_arrive", file, line); }

inline void cluster_arrive_relaxed(SIMT_SITE) {
    simt::arrive_at_cluster("cluster_arrive_relaxed", file, line);
}

inline void cluster_wait(SIMT_SITE) { simt::wait_for_cluster("cluster_wait", file, line); }

template <typename T> inline const T* map_shared_rank(const T* shared, unsigned rank, SIMT_SITE) {
    return static_cast<const T*>(simt::map_shared_rank(shared, rank, "map_shared_rank", file, line));
}

// --- Powers and inverses -------------------------------------------------------------------------

// The two twins that may differ in last bits.
inline float exp2_ftz(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float inverse_ftz(float x) {
    const float y = 1.0f / (fabsf(x) < 0x1p-126f ? x * 0.0f : x);
    return fabsf(y) < 0x1p-126f ? y * 0.0f : y;
}

// --- Integers ------------------------------------------------------------------------------------

inline int dp4a(int a, int b, int c) {
    unsigned sum = (unsigned)c;
    for (int i = 0; i < 32; i += 8) {
        sum += (unsigned)((signed char)(a >> i) * (signed char)(b >> i));
    }
    return (int)sum;
}

inline int dp4a_unsigned(unsigned a, unsigned b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(a >> 8 * i & 255u) * (signed char)(b >> 8 * i);
    return c;
}
