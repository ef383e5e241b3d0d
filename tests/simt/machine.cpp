// machine.cpp: the scheduler of the SIMT machine, and what it holds kernels to.
//
// Built once, without sanitizers, and loaded before any kernel. Clusters of blocks (of one, if the
// launch names none) run one after another, in an order set by the seed; so do a cluster's blocks
// between two of its barriers, a block's warps between two barriers, and a warp's lanes between two
// meetings. Shared memory is the running block's; the other blocks' lies in images, where map_shared_rank
// leads. Every access of a kernel arrives in `access`, which knows
//   - the arrays of this launch and the shared variables: all else is out of bounds;
//   - for every byte that may be written, who wrote and read it last, and when: two threads that
//     touch a byte, one of them writing, must have a barrier or an __syncwarp between them, or both
//     be atomic; two blocks must not, unless the earlier one has done an atomic since, by that
//     thread or behind a barrier, and the later one has done an atomic before;
//   - that a barrier of the cluster tells those who wait what each thread did before it arrived or
//     exited, and nothing else that other threads have told it since;
//   - which shared bytes a block has written: the others must not be read;
//   - what products of a warpgroup still read and sum up, until their threads have waited for them;
//   - that a phase of an mbarrier tells those who wait what each thread knew that arrived, and when its
//     copies arrive, which is any time;
//   - that threads of a kernel which starts early wait for the one ahead, and touch nothing that the
//     launch writes before that;
//   - which blocks of the cluster may have exited: their shared memory must not be read.
// All blocks of a cooperative launch run together: they stand where a cluster's do, and a thread that
// polls a word hands over to the others until something has changed. What one block tells another
// goes by the memory model of PTX (its sections "Release and Acquire Patterns" and "Causality
// Order"): a release tells what its thread knows, a fence makes the strong stores behind it tell what
// it knew then, and the barrier of a block is joined to what its threads know. Blocks that all wait
// for words which nobody is left to change have a deadlock. Mapped memory of the host may be touched
// by strong accesses alone.
// A fault ends the launch; its text names block, thread and place.
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <unordered_map>
#include <vector>

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;
using ull = unsigned long long;  // for printf

constexpr int WARP = 32;
constexpr int VALUE_BYTES = 64;
constexpr int MAX_THREADS = 1024;  // of a cluster, or of a cooperative grid
constexpr int MAX_BLOCKS = 8;      // likewise, on every GPU that has clusters; of a cooperative grid
constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t PAGE = 4096;
constexpr u32 MOST_IN_A_ROW = 1 << 12;  // accesses without a wait, where blocks run together

struct uint3 { u32 x, y, z; };

// Accesses are what a launch takes its time for: their common path is one function, the rest is not
// in it.
#define COMMON __attribute__((always_inline)) inline
#define RARE __attribute__((noinline))

#define CALLER __builtin_return_address(0)

// --- What Python passes and reads (machine.py holds the same declarations) -----------------------

struct Array {
    const char* name;
    char* begin;
    u64 bytes;
    int writable, shared, mapped;
};

struct Launch {
    void (*call)(void**);
    void** values;  // addresses of the kernel's arguments
    u32 grid[3], block[3], cluster[3];
    Array* arrays;
    int num_arrays;
    char* dynamic_shared;
    int cooperative, early;
    u64 seed;
    char fault[1000];   // empty if there was none
    char module[1000];  // the library with the fault, where the text does not name its place
    u64 offset;         // in that library
};

// --- State ---------------------------------------------------------------------------------------

// The last accesses to a byte. `who`, with threads and warps counted through the cluster: 0 nobody,
// thread + 1, MANY_LANES | warp, MANY_WARPS | block + MAX_BLOCKS * arrivals or MANY_BLOCKS |
// arrivals: the most at barriers of the cluster that any of them had behind it.
struct Cell {
    u32 write_time, read_time;
    u16 writer, reader;
};
constexpr u16 MANY_WARPS = 0x4000, MANY_LANES = 0x2000, MANY_BLOCKS = MANY_WARPS | MANY_LANES;
constexpr u16 ATOMIC = 0x8000, COPYING = 0x1000;  // how the writer writes
constexpr u16 NUMBER = 0x0fff;                    // what follows the marks
constexpr int MAX_ARRIVALS = NUMBER / MAX_BLOCKS;

struct Region {
    Array array;
    Cell* cells;    // one a byte, or one for each block that runs together; null where nothing writes
    int rank = -1;  // of the block whose image it is
    int of = -1;    // which region it is an image of
    u32* reads = nullptr;      // of shared memory where mbarriers are: when each warp read each byte last
    char* by_proxy = nullptr;  // likewise: whether a bulk copy wrote it
};

struct Copy {
    char *to, data[16];
    int bytes, group;
};

// Copies on their way to where a phase of an mbarrier waits for them.
struct Flight {
    std::vector<Copy> copies;
    u32 bytes;        // that the phase counts, of a bulk copy
    bool is_arrival;  // of the thread that copies
    std::shared_ptr<const struct News> known;  // what their thread knew
};

struct Product {
    float* to;
    std::vector<float> sums;
    int group;
};

struct Operand {  // of a product, in shared memory
    const char* at;
    int bytes, group;
    u32 time;
};

struct Held {  // an operand in registers
    const char* at;
    std::vector<char> data;
    int group;
};

enum State {
    READY, AT_BARRIER, AT_CLUSTER, AT_MEETING, AT_CONVERGENCE, AT_MBARRIER, POLLING, EXITED
};

// What a thread has been told: until when all is over that each thread did, each warp as a whole and
// each block as a whole. A barrier of a cluster, whose warps arrive together, tells this too.
struct News {
    u32 thread[MAX_THREADS], warp[MAX_THREADS / WARP], block[MAX_BLOCKS];
    int number;  // of the cluster's barrier, from 1 on
    u32 time;
};
using Known = std::shared_ptr<const News>;  // null: nothing

struct Mbarrier {
    u32 arrivals, missing;  // of each phase, and of this one
    i64 bytes;              // that this one waits for
    u32 phases;             // that are over
    Known gathered, told;   // by arrivals at this phase; by the last one
    std::vector<Flight> flights;
};

struct Thread {
    uint3 index;
    jmp_buf here;
    bool started;  // `here` is valid
    State state;
    const char *name, *file;  // of the function in which it waits
    int line;
    u32 mask;
    char brought[VALUE_BYTES];
    u32 met_at;                 // time of its last meeting
    u32 block_time, warp_time;  // of its last barrier and __syncwarp
    int predicates;             // how many brought one to its last barrier
    int arrivals, waits;        // at barriers of the cluster
    u32 arrived_at;             // time of its last arrival
    int told;                   // barriers of the cluster, by waiting or by who has waited
    u32 converged;              // what __activemask returns
    std::vector<Copy> copies;   // not waited for
    int groups;                 // of copies, committed so far
    std::vector<Product> products;  // not waited for, and what they read
    std::vector<Operand> operands;
    std::vector<Held> held;
    int product_groups;         // committed so far
    bool products_fenced;       // since it has waited for some
    u32 proxy_fenced;           // until then, what it wrote is there for products and bulk copies
    bool awaited;               // the kernel ahead
    const Mbarrier* awaits;     // the phase of it with this parity
    u32 parity;
    Known known, met;    // of a cooperative launch or by mbarriers: what it was told; by the lanes it met last
    Known fenced;        // what it knew at its last fence
    Known seen;          // what a fence would tell it of words that it has loaded
    u32 changes;         // there were so many when it began to poll
    std::vector<std::pair<u64, u32>> polled;  // words it has loaded, and the changes until then
};

struct Block {
    uint3 index;
    bool exited;
    u32 acquired;  // time of its last atomic, which may have told it what other blocks did
    u16 reader;    // who of other blocks has read its shared memory, until when
    u32 read_time;
    const Thread* last_reader;
    const Region* last_read;
    const void* read_at;
};

