// prefill_operands.cuh: prefill_mma's operands of ldmatrix: queries, keys and values in shared
// memory.
#include "batch.cuh"
#include "prefill_config.cuh"
#include "reduce.cuh"
#include "vector.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

// Stores this warp's queries to shared memory, rounded to terms. A factor applies the sign of the
// scale and, where f16 cannot hold every q, brings the largest of a row to 128 .. 256; `units` is
// its inverse.
__device__ __forceinline__ void load_queries(u8* to, float* units, const Q_T* q, i64 q_stride, int G,
                                             int kv_head, const RowBlock& rows, float sign) {
    constexpr int LANES = D <= 16 ? 2 : D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32;  // of a row
    const int chunk = threadIdx.x % LANES;
    const bool has_chunk = chunk < D / 8;
    const Q_T* first = q + rows.start * q_stride + (i64)kv_head * G * D + (has_chunk ? chunk * 8 : 0);
#pragma unroll 4
    for (int step = 0; step < WARP_ROWS * LANES / WARP; step++) {
        const int row = step * (WARP / LANES) + threadIdx.x % WARP / LANES;
        const int in_block = threadIdx.x / WARP * WARP_ROWS + row;
        const int in_group = rows.first_row + min(in_block, rows.num_rows - 1);
        float x[8];
        load8(x, first + in_group / G * q_stride + in_group % G * D);
        float factor = sign;
        if constexpr (!Q_IS_EXACT) {
            u32 largest[1] = {0};
#pragma unroll
            for (int i = 0; i < 8; i++) largest[0] = max(largest[0], __float_as_uint(x[i]) << 1 >> 1);
            group_max<LANES>(largest);
            const u32 exponent = max(largest[0] >> 23, 8u);
            factor *= __uint_as_float((261u - exponent) << 23);
            if (chunk == 0) units[in_block] = __uint_as_float((exponent - 7u) << 23);
        }
        u32 words[Q_TERMS][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float two[2] = {x[2 * i] * factor, x[2 * i + 1] * factor};
#pragma unroll
            for (int term = 0; term < Q_TERMS; term++) words[term][i] = split_halves<KM>(two);
        }
#pragma unroll
        for (int term = 0; term < Q_TERMS; term++) {
            const u32(&w)[4] = words[term];
            if (has_chunk) {
                *(uint4*)(to + Halves::place(term * WARP_ROWS + row, chunk)) =
                    make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
}

#endif
