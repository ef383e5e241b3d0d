// ptx.cu: every wrapper of kernels_cu/ptx.cuh but those for clusters (clusters.cu),
// and every conversion, on arrays.
//
// Arrays, row-major (CODE = the bits of a KIND; registers as ptx.cuh numbers them):
//   widen, widen_plain    codes const [n] CODE -> floats [n]
//   narrow, narrow_plain  floats const [n] -> codes [n] CODE
//   widen_f16             codes const [n] u16 -> floats [n], by the bare instruction
//   narrow_f16            floats const [n] -> codes [n] u16, likewise
//   narrow_words          floats const [n, 2] -> codes [n, 2] CODE, f16 or bf16
//   load_eight            codes const [n, 8] of CODES, as bytes -> floats [n, 8]
//   store_eight           floats const [n, 8] -> codes [n, 8] CODE, f16 or bf16
//   widen_e4m3x2          pairs const [n] u16 -> halves [n, 2] u16
//   narrow_pairs          floats const [n, 2] -> codes [n, 2] CODE
//   copy                  from const [2, 128, 4] u32 -> to [2, 128, 4], the 128 in reverse order
//   copy_to_mbarrier      from const [2, 128, 4] u32 -> to, likewise: half by threads, half in bulk
//   load_matrices         rows const [32, 8] u16 -> plain, then transposed [2, 4, 32] u32
//   mma_*                 a const [R, 32], b const [R / 2, 32] u32; d [4, 32] float, in place
//   multiply              a, b const [16, 16] f16 bits -> d [16, 16] float
//   wgmma_*               a const [64, 64], b const [128, 64] bits, or as columns [64, 128]
//   wgmma_*_N             a const [64, 64], b const [N, 64] bits
//                         -> d [64, 128] float
//   power                 x const [n] float -> y [n] float
//   dot                   a, b, c const [n] int32 -> d [n] int32
//   subtract_halves       a, b const [n] u32, two f16 each -> y [n] u32
//   double_halves         x const [n] u32, likewise -> y [n, 2] u32
//   fuse_halves           a, b, c const [n] u32, likewise -> y [n] u32
//   pair_words            words const [n] u32 of CODES -> pairs [n, elements / 2] u32 of one word
//   pair_zipped           words const [n, 2] u32 of CODES -> pairs [n, elements] u32 of both
//   split_floats          x const [n, 2] float -> halves [n] u32 of KIND, rest [n, 2] float
// Defines:  SM it is compiled for; KIND = f16, bf16, e4m3 or e5m2; CODES = i8, i4, e4m3 or e5m2.
//           widen_plain does nothing but for e4m3, narrow_plain and narrow_pairs nothing but for the
//           fp8 kinds, and no kernel anything where the SM lacks its instruction
// Launch:   grid (ceil(n / 128)), block (128); copy, copy_to_mbarrier: (1), (128); from load_matrices
//           to multiply: (1), (32); wgmma_*: (1), (128)
// Order:    no atomics, bit-exact
#include "mma.cuh"
#include "quantize.cuh"
#include "wgmma.cuh"

#if !defined(SM) || !defined(KIND) || !defined(CODES)
#error "ptx.cu needs SM, KIND = f16, bf16, e4m3 or e5m2, and CODES = i8, i4, e4m3 or e5m2"
#endif
static_assert(SM * 10 == __CUDA_ARCH__, "compiled for the SM that the test expects");
using CODE = decltype(KIND::bits);

__device__ __forceinline__ int item() { return blockIdx.x * blockDim.x + threadIdx.x; }

// --- Conversions ---------------------------------------------------------------------------------

extern "C" __global__ void widen(float* floats, const CODE* codes, int n) {
    if (item() < n) floats[item()] = to_float(KIND{codes[item()]});
}

extern "C" __global__ void narrow(CODE* codes, const float* floats, int n) {
    if (item() < n) codes[item()] = from_float<KIND>(floats[item()]).bits;
}

extern "C" __global__ void widen_f16(float* floats, const u16* codes, int n) {
    if (item() < n) floats[item()] = f16_bits_to_float(codes[item()]);
}

extern "C" __global__ void narrow_f16(u16* codes, const float* floats, int n) {
    if (item() < n) codes[item()] = float_to_f16_bits(floats[item()]);
}