static Thread threads[MAX_THREADS];  // those of a block begin with a whole warp
static Block blocks[MAX_BLOCKS];     // of the cluster, by rank
alignas(16) static char handed[MAX_THREADS][VALUE_BYTES];  // what each brought to its last meeting
static char* stacks;
static Thread* current;
static jmp_buf scheduler;
static jmp_buf stopped;
static Launch* launch;
static thread_local bool runs_launch;  // others of the host's threads may load a library
static std::vector<Region> regions;
static std::vector<u32> cluster_order, block_order, warp_order, lane_order;
static int num_threads, num_blocks;  // of a block and of a cluster
static int stride;                   // threads of a block, in whole warps
static int running;                  // rank of the block that runs
static u32 now;                      // grows whenever threads have met
static u32 cluster_start;            // when the cluster's first thread began
static bool any_arrivals;            // at a barrier of the cluster
static int num_barriers;             // that are over
static News news[2];                 // of the last two: no live thread is further behind

// What an atomic may tell other blocks: what its thread did, what its block and its warp did before
// the barrier and the __syncwarp that the thread passed last, and what the cluster's barrier told.
struct Release { u32 time, cluster_start, block_time, warp_time; u16 thread; int told; };
static std::vector<Release> releases;  // of this launch, by time
static std::vector<News> all_told;     // to threads that then did an atomic
static bool together;                  // the blocks of a cooperative launch, which are all
static std::unordered_map<u64, Known> words;  // what a word tells whoever acquires it
static u32 in_a_row;                   // accesses since a thread has waited
static std::unordered_map<u64, Mbarrier> mbarriers;  // of the block that runs, by address
static u32 changes;                    // of words by strong stores and atomics
static bool is_timed;                  // somebody has looked at a clock, or at the host's memory
static u64 random_state;

static u32 random_below(u32 n) {
    random_state += 0x9e3779b97f4a7c15ull;  // splitmix64 (Steele, Lea and Flood, 2014)
    u64 x = random_state;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return (u32)(((x ^ x >> 31) >> 32) * n >> 32);
}

static void shuffle(std::vector<u32>& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
}

static void fill(std::vector<u32>& order, u32 n) {
    order.resize(n);
    std::iota(order.begin(), order.end(), 0u);
}

static int index_of(const Thread& thread) { return (int)(&thread - threads); }

static int rank_of(const Thread& thread) { return index_of(thread) / stride; }

static uint3 position(u32 i, const u32 (&sizes)[3]) {
    return {i % sizes[0], i / sizes[0] % sizes[1], i / sizes[0] / sizes[1]};
}

// --- Fibres --------------------------------------------------------------------------------------

static void suspend() {
    if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] static void stop(const Thread& thread, const void* where, const std::string& text);

static void live_and_die() {
    for (;;) {
        launch->call(launch->values);
        if (!current->products.empty()) {
            stop(*current, nullptr, "ends before it has waited for its products");
        }
        if (launch->early && !current->awaited) {
            stop(*current, nullptr, "ends without await_previous, of a kernel that starts early");
        }
        current->state = EXITED;
        suspend();
    }
}

static void start(Thread& thread) {
    thread.started = true;
    const int i = index_of(thread);
    const size_t bytes = STACK_BYTES - PAGE - i % 64 * 128;  // spread over the sets of a cache
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {stacks + i * STACK_BYTES + PAGE, 0, bytes};
    makecontext(&context, live_and_die, 0);
    setcontext(&context);
}

static void resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.here, 1);
    start(thread);
}

// Zeros that take memory when they are touched, or null.
static char* reserve(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : (char*)at;
}

static std::vector<std::pair<void*, size_t>> reserved;  // for this launch

static char* reserve_for_launch(size_t bytes) {
    char* const at = reserve(bytes);
    if (at) reserved.push_back({at, bytes});
    return at;
}

static bool make_stacks() {
    stacks = reserve(MAX_THREADS * STACK_BYTES);
    for (int i = 0; stacks && i < MAX_THREADS; i++) {
        mprotect(stacks + i * STACK_BYTES, PAGE, PROT_NONE);  // a stack that overflows
    }
    return stacks;
}

// --- Faults --------------------------------------------------------------------------------------

static std::string format(const char* text, ...) {
    char line[600];
    va_list values;
    va_start(values, text);
    vsnprintf(line, sizeof line, text, values);
    va_end(values);
    return line;
}

// Stop the launch. `where` is an address in the kernel's code if the text does not say the place.
[[noreturn]] static void stop(const Thread& thread, const void* where, const std::string& text) {
    const uint3 b = blocks[rank_of(thread)].index, t = thread.index;
    snprintf(launch->fault, sizeof launch->fault, "block (%u, %u, %u), thread (%u, %u, %u) %s",
             b.x, b.y, b.z, t.x, t.y, t.z, text.c_str());
    Dl_info info;
    if (where && dladdr(where, &info)) {
        snprintf(launch->module, sizeof launch->module, "%s", info.dli_fname);
        launch->offset = (u64)where - (u64)info.dli_fbase - 1;  // the call, not what follows it
    }
    _longjmp(stopped, 1);
}

// What follows the name of something that is not the running block's.
static std::string of_block(int rank) {
    const uint3 b = blocks[rank].index;
    return rank == running ? "" : format(" of block (%u, %u, %u)", b.x, b.y, b.z);
}

static std::string thread_name(int i) {
    const uint3 t = threads[i].index;
    return format("thread (%u, %u, %u)", t.x, t.y, t.z) + of_block(i / stride);
}

static std::string name_of(const Region& region) {
    return region.rank < 0 ? region.array.name : region.array.name + of_block(region.rank);
}

static std::string waiting(const Thread& t) {
    if (t.state == EXITED) return "has exited";
    return format("waits in %s at %s:%d", t.name, t.file, t.line);
}

static void wait(State state, const char* name, u32 mask, const char* file, int line) {
    current->state = state;
    current->name = name, current->mask = mask, current->file = file, current->line = line;
    in_a_row = 0;
    suspend();
}

// --- Memory --------------------------------------------------------------------------------------

// The rank of its block, or -1 if there are several.
static int block_of(u16 who) {
    if (num_blocks == 1) return 0;
    const int number = who & NUMBER;
    if (who & MANY_WARPS) return who & MANY_LANES ? -1 : number % MAX_BLOCKS;
    return who & MANY_LANES ? number * WARP / stride : (number - 1) / stride;
}

// The warp of `who`, or -1 if there are several.
static int warp_of(u16 who) {
    if (who & MANY_WARPS) return -1;
    return who & MANY_LANES ? who & NUMBER : ((who & NUMBER) - 1) / WARP;
}

static std::string who_text(u16 who) {
    who &= ~(ATOMIC | COPYING);
    const int rank = block_of(who), warp = warp_of(who);
    if (rank < 0) return "threads of several blocks";
    if (warp < 0) return "threads of several warps" + of_block(rank);
    if (!(who & MANY_LANES)) return thread_name(who - 1);
    return format("several threads of warp %d", warp - rank * stride / WARP) + of_block(rank);
}

static bool is_told(const News& told, u16 who, u32 time) {
    const int number = who & NUMBER;
    if (together && who & MANY_WARPS) return time <= told.block[number % MAX_BLOCKS];
    if (!(who & MANY_BLOCKS)) return time <= told.thread[number - 1];
    if (!(who & MANY_WARPS)) return time <= told.warp[number];
    return (who & MANY_LANES ? number : number / MAX_BLOCKS) < told.number;
}

// How often `who` had arrived at barriers of the cluster at `time`, or at most had.
static int arrivals_of(u16 who, u32 time) {
    const int number = who & NUMBER;
    if (time < cluster_start) return 0;
    if (who & MANY_WARPS) return who & MANY_LANES ? number : number / MAX_BLOCKS;
    const int first = who & MANY_LANES ? number * WARP : number - 1;
    int arrivals = 0;
    for (int i = first; i < first + (who & MANY_LANES ? WARP : 1); i++) {
        const Thread& t = threads[i];
        arrivals = std::max(arrivals, t.arrivals - (t.arrivals && time <= t.arrived_at));
    }
    return arrivals;
}

