// prefill_stage.cuh: prefill_mma's copies to shared memory, and the dequantization of a tile.
#include "prefill_config.cuh"
#include "ptx.cuh"
#include "vector.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

constexpr int COPIES_AT_ONCE = Q_IS_16BIT ? 8 : 1;  // 32-bit queries leave no registers for more

// Starts the copies of this warp's rows of a tile, codes unconverted. Lane i passes in `offset`
// where row i % WARP_KEYS begins, in elements; `even`: rows are `stride` apart.
template <typename T>
__device__ __forceinline__ void copy_rows(u8* to, const T* pool, i64 offset, i64 stride, bool even) {
    constexpr bool IS_RAW = LARGEST<T> > 0.0f;
    constexpr int CHUNK = RAW_BYTES<T> % 16 == 0 ? 16 : 8, CHUNKS = RAW_BYTES<T> / CHUNK;
    constexpr int COUNT = WARP_KEYS * CHUNKS;
    const int lane = opaque(threadIdx.x % WARP), mine = threadIdx.x / WARP * WARP_KEYS;
    const auto place = [&](int row, int chunk) {
        return IS_RAW ? row * RAW_BYTES<T> + chunk * CHUNK : Halves::place(row, chunk);
    };
    const auto copy = [&](int at, int chunk, const T* from) {
        cp_async<CHUNK>(to + at, (const u8*)from + chunk * CHUNK);
    };
    if (WARP % CHUNKS == 0 && even) {  // the usual case; addresses by addition save registers
        const int row = lane / CHUNKS, chunk = lane % CHUNKS;
        const int first = place(mine + row, chunk);
        const T* from = pool + (offset + (row - lane % WARP_KEYS) * stride);
#pragma unroll COPIES_AT_ONCE
        for (int step = 0; step < COUNT; step += WARP) {
            const int rows = step / CHUNKS;
            const int at = IS_RAW ? first + rows * RAW_BYTES<T> : Halves::further(first, rows);
            if (COUNT % WARP == 0 || step + lane < COUNT) copy(at, chunk, from);
            from += WARP / CHUNKS * stride;
        }
    } else {
#pragma unroll 1
        for (int step = 0; step < COUNT; step += WARP) {
            const int row = (step + lane) / CHUNKS, chunk = (step + lane) % CHUNKS;
            const T* from = pool + __shfl_sync(FULL_MASK, offset, row % WARP_KEYS);
            const int at = place(mine + row, chunk);
            if (COUNT % WARP == 0 || step + lane < COUNT) copy(at, chunk, from);
        }
    }
}

template <typename T> __device__ __forceinline__ void decode_tile(u8* tile, const u8* raw) {
    if constexpr (LARGEST<T> > 0.0f) {
        constexpr int EIGHTS = D / 8, STEP = THREADS / EIGHTS;  // eights of a row; rows at a time
        constexpr int BYTES = RAW_BYTES<T> / EIGHTS;
        const auto decode = [&](int place, const u8* from) {
            *(uint4*)(tile + place) = to_halves<T>(get8((const T*)from));
        };
        if constexpr (THREADS % EIGHTS == 0 && KEYS % STEP == 0) {
            const int first = Halves::place(threadIdx.x / EIGHTS, threadIdx.x % EIGHTS);
#pragma unroll
            for (int row = 0; row < KEYS; row += STEP) {
                decode(Halves::further(first, row), raw + (row * EIGHTS + threadIdx.x) * BYTES);
            }
        } else {
#pragma unroll 2
            for (int i = threadIdx.x; i < KEYS * EIGHTS; i += THREADS) {
                decode(Halves::place(i / EIGHTS, i % EIGHTS), raw + i * BYTES);
            }
        }
    }
}

#endif
