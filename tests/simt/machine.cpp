// machine.cpp: the scheduler of the SIMT machine, and what it holds kernels to.
//
// Built once, without sanitizers, and loaded before any kernel. Blocks run one after another, in an
// order set by the seed; so do a block's warps between two barriers, and a warp's lanes between two
// meetings. Every access of a kernel arrives in `access`, which knows
//   - the arrays of this launch and the shared variables: all else is out of bounds;
//   - for every byte that may be written, who wrote and read it last, and when: two threads that
//     touch a byte, one of them writing, must have a barrier or an __syncwarp between them, or both
//     be atomic; two blocks must not, unless the earlier one has done an atomic since, by that
//     thread or behind a barrier, and the later one has done an atomic before;
//   - which shared bytes this block has written: the others must not be read.
// A fault ends the launch; its text names block, thread and place.
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using ull = unsigned long long;  // for printf

constexpr int WARP = 32;
constexpr int VALUE_BYTES = 64;
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t PAGE = 4096;

struct uint3 { u32 x, y, z; };

#define CALLER __builtin_return_address(0)

// --- What Python passes and reads (machine.py holds the same declarations) -----------------------

struct Array {
    const char* name;
    char* begin;
    u64 bytes;
    int writable, shared;
};

struct Launch {
    void (*call)(void**);
    void** values;  // addresses of the kernel's arguments
    u32 grid[3], block[3];
    Array* arrays;
    int num_arrays;
    char* dynamic_shared;
    u64 seed;
    char fault[1000];   // empty if there was none
    char module[1000];  // the library with the fault, where the text does not name its place
    u64 offset;         // in that library
};

// --- State ---------------------------------------------------------------------------------------

// The last accesses to a byte. `who`: 0 nobody, thread + 1, MANY_LANES | warp or MANY_WARPS.
struct Cell {
    u32 write_time, read_time;
    u16 writer, reader;
};
constexpr u16 MANY_WARPS = 0x4000, MANY_LANES = 0x2000;
constexpr u16 ATOMIC = 0x8000, COPYING = 0x1000;  // how the writer writes

struct Region {
    Array array;
    Cell* cells;  // one a byte; null where nothing writes
};

struct Copy {
    char *to, data[16];
    int bytes, group;
};

enum State { READY, AT_BARRIER, AT_MEETING, AT_CONVERGENCE, EXITED };

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
    u32 converged;              // what __activemask returns
    std::vector<Copy> copies;   // not waited for
    int groups;                 // of copies, committed so far
};

static Thread threads[MAX_THREADS];
static char handed[MAX_THREADS][VALUE_BYTES];  // what each brought to its last meeting
static char* stacks;
static Thread* current;
static jmp_buf scheduler;
static jmp_buf stopped;
static Launch* launch;
static std::vector<Region> regions;
static std::vector<u32> block_order, warp_order, lane_order;
static uint3 block_at;
static int num_threads;
static u32 now;                // grows whenever threads have met
static u32 block_start;        // when the block's first thread began
static bool block_is_ordered;  // an atomic may have told it what earlier blocks did

// What an atomic may tell later blocks: what its thread did, and what its block and its warp did
// before the barrier and the __syncwarp that the thread passed last.
struct Release { u32 time, block_start, block_time, warp_time; u16 thread; };
static std::vector<Release> releases;  // of this launch, by time
static u64 random_state;

static u32 random_below(u32 n) {
    random_state += 0x9e3779b97f4a7c15ull;  // splitmix64 (Steele, Lea and Flood, 2014)
    u64 x = random_state;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return (u32)((x ^ x >> 31) % n);
}

static void shuffle(std::vector<u32>& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
}

static void fill(std::vector<u32>& order, u32 n) {
    order.resize(n);
    std::iota(order.begin(), order.end(), 0u);
}

static int index_of(const Thread& thread) { return (int)(&thread - threads); }

static uint3 position(u32 i, const u32 (&sizes)[3]) {
    return {i % sizes[0], i / sizes[0] % sizes[1], i / sizes[0] / sizes[1]};
}

// --- Fibres --------------------------------------------------------------------------------------

