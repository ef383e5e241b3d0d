// machine.hpp: CUDA's built-ins for a C++17 compiler, so that kernels_cu/<stem>.cu runs on a CPU.
//
// tests/simt/machine.py puts this file before the text of pykv.cuda.source(stem) and compiles both
// with -fsanitize=thread and -fsanitize=undefined. Neither sanitizer's library is linked: the
// compiler's calls before each memory access and after each failed check land in machine.cpp,
// which knows every array and every thread. A thread is a fibre that runs until it waits for
// others; hence the site (file and line) that every waiting function takes from its caller.
#pragma once
#include <string.h>

#include <typeinfo>

// --- Declarations and types ----------------------------------------------------------------------

// machine.py finds kernels by __global__ and __launch_bounds__, and takes these away.
#define PYKV_SIMT
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("simt_shared")))  // machine.py handles extern ones

struct uint3 { unsigned x, y, z; };
using dim3 = uint3;
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- The machine ---------------------------------------------------------------------------------

// C's functions, by declarations: libstdc++'s <math.h> takes longer to read than most kernels to
// compile. A kernel that needs another one does not compile until it stands here.
extern "C" {
float ceilf(float), expf(float), exp2f(float), fabsf(float), floorf(float), log2f(float);
float logf(float), rintf(float), sqrtf(float), tanhf(float);
float fmaf(float, float, float), fmaxf(float, float), fminf(float, float);
float nextafterf(float, float);
double fabs(double), fma(double, double, double), rint(double);
}
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline int abs(int x) { return x < 0 ? -x : x; }

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {
constexpr int WARP = 32;
constexpr int VALUE_BYTES = 64;  // the most that one lane hands to the others at once

// Constant for a thread, so the compiler may keep what they return.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();
__attribute__((const)) int lane();
__attribute__((const)) char* dynamic_shared();

// All live threads of the block meet; returns how many of them brought `predicate`.
int meet_block(const char* name, bool predicate, const char* file, int line);

// The lanes of `mask` meet; returns what each of them brought. Entries of other lanes are stale.
const char (*meet_lanes(const char* name, unsigned mask, const void* value, int bytes,
                        const char* file, int line))[VALUE_BYTES];

unsigned converged_lanes(const char* name, const char* file, int line);  // who waits at this site
void order_memory();  // of the lanes that have just met

// Accesses to words that other blocks, or the host, touch meanwhile. `poll` comes before a load: a
// thread that has loaded the word before hands over to the others until something has changed.
enum { LOADS = 1, STORES = 2 };    // kinds
enum { ACQUIRE = 1, RELEASE = 2 };  // orders, of which 0 is relaxed
void poll(const void* address, const char* name, const char* file, int line);
void strong_access(const void* address, int bytes, int kind, int order, const void* caller);
void atomic_access(const void* address, int bytes, int order, const void* caller);
void fence();  // of the GPU or the system
unsigned long long global_timer();

// The barrier of all live threads of the cluster's blocks, in two steps that follow each other; a
// warp's lanes take each together.
void arrive_at_cluster(const char* name, const char* file, int line);
void wait_for_cluster(const char* name, const char* file, int line);

// Where the block of that rank holds what this block holds at `shared`; for reads alone.
const void* map_shared_rank(const void* shared, unsigned rank, const char* name, const char* file,
                     int line);

// For instructions of one state space: stops where `at` lies in the other.
void require_space(const void* at, bool is_shared);

// Asynchronous copies of this thread. The target is poison, and nobody's to touch, until the thread
// has waited until at most `groups` of its committed groups are left.
void copy_later(void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int groups);

// Barriers in shared memory whose phases count arrivals and bytes of copies; `parity` is that of a phase.
void make_mbarrier(const void* at, unsigned arrivals, const char* file, int line);
void arrive_at_mbarrier(const void* at, unsigned bytes);
void arrive_behind_copies(const void* at);
void copy_in_bulk(void* to, const void* from, unsigned bytes, const void* at);
void wait_for_mbarrier(const void* at, unsigned parity, const char* file, int line);

void await_previous();  // what a kernel that starts early does ahead of all that the launch writes

// Products of a warpgroup (wgmma), which go on beside this thread. They read shared memory that
// was written ahead of a fence of the writing thread, and that nobody writes again before the thread
// has waited until at most `groups` of its committed groups are left. Until then `sums` is poison, and
// nobody's to touch; before the first product it takes a fence.
void fence_proxy();
void fence_products();
float* sums_later(float* sums, int count, const char* file, int line);
void read_later(const void* at, int bytes, const char* file, int line);
void hold_later(const void* registers, int bytes);  // operands that nobody writes until then, either
void commit_products();
void wait_for_products(int groups);

[[noreturn]] void fail_shuffle(const char* name, unsigned mask, int from, const char* file,
                               int line);

template <class T>
const T value_of(const char (*values)[VALUE_BYTES], int lane) {
    static_assert(sizeof(T) <= VALUE_BYTES, "fits a lane's slot");
    T x;
    memcpy(&x, values[lane], sizeof x);
    return x;
}

template <class T>
T shuffle(const char* name, unsigned mask, const T& mine, int from, const char* file, int line) {
    const auto values = meet_lanes(name, mask, &mine, sizeof mine, file, line);
    if (!(mask >> from & 1)) fail_shuffle(name, mask, from, file, line);
    return value_of<T>(values, from);
}

// Folds what the lanes of `mask` hold, in the order of the lanes.
template <class T, class Fold>
T reduce(const char* name, unsigned mask, const T& mine, Fold fold, const char* file, int line) {
    const auto values = meet_lanes(name, mask, &mine, sizeof mine, file, line);
    T total = value_of<T>(values, __builtin_ctz(mask));
    for (int i = __builtin_ctz(mask) + 1; i < WARP; i++) {
        if (mask >> i & 1) total = fold(total, value_of<T>(values, i));
    }
    return total;
}

template <class T>
__attribute__((no_sanitize("thread"))) inline T strong_load(const T* at, int order) {
    strong_access(at, sizeof(T), LOADS, order, __builtin_return_address(0));
    return *const_cast<const volatile T*>(at);
}

template <class T>
__attribute__((no_sanitize("thread"))) inline void strong_store(T* at, T x, int order) {
    strong_access(at, sizeof(T), STORES, order, __builtin_return_address(0));
    *const_cast<volatile T*>(at) = x;
}

template <class T, class Change>
__attribute__((no_sanitize("thread"))) inline T atomic(T* at, Change change, int order = 0) {
    atomic_access(at, sizeof(T), order, __builtin_return_address(0));
    const T old = *at;
    *at = change(old);
    return old;
}

template <int... I> struct Numbers {};  // those below N; <utility>'s take 50 ms to read
template <int N, int... I> struct NumbersBelow : NumbersBelow<N - 1, N - 1, I...> {};
template <int... I> struct NumbersBelow<0, I...> : Numbers<I...> {};

// How machine.py calls a kernel, and what it may know of its parameters.
template <class... P>
struct Signature {
    static const char* name(int i) {
        const char* names[] = {typeid(P).name()..., nullptr};
        return names[i];
    }
    template <int... I>
    __attribute__((no_sanitize("thread")))
    static void call(void (*kernel)(P...), void** values, Numbers<I...>) {
        kernel(*static_cast<P*>(values[I])...);
    }
    static void call(void (*kernel)(P...), void** values) {
        call(kernel, values, NumbersBelow<sizeof...(P)>());
    }
};
template <class... P> Signature<P...> signature(void (*)(P...)) { return {}; }
constexpr int max_threads(int threads = 1024, int = 0) { return threads; }
}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
#define warpSize 32

