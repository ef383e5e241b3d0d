// decode_stage.cuh: paged_decode_mma's stages: where the rows of a tile lie in pages and in shared
// memory, and their copy.
#include "decode_config.cuh"

constexpr bool TILES_IN_PAGES = PAGE % 16 == 0;  // 16 aligned keys share a page
constexpr int PAGE_IDS = TILES_IN_PAGES ? KEYS / 16 : 1;

// The page table of one sequence. Keys are clamped to `first` .. `last`.
struct Table {
    const int* pages;
    int first, last;

    __device__ __forceinline__ u32 key(int k) const { return max(first, min(k, last)); }
    __device__ __forceinline__ int page(int k) const { return __ldg(pages + key(k) / PAGE); }

    __device__ __forceinline__ bool contains(int tile) const {
        return tile * KEYS >= first && tile * KEYS + KEYS - 1 <= last;
    }
    __device__ __forceinline__ bool contains_key(int k) const { return k >= first && k <= last; }

    // The pages of a tile: one for each 16 keys, or that of this lane's key.
    __device__ __forceinline__ void find(int (&ids)[PAGE_IDS], int tile) const {
#pragma unroll
        for (int i = 0; i < PAGE_IDS; i++) {
            ids[i] = page(tile * KEYS + (TILES_IN_PAGES ? 16 * i : threadIdx.x % KEYS));
        }
    }
};

// The rows of one KV head, or their scales. Strides of pages and tokens are below 2^32 bytes, which
// the host checks: an address takes two instructions, with 64-bit strides seven.
template <typename T> struct Rows {
    const u8* at;
    u32 page_bytes, token_bytes;

    __device__ __forceinline__ Rows(const T* pool, int page, int token, i64 head, int kv_head)
        : at((const u8*)(pool + kv_head * head)), page_bytes((u32)page * sizeof(T)),
          token_bytes((u32)token * sizeof(T)) {}

    __device__ __forceinline__ const T* row(int page, u32 key) const {
        return (const T*)(at + (u64)(u32)page * page_bytes + (u64)(key % PAGE) * token_bytes);
    }
};

// Layout of a tile's rows in shared memory. The lanes of a warp copy rows together, so that their
// requests are whole lines: L2 serves half lines at half the rate. A swizzle permutes the 16-byte
// chunks of a row, so that lanes that read several rows at once use all banks.
template <typename S> struct StageLayout {
    static constexpr int ROW = S::ROW_BYTES * S::SHARERS;
    static constexpr int PITCH = PITCH_OF<ROW>;
    static constexpr int CHUNK = 16;
    static constexpr int CHUNKS = ROW / CHUNK;
    static constexpr int OF_LANE = KEYS * CHUNKS / WARP;  // chunks that a lane copies of a tile
    static constexpr bool HAS_SWIZZLE = PITCH >= 128 && (PITCH & (PITCH - 1)) == 0;
    static constexpr bool IS_KEYS = S::SHARERS == 4;
    static_assert(ROW % CHUNK == 0 && KEYS * CHUNKS % WARP == 0, "all lanes copy whole chunks");

    // Row and chunk of this lane's i-th copy.
    static __device__ __forceinline__ int row(int i) {
        const int lane = threadIdx.x % WARP;
        if (WARP % CHUNKS == 0) return i * (WARP / CHUNKS) + lane / CHUNKS;
        return (i * WARP + lane) / CHUNKS;
    }
    static __device__ __forceinline__ int chunk(int i) {
        const int lane = threadIdx.x % WARP;
        return WARP % CHUNKS == 0 ? lane % CHUNKS : (i * WARP + lane) % CHUNKS;
    }

    // For keys, lanes read READ chunks each of consecutive rows, enough to use all banks; for
    // values, two chunks each of rows r, r + 2, r + 4 and r + 6.
    static constexpr int READ = S::BYTES / 4;
    static __device__ __forceinline__ int swizzle(int row) {
        return !HAS_SWIZZLE ? 0 : IS_KEYS ? row % (8 / READ) * READ : row / 2 % 4 * 2;
    }
    static __device__ __forceinline__ int place(int row, int chunk) {
        return row * PITCH + (chunk ^ swizzle(row)) * CHUNK;
    }
    // Piece i of lane `part`.
    static __device__ __forceinline__ int place_of(int row, int i, int part) {
        const int byte = (i * S::SHARERS + part) * S::BYTES;
        return place(row, byte / CHUNK) + byte % CHUNK;
    }
};