// Whether an atomic of its own block, or of one that a barrier has told, came after what `who` did
// at `time` in another block, and before the last atomic of the running one.
static bool is_released(u16 who, u32 time) {
    const auto later = [](const Release& r, u32 t) { return r.time < t; };
    auto r = std::lower_bound(releases.begin(), releases.end(), time, later);
    for (; r != releases.end() && r->time <= blocks[running].acquired; ++r) {
        if (r->cluster_start > time) return false;  // the atomics of the clusters that followed
        if (r->told >= 0 && is_told(all_told[r->told], who, time)) return true;
        if (num_blocks > 1 && block_of(who) != r->thread / stride) continue;
        if (time <= r->block_time || who == r->thread + 1) return true;
        if (warp_of(who) == r->thread / WARP && time <= r->warp_time) return true;
    }
    return false;
}

// Whether the current thread has been told, by other ways than its own block's barriers, that what
// `who` did at `time` is over.
RARE static bool is_told(u16 who, u32 time) {
    if (together) return current->known && is_told(*current->known, who, time);
    const bool of_others = time < cluster_start || block_of(who) != running;
    if (of_others && blocks[running].acquired && is_released(who, time)) return true;
    if (time >= cluster_start && current->known && is_told(*current->known, who, time)) return true;
    // Cells of shared memory know no other cluster.
    return time >= cluster_start && current->told && is_told(news[current->told % 2], who, time);
}

// Whether what `who` did at `time` is known to be over for the current thread.
static bool is_ordered(u16 who, u32 time) {
    who &= ~ATOMIC;
    if (who == 0) return true;
    if (time >= cluster_start && (num_blocks == 1 || block_of(who) == running)) {
        const int me = index_of(*current);
        if (who == me + 1 || time <= current->block_time) return true;
        if (warp_of(who) == me / WARP && time <= current->warp_time) return true;
        if (!together && !current->told && !current->known) return false;
    }
    return is_told(who, time);
}

static Region* find(u64 address, u64 bytes) {
    for (Region& r : regions) {
        const u64 offset = address - (u64)r.array.begin;
        if (offset < r.array.bytes && bytes <= r.array.bytes - offset) return &r;
    }
    return nullptr;
}

struct Access {
    bool writes, atomic;
    const void* caller;
    const char* verb() const { return writes ? "writes" : "reads"; }
};

[[noreturn]] static void out_of_bounds(u64 address, u64 bytes, const Access& by) {
    std::string text = format("%s %llu bytes at %p, outside of every array", by.verb(), (ull)bytes,
                              (void*)address);
    u64 nearest = address < PAGE ? 0 : 1ull << 40;  // further off it is no overflow of an index
    for (const Region& r : regions) {
        const u64 begin = (u64)r.array.begin, end = begin + r.array.bytes;
        const u64 distance = address < begin ? begin - address : address - end;
        if (r.array.bytes == 0 || distance >= nearest) continue;
        nearest = distance;
        text = format("%s %llu bytes at byte %lld of %s, which has %llu bytes", by.verb(),
                      (ull)bytes, (long long)(address - begin), name_of(r).c_str(),
                      (ull)r.array.bytes);
    }
    stop(*current, by.caller, text);
}

[[noreturn]] static void race(const Region& region, u64 i, const Access& by, u16 who, u32 time,
                              const char* other_did) {
    const std::string other = time < cluster_start ? "another block" : who_text(who);
    stop(*current, by.caller,
         format("%s byte %llu of %s, which %s %s without a barrier between", by.verb(), (ull)i,
                name_of(region).c_str(), other.c_str(), other_did));
}

// Who has touched a byte when the current thread does after `who` did at `time`.
static u16 joined(u16 who, u32 time) {
    const u16 me = (u16)(index_of(*current) + 1), my_warp = MANY_LANES | (me - 1) / WARP;
    who &= ~ATOMIC;
    if (who == me || is_ordered(who, time)) return me;
    if (warp_of(who) == (me - 1) / WARP) return my_warp;
    if (num_blocks == 1 && !any_arrivals) return MANY_WARPS;
    const int arrivals = std::max(current->arrivals, arrivals_of(who, time));
    if (block_of(who) != running) return MANY_BLOCKS | arrivals;
    return MANY_WARPS | (running + MAX_BLOCKS * arrivals);
}

// Whether all reads of a byte are known to be over, of several warps each by itself where the region
// counts them: an mbarrier tells of some.
COMMON static bool are_reads_ordered(const Region& region, const Cell& cell, u64 i) {
    if (is_ordered(cell.reader, cell.read_time)) return true;
    if (!region.reads || !(cell.reader & MANY_WARPS)) return false;
    const u32* const times = region.reads + i * (stride / WARP);
    for (int warp = 0; warp < stride / WARP; warp++) {
        if (times[warp] < std::max(cell.write_time, cluster_start)) continue;
        if (!is_ordered(MANY_LANES | warp, times[warp])) return false;
    }
    return true;
}

// Stop where an access races with the last ones to a byte.
COMMON static void check_order(const Region& region, const Cell& cell, u64 i, const Access& by) {
    const bool both_atomic = by.atomic && cell.writer & ATOMIC;
    if (!both_atomic && !is_ordered(cell.writer, cell.write_time)) {
        race(region, i, by, cell.writer, cell.write_time, "writes");
    }
    if (by.writes && !(by.atomic && cell.reader & ATOMIC) && !are_reads_ordered(region, cell, i)) {
        race(region, i, by, cell.reader, cell.read_time, "reads");
    }
}

COMMON static void touch(Region& region, Cell& cell, u64 i, const Access& by) {
    if (region.array.shared) {  // what an earlier cluster did there does not count
        if (cell.write_time < cluster_start) cell.writer = 0;
        if (cell.read_time < cluster_start) cell.reader = 0;
    }
    if (cell.writer & COPYING) {
        stop(*current, by.caller, format("%s byte %llu of %s, which an asynchronous copy writes",
                                         by.verb(), (ull)i, name_of(region).c_str()));
    }
    check_order(region, cell, i, by);
    if (region.array.shared && cell.writer == 0 && (!by.writes || by.atomic)) {
        stop(*current, by.caller, format("reads byte %llu of %s, which no thread has written",
                                         (ull)i, name_of(region).c_str()));
    }
    if (by.writes) {
        cell.writer = joined(cell.writer, cell.write_time) | (by.atomic ? ATOMIC : 0);
        cell.write_time = now;
        cell.reader = 0;
    } else {
        const bool atomic = by.atomic && (cell.reader & ATOMIC || is_ordered(cell.reader, cell.read_time));
        cell.reader = joined(cell.reader, cell.read_time) | (atomic ? ATOMIC : 0);
        cell.read_time = now;
    }
}

static bool same(const Cell& a, const Cell& b) { return !memcmp(&a, &b, sizeof a); }

// Bytes that were touched together have equal cells: the first answers for those that follow it.
// Of memory that the blocks of a cooperative launch share, each has a cell of every byte.
RARE static void touch_together(Region& region, u64 begin, u64 bytes, const Access& by) {
    const size_t size = num_blocks * sizeof(Cell);
    Cell before[MAX_BLOCKS];
    for (u64 i = 0; i < bytes; i++) {
        Cell* const row = region.cells + (begin + i) * num_blocks;
        memcpy(before, row, size);
        for (int b = 0; b < num_blocks; b++) {
            if (b == running) continue;
            check_order(region, row[b], begin + i, by);
            if (by.writes && !by.atomic) row[b] = {};  // what is over tells no more than this write
        }
        touch(region, row[running], begin + i, by);
        for (Cell* next = row + num_blocks; i + 1 < bytes && !memcmp(next, before, size); i++) {
            memcpy(next, row, size);
            next += num_blocks;
        }
    }
}

