// host_ring.cuh: ring buffers in pinned memory, by which host and kernel exchange messages while the
// kernel runs (layout and the host's side: pykv/programs/host_rings.py).
//
// A slot is 8 words of 8 bytes. The low half of a word is payload, the high half the number of its
// message. Stores of a word are atomic, so a reader that finds the expected number in every word has
// the whole message, without a fence. Messages are numbered from 1 on, modulo 2^32; message n lies in
// slot n % RING_SLOTS. Data in GPU memory that a message refers to needs a system fence before the
// message.
#include "ptx.cuh"

#if !defined(RING_SLOTS)
#error "host_ring.cuh needs RING_SLOTS"
#endif
static_assert(RING_SLOTS > 0 && (RING_SLOTS & (RING_SLOTS - 1)) == 0, "numbers wrap around at a whole round");

constexpr int SLOT_WORDS = 8, LINE_WORDS = 16;  // each side writes its own line of 128 bytes
constexpr int BEAT = 0, ABORT = 1;              // the host's line: heartbeat; 1 ends the kernel
constexpr int STATE = LINE_WORDS, TAKEN = STATE + 1;  // the kernel's line: state; commands taken
constexpr int COMMANDS = 2 * LINE_WORDS, RESULTS = COMMANDS + RING_SLOTS * SLOT_WORDS;

enum State {
    STARTING = 0,  // result of a look that found nothing new
    RUNNING = 1, STOPPED = 2, SILENT = 3, ABORTED = 4,
    OVER = 5, SPENT = 6, NO_PAGES = 7,  // of resident_program.cu alone
};

// A warp polls once. Returns RUNNING if command `number` is complete (its words in lanes 0 to 7),
// SILENT if the heartbeat has stood still for `limit` ns, ABORTED, or STARTING if nothing is new.
// `beat` is the last heartbeat seen, `heard` the time of its last change.
__device__ __forceinline__ State look(u32& payload, u64& beat, u64& heard, const u64* host,
                                      u32 number, u64 limit) {
    const int lane = threadIdx.x % WARP;
    const bool has_word = lane < SLOT_WORDS;
    const u64 word = load_host(
        host + (has_word ? COMMANDS + (int)(number % RING_SLOTS) * SLOT_WORDS + lane
                         : lane % 2 ? ABORT : BEAT));
    const u64 now = global_timer();
    payload = (u32)word;
    if (__any_sync(FULL_MASK, !has_word && lane % 2 && word != 0)) return ABORTED;
    if (__all_sync(FULL_MASK, !has_word || (u32)(word >> 32) == number)) return RUNNING;
    const u64 counted = __shfl_sync(FULL_MASK, word, SLOT_WORDS);
    if (counted != beat) heard = now;
    beat = counted;
    return __any_sync(FULL_MASK, now - heard > limit && now > heard) ? SILENT : STARTING;
}

// Polls until a command, silence or an abort.
__device__ __forceinline__ State await_command(u32& payload, u64& beat, const u64* host, u32 number,
                                               u64 limit) {
    u64 heard = global_timer();
    for (;;) {
        const State state = look(payload, beat, heard, host, number, limit);
        if (state != STARTING) return state;
    }
}

// Lane i's payload is word i of the result.
__device__ __forceinline__ void post_result(u64* host, u32 number, u32 payload) {
    const int lane = threadIdx.x % WARP;
    if (lane >= SLOT_WORDS) return;
    store_host(host + RESULTS + (int)(number % RING_SLOTS) * SLOT_WORDS + lane,
               (u64)number << 32 | payload);
}

// Not to be called for every job: the next fence waits for this store to reach the host.
__device__ __forceinline__ void post_state(u64* host, State state) {
    if (threadIdx.x == 0) store_host(host + STATE, state);
}