template <typename T> struct Halves {  // fp8 kinds have none of these
    static __device__ void narrow(CODE*, const float*) {}
    static __device__ void store(CODE*, const float (&)[8]) {}
};

template <typename T> struct TwoBytes {
    static __device__ void narrow(u16* y, const float* x) {
#if __CUDA_ARCH__ >= 800
        const u32 word = two_halves(x[0], x[1], T{});
        y[0] = (u16)word, y[1] = (u16)(word >> 16);
#endif
    }
    static __device__ void store(u16* y, const float (&x)[8]) { store8((T*)y, x); }
};
template <> struct Halves<f16> : TwoBytes<f16> {};
template <> struct Halves<bf16> : TwoBytes<bf16> {};

template <typename T> struct Fp8 {  // f16 and bf16 have none of these
    static __device__ void widen_plain(float*, const CODE*) {}
    static __device__ void narrow_plain(CODE*, const float*) {}
    static __device__ void narrow_pair(CODE*, const float*) {}
};

template <> struct Fp8<e4m3> {
    static __device__ void widen_plain(float* y, const u8* x) { *y = e4m3_to_float(e4m3{*x}); }
    static __device__ void narrow_plain(u8* y, const float* x) {
        *y = float_to_fp8<3, 7, 0x7e>(*x);
    }
    static __device__ void narrow_pair(u8* y, const float* x) {
#if __CUDA_ARCH__ >= 890
        const u16 pair = floats_to_e4m3x2(x[0], x[1]);
        y[0] = (u8)pair, y[1] = (u8)(pair >> 8);
#endif
    }
};

template <> struct Fp8<e5m2> {
    static __device__ void widen_plain(float*, const u8*) {}
    static __device__ void narrow_plain(u8* y, const float* x) {
        *y = float_to_fp8<2, 15, 0x7b>(*x);
    }
    static __device__ void narrow_pair(u8* y, const float* x) {
#if __CUDA_ARCH__ >= 890
        const u16 pair = floats_to_e5m2x2(x[0], x[1]);
        y[0] = (u8)pair, y[1] = (u8)(pair >> 8);
#endif
    }
};

extern "C" __global__ void widen_plain(float* floats, const CODE* codes, int n) {
    if (item() < n) Fp8<KIND>::widen_plain(floats + item(), codes + item());
}

extern "C" __global__ void narrow_plain(CODE* codes, const float* floats, int n) {
    if (item() < n) Fp8<KIND>::narrow_plain(codes + item(), floats + item());
}

extern "C" __global__ void narrow_pairs(CODE* codes, const float* floats, int n) {
    if (item() < n) Fp8<KIND>::narrow_pair(codes + 2 * item(), floats + 2 * item());
}

extern "C" __global__ void narrow_words(CODE* codes, const float* floats, int n) {
    if (item() < n) Halves<KIND>::narrow(codes + 2 * item(), floats + 2 * item());
}

extern "C" __global__ void load_eight(float* floats, const u8* codes, int n) {
    if (item() >= n) return;
    float x[8];
    load8(x, (const CODES*)codes + (i64)item() * 8 / PACKED<CODES>);
    store8(floats + 8 * item(), x);
}

extern "C" __global__ void store_eight(CODE* codes, const float* floats, int n) {
    if (item() >= n) return;
    float x[8];
    load8(x, floats + 8 * item());
    Halves<KIND>::store(codes + 8 * item(), x);
}

extern "C" __global__ void widen_e4m3x2(u16* halves, const u16* pairs, int n) {
#if __CUDA_ARCH__ >= 890
    if (item() >= n) return;
    const u32 two = e4m3x2_to_f16x2(pairs[item()]);
    halves[2 * item()] = (u16)two;
    halves[2 * item() + 1] = (u16)(two >> 16);
#endif
}

extern "C" __global__ void widen_e4m3x4(u32* halves, const u32* words, int n) {
#if __CUDA_ARCH__ >= 890
    if (item() >= n) return;
    u32 pairs[2];
    e4m3x4_to_f16x4(pairs, words[item()]);
    halves[2 * item()] = pairs[0];
    halves[2 * item() + 1] = pairs[1];
#endif
}

