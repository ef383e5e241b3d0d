// phase_program.cu: the phases of a model's step, one after another, in one launch: embedding rows,
// products with weights, new rows of a KV cache, attention over its pages, the likeliest token.
//
// Arrays (letters as in pykv/ops/phase_program.py):
//   program   const  [PHASES, 66] u64: a `Phase` each, with addresses of the arrays that it reads
//                    and writes; 16-byte aligned
//   counters  [2] u32, zero before and behind a launch (grid_barrier.cuh)
// Scalars:  phases = PHASES
// Defines:  KINDS = one or more of F32, F16, BF16 and formats of planes.cuh, with commas between: kinds
//           of matrices; X_T, B_T, BLOCK, ROWS and OUTS as block_linear.cu has them for `gemv`; ROWS is
//           at least T. Programs with a cache: what paged_qkv.cu and paged_decode.cu need as well,
//           of which NEW_T and Q_T are X_T, and ATTENTION_BYTES of shared memory. Programs that draw
//           (phase_draw.cuh): DRAWS = 1
// Launch:   cooperative, grid up to what the GPU runs at once, block (BLOCK), dynamic shared memory the
//           most that a product takes (block_linear.cu), or ATTENTION_BYTES. From sm_70 on
// Traffic:  that of the phases
// Order:    that of the kernels which have these phases to themselves, whatever the grid is: the same
//           bits as theirs where they cut products and keys alike
// Stack: 72 bytes, of attention on sm_80, where the compiler keeps a thread to 128 registers so that two
//           blocks fit on an SM; 8 elsewhere, of weights that wait for a stage, of two kinds
#include "phase_program.cuh"

#if __CUDA_ARCH__ >= 700
extern "C" __global__ void __launch_bounds__(BLOCK)
phase_program(const u64* program, u32* counters, int phases) {
    extern __shared__ __align__(128) float staged[];
    __shared__ Shared shared;
    __shared__ __align__(16) Phase held[2];
    ask_for(held[0], program, 0);
    run_phases(held, staged, shared, program, counters, phases, 0);
    grid_leave(counters);
}
#else
extern "C" __global__ void phase_program(const u64* program, u32* counters, int phases) {}
#endif