// --- Barriers and fences -------------------------------------------------------------------------

inline void __syncthreads(SIMT_SITE) { simt::meet_block("__syncthreads", false, file, line); }
inline int __syncthreads_count(int predicate, SIMT_SITE) {
    return simt::meet_block("__syncthreads_count", predicate, file, line);
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
    return simt::meet_block("__syncthreads_or", predicate, file, line) > 0;
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
    return simt::meet_block("__syncthreads_and", !predicate, file, line) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) {
    simt::meet_lanes("__syncwarp", mask, "", 0, file, line);
    simt::order_memory();
}
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() {}  // tells other blocks nothing
inline void __threadfence_system() { simt::fence(); }

// --- Warp functions ------------------------------------------------------------------------------

template <class T> T __shfl_sync(unsigned mask, T x, int from, int width = 32, SIMT_SITE) {
    from = (simt::lane() & -width) | (from & (width - 1));
    return simt::shuffle("__shfl_sync", mask, x, from, file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned step, int width = 32, SIMT_SITE) {
    const int lane = simt::lane(), first = lane & -width, from = lane - (int)step;
    return simt::shuffle("__shfl_up_sync", mask, x, from < first ? lane : from, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned step, int width = 32, SIMT_SITE) {
    const int lane = simt::lane(), last = lane | (width - 1), from = lane + (int)step;
    return simt::shuffle("__shfl_down_sync", mask, x, from > last ? lane : from, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int flip, int width = 32, SIMT_SITE) {
    const int lane = simt::lane(), last = lane | (width - 1), from = lane ^ flip;
    return simt::shuffle("__shfl_xor_sync", mask, x, from > last ? lane : from, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
    const unsigned mine = predicate ? 1u << simt::lane() : 0;
    return simt::reduce(
        "__ballot_sync", mask, mine, [](unsigned a, unsigned b) { return a | b; }, file, line);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
    return __ballot_sync(mask, predicate, file, line) == mask;
}
inline unsigned __activemask(SIMT_SITE) {
    return simt::converged_lanes("__activemask", file, line);
}

template <class T> unsigned __match_any_sync(unsigned mask, T x, SIMT_SITE) {
    const auto values = simt::meet_lanes("__match_any_sync", mask, &x, sizeof x, file, line);
    unsigned same = 0;
    for (int i = 0; i < simt::WARP; i++) {
        same |= (mask >> i & 1 && !memcmp(values[i], &x, sizeof x)) ? 1u << i : 0;
    }
    return same;
}
template <class T> unsigned __match_all_sync(unsigned mask, T x, int* all, SIMT_SITE) {
    *all = __match_any_sync(mask, x, file, line) == mask;
    return *all ? mask : 0;
}

#define SIMT_REDUCE(op, T, expression)                                                           \
    inline T __reduce_##op##_sync(unsigned mask, T x, SIMT_SITE) {                               \
        return simt::reduce(                                                                     \
            "__reduce_" #op "_sync", mask, x, [](T a, T b) -> T { return expression; }, file,    \
            line);                                                                               \
    }
SIMT_REDUCE(add, unsigned, a + b)
SIMT_REDUCE(min, unsigned, a < b ? a : b)
SIMT_REDUCE(max, unsigned, a > b ? a : b)
SIMT_REDUCE(add, int, (int)((unsigned)a + (unsigned)b))
SIMT_REDUCE(min, int, a < b ? a : b)
SIMT_REDUCE(max, int, a > b ? a : b)
SIMT_REDUCE(and, unsigned, a & b)
SIMT_REDUCE(or, unsigned, a | b)
SIMT_REDUCE(xor, unsigned, a ^ b)
#undef SIMT_REDUCE

// --- Atomics: the old value comes back -----------------------------------------------------------

// Always inlined, because simt::atomic takes its caller for the place.
#define SIMT_ATOMIC(name, T, expression)                                  \
    __attribute__((always_inline)) inline T name(T* at, T x) {            \
        return simt::atomic(at, [x](T old) -> T { return expression; });  \
    }
#define SIMT_INTEGER_ATOMICS(T)                          \
    SIMT_ATOMIC(atomicExch, T, x)                        \
    SIMT_ATOMIC(atomicMin, T, x < old ? x : old)         \
    SIMT_ATOMIC(atomicMax, T, x > old ? x : old)         \
    SIMT_ATOMIC(atomicAnd, T, old & x)                   \
    SIMT_ATOMIC(atomicOr, T, old | x)                    \
    SIMT_ATOMIC(atomicXor, T, old ^ x)                   \
    __attribute__((always_inline)) inline T atomicCAS(T* at, T expected, T x) { \
        return simt::atomic(at, [=](T old) -> T { return old == expected ? x : old; }); \
    }
SIMT_INTEGER_ATOMICS(int)
SIMT_INTEGER_ATOMICS(unsigned)
SIMT_INTEGER_ATOMICS(unsigned long long)
SIMT_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)x))
SIMT_ATOMIC(atomicAdd, unsigned, old + x)
SIMT_ATOMIC(atomicAdd, unsigned long long, old + x)
SIMT_ATOMIC(atomicAdd, float, old + x)
SIMT_ATOMIC(atomicAdd, double, old + x)  // sm_60 and later
SIMT_ATOMIC(atomicExch, float, x)
SIMT_ATOMIC(atomicSub, int, (int)((unsigned)old - (unsigned)x))
SIMT_ATOMIC(atomicSub, unsigned, old - x)
SIMT_ATOMIC(atomicInc, unsigned, old >= x ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, unsigned, old == 0 || old > x ? x : old - 1)
#undef SIMT_INTEGER_ATOMICS
#undef SIMT_ATOMIC

// --- Arithmetic ----------------------------------------------------------------------------------

template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> void __stcs(T* at, T x) { *at = x; }

template <class To, class From> To simt_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline float __int_as_float(int x) { return simt_bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt_bits<double>(x); }

// Rounded to nearest even by themselves: the compiler is told not to fuse.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }  // NaN gives 0
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }

inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 32; i += 8) {  // three bits of each half byte count
        out |= (unsigned)(bytes >> 8 * (selector >> i / 2 & 7) & 0xff) << i;
    }
    return out;
}

#define SIMT_MIN_MAX(T)                                     \
    inline T min(T a, T b) { return b < a ? b : a; }        \
    inline T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

#include "ptx.hpp"