// --- Copies and fragments ------------------------------------------------------------------------

extern "C" __global__ void copy(u32* to, const u32* from) {
    __shared__ __align__(16) u32 pieces[2][128][4];
    const int i = threadIdx.x;
    for (int half = 0; half < 2; half++) {
        const u32* piece = from + (half * 128 + i) * 4;
        if (half == 0) {
            cp_async<16>(pieces[half][i], piece);
        } else {
            cp_async<8>(pieces[half][i], piece);
            cp_async<4>(pieces[half][i] + 2, piece + 2);
            cp_async<4>(pieces[half][i] + 3, piece + 3);
        }
        cp_async_commit();
    }
    cp_async_wait<1>();  // the first half is there
    __syncthreads();
    for (int j = 0; j < 4; j++) to[i * 4 + j] = pieces[0][127 - i][j];
    cp_async_wait<0>();
    __syncthreads();
    for (int j = 0; j < 4; j++) to[(128 + i) * 4 + j] = pieces[1][127 - i][j];
}

extern "C" __global__ void copy_to_mbarrier(u32* to, const u32* from) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ __align__(16) u32 pieces[128][4];
    __shared__ u64 filled, emptied;
    const int i = threadIdx.x;
    if (i == 0) {
        mbarrier_init(&filled, 64 + 1);
        mbarrier_init(&emptied, 4);
        fence_async_proxy();
    }
    __syncthreads();
    for (int half = 0; half < 2; half++) {
        const u32* const piece = from + half * 512;
        if (half == 1) mbarrier_wait(&emptied, 0);
        if (i < 64) {
            cp_async16(pieces[i], piece + i * 4);
            mbarrier_arrive_behind_copies(&filled);
        } else if (i == 64) {
            mbarrier_arrive_expecting(&filled, 64 * 16);
            copy_bulk(pieces[64], piece + 64 * 4, 64 * 16, &filled);
        }
        mbarrier_wait(&filled, half);
        for (int j = 0; j < 4; j++) to[(half * 128 + i) * 4 + j] = pieces[127 - i][j];
        __syncwarp();
        mbarrier_arrive(&emptied, i % WARP == 0);
    }
#endif
}

extern "C" __global__ void load_matrices(u32* matrices, const u16* rows) {
    __shared__ __align__(16) u16 tile[32][8];
    const int lane = threadIdx.x;
    for (int i = 0; i < 8; i++) tile[lane][i] = rows[lane * 8 + i];
    __syncthreads();
#if __CUDA_ARCH__ >= 750
    u32 r[4];
    ldmatrix_x4(r, tile[lane]);
    for (int i = 0; i < 4; i++) matrices[i * WARP + lane] = r[i];
    ldmatrix_x4_trans(r, tile[lane]);
    for (int i = 0; i < 4; i++) matrices[(4 + i) * WARP + lane] = r[i];
#endif
}

template <int N, typename T> __device__ __forceinline__ void load(T (&r)[N], const T* registers) {
#pragma unroll
    for (int i = 0; i < N; i++) r[i] = registers[i * WARP + threadIdx.x];
}

template <typename T> __device__ __forceinline__ void store(T* registers, const T (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) registers[i * WARP + threadIdx.x] = r[i];
}

extern "C" __global__ void mma_k8_f16(float* d, const u32* a, const u32* b) {
#if __CUDA_ARCH__ >= 750
    u32 ra[2], rb[1];
    float rd[4];
    load(ra, a), load(rb, b), load(rd, d);
    mma_m16n8k8_f16(rd, ra, rb);
    store(d, rd);
#endif
}

extern "C" __global__ void mma_k16_f16(float* d, const u32* a, const u32* b) {
#if __CUDA_ARCH__ >= 800
    u32 ra[4], rb[2];
    float rd[4];
    load(ra, a), load(rb, b), load(rd, d);
    mma_m16n8k16_f16(rd, ra, rb);
    store(d, rd);
#endif
}

extern "C" __global__ void mma_k16_bf16(float* d, const u32* a, const u32* b) {
#if __CUDA_ARCH__ >= 800
    u32 ra[4], rb[2];
    float rd[4];
    load(ra, a), load(rb, b), load(rd, d);
    mma_m16n8k16_bf16(rd, ra, rb);
    store(d, rd);
#endif
}