COMMON static void touch_all(Region& region, u64 begin, u64 bytes, const Access& by) {
    if (together && !region.array.shared) return touch_together(region, begin, bytes, by);
    Cell* const cells = region.cells + begin;
    const int warps = stride / WARP;
    const auto same_reads = [&](u64 i, u64 j) {
        const u32* const reads = region.reads + begin * warps;
        return !region.reads || !memcmp(reads + i * warps, reads + j * warps, warps * sizeof *reads);
    };
    for (u64 i = 0; i < bytes; i++) {
        const Cell before = cells[i];
        touch(region, cells[i], begin + i, by);
        const Cell after = cells[i];
        for (; i + 1 < bytes && same(cells[i + 1], before) && same_reads(i, i + 1); i++) {
            cells[i + 1] = after;
        }
    }
    if (!region.reads) return;
    if (by.writes) memset(region.by_proxy + begin, 0, bytes);
    for (u64 i = begin; i < begin + bytes && !by.writes; i++) {
        region.reads[i * warps + index_of(*current) / WARP] = now;
    }
}

// A read through map_shared_rank, of bytes that may be the running block's own.
RARE static void touch_image(Region& image, u64 begin, u64 bytes, const Access& by) {
    if (by.writes) {
        stop(*current, by.caller,
             format("writes %s, which map_shared_rank makes const", name_of(image).c_str()));
    }
    Block& block = blocks[image.rank];
    if (block.exited) {
        stop(*current, by.caller, format("reads byte %llu of %s, which has exited", (ull)begin,
                                         name_of(image).c_str()));
    }
    touch_all(image, begin, bytes, by);
    if (image.rank == running) {
        memcpy(image.array.begin + begin, regions[image.of].array.begin + begin, bytes);
        return;
    }
    block.reader = joined(block.reader, block.read_time);
    block.read_time = now;
    block.last_reader = current, block.last_read = &image, block.read_at = by.caller;
}

// Let other threads go on, as one that waits by plain loads does not: they are about to race.
RARE static void hand_over() {
    current->changes = changes - 1;
    wait(POLLING, "a loop", 0, "", 0);
}

RARE static void access_memory(u64 address, u64 bytes, const Access& by) {
    if (!runs_launch) return;  // the library is being loaded or asked for its kernels
    if (address - (u64)handed < sizeof handed) return;
    Region* const region = find(address, bytes);
    if (!region) out_of_bounds(address, bytes, by);
    const u64 begin = address - (u64)region->array.begin;
    if (together && ++in_a_row > MOST_IN_A_ROW) hand_over();
    if (launch->early && !current->awaited && region->array.writable && !region->array.shared) {
        stop(*current, by.caller, format("%s byte %llu of %s before await_previous", by.verb(),
                                         (ull)begin, name_of(*region).c_str()));
    }
    if (region->array.mapped) {
        if (by.atomic) return;
        stop(*current, by.caller, format("%s byte %llu of %s, mapped memory of the host, by a plain "
                                         "access", by.verb(), (ull)begin, name_of(*region).c_str()));
    }
    if (region->rank >= 0) {
        touch_image(*region, begin, bytes, by);
    } else if (region->cells) {
        touch_all(*region, begin, bytes, by);
    } else if (by.writes) {
        stop(*current, by.caller, format("writes %s, which is const", region->array.name));
    }
}

// Most accesses are to locals.
COMMON static void access(u64 address, u64 bytes, const Access& by) {
    if (address - (u64)stacks >= MAX_THREADS * STACK_BYTES) access_memory(address, bytes, by);
}

// --- What blocks of a cooperative launch tell each other -----------------------------------------

static void sum_up(News& news) {
    for (u32& time : news.warp) time = ~0u;
    for (u32& time : news.block) time = ~0u;
    for (int i = 0; i < num_blocks * stride; i++) {
        if (i % stride >= num_threads) continue;
        news.warp[i / WARP] = std::min(news.warp[i / WARP], news.thread[i]);
        news.block[i / stride] = std::min(news.block[i / stride], news.thread[i]);
    }
}

static Known joined(const Known& a, const Known& b) {
    if (!a || !b || a == b) return a ? a : b;
    bool a_knows_all = true, b_knows_all = true;
    for (int i = 0; i < num_blocks * stride; i++) {
        a_knows_all = a_knows_all && b->thread[i] <= a->thread[i];
        b_knows_all = b_knows_all && a->thread[i] <= b->thread[i];
    }
    if (a_knows_all || b_knows_all) return a_knows_all ? a : b;
    const auto both = std::make_shared<News>(*a);
    for (int i = 0; i < num_blocks * stride; i++) {
        both->thread[i] = std::max(a->thread[i], b->thread[i]);
    }
    sum_up(*both);
    return both;
}

// What several threads have been told.
static Known joined_of(const Thread* first, int count, u32 mask = ~0u) {
    Known all;
    for (int i = 0; i < count; i++) {
        if (first[i].state != EXITED && mask >> i % WARP & 1) all = joined(all, first[i].known);
    }
    return all;
}

// All that the current thread knows to be over; what it does from here on is later.
static Known knowledge() {
    const auto news = current->known ? std::make_shared<News>(*current->known)
                                     : std::make_shared<News>();
    const int me = index_of(*current), first = running * stride;
    for (int i = first; i < first + num_threads; i++) {
        const u32 time = i / WARP == me / WARP ? std::max(current->block_time, current->warp_time)
                                               : current->block_time;
        news->thread[i] = std::max(news->thread[i], i == me ? now : time);
    }
    sum_up(*news);
    now++;
    return news;
}

// --- Meetings ------------------------------------------------------------------------------------

static bool same(const char* a, const char* b) { return a == b || !strcmp(a, b); }

static bool same_site(const Thread& a, const Thread& b) {
    return a.state == b.state && a.line == b.line && a.mask == b.mask && same(a.name, b.name) &&
           same(a.file, b.file);
}

// Let lanes go that have all met, and return whether there were any.
static bool release_lanes(Thread* lanes, int count) {
    bool released = false;
    for (int i = 0; i < count; i++) {
        const u32 mask = lanes[i].mask;
        bool complete = lanes[i].state == AT_MEETING && (count == WARP || mask >> count == 0);
        for (int j = 0; j < count && complete; j++) {
            if (mask >> j & 1) complete = same_site(lanes[i], lanes[j]);
        }
        if (!complete) continue;
        const bool any_told = together || !mbarriers.empty();
        const Known known = any_told ? joined_of(lanes, count, mask) : nullptr;
        for (int to = 0; to < count; to++) {
            if (!(mask >> to & 1)) continue;
            lanes[to].state = READY;
            lanes[to].met_at = now;
            lanes[to].met = known;
            memcpy(handed[index_of(lanes[to])], lanes[to].brought, VALUE_BYTES);
        }
        released = true;
    }
    for (int i = 0; i < count && !released; i++) {  // __activemask: whoever waits at one site
        if (lanes[i].state != AT_CONVERGENCE) continue;
        u32 group = 0;
        for (int j = 0; j < count; j++) {
            if (same_site(lanes[i], lanes[j])) group |= 1u << j;
        }
        for (int j = 0; j < count; j++) {
            if (!(group >> j & 1)) continue;
            lanes[j].converged = group;
            lanes[j].state = READY;
        }
        released = true;
    }
    now++;
    return released;
}

static bool any_polls(const Thread* first, int count) {
    const auto polls = [](const Thread& t) { return t.state == POLLING || t.state == AT_MBARRIER; };
    return std::any_of(first, first + count, polls);
}