static void suspend() {
    if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

static void live_and_die() {
    for (;;) {
        launch->call(launch->values);
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
    const uint3 t = thread.index;
    snprintf(launch->fault, sizeof launch->fault, "block (%u, %u, %u), thread (%u, %u, %u) %s",
             block_at.x, block_at.y, block_at.z, t.x, t.y, t.z, text.c_str());
    Dl_info info;
    if (where && dladdr(where, &info)) {
        snprintf(launch->module, sizeof launch->module, "%s", info.dli_fname);
        launch->offset = (u64)where - (u64)info.dli_fbase - 1;  // the call, not what follows it
    }
    _longjmp(stopped, 1);
}

static std::string thread_name(int i) {
    const uint3 t = threads[i].index;
    return format("thread (%u, %u, %u)", t.x, t.y, t.z);
}

static std::string waiting(const Thread& t) {
    if (t.state == EXITED) return "has exited";
    return format("waits in %s at %s:%d", t.name, t.file, t.line);
}

// --- Memory --------------------------------------------------------------------------------------

static std::string who_text(u16 who) {
    who &= ~ATOMIC;
    if (who & MANY_WARPS) return "threads of several warps";
    if (who & MANY_LANES) return format("several threads of warp %d", who & 0x0fff);
    return thread_name(who - 1);
}

// Whether an atomic of its own block came after what `who` did at `time`, in an earlier block.
static bool is_released(u16 who, u32 time) {
    const auto later = [](const Release& r, u32 t) { return r.time < t; };
    auto r = std::lower_bound(releases.begin(), releases.end(), time, later);
    for (; r != releases.end(); ++r) {
        if (r->block_start > time) return false;  // the atomics of the blocks that followed
        if (time <= r->block_time || who == r->thread + 1) return true;
        const int warp = who & MANY_LANES ? who & 0x0fff : (who - 1) / WARP;
        if (!(who & MANY_WARPS) && warp == r->thread / WARP && time <= r->warp_time) return true;
    }
    return false;
}

// Whether what `who` did at `time` is known to be over for the current thread.
static bool is_ordered(u16 who, u32 time) {
    who &= ~ATOMIC;
    if (who == 0) return true;
    // Cells of shared memory know no other block.
    if (time < block_start) return block_is_ordered && is_released(who, time);
    const int me = index_of(*current);
    if (who == me + 1 || time <= current->block_time) return true;
    if (who & MANY_WARPS) return false;
    const int warp = who & MANY_LANES ? who & 0x0fff : (who - 1) / WARP;
    return warp == me / WARP && time <= current->warp_time;
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
                      (ull)bytes, (long long)(address - begin), r.array.name, (ull)r.array.bytes);
    }
    stop(*current, by.caller, text);
}

[[noreturn]] static void race(const Region& region, u64 i, const Access& by, u16 who, u32 time,
                              const char* other_did) {
    const std::string other = time < block_start ? "another block" : who_text(who);
    stop(*current, by.caller,
         format("%s byte %llu of %s, which %s %s without a barrier between", by.verb(), (ull)i,
                region.array.name, other.c_str(), other_did));
}

// Who has touched a byte when the current thread does after `who` did at `time`.
static u16 joined(u16 who, u32 time) {
    const u16 me = (u16)(index_of(*current) + 1), my_warp = MANY_LANES | (me - 1) / WARP;
    who &= ~ATOMIC;
    if (who == me || is_ordered(who, time)) return me;
    const bool one_thread = !(who & (MANY_WARPS | MANY_LANES));
    if (who == my_warp || (one_thread && (who - 1) / WARP == (me - 1) / WARP)) return my_warp;
    return MANY_WARPS;
}

static void touch(Region& region, u64 i, const Access& by) {
    Cell& cell = region.cells[i];
    if (region.array.shared) {  // what an earlier block did there does not count
        if (cell.write_time < block_start) cell.writer = 0;
        if (cell.read_time < block_start) cell.reader = 0;
    }
    if (cell.writer & COPYING) {
        stop(*current, by.caller, format("%s byte %llu of %s, which an asynchronous copy writes",
                                         by.verb(), (ull)i, region.array.name));
    }
    const bool both_atomic = by.atomic && cell.writer & ATOMIC;
    if (!both_atomic && !is_ordered(cell.writer, cell.write_time)) {
        race(region, i, by, cell.writer, cell.write_time, "writes");
    }
    if (by.writes && !is_ordered(cell.reader, cell.read_time)) {
        race(region, i, by, cell.reader, cell.read_time, "reads");
    }
    if (region.array.shared && cell.writer == 0 && (!by.writes || by.atomic)) {
        stop(*current, by.caller, format("reads byte %llu of %s, which no thread has written",
                                         (ull)i, region.array.name));
    }
    if (by.writes) {
        cell.writer = joined(cell.writer, cell.write_time) | (by.atomic ? ATOMIC : 0);
        cell.write_time = now;
        cell.reader = 0;
    } else {
        cell.reader = joined(cell.reader, cell.read_time);
        cell.read_time = now;
    }
}

static void access(u64 address, u64 bytes, const Access& by) {
    if (!launch) return;  // the library is being loaded or asked for its kernels
    if (address - (u64)stacks < MAX_THREADS * STACK_BYTES) return;  // locals
    if (address - (u64)handed < sizeof handed) return;
    Region* const region = find(address, bytes);
    if (!region) out_of_bounds(address, bytes, by);
    const u64 begin = address - (u64)region->array.begin;
    if (region->cells) {
        for (u64 i = begin; i < begin + bytes; i++) touch(*region, i, by);
    } else if (by.writes) {
        stop(*current, by.caller, format("writes %s, which is const", region->array.name));
    }
}

// --- Meetings ------------------------------------------------------------------------------------