// Calls copy(i, place, from) for each of this lane's chunks of a tile; i is the chunk's number, and
// arbitrary with cp.async. Keys outside the table are clamped to it; without cp.async they may be
// read as they are, and store_held clears them.
template <typename S, typename T, typename Copy>
__device__ __forceinline__ void copy_tile(const Rows<T>& rows, const Table& table,
                                          const int (&ids)[PAGE_IDS], int tile, Copy copy) {
    using At = StageLayout<S>;
    // A warp copies AT_ONCE whole rows by COPIES chunks a lane.
    constexpr int COPIES = At::CHUNKS / (At::CHUNKS & -At::CHUNKS);
    constexpr int AT_ONCE = WARP * COPIES / At::CHUNKS;
    constexpr bool BY_STEPS = TILES_IN_PAGES && AT_ONCE <= 16;
    const int lane = threadIdx.x % WARP;
    if constexpr (BY_STEPS) {
        if (!HAS_CP_ASYNC || table.contains(tile)) {  // few instructions, which bound the loop
            const int row = lane / At::CHUNKS, chunk = lane % At::CHUNKS;
            const u64 offset = (u64)row * rows.token_bytes + chunk * At::CHUNK;
#pragma unroll
            for (int s = 0; s < KEYS / 16; s++) {
                const u8* from = (const u8*)rows.row(ids[s], tile * KEYS + 16 * s) + offset;
#pragma unroll
                for (int i = 16 * s; i < 16 * s + 16; i += AT_ONCE) {
                    copy(i / AT_ONCE * COPIES, At::place(i + row, chunk), from);
#pragma unroll
                    for (int j = 1; j < COPIES; j++) {
                        const int down = At::row(j) - row, right = At::chunk(j) - chunk;
                        const u64 beyond = (u64)down * rows.token_bytes + right * At::CHUNK;
                        copy(i / AT_ONCE * COPIES + j, At::place(i + row + down, chunk + right),
                             from + beyond);
                    }
                    from += (u64)rows.token_bytes * AT_ONCE;
                }
            }
            return;
        }
    }
    const auto copy_chunk = [&](int i, int n) {
        const int row = n / At::CHUNKS, chunk = n % At::CHUNKS;
        int page = ids[0];
        if (!TILES_IN_PAGES) {
            page = __shfl_sync(FULL_MASK, page, row);
        } else if (row >= 16) {
            page = ids[PAGE_IDS - 1];
        }
        const u8* from = (const u8*)rows.row(page, table.key(tile * KEYS + row));
        copy(i, At::place(row, chunk), from + chunk * At::CHUNK);
    };
    if constexpr (BY_STEPS) {
#pragma unroll 1
        for (int n = lane; n < KEYS * At::CHUNKS; n += WARP) copy_chunk(0, n);
    } else {
#pragma unroll
        for (int i = 0; i < At::OF_LANE; i++) copy_chunk(i, i * WARP + lane);
    }
}

template <int WORDS> __device__ __forceinline__ void load_words(u32 (&w)[WORDS], const u8* from) {
    if constexpr (WORDS == 4) {
        const uint4 x = *reinterpret_cast<const uint4*>(from);
        w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
    } else if constexpr (WORDS == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        w[0] = x.x, w[1] = x.y;
    } else {
        w[0] = *reinterpret_cast<const u32*>(from);
    }
}
