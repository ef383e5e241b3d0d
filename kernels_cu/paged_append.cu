// paged_append.cu: write new key and value rows into a paged KV pool.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/paged_append.py):
//   k_pool, v_pool          [N, P, H, D]  KV_T, updated in place
//   k, v             const  [T, H, D]     NEW_T, new rows; token strides k_stride, v_stride elements
//   slots            const  [T] int32     page * P + offset; negative: skip the row
// Defines:  NEW_T, KV_T = float, f16 or bf16; ROW = H * D elements, a multiple of 8
// Launch:   grid (T), block (128), no shared memory; one block moves one K and one V row
// Traffic:  2 * T * ROW * (sizeof(NEW_T) + sizeof(KV_T)) + 4 * T bytes
// Order:    no atomics; bit-exact, rounds to nearest even where the types differ; two equal slots leave either row
#include "common.cuh"

#if !defined(NEW_T) || !defined(KV_T) || !defined(ROW)
#error "paged_append.cu needs NEW_T, KV_T and ROW = H * D"
#endif
static_assert(ROW % 8 == 0, "rows move in pieces of eight elements");

extern "C" __global__ void __launch_bounds__(128)
paged_append(KV_T* __restrict__ k_pool, KV_T* __restrict__ v_pool,
             const NEW_T* __restrict__ k, const NEW_T* __restrict__ v,
             const int* __restrict__ slots, i64 k_stride, i64 v_stride) {
    const i64 slot = slots[blockIdx.x];
    if (slot < 0) return;  // padding row of a captured graph

    const i64 dst = slot * ROW;  // 64 bits: pools pass 2^31 elements
    const NEW_T* k_row = k + blockIdx.x * k_stride;
    const NEW_T* v_row = v + blockIdx.x * v_stride;
    for (int i = threadIdx.x * 8; i < ROW; i += blockDim.x * 8) {
        move8(k_pool + dst + i, k_row + i);
        move8(v_pool + dst + i, v_row + i);
    }
}
