// product_chain.cu: many products, one after another, in one launch: a program of phases.
//
// Arrays (letters as in pykv/ops/product_chain.py):
//   program   const  [PHASES, 12] u64: for each phase, in the order of the fields of Phase, what `gemv`
//                    of block_linear.cu takes, with addresses of its arrays, and its stage
//   counters  [2] u32, zero before and behind a launch (grid_barrier.cuh)
// Scalars:  phases = PHASES
// Defines:  KIND = F32, F16, BF16 or a format of planes.cuh; it, X_T, B_T, BLOCK, ROWS and OUTS as
//           block_linear.cu has them for `gemv`; ROWS is at least T
// Launch:   cooperative, grid up to what the GPU runs at once, block (BLOCK), dynamic shared memory the
//           most that a phase takes: parts * ROWS * 4608 bytes. From sm_70 on
// Traffic:  that of the products
// Order:    that of the products, whatever the grid is: the same bits as theirs with the same `parts`
//
// Each phase has tiles, which blocks take in turn. Phases that need nothing of each other make a stage,
// behind which all blocks wait for each other; meanwhile the weights of a block's next tile are on
// their way into registers. No block may arrive for a stage before it has waited for the one ahead:
// the counter knows how many have arrived, not who.
#include "grid_barrier.cuh"
#include "plain.cuh"

#if !defined(KIND) || !defined(X_T) || !defined(B_T) || !defined(BLOCK) || !defined(ROWS) || \
    !defined(OUTS)
#error "product_chain.cu needs KIND, X_T, B_T, BLOCK, ROWS and OUTS"
#endif

using K = KIND;
constexpr int GROUP = 32;

#include "block_gemv.cuh"

// Numbers of 32 bits in pairs; the host packs the same (product_chain.py).
struct Phase {
    u64 out, x, w, bias, norm;
    i64 x_stride, out_stride;
    int T, O, I, W, parts, accumulate, gate;
    int stage;  // how many are over before, 0 of the first; it grows by 1 at most
    float eps;
    int tiles;
};
static_assert(sizeof(Phase) == 96, "twelve words");

#if __CUDA_ARCH__ >= 700
extern "C" __global__ void __launch_bounds__(BLOCK)
product_chain(const u64* program, u32* counters, int phases) {
    extern __shared__ __align__(128) float staged[];
    __shared__ WarpSums shared;
    int stage = 0;
    for (int i = 0; i < phases; i++) {
        const Phase& p = reinterpret_cast<const Phase*>(program)[i];
        bool waits = p.stage != stage;
        stage = p.stage;
        if (waits) grid_arrive(counters);
        const auto await = [&] {
            if (waits) {
                grid_wait(counters, stage);
            } else {
                __syncthreads();  // all have read what the block's last tile kept in shared memory
            }
            waits = false;
        };
        for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
            gemv_tile(staged, shared, reinterpret_cast<X_T*>(p.out), reinterpret_cast<const X_T*>(p.x),
                      reinterpret_cast<const u8*>(p.w), reinterpret_cast<const B_T*>(p.bias),
                      reinterpret_cast<const float*>(p.norm), p.T, p.O, p.I, p.W, p.x_stride,
                      p.out_stride, p.parts, p.accumulate, p.gate, p.eps, tile, 0, await);
        }
        if (waits) await();  // also without a tile
    }
    grid_leave(counters);
}
#else
extern "C" __global__ void product_chain(const u64* program, u32* counters, int phases) {}
#endif
