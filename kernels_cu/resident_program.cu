// resident_program.cu: tokens of a few sequences, one after another in one launch: phases of a model's
// step, and between two tokens what the host else does: it draws, ends sequences and tells the host.
//
// Arrays (letters as in pykv/ops/resident_program.py):
//   program, counters   as of phase_program.cu; the phases leave `peaks`
//   ids, positions, slots, lengths
//                       [T] int each, what the phases read of a token; of the next one behind it. A
//                       sequence that has ended has length 0 and slot -1
//   control             [4] u32: the numbers of the first result and of the first command, tokens of
//                       the launch at most, and whether a token follows, which the kernel says
//   host                u64, pinned memory of the host (host_ring.cuh): commands {STOP, row, 0 ...},
//                       {GRANT, tokens, 0 ...}, so many more, and {PAGES, row, place, count, pages}, up
//                       to 4, for entries of `page_table` from that place on, which no length reaches
//                       yet; a result for each token, of whose words i is that of sequence i: the
//                       token in its low 24 bits, a `Why` in its high 8
//   told                [RING_SLOTS, T, W] u64, pinned memory of the host: in the low halves what
//                       phases have left in `found` of each result; null where W = 0
//   page_table          [T, M] int, -1 where a sequence has no page
//   peaks        const  [T] int, the token drawn for each, -1 where logits are not finite
//   found        const  [T, W] int, what phases found of the tokens beside; null where W = 0
//   limits       const  [T] int, tokens of prompt and answer together at most
//   ends         const  [T, E] int, tokens that end a sequence; -1 is none
// Scalars:  phases as of phase_program.cu; T <= 8; M; P = tokens of a page; E; W; limit = ns of silence
//           of the host after which the kernel ends behind a token
// Defines:  those of phase_program.cu; RING_SLOTS = slots of either ring, a power of two, and results
//           that the host has granted and not read at most: the kernel waits for nobody to read them
// Launch:   as of phase_program.cu
// Traffic:  that of the phases for each token
// Order:    as of phase_program.cu
// Stack: 104 bytes, on sm_80, for the reason that phase_program.cu has
#include "host_ring.cuh"
#include "phase_program.cuh"

enum Command { STOP = 1, GRANT = 2, PAGES = 3 };
// Of a sequence behind a token: it goes on, or its row is nobody's from now on.
enum Why { NEXT, ENDED, FULL, OUT_OF_PAGES, TAKEN_BACK, NOT_FINITE, NOBODY };
constexpr int TOKEN_BITS = 24;
enum Control { NUMBER, COMMAND, TOKENS, GOES_ON };

#if __CUDA_ARCH__ >= 700
// What the first warp of the first block keeps from token to token.
struct Talk {
    u64 beat, heard;
    u32 number, command, left;  // of the next result and command; tokens, with the one under way
};

// What the kernel is given, beside phases.
struct Sequences {
    int *ids, *positions, *slots, *lengths;
    u32* control;
    u64 *host, *told;
    int* page_table;
    const int *peaks, *found, *limits, *ends;
    int T, M, P, E, W;
};

// What the host says; a bit of `stopped` for each sequence that it stops.
__device__ __forceinline__ State listen(u32& stopped, Talk& talk, const Sequences& s, u64 limit) {
    constexpr int PAGE_WORD = 4;  // of a command, the first that is a page
    u64 beat = talk.beat, heard = talk.heard;
    u32 payload, command = talk.command, granted = 0;
    State state;
    while ((state = look(payload, beat, heard, s.host, command, limit)) == RUNNING) {
        const u32 kind = __shfl_sync(FULL_MASK, payload, 0), row = __shfl_sync(FULL_MASK, payload, 1);
        const u32 place = __shfl_sync(FULL_MASK, payload, 2), count = __shfl_sync(FULL_MASK, payload, 3);
        const u32 i = threadIdx.x - PAGE_WORD;
        if (kind == STOP && row < WARP) stopped |= 1u << row;
        if (kind == GRANT) granted += row;
        if (kind == PAGES && row < (u32)s.T && i < min(count, (u32)(SLOT_WORDS - PAGE_WORD)) &&
            place + i < (u32)s.M) {
            s.page_table[row * s.M + place + i] = (int)payload;
        }
        command++;
    }
    __syncwarp();
    if (threadIdx.x == 0) {
        if (command != talk.command) store_host(s.host + TAKEN, command - s.control[COMMAND]);
        talk.beat = beat;
        talk.heard = heard;
        talk.command = command;
        talk.left += granted;
    }
    __syncwarp();
    return state;
}