// What ldmatrix loads is what mma takes: A as it lies, B transposed.
extern "C" __global__ void multiply(float* d, const u16* a, const u16* b) {
    __shared__ __align__(16) u16 tiles[2][16][16];
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += WARP) {
        tiles[0][i / 16][i % 16] = a[i];
        tiles[1][i / 16][i % 16] = b[i];
    }
    __syncthreads();
#if __CUDA_ARCH__ >= 800
    u32 ra[4], rb[4];
    ldmatrix_x4(ra, &tiles[0][lane % 16][lane / 16 * 8]);
    ldmatrix_x4_trans(rb, &tiles[1][lane % 16][lane / 16 * 8]);
#pragma unroll
    for (int half = 0; half < 2; half++) {  // columns 0 to 7 and 8 to 15 of B
        const u32 columns[2] = {rb[2 * half], rb[2 * half + 1]};
        float rd[4] = {};
        mma_m16n8k16_f16(rd, ra, columns);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            d[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = rd[i];
        }
    }
#endif
}

// Rows of 64 elements, or as many columns together, in the order that wgmma reads.
template <bool BF16, bool COLUMNS>
__device__ __forceinline__ void multiply_by_group(u16* tiles, float* d, const u16* a,
                                                  const u16* b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    u16* const tile_a = tiles;
    u16* const tile_b = tiles + 64 * 64;
    for (int i = threadIdx.x; i < 128 * 64; i += 128) {
        const int row = i / 64, at = row * 64 + (i % 64 / 8 ^ row % 8) * 8 + i % 8;
        if (row < 64) tile_a[at] = a[i];
        tile_b[at] = b[COLUMNS ? row % 64 * 128 + row / 64 * 64 + i % 64 : i];
    }
    fence_async_proxy();
    __syncthreads();
    float sums[64] = {};
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) {
        wgmma_m64n128k16<BF16, COLUMNS>(
            sums, wgmma_matrix(tile_a + step * 16, 0),
            wgmma_matrix(tile_b + step * (COLUMNS ? 16 * 64 : 16), COLUMNS ? 64 * 128 : 0));
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_results(sums);
    const int row = threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4;
#pragma unroll
    for (int n = 0; n < 64; n++) {
        d[(row + n / 2 % 2 * 8) * 128 + n / 4 * 8 + threadIdx.x % 4 * 2 + n % 2] = sums[n];
    }
#endif
}

extern "C" __global__ void wgmma_f16(float* d, const u16* a, const u16* b) {
    __shared__ __align__(1024) u16 tiles[192 * 64];
    multiply_by_group<false, false>(tiles, d, a, b);
}

extern "C" __global__ void wgmma_bf16(float* d, const u16* a, const u16* b) {
    __shared__ __align__(1024) u16 tiles[192 * 64];
    multiply_by_group<true, false>(tiles, d, a, b);
}

extern "C" __global__ void wgmma_columns(float* d, const u16* a, const u16* b) {
    __shared__ __align__(1024) u16 tiles[192 * 64];
    multiply_by_group<false, true>(tiles, d, a, b);
}

// The same with rows of a in registers.
template <int SUMS>
__device__ __forceinline__ void multiply_registers(u16* tile, float* d, const u16* a, const u16* b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int COLUMNS = 2 * SUMS;
    for (int i = threadIdx.x; i < COLUMNS * 64; i += 128) {
        const int row = i / 64;
        tile[row * 64 + (i % 64 / 8 ^ row % 8) * 8 + i % 8] = b[i];
    }
    fence_async_proxy();
    __syncthreads();
    const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane / 4;
    u32 words[2][2][4];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int at = (row + i % 2 * 8) * 64 + i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
        words[i / 8][i / 4 % 2][i % 4] = a[at] | (u32)a[at + 1] << 16;
    }
    float sums[SUMS] = {};
    const WgmmaMatrix matrix = wgmma_matrix(tile, 0);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) {
        wgmma_m64k16(sums, words[step / 2][step % 2], wgmma_matrix(matrix, step * 32));
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_operands(words[0]);
    wgmma_operands(words[1]);
    wgmma_results(sums);
#pragma unroll
    for (int n = 0; n < SUMS; n++) {
        d[(row + n / 2 % 2 * 8) * COLUMNS + n / 4 * 8 + lane % 4 * 2 + n % 2] = sums[n];
    }
#endif
}

