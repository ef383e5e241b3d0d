// resident_program.cu: tokens of a few sequences, one after another in one launch: phases of a model's
// step, and between two tokens what the host else does: it draws, ends and starts sequences and tells
// the host.
//
// Arrays (letters as in pykv/ops/resident_program.py):
//   program, counters   as of phase_program.cu; the phases leave `peaks`
//   ids, positions, slots, lengths
//                       [T] int each, what the phases read of a token; of the next one behind it. A
//                       sequence that has ended has length 0 and slot -1
//   control             [4] u32: the numbers of the first result and of the first command, tokens of
//                       the launch at most, and whether a token follows, which the kernel says
//   host                u64, pinned memory of the host (host_ring.cuh): commands, which
//                       pykv/resident_commands.py describes; a result for each token, of whose words
//                       i is that of row i: from the lowest bit on the token in 24, a `Why` in 3, and
//                       in 5 how many sequences were started in the row before, modulo 32
//   told                [RING_SLOTS, T, W] u64, pinned memory of the host: in the low halves what
//                       phases have left in `found` of each result; null where W = 0
//   page_table          [T, M] int, -1 where a sequence has no page
//   peaks        const  [T] int, the token drawn for each, -1 where logits are not finite
//   found        const  [T, W] int, what phases found of the tokens beside; null where W = 0
//   limits              [T] int, tokens of prompt and answer together at most
//   ends                [T, E] int, tokens that end a sequence; -1 is none
//   params              [N] int, words that phases read of how tokens are drawn; null where N = 0
// Scalars:  phases as of phase_program.cu; T <= 8; M; P = tokens of a page; E; W; N; limit = ns of
//           silence of the host after which the kernel ends behind a token
// Defines:  those of phase_program.cu; RING_SLOTS = slots of either ring, a power of two, and results
//           that the host has granted and not read at most: the kernel waits for nobody to read them
// Launch:   as of phase_program.cu
// Traffic:  that of the phases for each token
// Order:    as of phase_program.cu
// Stack: 104 bytes, on sm_80, for the reason that phase_program.cu has
#include "host_ring.cuh"
#include "phase_program.cuh"

// PARAMS and START change what blocks read for a token under way, even in rows that nobody has.
enum Command { STOP = 1, GRANT, PAGES, ENDS, PARAMS, START };
// Of a sequence behind a token: it goes on, or its row is nobody's from now on.
enum Why { NEXT, ENDED, FULL, OUT_OF_PAGES, TAKEN_BACK, NOT_FINITE, NOBODY };
constexpr int TOKEN_BITS = 24, WHY_BITS = 3, MOST_ROWS = 8;
enum Control { NUMBER, COMMAND, TOKENS, GOES_ON };

#if __CUDA_ARCH__ >= 700
// What the first warp of the first block keeps from token to token.
struct Talk {
    u64 beat, heard;
    u32 number, command, left;  // of the next result and command; tokens, with the one under way
    u32 stopped;                // a bit for each row whose sequence the host stops
    u32 epochs[MOST_ROWS];      // of the sequences that rows have
};

// What the kernel is given, beside phases.
struct Sequences {
    int *ids, *positions, *slots, *lengths;
    u32* control;
    u64 *host, *told;
    int *page_table, *limits, *ends, *params;
    const int *peaks, *found;
    int T, M, P, E, W, N;
};

// A warp gives a row that nobody has to a sequence, whose words have come: {START, row, token, length,
// pages, ends, limit, epoch}. Lane `row` writes what it reads of the row's inputs.
__device__ __forceinline__ void start(Talk& talk, const Sequences& s, u32 payload) {
    const auto word = [&](int i) { return (int)__shfl_sync(FULL_MASK, payload, i); };
    const int lane = threadIdx.x, row = word(1), token = word(2), at = word(3) - 1;
    const int pages = word(4), ends = word(5), limit = word(6), epoch = word(7);
    int* const table = s.page_table + row * s.M;
    for (int i = pages + lane; i < s.M; i += WARP) table[i] = -1;  // the last one's, now of others
    for (int i = ends + lane; i < s.E; i += WARP) s.ends[row * s.E + i] = -1;
    if (lane != row) return;
    s.ids[row] = token;
    s.positions[row] = at;
    s.slots[row] = table[at / s.P] * s.P + at % s.P;
    s.lengths[row] = at + 1;
    s.limits[row] = limit;
    talk.epochs[row] = epoch;
}

// What the host says. While blocks compute a token, `is_between` false, this stops ahead of a command
// that must wait for them: then the state is RUNNING.
__device__ __forceinline__ State listen(Talk& talk, const Sequences& s, u64 limit, bool is_between) {
    constexpr int FIRST_WORD = 4;  // of a command that writes words of an array, of which it has 4
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
            stopped &= ~(1u << row);  // that was meant for the row's last one
        }
        command++;
        __syncwarp();  // the next one may read or write what other lanes have written
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

// What follows a token for the sequence of a lane.
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

// A warp makes the inputs of the next token and tells the host of this one; a lane for each row.
// `state` is what the host said.
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
    __syncwarp();  // all know who is stopped
    if (lane == 0) talk.stopped = 0;
    if (state == RUNNING) {
        state = STARTING;
        if (!is_last && !lacks_page) {  // else a sequence would have a row and no token of it
            __syncwarp();
            listen(talk, s, limit, true);  // the next token's look sees silence, too
            goes_on = lane < s.T && s.lengths[lane] > 0;
        }
    }
    if (!__any_sync(FULL_MASK, goes_on) && !lacks_page) state = OVER;
    if (state == STARTING) state = lacks_page ? NO_PAGES : is_last ? SPENT : RUNNING;
    u64* const told = s.told + (i64)(talk.number % RING_SLOTS) * s.T * s.W;
    for (int i = lane; i < s.T * s.W; i += WARP) store_host(told + i, (u32)s.found[i]);
    __syncwarp();            // the lanes that post the result order what all have stored
    __threadfence_system();  // that, and rows of this token, ahead of the result
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
        if (talks) state = listen(talk, sequences, limit, false);  // while others are waited for
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