// What follows a token for the sequence of a lane.
__device__ __forceinline__ Why why_of(int peak, int length, bool is_stopped, bool is_last, int limit,
                                      const int* ends, int E, int page) {
    if (is_stopped) return TAKEN_BACK;
    if (peak < 0) return NOT_FINITE;
    for (int e = 0; e < E; e++) {
        if (ends[e] == peak) return ENDED;
    }
    if (length + 1 >= limit) return FULL;
    return page < 0 && !is_last ? OUT_OF_PAGES : NEXT;
}

// A warp makes the inputs of the next token and tells the host of this one; a lane for each sequence.
__device__ __forceinline__ void advance(Talk& talk, State state, u32 stopped, const Sequences& s) {
    const int lane = threadIdx.x;
    const int length = lane < s.T ? s.lengths[lane] : 0;  // with this token
    const bool is_last = talk.left == 1;
    int token = 0, page = -1;
    Why why = NOBODY;
    if (length > 0) {
        token = s.peaks[lane];
        if (length / s.P < s.M) page = s.page_table[lane * s.M + length / s.P];
        why = why_of(token, length, stopped >> lane & 1, is_last, s.limits[lane], s.ends + lane * s.E, s.E,
                     page);
    }
    const bool goes_on = why == NEXT;
    if (lane < s.T) {
        s.ids[lane] = goes_on ? token : 0;
        s.positions[lane] = goes_on ? length : 0;
        s.slots[lane] = goes_on && page >= 0 ? page * s.P + length % s.P : -1;
        s.lengths[lane] = goes_on ? length + 1 : 0;
    }
    const bool lacks_page = __any_sync(FULL_MASK, why == OUT_OF_PAGES);
    if (!__any_sync(FULL_MASK, goes_on) && !lacks_page) state = OVER;
    if (state == STARTING) state = lacks_page ? NO_PAGES : is_last ? SPENT : RUNNING;
    u64* const told = s.told + (i64)(talk.number % RING_SLOTS) * s.T * s.W;
    for (int i = lane; i < s.T * s.W; i += WARP) store_host(told + i, (u32)s.found[i]);
    __syncwarp();            // the lanes that post the result order what all have stored
    __threadfence_system();  // that, and rows of this token, ahead of the result
    post_result(s.host, talk.number, (u32)why << TOKEN_BITS | (why < TAKEN_BACK ? token : 0));
    if (state != RUNNING) post_state(s.host, state);
    __syncwarp();
    if (lane == 0) {
        s.control[GOES_ON] = state == RUNNING;
        talk.number++;
        talk.left--;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
resident_program(const u64* program, u32* counters, int* ids, int* positions, int* slots, int* lengths,
                 u32* control, u64* host, u64* told, int* page_table, const int* peaks,
                 const int* found, const int* limits, const int* ends, int phases, int T, int M, int P,
                 int E, int W, u64 limit) {
    extern __shared__ __align__(128) float staged[];
    __shared__ Shared shared;
    __shared__ __align__(16) Phase held[2];
    __shared__ Talk talk;
    const bool talks = blockIdx.x == 0 && threadIdx.x < WARP;
    const Sequences sequences{ids, positions, slots, lengths, control, host, told, page_table, peaks,
                              found, limits, ends, T, M, P, E, W};
    if (talks) {
        if (threadIdx.x == 0) {
            talk = {~0ull, 0, control[NUMBER], control[COMMAND], control[TOKENS]};
        }
        post_state(host, RUNNING);
    }
    ask_for(held[0], program, 0);
    int over = 0;
    for (bool goes_on = true; goes_on;) {
        over = run_phases(held, staged, shared, program, counters, phases, over);
        __syncthreads();
        grid_arrive(counters);
        ask_for(held[0], program, 0);
        u32 stopped = 0;
        State state = STARTING;
        if (talks) state = listen(stopped, talk, sequences, limit);  // while others are waited for
        grid_wait(counters, ++over);
        if (talks) advance(talk, state, stopped, sequences);
        __syncthreads();
        grid_arrive(counters);
        grid_wait(counters, ++over);
        goes_on = control[GOES_ON];
    }
    cp_async_wait<0>();
    grid_leave(counters);
}
#else
extern "C" __global__ void
resident_program(const u64* program, u32* counters, int* ids, int* positions, int* slots, int* lengths,
                 u32* control, u64* host, u64* told, int* page_table, const int* peaks,
                 const int* found, const int* limits, const int* ends, int phases, int T, int M, int P,
                 int E, int W, u64 limit) {}
#endif