// Run the lanes of a warp until each has exited, waits at a barrier or polls.
static void run_warp(Thread* lanes, int count) {
    fill(lane_order, count);
    do {
        shuffle(lane_order);
        for (u32 i : lane_order) {
            if (lanes[i].state == READY) resume(lanes[i]);
        }
    } while (release_lanes(lanes, count));
    if (any_polls(lanes, count)) return;  // who may yet come
    for (int i = 0; i < count; i++) {
        const Thread& t = lanes[i];
        if (t.state != AT_MEETING) continue;
        for (int j = 0; j < WARP; j++) {
            if (!(t.mask >> j & 1) || (j < count && same_site(t, lanes[j]))) continue;
            const std::string other = j < count ? waiting(lanes[j]) : "does not exist";
            stop(t, nullptr,
                 format("%s with mask %08x for lane %d, which %s", waiting(t).c_str(), t.mask, j,
                        other.c_str()));
        }
    }
}

// Let a block go whose live threads have all met at one barrier, and return whether it can go on:
// not if no thread is left, or some wait for the cluster.
static bool release_block() {
    Thread* const block = threads + running * stride;
    const Thread* first = nullptr;
    int predicates = 0, told = 0;
    for (int i = 0; i < num_threads; i++) {
        if (block[i].state == AT_CLUSTER || block[i].state == POLLING) return false;
    }
    const Known known = together ? joined_of(block, num_threads) : nullptr;
    for (int i = 0; i < num_threads; i++) {
        const Thread& t = block[i];
        if (t.state == EXITED) continue;
        if (t.state == AT_MBARRIER) {
            stop(t, nullptr, waiting(t) + " for a phase that nobody is left to end");
        }
        if (!first) first = &t;
        if (!same_site(*first, t)) {
            stop(t, nullptr, waiting(t) + ", but " + thread_name(index_of(*first)) + " " +
                                 waiting(*first));
        }
        predicates += t.brought[0];
        told = std::max(told, t.told);
    }
    for (int i = 0; i < num_threads; i++) {
        Thread& t = block[i];
        if (t.state == EXITED) continue;
        t.state = READY;
        t.block_time = now;
        t.predicates = predicates;
        t.told = told;
        t.known = known;
    }
    now++;
    blocks[running].exited = !first;
    return first != nullptr;
}

static void set_copying(const Copy& copy, bool copying) {
    Region* const region = find((u64)copy.to, copy.bytes);
    if (!region->cells) return;
    for (int i = 0; i < copy.bytes; i++) {
        u16& writer = region->cells[copy.to - region->array.begin + i].writer;
        writer = copying ? writer | COPYING : writer & ~COPYING;
    }
}

static void end_phase(Mbarrier& barrier) {
    if (barrier.missing || barrier.bytes) return;
    barrier.phases++;
    barrier.missing = barrier.arrivals;
    barrier.told = barrier.gathered;
    barrier.gathered = nullptr;
}

static void land(Mbarrier& barrier, const Flight& flight) {
    for (const Copy& copy : flight.copies) {
        set_copying(copy, false);
        memcpy(copy.to, copy.data, copy.bytes);
        const Region& region = *find((u64)copy.to, copy.bytes);
        if (flight.bytes) memset(region.by_proxy + (copy.to - region.array.begin), 1, copy.bytes);
    }
    barrier.gathered = joined(barrier.gathered, flight.known);
    barrier.bytes -= flight.bytes;
    barrier.missing -= flight.is_arrival;
    end_phase(barrier);
}

static bool is_over(const Mbarrier& barrier, u32 parity) { return barrier.phases % 2 != parity; }

// Let copies land, in any order, until threads that wait for phases can go on; return whether some can.
static bool release_mbarriers() {
    Thread* const block = threads + running * stride;
    for (bool any_left = true; any_left;) {
        any_left = false;
        for (auto& [address, barrier] : mbarriers) {
            std::vector<Flight> flights, left;
            flights.swap(barrier.flights);
            for (Flight& flight : flights) {
                if (random_below(2)) land(barrier, flight);
                else left.push_back(std::move(flight));
            }
            any_left = any_left || !left.empty();
            barrier.flights.swap(left);
        }
        bool any_woke = false;
        for (Thread* t = block; t < block + num_threads; t++) {
            if (t->state != AT_MBARRIER || !is_over(*t->awaits, t->parity)) continue;
            t->state = READY;
            any_woke = true;
        }
        if (any_woke) return true;
    }
    return false;
}

// Put the shared memory of the running block away, and that of another in its place.
static void switch_to(int rank) {
    for (const Region& image : regions) {
        if (image.rank != running) continue;
        memcpy(image.array.begin, regions[image.of].array.begin, image.array.bytes);
    }
    for (const Region& image : regions) {
        if (image.rank != rank) continue;
        memcpy(regions[image.of].array.begin, image.array.begin, image.array.bytes);
        regions[image.of].cells = image.cells;
    }
    running = rank;
}

// A block that has exited must have waited until others had read its shared memory.
static void check_last_read() {
    const Block& block = blocks[running];
    const auto knows_less = [](const Thread& a, const Thread& b) { return a.told < b.told; };
    Thread* const first = threads + running * stride;
    current = std::max_element(first, first + num_threads, knows_less);
    if (is_ordered(block.reader, block.read_time)) return;
    stop(*block.last_reader, block.read_at,
         format("reads %s of block (%u, %u, %u), which may have exited: the block does not wait "
                "for it before its end", block.last_read->array.name, block.index.x,
                block.index.y, block.index.z));
}

// Run a block until all its threads have exited or some wait for the cluster, or poll.
static void run_block() {
    do {
        shuffle(warp_order);
        for (u32 warp : warp_order) {
            run_warp(threads + running * stride + warp * WARP,
                     std::min<int>(WARP, num_threads - warp * WARP));
        }
    } while (release_mbarriers() || release_block());
    if (blocks[running].exited) check_last_read();
}

[[noreturn]] static void stop_waiting_for(const Thread& missing) {
    for (int i = 0; i < num_blocks * stride; i++) {
        const Thread& t = threads[i];
        if (t.state != AT_CLUSTER) continue;
        running = rank_of(t);
        stop(t, nullptr, waiting(t) + ", but " + thread_name(index_of(missing)) + " " +
                             waiting(missing) + " and has not arrived");
    }
    __builtin_unreachable();  // a block stops before its end only where a thread waits
}

// Let a cluster go whose live threads have all arrived, and return whether any are left.
static bool release_cluster() {
    News& told = news[(num_barriers + 1) % 2];
    for (u32& time : told.warp) time = ~0u;
    told.number = num_barriers + 1;
    told.time = now;
    bool any_left = false;
    for (int i = 0; i < num_blocks * stride; i++) {
        const Thread& t = threads[i];
        const bool exited = t.state == EXITED;
        if (!exited && t.arrivals == num_barriers) stop_waiting_for(t);
        any_left = any_left || !exited;
        told.thread[i] = exited ? ~0u : t.arrived_at;
        told.warp[i / WARP] = std::min(told.warp[i / WARP], told.thread[i]);
    }
    num_barriers++;
    u32 acquired = 0;
    for (int i = 0; i < num_blocks; i++) acquired = std::max(acquired, blocks[i].acquired);
    for (int i = 0; i < num_blocks; i++) blocks[i].acquired = acquired;
    for (int i = 0; i < num_blocks * stride; i++) {
        if (threads[i].state == AT_CLUSTER) threads[i].state = READY;
    }
    now++;
    return any_left;
}

// --- Blocks that run together --------------------------------------------------------------------

constexpr int IDLE_ROUNDS = 4;            // in which all look again, before it is a deadlock
constexpr u64 IDLE_SECONDS = 60;          // likewise where clocks or the host may change something
constexpr u32 IDLE_MICROSECONDS = 20;     // between two looks at them

static u64 nanoseconds() {
    timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000ull + at.tv_nsec;
}

// Let the threads of a block go on that poll, and return whether any of its threads can: all, or
// those before which something has changed.
static bool wake(int rank, bool all) {
    Thread* const first = threads + rank * stride;
    bool any = false;
    for (Thread* t = first; t < first + num_threads; t++) {
        if (t->state == POLLING && (all || t->changes != changes)) t->state = READY;
        any = any || t->state == READY;
    }
    return any;
}

