// resident_program.cu: a persistent decode loop: each token runs the phases of a model's step; between
// two tokens the kernel itself takes the drawn tokens, ends and starts sequences and reports to the
// host.
//
// Arrays (letters as in pykv/ops/resident_program.py):
//   program, counters   as of phase_program.cu; the phases write `peaks`
//   ids, positions, slots, lengths
//                       [T] int each, inputs of the phases; overwritten with those of the next token.
//                       A free row has length 0 and slot -1
//   control             [4] u32: numbers of the first result and of the first command, most tokens of
//                       the launch; the kernel writes whether another token follows
//   host                u64, pinned memory of the host (host_ring.cuh): commands, see
//                       pykv/programs/resident_commands.py, and a result for each token. Word i of a
//                       result is of row i: the token in the low 24 bits, a `Why` in 3, and in 5 the
//                       epoch, the number of sequences started in the row, modulo 32
//   told                [RING_SLOTS, T, W] u64, pinned memory of the host: `found` of each result, in
//                       the low halves; null where W = 0
//   page_table          [T, M] int, -1 where a sequence has no page
//   peaks        const  [T] int, the token drawn for each row, -1 where logits are not finite
//   found        const  [T, W] int, log probabilities of the phases; null where W = 0
//   limits              [T] int, most tokens of prompt and answer together
//   ends                [T, E] int, tokens that end a sequence; -1 is none
//   params              [N] int, sampling parameters that phases read; null where N = 0
// Scalars:  phases as of phase_program.cu; T <= 8; M; P = tokens of a page; E; W; N; limit = ns of
//           silence of the host after which the kernel ends at the next token
// Defines:  those of phase_program.cu; RING_SLOTS = slots of either ring, a power of two; at least the
//           results that the host has granted and not read, so that the kernel never waits for a reader
// Launch:   as of phase_program.cu
// Traffic:  that of the phases for each token
// Order:    as of phase_program.cu
// Stack: 104 bytes, on sm_80, for the reason given in phase_program.cu
#include "host_ring.cuh"
#include "phase_program.cuh"

// PARAMS and START change what blocks read for the token under way, even in free rows.
enum Command { STOP = 1, GRANT, PAGES, ENDS, PARAMS, START };
// NEXT: the sequence goes on; else its row is free from now on.
enum Why { NEXT, ENDED, FULL, OUT_OF_PAGES, TAKEN_BACK, NOT_FINITE, NOBODY };
constexpr int TOKEN_BITS = 24, WHY_BITS = 3, MOST_ROWS = 8;
enum Control { NUMBER, COMMAND, TOKENS, GOES_ON };

#if __CUDA_ARCH__ >= 700
// State that the first warp of the first block keeps from token to token.
struct Talk {
    u64 beat, heard;
    u32 number, command, left;  // of the next result, of the next command; tokens left, this one too
    u32 stopped;                // a bit for each row whose sequence the host stops
    u32 epochs[MOST_ROWS];      // of the rows' sequences
};

// Arguments of the kernel, besides the phases.
struct Sequences {
    int *ids, *positions, *slots, *lengths;
    u32* control;
    u64 *host, *told;
    int *page_table, *limits, *ends, *params;
    const int *peaks, *found;
    int T, M, P, E, W, N;
};

// A warp starts a sequence in a free row, by the command {START, row, token, length, pages, ends,
// limit, epoch}. Lane `row`, which later reads the row's inputs, writes them.
__device__ __forceinline__ void start(Talk& talk, const Sequences& s, u32 payload) {
    const auto word = [&](int i) { return (int)__shfl_sync(FULL_MASK, payload, i); };
    const int lane = threadIdx.x, row = word(1), token = word(2), at = word(3) - 1;
    const int pages = word(4), ends = word(5), limit = word(6), epoch = word(7);
    int* const table = s.page_table + row * s.M;
    for (int i = pages + lane; i < s.M; i += WARP) table[i] = -1;  // drop the last sequence's pages
    for (int i = ends + lane; i < s.E; i += WARP) s.ends[row * s.E + i] = -1;
    if (lane != row) return;
    s.ids[row] = token;
    s.positions[row] = at;
    s.slots[row] = table[at / s.P] * s.P + at % s.P;
    s.lengths[row] = at + 1;
    s.limits[row] = limit;
    talk.epochs[row] = epoch;
}

