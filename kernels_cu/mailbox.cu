// mailbox.cu: a kernel that stays on the GPU and takes jobs from the host, of the smallest kind.
//
// Arrays (letters as in pykv/ops/mailbox.py):
//   x      [R, N] float, contiguous; a job replaces the first n elements of a row by x * scale + bias,
//          `iterations` times
//   host   u64, pinned memory of the host (host_ring.cuh): commands {kind, row, n, iterations, scale,
//          bias, 0, 0}, scale and bias as bits of floats; results {verdict, ns, 0 ...}, one for each
//          command in their order, verdict DONE or REFUSED, ns of the GPU's clock for the job
// Scalars:  first = number of the first command; limit = ns of silence of the host after which the
//           kernel ends
// Defines:  BLOCK = threads; RING_SLOTS = slots of either ring, a power of two
// Launch:   grid (1), block (BLOCK), on a stream of its own that waits for no other
// Traffic:  a job reads and writes 4 * n bytes
// Order:    each product and sum is rounded
#include "host_ring.cuh"

#if !defined(BLOCK)
#error "mailbox.cu needs BLOCK"
#endif

enum Kind { STOP = 1, SCALE = 2 };
enum Verdict { DONE = 1, REFUSED = 2 };

extern "C" __global__ void __launch_bounds__(BLOCK)
mailbox(float* x, u64* host, u32 first, int R, int N, u64 limit) {
    __shared__ u32 command[SLOT_WORDS];
    __shared__ State told;
    const bool talks = threadIdx.x < WARP;
    const int lane = threadIdx.x % WARP;
    State state = RUNNING;
    post_state(host, state);
    u32 number = first;
    u64 beat = 0;
    for (; state == RUNNING; number++) {
        if (talks) {
            u32 payload;
            const State found = await_command(payload, beat, host, number, limit);
            if (lane < SLOT_WORDS) command[lane] = payload;
            if (lane == 0) told = found;
            __threadfence_system();  // to see what the host wrote to x ahead of the command
        }
        __syncthreads();
        state = told;
        if (state != RUNNING) break;
        const u32 kind = command[0], row = command[1], n = command[2], iterations = command[3];
        const float scale = __uint_as_float(command[4]), bias = __uint_as_float(command[5]);
        const u64 begin = global_timer();
        const bool is_stop = kind == STOP;
        const bool is_good = is_stop || (kind == SCALE && row < (u32)R && n <= (u32)N);
        if (is_good && !is_stop) {
            float* const at = x + (i64)row * N;
            for (int i = threadIdx.x; i < (int)n; i += BLOCK) {
                float value = at[i];
                for (u32 k = 0; k < iterations; k++) {
                    value = __fadd_rn(__fmul_rn(value, scale), bias);
                }
                at[i] = value;
            }
        }
        __syncthreads();
        if (talks) {
            __threadfence_system();  // so that the host sees x ahead of the result
            const u32 took = (u32)(global_timer() - begin), verdict = is_good ? DONE : REFUSED;
            post_result(host, number, lane == 0 ? verdict : lane == 1 ? took : 0);
        }
        if (is_stop) state = STOPPED;
    }
    post_state(host, state);
}
