// contiguous_append.cu: write new key and value rows behind those of caches without pages.
//
// Arrays (letters as in pykv/ops/contiguous_append.py); strides are counted in elements of an array,
// the elements of a row are contiguous:
//   k_cache, v_cache         [S, C, H, DK | DV] K_T, V_T, in place: strides slot, token, head
//   k, v              const  [B, T, H, DK | DV] NEW_T: strides batch, token, head
//   lengths                  [S] LENGTH_T  tokens of each slot before the call
//   slots             const  [B] int       the slot of each batch row; null: b. Negative: skip it
//   inv_freq          const  [F] float     radians per position, for K rows; null where F is 0
// Scalars:  pair j of a K row is its elements j * step and j * step + gap, as in rope.cu
// Defines:  NEW_T, K_T, V_T = float, f16 or bf16; LENGTH_T = int or i64; K_DIM = DK, V_DIM = DV,
//           multiples of 8; HEADS = H; ADVANCE = 0 or 1; BLOCK = threads, LANES of which share a row
// Launch:   contiguous_append: block (BLOCK), no dynamic shared memory, grid (T * H / (BLOCK /
//           LANES) rounded up, B); with ADVANCE, for T = 1, grid (1, B)
//           advance_lengths: block (BLOCK), grid (B / BLOCK rounded up)
// Traffic:  B * T * H * (DK * (sizeof(NEW_T) + sizeof(K_T)) + DV * (sizeof(NEW_T) + sizeof(V_T)))
// Order:    no atomics; rows that are not rotated are bit-exact; two batch rows of one slot leave
//           either
// Skipped:  rows whose position is at least C, or whose slot has a negative length
#include "rotary.cuh"
#include "vector.cuh"

#if !defined(NEW_T) || !defined(K_T) || !defined(V_T) || !defined(LENGTH_T) || !defined(HEADS)
#error "contiguous_append.cu needs NEW_T, K_T, V_T, LENGTH_T and HEADS"
#endif
#if !defined(K_DIM) || !defined(V_DIM) || !defined(ADVANCE) || !defined(BLOCK) || !defined(LANES)
#error "contiguous_append.cu needs K_DIM, V_DIM, ADVANCE, BLOCK and LANES"
#endif
constexpr int H = HEADS, GROUPS = BLOCK / LANES;
static_assert(K_DIM % 8 == 0 && V_DIM % 8 == 0, "rows move in pieces of eight elements");
static_assert(WARP % LANES == 0 && BLOCK % WARP == 0, "whole warps of whole groups");

// The lanes of a group move N elements from the `first` on.
template <int N, typename To>
__device__ __forceinline__ void move_row(To* to, const NEW_T* from, int first) {
    if (first % 8 == 0) {
#pragma unroll 4
        for (int i = first + (int)(threadIdx.x % LANES) * 8; i < N; i += LANES * 8) {
            *reinterpret_cast<Eight<To>*>(to + i) = convert8<To>(get8(from + i));
        }
        return;
    }
    for (int i = first + (int)(threadIdx.x % LANES); i < N; i += LANES) {
        to[i] = from_float<To>(to_float(from[i]));
    }
}

// They rotate F pairs by `position`, and move what stays.
__device__ __forceinline__ void rotate_row(K_T* to, const NEW_T* from, double position,
                                           const float* inv_freq, int F, int step, int gap) {
    for (int j = threadIdx.x % LANES; j < F; j += LANES) {
        float sine, cosine;
        sin_cos(position * inv_freq[j], sine, cosine);
        const float a = to_float(from[j * step]), b = to_float(from[j * step + gap]);
        to[j * step] = from_float<K_T>(a * cosine - b * sine);
        to[j * step + gap] = from_float<K_T>(a * sine + b * cosine);
    }
    move_row<K_DIM>(to, from, 2 * F);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
contiguous_append(K_T* __restrict__ k_cache, V_T* __restrict__ v_cache,
                  const NEW_T* __restrict__ k, const NEW_T* __restrict__ v,
                  LENGTH_T* __restrict__ lengths, const int* __restrict__ slots,
                  const float* __restrict__ inv_freq,
                  i64 k_cache_slot, i64 k_cache_token, i64 k_cache_head,
                  i64 v_cache_slot, i64 v_cache_token, i64 v_cache_head,
                  i64 k_batch, i64 k_token, i64 k_head, i64 v_batch, i64 v_token, i64 v_head,
                  int num_rows, int capacity, int F, int step, int gap) {
    const int slot = slots ? slots[blockIdx.y] : (int)blockIdx.y;
    if (slot < 0) return;
    const i64 length = lengths[slot];
    if (length < 0) return;
    // With ADVANCE the rows of one token, which a block has all to itself.
    for (int row = blockIdx.x * GROUPS + threadIdx.x / LANES; row < num_rows; row += GROUPS) {
        const i64 token = row / H, head = row % H;
        if (token < capacity - length) {  // a sum with any length may overflow
            const i64 position = length + token;
            const NEW_T* from = k + blockIdx.y * k_batch + token * k_token + head * k_head;
            K_T* to = k_cache + slot * k_cache_slot + position * k_cache_token +
                      head * k_cache_head;
            if (F > 0) {
                rotate_row(to, from, (double)position, inv_freq, F, step, gap);
            } else {
                move_row<K_DIM>(to, from, 0);
            }
            move_row<V_DIM>(
                v_cache + slot * v_cache_slot + position * v_cache_token + head * v_cache_head,
                v + blockIdx.y * v_batch + token * v_token + head * v_head, 0);
        }
        if (!ADVANCE) break;
    }
    if constexpr (ADVANCE) {
        __syncthreads();  // all threads have read the length
        if (threadIdx.x == 0 && length < capacity) lengths[slot] = length + 1;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
advance_lengths(LENGTH_T* lengths, const int* slots, int B, int T, int capacity) {
    const int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= B) return;
    const int slot = slots ? slots[b] : b;
    if (slot < 0) return;
    const i64 length = lengths[slot];
    if (length >= 0 && length < capacity) {
        lengths[slot] = (LENGTH_T)min(length + T, (i64)capacity);
    }
}