// Takes commands until none is left. While blocks compute a token (`is_between` is false), it stops
// ahead of a command that must wait for them, and returns RUNNING.
__device__ __forceinline__ State listen(Talk& talk, const Sequences& s, u64 limit, bool is_between) {
    constexpr int FIRST_WORD = 4;  // PAGES, ENDS and PARAMS have up to 4 words to write, from here on
    u64 beat = talk.beat, heard = talk.heard;
    u32 payload, command = talk.command, granted = 0, stopped = talk.stopped;
    State state;
    while ((state = look(payload, beat, heard, s.host, command, limit)) == RUNNING) {
        const u32 kind = __shfl_sync(FULL_MASK, payload, 0), row = __shfl_sync(FULL_MASK, payload, 1);
        const u32 place = __shfl_sync(FULL_MASK, payload, 2), count = __shfl_sync(FULL_MASK, payload, 3);
        const u32 i = threadIdx.x - FIRST_WORD;
        if (kind >= PARAMS && !is_between) break;
        if (kind == STOP && row < WARP) stopped |= 1u << row;
        if (kind == GRANT) granted += row;
        int* const words = kind == PAGES ? s.page_table : kind == ENDS ? s.ends : s.params;
        const int width = kind == PAGES ? s.M : kind == ENDS ? s.E : s.N;
        if (kind >= PAGES && kind <= PARAMS && row < (u32)s.T &&
            i < min(count, (u32)(SLOT_WORDS - FIRST_WORD)) && place + i < (u32)width) {
            words[row * width + place + i] = (int)payload;
        }
        if (kind == START && row < (u32)s.T) {
            start(talk, s, payload);
            stopped &= ~(1u << row);  // a STOP before was for the row's last sequence
        }
        command++;
        __syncwarp();  // the next command may access what other lanes have written
    }
    __syncwarp();
    if (threadIdx.x == 0) {
        if (command != talk.command) store_host(s.host + TAKEN, command - s.control[COMMAND]);
        talk.beat = beat;
        talk.heard = heard;
        talk.command = command;
        talk.left += granted;
        talk.stopped = stopped;
    }
    __syncwarp();
    return state;
}

// Whether the sequence of a lane goes on after a token.
__device__ __forceinline__ Why why_of(int peak, int length, bool is_stopped, int limit, const int* ends,
                                      int E, int page) {
    if (is_stopped) return TAKEN_BACK;
    if (peak < 0) return NOT_FINITE;
    for (int e = 0; e < E; e++) {
        if (ends[e] == peak) return ENDED;
    }
    if (length + 1 >= limit) return FULL;
    return page < 0 ? OUT_OF_PAGES : NEXT;
}

// A warp writes the inputs of the next token and reports this one to the host; one lane a row. `state`
// is the result of listen().
__device__ __forceinline__ void advance(Talk& talk, State state, const Sequences& s, u64 limit) {
    const int lane = threadIdx.x;
    const int length = lane < s.T ? s.lengths[lane] : 0;  // with this token
    const bool is_last = talk.left == 1, is_stopped = talk.stopped >> lane & 1;
    const u32 epoch = lane < s.T ? talk.epochs[lane] : 0;
    int token = 0, page = -1;
    Why why = NOBODY;
    if (length > 0) {
        token = s.peaks[lane];
        if (length / s.P < s.M) page = s.page_table[lane * s.M + length / s.P];
        why = why_of(token, length, is_stopped, s.limits[lane], s.ends + lane * s.E, s.E, page);
    }
    bool goes_on = why == NEXT;
    if (lane < s.T) {
        s.ids[lane] = goes_on ? token : 0;
        s.positions[lane] = goes_on ? length : 0;
        s.slots[lane] = goes_on ? page * s.P + length % s.P : -1;
        s.lengths[lane] = goes_on ? length + 1 : 0;
    }
    const bool lacks_page = __any_sync(FULL_MASK, why == OUT_OF_PAGES);
    __syncwarp();  // all lanes have read `stopped`
    if (lane == 0) talk.stopped = 0;
    if (state == RUNNING) {
        state = STARTING;
        if (!is_last && !lacks_page) {  // else no token follows for a sequence to start with
            __syncwarp();
            listen(talk, s, limit, true);  // silence is left to the next token's listen()
            goes_on = lane < s.T && s.lengths[lane] > 0;
        }
    }
    if (!__any_sync(FULL_MASK, goes_on) && !lacks_page) state = OVER;
    if (state == STARTING) state = lacks_page ? NO_PAGES : is_last ? SPENT : RUNNING;
    u64* const told = s.told + (i64)(talk.number % RING_SLOTS) * s.T * s.W;
    for (int i = lane; i < s.T * s.W; i += WARP) store_host(told + i, (u32)s.found[i]);
    __syncwarp();            // fences are cumulative: they order the stores of all lanes
    __threadfence_system();  // log probabilities and this token's rows before the result
    if (why >= TAKEN_BACK) token = 0;
    post_result(s.host, talk.number, epoch << (TOKEN_BITS + WHY_BITS) | (u32)why << TOKEN_BITS | token);
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
                 const int* found, int* limits, int* ends, int* params, int phases, int T, int M, int P,
                 int E, int W, int N, u64 limit) {
    extern __shared__ __align__(128) float staged[];
    __shared__ Shared shared;
    __shared__ __align__(16) Phase held[2];
    __shared__ Talk talk;
    const bool talks = blockIdx.x == 0 && threadIdx.x < WARP;
    const Sequences sequences{ids, positions, slots, lengths, control, host, told, page_table, limits,
                              ends, params, peaks, found, T, M, P, E, W, N};
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
        State state = STARTING;
        if (talks) state = listen(talk, sequences, limit, false);  // while other blocks arrive
        grid_wait(counters, ++over);
        if (talks) advance(talk, state, sequences, limit);
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
                 const int* found, int* limits, int* ends, int* params, int phases, int T, int M, int P,
                 int E, int W, int N, u64 limit) {}
#endif