extern "C" __global__ void wgmma_f16_8(float* d, const u16* a, const u16* b) {
    __shared__ __align__(1024) u16 tile[64 * 64];
    multiply_registers<4>(tile, d, a, b);
}

extern "C" __global__ void wgmma_f16_16(float* d, const u16* a, const u16* b) {
    __shared__ __align__(1024) u16 tile[64 * 64];
    multiply_registers<8>(tile, d, a, b);
}

extern "C" __global__ void wgmma_f16_32(float* d, const u16* a, const u16* b) {
    __shared__ __align__(1024) u16 tile[64 * 64];
    multiply_registers<16>(tile, d, a, b);
}

extern "C" __global__ void wgmma_f16_64(float* d, const u16* a, const u16* b) {
    __shared__ __align__(1024) u16 tile[64 * 64];
    multiply_registers<32>(tile, d, a, b);
}

// --- Powers --------------------------------------------------------------------------------------

extern "C" __global__ void power(float* y, const float* x, int n) {
    if (item() < n) y[item()] = exp2_ftz(x[item()]);
}

extern "C" __global__ void inverse(float* y, const float* x, int n) {
    if (item() < n) y[item()] = inverse_ftz(x[item()]);
}

// --- Integers ------------------------------------------------------------------------------------

extern "C" __global__ void dot(int* d, const int* a, const int* b, const int* c, int n) {
    if (item() < n) d[item()] = dp4a(a[item()], b[item()], c[item()]);
}

// --- Operands of mma -----------------------------------------------------------------------------

extern "C" __global__ void subtract_halves(u32* y, const u32* a, const u32* b, int n) {
#if __CUDA_ARCH__ >= 750
    if (item() < n) y[item()] = sub_f16x2(a[item()], b[item()]);
#endif
}

extern "C" __global__ void double_halves(u32* y, const u32* x, int n) {
    if (item() < n) y[2 * item()] = lower_twice(x[item()]), y[2 * item() + 1] = upper_twice(x[item()]);
}

extern "C" __global__ void fuse_halves(u32* y, const u32* a, const u32* b, const u32* c, int n) {
#if __CUDA_ARCH__ >= 750
    if (item() < n) y[item()] = fma_f16x2(a[item()], b[item()], c[item()]);
#endif
}

extern "C" __global__ void pair_words(u32* pairs, const u32* words, int n) {
#if __CUDA_ARCH__ >= 750
    if (item() >= n) return;
    u32 of_word[PER_WORD<CODES> / 2];
    to_pairs(of_word, words[item()], CODES{});
    for (int i = 0; i < PER_WORD<CODES> / 2; i++) pairs[item() * PER_WORD<CODES> / 2 + i] = of_word[i];
#endif
}

extern "C" __global__ void pair_zipped(u32* pairs, const u32* words, int n) {
#if __CUDA_ARCH__ >= 750
    if (item() >= n) return;
    for (int half = 0; half < 2; half++) {
        u32 of_half[PER_WORD<CODES> / 2];
        const u32 both = zip<CODES>(words[2 * item()], words[2 * item() + 1], half);
        to_pairs(of_half, both, CODES{});
        for (int i = 0; i < PER_WORD<CODES> / 2; i++) {
            pairs[item() * PER_WORD<CODES> + half * PER_WORD<CODES> / 2 + i] = of_half[i];
        }
    }
#endif
}

template <typename T> struct Split {  // fp8 kinds have none
    static __device__ void run(u32*, float*, const float*) {}
};
template <typename T> struct SplitHalves {
    static __device__ void run(u32* halves, float* rest, const float* x) {
        float two[2] = {x[0], x[1]};
        *halves = split_halves<T>(two);
        rest[0] = two[0], rest[1] = two[1];
    }
};
template <> struct Split<f16> : SplitHalves<f16> {};
template <> struct Split<bf16> : SplitHalves<bf16> {};

extern "C" __global__ void split_floats(u32* halves, float* rest, const float* x, int n) {
    if (item() < n) Split<KIND>::run(halves + item(), rest + 2 * item(), x + 2 * item());
}
