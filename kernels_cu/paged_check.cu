// paged_check.cu: find the first entry of page tables and slots that no paged op may be given.
//
// Arrays (letters as in pykv/ops/paged_check.py), all int32 unless said otherwise:
//   found                 [1] u64    ~0 before; the least (reason << 32 | index) of all offenders
//   values         const  [n] INDEX  int or i64
//   slots          const  [n] INDEX  negative: none
//   seen                  [mask + 1] u64  hash table, ~0 before, at least twice as large as slots
//   indptr, starts const  [B+1]
//   indices        const  [n]
//   last_page_len, lengths  const  [B]
//   page_table     const  [B, M]     rows row_stride elements apart
//   batch_indices, positions  const  [n]
// Defines:  INDEX = int or i64; BLOCK = threads
// Launch:   grid (ceil(threads / BLOCK)), block (BLOCK), threads as each kernel says, no shared memory
// Traffic:  each array once
// Order:    atomic minima, so the same offender in every run
#include "batch.cuh"

#if !defined(INDEX) || !defined(BLOCK)
#error "paged_check.cu needs INDEX = int or i64, and BLOCK"
#endif

// The reasons, in the order in which they are reported; pykv/ops/paged_check.py has their texts.
enum Reason { BAD_START, BAD_ORDER, BAD_END, NO_PAGE, BAD_COUNT, BAD_ENTRY, REPEATED };

__device__ __forceinline__ i64 item() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ __forceinline__ void report(u64* found, Reason reason, i64 index) {
    atomicMin(found, (u64)reason << 32 | (u64)index);
}

// Threads: n. Entries from `low` to `end` - 1; `low` is the least i64 where negative ones are
// skipped.
extern "C" __global__ void __launch_bounds__(BLOCK)
paged_check_range(u64* found, const INDEX* values, i64 n, i64 low, i64 end) {
    if (item() >= n) return;
    const i64 value = values[item()];
    if (value < low || value >= end) report(found, BAD_ENTRY, item());
}

// Threads: n. Slots below `end`, none of them twice; the later one of two is reported.
extern "C" __global__ void __launch_bounds__(BLOCK)
paged_check_slots(u64* found, u64* seen, const INDEX* slots, u32 mask, i64 n, i64 end) {
    if (item() >= n) return;
    const i64 slot = slots[item()];
    if (slot < 0) return;
    if (slot >= end) return report(found, BAD_ENTRY, item());

    // An entry of `seen` is slot << 32 | index, its slot for good and its index falling. Of a
    // slot's entries a < b < c ... b meets a whichever comes first, and nothing before b is
    // reported.
    const u64 mine = (u64)slot << 32 | (u64)item();
    for (u32 at = (u32)slot * 2654435761u;; at++) {
        u64* const entry = seen + (at & mask);
        u64 old = atomicCAS(entry, ~0ull, mine);
        if (old == ~0ull) return;
        if (old >> 32 != (u64)slot) continue;
        old = atomicMin(entry, mine);
        return report(found, REPEATED, max((i64)(old & 0xffffffffu), item()));
    }
}

// The checks that all tables of starts share: from 0, growing, not past `end`.
__device__ __forceinline__ void check_starts(u64* found, const int* starts, i64 i, i64 last,
                                             i64 end) {
    if (i == 0 && starts[0] != 0) report(found, BAD_START, 0);
    if (i < last && starts[i + 1] < starts[i]) report(found, BAD_ORDER, i + 1);
    if (i <= last && starts[i] > end) report(found, BAD_END, i);
}

// Threads: B + 1.
extern "C" __global__ void __launch_bounds__(BLOCK)
paged_check_starts(u64* found, const int* starts, i64 B, i64 end) {
    check_starts(found, starts, item(), B, end);
}

// Threads: max(n, B + 1). Request b has starts[b+1] - starts[b] tokens; where `starts` is null, one
// of an append, and of a read what its pages hold. To read, its pages do for its tokens, those that
// they need are 0 to num_pages - 1, and last_page_len, if not null, is 0 to page_size. To append,
// requests without pages are skipped; pages are below num_pages, negative ones are skipped; and
// last_page_len, if not null, says where the tokens go: that is within the request's pages. It
// counts them too where `after`.
extern "C" __global__ void __launch_bounds__(BLOCK)
paged_check_table(u64* found, const int* indptr, const int* indices, const int* last_page_len,
                  const int* starts, i64 n, i64 B, i64 num_pages, i64 page_size, int appends,
                  int after) {
    const i64 i = item();
    check_starts(found, indptr, i, B, n);
    if (B > 0 && i < n && i < indptr[B] &&
        ((indices[i] < 0 && !appends) || indices[i] >= num_pages)) {
        const int b = last_up_to(indptr, (int)B, i);
        const bool is_used = appends || !starts ||
                             (i - indptr[b]) * page_size < starts[b + 1] - starts[b];
        if (is_used) report(found, BAD_ENTRY, i);
    }
    if (i >= B) return;
    const i64 pages = (i64)indptr[i + 1] - indptr[i];
    if (appends && pages == 0) return;
    const i64 tokens = starts ? starts[i + 1] - starts[i] : appends;
    if (pages * page_size < tokens) report(found, NO_PAGE, i);
    if (!last_page_len || pages == 0) return;
    const i64 last = last_page_len[i], first = (pages - 1) * page_size + last - after * tokens;
    const bool is_wrong = appends ? first < 0 || first + tokens > pages * page_size
                                  : last < 0 || last > page_size;
    if (is_wrong && (tokens > 0 || !appends)) report(found, BAD_COUNT, i);
}

// Threads: B * max(M, 1). Lengths are at most M * page_size; pages of the last `seen` tokens, and
// with `starts`, not null, of as many up to each of the last starts[b+1] - starts[b], are 0 to
// num_pages - 1. A sequence with none of those may be anything.
extern "C" __global__ void __launch_bounds__(BLOCK)
paged_check_page_table(u64* found, const int* page_table, const int* lengths, const int* starts,
                       i64 row_stride, i64 B, i64 M, i64 num_pages, i64 page_size, i64 seen) {
    const i64 width = max(M, (i64)1), b = item() / width, m = item() - b * width;
    if (b >= B) return;
    const i64 length = lengths[b], queries = starts ? starts[b + 1] - starts[b] : 1;
    if (queries == 0) return;
    if (m == 0 && length > M * page_size) report(found, BAD_COUNT, b);
    if (m >= M) return;
    const i64 page = page_table[b * row_stride + m];
    const bool is_used = m * page_size < length &&
                         (m + 1) * page_size > length - seen - (queries - 1);
    if (is_used && (page < 0 || page >= num_pages)) report(found, BAD_ENTRY, item());
}

// Threads: n. Positions lie in the pages of their request; negative requests, and those without
// pages, are skipped.
extern "C" __global__ void __launch_bounds__(BLOCK)
paged_check_positions(u64* found, const int* batch_indices, const int* positions, const int* indptr,
                      i64 n, int B, i64 page_size) {
    const i64 i = item();
    if (i >= n || batch_indices[i] < 0) return;
    const int b = batch_indices[i];
    if (b >= B) return report(found, BAD_ENTRY, i);
    const i64 end = ((i64)indptr[b + 1] - indptr[b]) * page_size;
    if (end > 0 && (positions[i] < 0 || positions[i] >= end)) report(found, BAD_COUNT, i);
}