[[noreturn]] static void stop_polling() {
    std::string others;
    const Thread* polls = nullptr;
    int num_polls = 0;
    for (int i = 0; i < num_blocks * stride; i++) {
        const Thread& t = threads[i];
        if (t.state != POLLING) continue;
        if (!polls) polls = &t;
        else if (num_polls < 4) others += "; " + thread_name(i) + " " + waiting(t);
        num_polls++;
    }
    running = rank_of(*polls);
    stop(*polls, nullptr, waiting(*polls) + " for a change that nobody is left to make" + others);
}

static void run_together() {
    int idle = 0;
    u32 changes_before = 0;
    u64 changed_at = nanoseconds();
    for (bool any_left = true, all = false; any_left;) {
        bool any_ran = any_left = false;
        shuffle(block_order);
        for (u32 rank : block_order) {
            if (blocks[rank].exited) continue;
            any_left = true;
            if (!wake(rank, all)) continue;
            any_ran = true;
            if (num_blocks > 1) switch_to(rank);
            run_block();
        }
        if (changes != changes_before) idle = 0, changed_at = nanoseconds();
        changes_before = changes;
        all = !any_ran;
        if (any_ran || !any_left) continue;
        const bool is_late = nanoseconds() - changed_at > IDLE_SECONDS * 1000000000ull;
        if (is_timed && !is_late) {
            usleep(IDLE_MICROSECONDS);
        } else if (is_late || ++idle > IDLE_ROUNDS) {
            stop_polling();
        }
        is_timed = false;
    }
}

static void run_cluster(u32 cluster) {
    const u32(&sizes)[3] = together ? launch->grid : launch->cluster;
    const u32 clusters[3] = {launch->grid[0] / sizes[0], launch->grid[1] / sizes[1],
                             launch->grid[2] / sizes[2]};
    const uint3 at = position(cluster, clusters);
    cluster_start = ++now;
    any_arrivals = false;
    num_barriers = 0;
    for (const Region& r : regions) {
        if (r.array.shared) memset(r.array.begin, 0xff, r.array.bytes);
    }
    for (int rank = 0; rank < num_blocks; rank++) {
        const uint3 b = position(rank, sizes);
        blocks[rank] = {};
        blocks[rank].index = {at.x * sizes[0] + b.x, at.y * sizes[1] + b.y,
                              at.z * sizes[2] + b.z};
    }
    for (int i = 0; i < num_blocks * stride; i++) {
        Thread& t = threads[i];
        t.state = i % stride < num_threads ? READY : EXITED;
        t.block_time = t.warp_time = 0;
        t.arrivals = t.waits = t.told = 0;
        t.copies.clear();
        t.products.clear();
        t.operands.clear();
        t.held.clear();
        t.groups = t.product_groups = 0;
        t.products_fenced = t.awaited = false;
        t.proxy_fenced = 0;
        t.known = t.met = t.fenced = t.seen = nullptr;
        t.polled.clear();
    }
    mbarriers.clear();
    if (together) return run_together();
    do {
        shuffle(block_order);
        for (u32 rank : block_order) {
            if (blocks[rank].exited) continue;
            if (num_blocks > 1) switch_to(rank);
            run_block();
        }
    } while (release_cluster());
}

// The images of a cluster's shared memory, aligned as it is.
static bool add_images() {
    const int num_regions = (int)regions.size();
    for (int rank = 0; rank < num_blocks; rank++) {
        for (int i = 0; i < num_regions; i++) {
            Region image = regions[i];
            if (!image.array.shared || !image.array.bytes) continue;
            char* const begin = reserve_for_launch(image.array.bytes + PAGE);
            image.cells = (Cell*)reserve_for_launch(image.array.bytes * sizeof(Cell));
            if (!begin || !image.cells) return false;
            image.array.begin = begin + (u64)image.array.begin % PAGE;
            image.rank = rank, image.of = i;
            regions.push_back(image);
        }
    }
    return true;
}

extern "C" int simt_run(Launch* given) {
    if (!stacks && !make_stacks()) return -1;
    launch = given;
    runs_launch = true;
    random_state = launch->seed;
    num_threads = launch->block[0] * launch->block[1] * launch->block[2];
    together = launch->cooperative;
    const u32(&sizes)[3] = together ? launch->grid : launch->cluster;
    num_blocks = sizes[0] * sizes[1] * sizes[2];
    words.clear();
    changes = 0;
    is_timed = false;
    fill(warp_order, (num_threads + WARP - 1) / WARP);
    stride = (int)warp_order.size() * WARP;
    running = 0;
    now = 0;
    releases.clear();
    all_told.clear();
    bool watched = true;
    for (int i = 0; i < launch->num_arrays; i++) {
        const Array& a = launch->arrays[i];
        const bool has_cells = a.writable && a.bytes && !(a.shared && num_blocks > 1) && !a.mapped;
        const u64 num_cells = a.bytes * (together && !a.shared ? num_blocks : 1);
        Cell* cells = has_cells ? (Cell*)reserve_for_launch(num_cells * sizeof(Cell)) : nullptr;
        watched = watched && (cells || !has_cells);
        regions.push_back({a, cells});
    }
    if (num_blocks > 1) watched = watched && add_images();
    for (int i = 0; i < num_blocks * stride; i++) {
        threads[i].index = position(i % stride, launch->block);
    }
    fill(cluster_order, launch->grid[0] * launch->grid[1] * launch->grid[2] / num_blocks);
    fill(block_order, num_blocks);
    shuffle(cluster_order);
    if (watched && _setjmp(stopped) == 0) {
        for (u32 cluster : cluster_order) run_cluster(cluster);
    } else {
        for (Thread& t : threads) t.started = false;  // their stacks are given up
    }
    for (const auto& [at, bytes] : reserved) munmap(at, bytes);
    reserved.clear();
    regions.clear();
    runs_launch = false;
    return watched ? given->fault[0] != 0 : -1;
}

// --- What machine.hpp declares -------------------------------------------------------------------

