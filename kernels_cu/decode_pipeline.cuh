// decode_pipeline.cuh: paged_decode_mma's pipeline: a warp's tiles, one after the other.
#include "decode_stage.cuh"
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 750  // older SMs get an empty kernel, which the host never launches

// What a lane holds of the keys of a tile, and of its values: out of shared memory, which the copies
// of the next tile may fill while this one is worked on.
struct Keys { u32 words[KEYS / 8][KFragment::COUNT][KFragment::WORDS]; };
struct Values { u32 words[KEYS / 4][VFragment::COUNT][VFragment::WORDS]; };

// Of key 8n + g.
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

// Of keys 2t, 2t + 1, 2t + 8 and 2t + 9 of each sixteen.
__device__ __forceinline__ void load_values(Values& values, const u8* stage) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < KEYS / 4; n++) {
        const int row = n / 4 * 16 + n % 2 + n / 2 % 2 * 8;  // from 2t on; it takes the same turn
#pragma unroll
        for (int i = 0; i < VFragment::COUNT; i++) {
            const int place = StageLayout<VFragment>::place_of(lane % 4 * 2, i, lane / 4);
            load_words(values.words[n][i], stage + place + row * StageLayout<VFragment>::PITCH);
        }
    }
}

// Where they come from; and of the tile that is copied next its pages, and its scales as they are
// stored, since to convert them is to wait for them: those of this lane's key and value.
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

// A piece begins by `start` with its first tile, whose pages are in `ids`. Then, for each tile,
// `take_keys` and `take_values` wait for its rows and ask for what comes next, and `find_pages` ends
// its turn. `end` is that of the piece's tiles.
#if __CUDA_ARCH__ >= 800
// When a tile's keys have been read, those of the next tile are copied; values likewise.
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
        __syncwarp();  // what the others have copied too
        load_keys(taken, stage);
        __syncwarp();  // all have read what is copied over
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
// While a tile's keys are worked on, its values are on their way to registers; while these are, the
// keys of the next tile. What arrived is stored when all that was in the queue has been read.
struct Pipeline : Source {
    static constexpr int K_CHUNKS = StageLayout<KFragment>::OF_LANE, V_CHUNKS = StageLayout<VFragment>::OF_LANE;
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
        __syncwarp();  // all have read what is stored over
#pragma unroll
        for (int i = 0; i < At::OF_LANE; i++) {
            *(uint4*)(stage + At::place(At::row(i), At::chunk(i))) = held[i];
        }
        if (!table.contains(tile)) {  // no weight of 0 shall meet a NaN
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