static void wait(State state, const char* name, u32 mask, const char* file, int line) {
    current->state = state;
    current->name = name, current->mask = mask, current->file = file, current->line = line;
    suspend();
}

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
        for (int to = 0; to < count; to++) {
            if (!(mask >> to & 1)) continue;
            lanes[to].state = READY;
            lanes[to].met_at = now;
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

// Run the lanes of a warp until each has exited or waits at a barrier.
static void run_warp(Thread* lanes, int count) {
    fill(lane_order, count);
    do {
        shuffle(lane_order);
        for (u32 i : lane_order) {
            if (lanes[i].state == READY) resume(lanes[i]);
        }
    } while (release_lanes(lanes, count));
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

// Let a block go whose live threads have all met at one barrier, and return whether any are left.
static bool release_block() {
    const Thread* first = nullptr;
    int predicates = 0;
    for (int i = 0; i < num_threads; i++) {
        const Thread& t = threads[i];
        if (t.state == EXITED) continue;
        if (!first) first = &t;
        if (!same_site(*first, t)) {
            stop(t, nullptr, waiting(t) + ", but " + thread_name(index_of(*first)) + " " +
                                 waiting(*first));
        }
        predicates += t.brought[0];
    }
    for (int i = 0; i < num_threads; i++) {
        Thread& t = threads[i];
        if (t.state == EXITED) continue;
        t.state = READY;
        t.block_time = now;
        t.predicates = predicates;
    }
    now++;
    return first != nullptr;
}

static void run_block() {
    block_start = ++now;
    block_is_ordered = false;
    for (const Region& r : regions) {
        if (r.array.shared) memset(r.array.begin, 0xff, r.array.bytes);
    }
    for (int i = 0; i < num_threads; i++) {
        threads[i].state = READY;
        threads[i].block_time = threads[i].warp_time = 0;
        threads[i].copies.clear();
        threads[i].groups = 0;
    }
    do {
        shuffle(warp_order);
        for (u32 warp : warp_order) {
            run_warp(threads + warp * WARP, std::min<int>(WARP, num_threads - warp * WARP));
        }
    } while (release_block());
}

extern "C" int simt_run(Launch* given) {
    if (!stacks && !make_stacks()) return -1;
    launch = given;
    random_state = launch->seed;
    num_threads = launch->block[0] * launch->block[1] * launch->block[2];
    now = 0;
    releases.clear();
    bool watched = true;
    for (int i = 0; i < launch->num_arrays; i++) {
        const Array& a = launch->arrays[i];
        Cell* cells = a.writable && a.bytes ? (Cell*)reserve(a.bytes * sizeof(Cell)) : nullptr;
        watched = watched && (cells || !a.writable || !a.bytes);
        regions.push_back({a, cells});
    }
    for (int i = 0; i < num_threads; i++) threads[i].index = position(i, launch->block);
    fill(block_order, launch->grid[0] * launch->grid[1] * launch->grid[2]);
    fill(warp_order, (num_threads + WARP - 1) / WARP);
    shuffle(block_order);
    if (watched && _setjmp(stopped) == 0) {
        for (u32 block : block_order) {
            block_at = position(block, launch->grid);
            run_block();
        }
    } else {
        for (Thread& t : threads) t.started = false;  // their stacks are given up
    }
    for (const Region& r : regions) {
        if (r.cells) munmap(r.cells, r.array.bytes * sizeof(Cell));
    }
    regions.clear();
    launch = nullptr;
    return watched ? given->fault[0] != 0 : -1;
}

// --- What machine.hpp declares -------------------------------------------------------------------

namespace simt {
uint3 thread_index() { return current->index; }
uint3 block_index() { return block_at; }
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

u32 converged_lanes(const char* file, int line) {
    wait(AT_CONVERGENCE, "__activemask", 0, file, line);
    return current->converged;
}

void order_memory() { current->warp_time = current->met_at; }

void atomic_access(const void* address, int bytes, const void* caller) {
    access((u64)address, bytes, {true, true, caller});
    if (find((u64)address, bytes)->array.shared) return;
    block_is_ordered = true;
    const Thread& t = *current;
    releases.push_back({now, block_start, t.block_time, t.warp_time, (u16)index_of(t)});
}

static void set_copying(const Copy& copy, bool copying) {
    Region* const region = find((u64)copy.to, copy.bytes);
    if (!region->cells) return;
    for (int i = 0; i < copy.bytes; i++) {
        u16& writer = region->cells[copy.to - region->array.begin + i].writer;
        writer = copying ? writer | COPYING : writer & ~COPYING;
    }
}

void copy_later(void* to, const void* from, int bytes) {
    Copy copy{(char*)to, {}, bytes, current->groups};
    access((u64)from, bytes, {false, false, CALLER});
    access((u64)to, bytes, {true, false, CALLER});
    memcpy(copy.data, from, bytes);
    memset(to, 0xff, bytes);
    set_copying(copy, true);
    current->copies.push_back(copy);
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
