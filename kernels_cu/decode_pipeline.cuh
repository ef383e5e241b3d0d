// decode_pipeline.cuh: paged_decode_mma's pipeline of a warp's tiles: from pages to stages to
// registers.
#include "decode_stage.cuh"
#include "ptx.cuh"
#include "warps.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

// A lane's fragments of the keys and of the values of a tile, in registers: copies of the next tile
// may fill the stage while this one is multiplied.
struct Keys { u32 words[KEYS / 8][KFragment::COUNT][KFragment::WORDS]; };
struct Values { u32 words[KEYS / 4][VFragment::COUNT][VFragment::WORDS]; };

// words[n] is of key 8n + g.
__device__ __forceinline__ void load_keys(Keys& keys, const u8* stage) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < KFragment::COUNT; i++) {
            const int place = StageLayout<KFragment>::place_of(8 * n + lane / 4, i, lane % 4);
            load_words(keys.words[n][i], stage + place);
        }
    }
}

// Four rows of each 16 keys: 2t, 2t + 1, 2t + 8 and 2t + 9.
__device__ __forceinline__ void load_values(Values& values, const u8* stage) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < KEYS / 4; n++) {
        const int row = n / 4 * 16 + n % 2 + n / 2 % 2 * 8;  // from 2t on, with the same swizzle
#pragma unroll
        for (int i = 0; i < VFragment::COUNT; i++) {
            const int place = StageLayout<VFragment>::place_of(lane % 4 * 2, i, lane / 4);
            load_words(values.words[n][i], stage + place + row * StageLayout<VFragment>::PITCH);
        }
    }
}

// Where tiles come from. For the next tile it holds the pages and the scales of this lane's key and
// value; scales stay in their storage type, because a conversion would wait for the load.
struct Source {
    Rows<K_T> keys;
    Rows<V_T> values;
    Rows<SCALE_T> key_scales, value_scales;
    int ids[PAGE_IDS] = {};
    SCALE_T k_scale{}, v_scale{};

    __device__ __forceinline__ void load_scales(const Table& table, int tile) {
        if constexpr (HAS_CODES && ROW_SCALES) {
            const int of_tile = threadIdx.x % WARP % KEYS;
            const int page = of_tile < 16 ? ids[0] : ids[PAGE_IDS - 1];
            const u32 key = table.key(tile * KEYS + of_tile);
            if (K_ROW_SCALES) k_scale = *key_scales.row(page, key);
            if (V_ROW_SCALES) v_scale = *value_scales.row(page, key);
        }
    }
};

// `start` begins a piece with its first tile, whose pages are in `ids`. Then for each tile
// `next_keys` and `next_values` wait for its rows and start the following copy, and `find_pages`
// loads the page numbers of the tile after. `end` is the end of the piece's tiles.
#if __CUDA_ARCH__ >= 800
// One stage of keys and one of values: when a stage has been read, the next tile is copied into it.
struct Pipeline : Source {
    template <typename S, typename T>
    __device__ __forceinline__ void copy(u8* stage, const Rows<T>& rows, const Table& table,
                                         int tile) {
        copy_tile<S>(rows, table, ids, tile, [stage](int, int place, const u8* from) {
            cp_async16(stage + place, from);
        });
    }

    __device__ __forceinline__ void start(u8* k_stage, u8* v_stage, const Table& table, int tile,
                                          int end) {
        const bool has_tile = tile < end;
        if (has_tile) {
            copy<KFragment>(k_stage, keys, table, tile);
            load_scales(table, tile);
        }
        cp_async_commit();
        if (has_tile) copy<VFragment>(v_stage, values, table, tile);
        cp_async_commit();
        find_pages(table, tile, end);
    }

    __device__ __forceinline__ void next_keys(Keys& taken, u8* stage, const Table& table, int tile,
                                              int end) {
        const int later = tile + WARPS;
        if (later < end) load_scales(table, later);
        cp_async_wait<1>();
        __syncwarp();  // the copies of all lanes have arrived
        load_keys(taken, stage);
        __syncwarp();  // all lanes have read the stage
        if (later < end) copy<KFragment>(stage, keys, table, later);
        cp_async_commit();
    }

    __device__ __forceinline__ void next_values(Values& taken, u8* stage, const Table& table,
                                                int tile, int end) {
        const int later = tile + WARPS;
        cp_async_wait<1>();
        __syncwarp();
        load_values(taken, stage);
        __syncwarp();
        if (later < end) copy<VFragment>(stage, values, table, later);
        cp_async_commit();
    }

    __device__ __forceinline__ void find_pages(const Table& table, int tile, int end) {
        if (tile + WARPS < end) table.find(ids, tile + WARPS);
    }
};
#else
// Without cp.async: one stage, and registers that hold the rows in flight. While a tile's keys are
// multiplied, its values are loaded; while its values are, the keys of the next tile.
struct Pipeline : Source {
    static constexpr int K_CHUNKS = StageLayout<KFragment>::OF_LANE;
    static constexpr int V_CHUNKS = StageLayout<VFragment>::OF_LANE;
    uint4 held[K_CHUNKS > V_CHUNKS ? K_CHUNKS : V_CHUNKS];

    template <typename S, typename T>
    __device__ __forceinline__ void fetch(const Rows<T>& rows, const Table& table, int tile) {
        copy_tile<S>(rows, table, ids, tile, [&](int i, int, const u8* from) {
            held[i] = load16_eager(from);
        });
    }

    template <typename S>
    __device__ __forceinline__ void store_held(u8* stage, const Table& table, int tile) {
        using At = StageLayout<S>;
        __syncwarp();  // all lanes have read the stage
#pragma unroll
        for (int i = 0; i < At::OF_LANE; i++) {
            *(uint4*)(stage + At::place(At::row(i), At::chunk(i))) = held[i];
        }
        if (!table.contains(tile)) {  // a weight of 0 times a NaN is NaN
#pragma unroll 1
            for (int i = 0; i < At::OF_LANE; i++) {
                if (table.contains_key(tile * KEYS + At::row(i))) continue;
                *(uint4*)(stage + At::place(At::row(i), At::chunk(i))) = make_uint4(0, 0, 0, 0);
            }
        }
        __syncwarp();
    }

    __device__ __forceinline__ void start(u8*, u8*, const Table& table, int tile, int end) {
        if (tile >= end) return;
        fetch<KFragment>(keys, table, tile);
        load_scales(table, tile);
    }

    __device__ __forceinline__ void next_keys(Keys& taken, u8* stage, const Table& table, int tile,
                                              int end) {
        store_held<KFragment>(stage, table, tile);
        fetch<VFragment>(values, table, tile);
        if (tile + WARPS < end) table.find(ids, tile + WARPS);
        load_keys(taken, stage);
    }

    __device__ __forceinline__ void next_values(Values& taken, u8* stage, const Table& table,
                                                int tile, int end) {
        store_held<VFragment>(stage, table, tile);
        start(stage, stage, table, tile + WARPS, end);
        load_values(taken, stage);
    }

    __device__ __forceinline__ void find_pages(const Table&, int, int) {}  // take_keys did
};
#endif
#endif