namespace simt {
enum { LOADS = 1, STORES = 2 };    // kinds of strong accesses
enum { ACQUIRE = 1, RELEASE = 2 };  // their orders

uint3 thread_index() { return current->index; }
uint3 block_index() { return blocks[running].index; }
uint3 block_size() { return {launch->block[0], launch->block[1], launch->block[2]}; }
uint3 grid_size() { return {launch->grid[0], launch->grid[1], launch->grid[2]}; }
int lane() { return index_of(*current) % WARP; }
char* dynamic_shared() { return launch->dynamic_shared; }

int meet_block(const char* name, bool predicate, const char* file, int line) {
    current->brought[0] = predicate;
    wait(AT_BARRIER, name, 0, file, line);
    return current->predicates;
}

const char (*meet_lanes(const char* name, u32 mask, const void* value, int bytes, const char* file,
                        int line))[VALUE_BYTES] {
    if (!(mask >> lane() & 1)) {
        stop(*current, nullptr,
             format("calls %s at %s:%d with mask %08x, in which it is not", name, file, line,
                    mask));
    }
    memcpy(current->brought, value, bytes);
    wait(AT_MEETING, name, mask, file, line);
    return handed + index_of(*current) / WARP * WARP;
}

u32 converged_lanes(const char* name, const char* file, int line) {
    wait(AT_CONVERGENCE, name, 0, file, line);
    return current->converged;
}

static std::string call(const char* name, const char* file, int line) {
    return format("calls %s at %s:%d", name, file, line);
}

// An instruction that all live lanes of a warp must execute at once.
static void meet_warp(const char* name, const char* file, int line) {
    const u32 together = converged_lanes(name, file, line);
    const Thread* const lanes = threads + index_of(*current) / WARP * WARP;
    for (int i = 0; i < WARP; i++) {
        if (together >> i & 1 || lanes[i].state == EXITED) continue;
        stop(*current, nullptr, call(name, file, line) + format(" without lane %d, which ", i) +
                                    waiting(lanes[i]));
    }
}

void arrive_at_cluster(const char* name, const char* file, int line) {
    meet_warp(name, file, line);
    if (current->arrivals > current->waits) {
        stop(*current, nullptr, call(name, file, line) + " twice without a wait between");
    }
    if (++current->arrivals > MAX_ARRIVALS) {
        stop(*current, nullptr, call(name, file, line) + " more often than this machine counts");
    }
    any_arrivals = true;
    current->arrived_at = now - 1;  // what it does from here on is later
}

void wait_for_cluster(const char* name, const char* file, int line) {
    meet_warp(name, file, line);
    if (current->arrivals == current->waits) {
        stop(*current, nullptr, call(name, file, line) + " without having arrived");
    }
    if (current->arrivals > num_barriers) wait(AT_CLUSTER, name, 0, file, line);
    current->waits = current->told = current->arrivals;
}

const void* map_shared_rank(const void* shared, u32 rank, const char* name, const char* file, int line) {
    if (rank >= (u32)num_blocks) {
        stop(*current, nullptr, call(name, file, line) + format(" with rank %u, but its cluster "
                                                                "has %d", rank, num_blocks));
    }
    int of = -1;
    for (int i = 0; i < launch->num_arrays; i++) {
        const Array& a = regions[i].array;
        const u64 offset = (u64)shared - (u64)a.begin;
        if (a.shared && (offset < a.bytes || (of < 0 && a.bytes && offset == a.bytes))) of = i;
    }
    if (of < 0) {
        stop(*current, nullptr, call(name, file, line) + " for what is not in shared memory");
    }
    for (const Region& image : regions) {
        if (image.rank != (int)rank || image.of != of) continue;
        return image.array.begin + ((const char*)shared - regions[of].array.begin);
    }
    return shared;  // of the one block there is
}

void order_memory() {
    current->warp_time = current->met_at;
    current->known = joined(current->known, current->met);
}

static void yield(const char* name, const char* file, int line) {
    wait(POLLING, name, 0, file, line);
}

// A strong access to a word of memory that blocks share: what it tells and what it is told.
static void synchronise(u64 address, int kind, int order) {
    Known& word = words[address];
    if (kind & LOADS) {
        Known& to = order & ACQUIRE ? current->known : current->seen;
        to = joined(to, word);
    }
    if (!(kind & STORES)) return;
    const Known told = order & RELEASE ? knowledge() : current->fenced;
    word = kind & LOADS ? joined(word, told) : told;  // an atomic carries on what a release began
    changes++;
}

void poll(const void* address, const char* name, const char* file, int line) {
    if (!together) return;
    const u64 word = (u64)address;
    auto last = current->polled.begin();
    while (last != current->polled.end() && last->first != word) ++last;
    if (last == current->polled.end()) {
        current->polled.push_back({word, changes});
        return;
    }
    if (last->second == changes || random_below(4) == 0) {
        // A change lets it go; so does the next round, where others went first by chance.
        current->changes = last->second == changes ? changes : changes - 1;
        const size_t at = last - current->polled.begin();
        yield(name, file, line);
        last = current->polled.begin() + at;
    }
    last->second = changes;
}

static void tell_later_blocks(u64 address, int bytes) {
    if (find(address, bytes)->array.shared) return;
    blocks[running].acquired = now;
    const Thread& t = *current;
    const News& told = news[t.told % 2];
    if (t.told && (all_told.empty() || all_told.back().time != told.time)) all_told.push_back(told);
    releases.push_back({now, cluster_start, t.block_time, t.warp_time, (u16)index_of(t),
                        t.told ? (int)all_told.size() - 1 : -1});
}

void strong_access(const void* address, int bytes, int kind, int order, const void* caller) {
    if (together && kind & STORES && random_below(4) == 0) {  // as anywhere, others may go first
        current->changes = changes - 1;
        yield("a strong store", "", 0);
    }
    const Region* const region = find((u64)address, bytes);
    if (region && region->array.mapped) is_timed = true;
    access((u64)address, bytes, {(kind & STORES) != 0 || !together, true, caller});
    if (together) {
        synchronise((u64)address, kind, order);
    } else {
        tell_later_blocks((u64)address, bytes);
    }
}

void fence() {
    if (!together) return;  // its atomics tell all that it knows
    current->known = joined(current->known, current->seen);
    current->fenced = knowledge();
}

u64 global_timer() {
    is_timed = true;
    return nanoseconds();
}

void atomic_access(const void* address, int bytes, int order, const void* caller) {
    strong_access(address, bytes, LOADS | STORES, order, caller);
}

static Copy begin_copy(void* to, const void* from, int bytes, const void* caller) {
    Copy copy{(char*)to, {}, bytes, current->groups};
    access((u64)from, bytes, {false, false, caller});
    access((u64)to, bytes, {true, false, caller});
    memcpy(copy.data, from, bytes);
    memset(to, 0xff, bytes);
    set_copying(copy, true);
    return copy;
}

void require_space(const void* at, bool is_shared) {
    if (!runs_launch) return;
    const Region* const region = find((u64)at, 1);
    if (!region || region->array.shared == is_shared) return;  // accesses say what is out of bounds
    stop(*current, CALLER, format("takes %s for %s memory", name_of(*region).c_str(),
                                  is_shared ? "shared" : "global"));
}

void copy_later(void* to, const void* from, int bytes) {
    if (((u64)to | (u64)from) % bytes) {
        stop(*current, CALLER, format("copies %d bytes that are not aligned to as many", bytes));
    }
    current->copies.push_back(begin_copy(to, from, bytes, CALLER));
}

void commit_copies() { current->groups++; }

void wait_for_copies(int groups) {
    std::vector<Copy> left;
    for (const Copy& copy : current->copies) {
        if (copy.group >= current->groups - groups) {
            left.push_back(copy);
            continue;
        }
        set_copying(copy, false);
        access((u64)copy.to, copy.bytes, {true, false, CALLER});
        memcpy(copy.to, copy.data, copy.bytes);
    }
    current->copies.swap(left);
}

// Whether what `who` wrote at `time` is there for products and bulk copies.
static bool is_fenced(u16 who, u32 time) {
    who &= ~ATOMIC;
    const int warp = warp_of(who), me = (who & NUMBER) - 1;
    const int first = warp < 0 ? running * stride : who & MANY_LANES ? warp * WARP : me;
    const int count = warp < 0 ? num_threads : who & MANY_LANES ? WARP : 1;
    return std::all_of(threads + first, threads + first + count,
                       [&](const Thread& t) { return time <= t.proxy_fenced; });
}

constexpr int MBARRIER_BYTES = 8;

// Of a block that is alone: what an mbarrier tells goes by times of its threads.
void make_mbarrier(const void* at, u32 arrivals, const char* file, int line) {
    const Region* const of = find((u64)at, MBARRIER_BYTES);
    if (num_blocks > 1 || !of || !of->array.shared || (u64)at % MBARRIER_BYTES) {
        stop(*current, nullptr, call("mbarrier_init", file, line) +
             " for what is not 8 aligned bytes of shared memory of a block without a cluster");
    }
    for (Region& region : regions) {
        if (!region.array.shared || region.reads || !region.array.bytes) continue;
        region.reads = (u32*)reserve_for_launch(region.array.bytes * (stride / WARP) * sizeof(u32));
        region.by_proxy = reserve_for_launch(region.array.bytes);
        if (!region.reads || !region.by_proxy) stop(*current, nullptr, "finds no memory");
    }
    access((u64)at, MBARRIER_BYTES, {true, false, CALLER});
    mbarriers[(u64)at] = {arrivals, arrivals, 0, 0, nullptr, nullptr, {}};
}

static Mbarrier& mbarrier_at(const void* at, const void* caller) {
    access((u64)at, MBARRIER_BYTES, {false, false, caller});
    const auto found = mbarriers.find((u64)at);
    if (found == mbarriers.end()) stop(*current, caller, "uses an mbarrier that nobody has made");
    return found->second;
}

void arrive_at_mbarrier(const void* at, u32 bytes) {
    Mbarrier& barrier = mbarrier_at(at, CALLER);
    if (!barrier.missing) stop(*current, CALLER, "arrives at an mbarrier whose phase has all arrivals");
    barrier.bytes += bytes;
    barrier.missing--;
    barrier.gathered = joined(barrier.gathered, knowledge());
    end_phase(barrier);
}

void arrive_behind_copies(const void* at) {
    Mbarrier& barrier = mbarrier_at(at, CALLER);
    barrier.flights.push_back({{}, 0, true, knowledge()});
    barrier.flights.back().copies.swap(current->copies);
}

// The last phase also tells what this thread knows when it asks for the copy.
void copy_in_bulk(void* to, const void* from, u32 bytes, const void* at) {
    Mbarrier& barrier = mbarrier_at(at, CALLER);
    if (((u64)to | (u64)from | bytes) % 16) stop(*current, CALLER, "copies no whole aligned 16 bytes");
    const Region& of = *find((u64)at, MBARRIER_BYTES);
    const Cell& made = of.cells[(const char*)at - of.array.begin];
    if (!is_fenced(made.writer, made.write_time)) {
        stop(*current, CALLER, "copies in bulk, to an mbarrier made without fence_async_proxy behind");
    }
    Flight flight{{}, bytes, false, nullptr};
    for (u32 i = 0; i < bytes; i += 16) {
        flight.copies.push_back(begin_copy((char*)to + i, (const char*)from + i, 16, CALLER));
    }
    flight.known = knowledge();
    barrier.flights.push_back(std::move(flight));
}

void wait_for_mbarrier(const void* at, u32 parity, const char* file, int line) {
    const Mbarrier& barrier = mbarrier_at(at, CALLER);
    if (!is_over(barrier, parity)) {
        current->awaits = &barrier;
        current->parity = parity;
        wait(AT_MBARRIER, "mbarrier_wait", 0, file, line);
    }
    current->known = joined(current->known, barrier.told);
}

void await_previous() { current->awaited = true; }

void fence_proxy() { current->proxy_fenced = now++; }

void fence_products() { current->products_fenced = true; }

void read_later(const void* at, int bytes, const char* file, int line) {
    Region* const region = find((u64)at, bytes);
    if (!region || !region->array.shared) {
        stop(*current, nullptr, call("wgmma", file, line) + " for what is not in shared memory");
    }
    const u64 begin = (const char*)at - region->array.begin;
    for (u64 i = begin; i < begin + bytes; i++) {
        const Cell& cell = region->cells[i];
        if (!cell.writer || cell.writer & COPYING) continue;  // the read itself says so
        if (region->by_proxy && region->by_proxy[i]) continue;
        if (is_fenced(cell.writer, cell.write_time)) continue;
        stop(*current, nullptr, call("wgmma", file, line) +
             format(" to read byte %llu of %s, which %s wrote without fence_async_proxy behind",
                    (ull)i, name_of(*region).c_str(), who_text(cell.writer).c_str()));
    }
    current->operands.push_back({(const char*)at, bytes, current->product_groups, now});
}

void hold_later(const void* registers, int bytes) {
    const char* const at = (const char*)registers;
    current->held.push_back({at, {at, at + bytes}, current->product_groups});
}

float* sums_later(float* sums, int count, const char* file, int line) {
    now++;  // what is written from here on is later than what earlier products have read
    for (Product& product : current->products) {
        if (product.to != sums) continue;
        product.group = current->product_groups;
        return product.sums.data();
    }
    if (!current->products_fenced) {
        stop(*current, nullptr, call("wgmma", file, line) + " without wgmma_fence before");
    }
    current->products.push_back({sums, {sums, sums + count}, current->product_groups});
    memset(sums, 0xff, count * sizeof *sums);
    return current->products.back().sums.data();
}

void commit_products() {
    current->product_groups++;
    now++;
}

void wait_for_products(int groups) {
    const int left = current->product_groups - groups;
    for (const Operand& read : current->operands) {
        if (read.group >= left) continue;
        const Region* const region = find((u64)read.at, read.bytes);
        const u64 begin = read.at - region->array.begin;
        for (u64 i = begin; i < begin + read.bytes; i++) {
            const Cell& cell = region->cells[i];
            if (cell.write_time <= read.time) continue;
            stop(*current, CALLER, format("waits for a product that reads byte %llu of %s, which "
                                          "%s has written meanwhile", (ull)i,
                                          name_of(*region).c_str(), who_text(cell.writer).c_str()));
        }
    }
    for (const Held& held : current->held) {
        if (held.group < left && memcmp(held.at, held.data.data(), held.data.size())) {
            stop(*current, CALLER, "waits for a product whose registers were written meanwhile");
        }
    }
    for (const Product& product : current->products) {
        if (product.group >= left) continue;
        const size_t size = product.sums.size() * sizeof(float);
        const auto is_poison = [](char byte) { return byte == '\xff'; };
        if (!std::all_of((char*)product.to, (char*)product.to + size, is_poison)) {
            stop(*current, CALLER, "waits for a product whose sums were written meanwhile");
        }
        memcpy(product.to, product.sums.data(), size);
    }
    const auto drop = [&](auto& all) {
        const auto is_over = [&](const auto& x) { return x.group < left; };
        all.erase(std::remove_if(all.begin(), all.end(), is_over), all.end());
    };
    drop(current->operands);
    drop(current->held);
    drop(current->products);
    current->products_fenced = false;
}

[[noreturn]] void fail_shuffle(const char* name, u32 mask, int from, const char* file, int line) {
    stop(*current, nullptr, format("calls %s at %s:%d with mask %08x to read lane %d, not in it",
                                   name, file, line, mask, from));
}
}  // namespace simt

// --- What -fsanitize=thread calls before each access ---------------------------------------------

#define ACCESS(kind, bytes)                              \
    extern "C" void __tsan_##kind##read##bytes(u64 at) {  \
        access(at, bytes, {false, false, CALLER});        \
    }                                                     \
    extern "C" void __tsan_##kind##write##bytes(u64 at) { \
        access(at, bytes, {true, false, CALLER});         \
    }
ACCESS(, 1)
ACCESS(, 2)
ACCESS(, 4)
ACCESS(, 8)
ACCESS(, 16)
ACCESS(unaligned_, 2)  // of a type that need not be aligned; the others are checked below
ACCESS(unaligned_, 4)
ACCESS(unaligned_, 8)
ACCESS(unaligned_, 16)
extern "C" void __tsan_read_range(u64 at, u64 bytes) { access(at, bytes, {false, false, CALLER}); }
extern "C" void __tsan_write_range(u64 at, u64 bytes) { access(at, bytes, {true, false, CALLER}); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// --- What -fsanitize=undefined calls after a failed check ----------------------------------------

struct Place { const char* file; u32 line, column; };  // first in every check's data

#define CHECK(name, what)                                                                     \
    extern "C" void __ubsan_handle_##name(const Place* at) {                                  \
        stop(*current, nullptr, format("%s at %s:%u", what, at->file, at->line));             \
    }
CHECK(type_mismatch_v1, "dereferences a null or misaligned pointer")
CHECK(out_of_bounds, "indexes past an array's end")
CHECK(add_overflow, "overflows a signed sum")
CHECK(sub_overflow, "overflows a signed difference")
CHECK(mul_overflow, "overflows a signed product")
CHECK(negate_overflow, "overflows by changing a sign")
CHECK(divrem_overflow, "divides by zero, or overflows")
CHECK(shift_out_of_bounds, "shifts by a negative or too large number")
CHECK(float_cast_overflow, "casts a float to an integer that cannot hold it")
