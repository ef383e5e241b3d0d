"""block_copy: every byte arrives, and no other byte changes."""

import numpy as np
import pytest

from pykv import cuda, ranges
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError
from pykv.ops import block_copy
from tests.helpers import assert_same_bits, pinned, swept, to_numpy, without_simt

TILE = block_copy.FEW["TILE"]  # the larger one, and a multiple of the other
LINE = 128  # where tiles meet

BASE = dict(sizes=[256] * 4, src_at=0, dst_at=0, spread=512)
CHANGES = (
    *({"sizes": [n] * 3} for n in (1, 2, 3, 15, 16, 17, 31, 127, 4080, 4095, 4096, 4097)),
    *({"sizes": [n] * 2, "spread": 3 * TILE} for n in (TILE + LINE, 2 * TILE - 1, 2 * TILE + 40)),
    # Unequal phases: widths of 8, 4, 2 and 1 bytes, each with head and tail.
    *({"sizes": [700] * 2, "spread": 1024, "src_at": a, "dst_at": 3} for a in (11, 7, 5, 4)),
    *({"sizes": [300], "src_at": a, "dst_at": b} for a, b in ((8, 0), (0, 4), (2, 0), (0, 1))),
    # Equal phases: a head of bytes, then 16 at a time; tiles still meet on lines.
    *({"sizes": [n, n], "src_at": a, "dst_at": a} for a in (1, 4, 8, 15) for n in (5, 16, 333)),
    *(
        {"sizes": [3 * TILE + 9], "src_at": a, "dst_at": b}
        for a, b in ((21, 5), (143, 127), (8, 4))
    ),
    {"sizes": [0, 5, 0, 0, TILE + 1, 16, 0], "spread": 2 * TILE},
    {"sizes": [*range(70)], "spread": 131},
    {"sizes": [1] * 40, "spread": 2},
    {"sizes": [9 * TILE, 1, 2 * TILE], "spread": 9 * TILE + 1},
)
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]
IDS = [
    f"{case['sizes'][:3]}x{len(case['sizes'])} {case['src_at']}-{case['dst_at']}" for case in CASES
]


def place(xp):
    return "cpu" if xp is np else "cuda"


def address(array):
    return ranges.address_of(array)


def prepare(*tables, **options):
    return cuda.prepare(block_copy.vectorized_copy, *tables, **options)


@pytest.fixture
def grids(monkeypatch):
    """The grid of every launch that is made, in blocks."""
    seen, configure = [], cuda.launch.driver.configure

    def spy(kernel, grid, *sizes):
        seen.append(grid)
        return configure(kernel, grid, *sizes)

    monkeypatch.setattr(cuda.launch.driver, "configure", spy)
    block_copy._launch.cache_clear()  # else a launch of another test would be reused
    return seen


def table(*addresses):
    return np.array(addresses, np.uint64)


def pool(xp, rng, size):
    return xp.asarray(rng.integers(0, 256, size, np.uint8))


def places(rng, spreads):
    """Where ranges of so many bytes begin that stand behind each other in a random order."""
    order = rng.permutation(len(spreads))
    begins = np.empty_like(spreads)
    begins[order] = np.cumsum(spreads[order]) - spreads[order]
    return begins


def inputs(xp, rng, sizes, src_at, dst_at, spread):
    """Two pools and tables into them, in which ranges stand in a random order, at an offset and
    `spread` apart, or behind each other where they are larger; and what the destination pool must
    hold afterwards."""
    spreads = np.maximum(spread, np.array(sizes) + 1)
    room = spreads.sum() + 2 * LINE
    src, dst = pool(xp, rng, room), pool(xp, rng, room)
    from_, to = (places(rng, spreads) + at for at in (src_at, dst_at))
    want = to_numpy(dst).copy()
    for size, a, b in zip(sizes, from_, to, strict=True):  # the definition, one pair at a time
        want[b : b + size] = to_numpy(src)[a : a + size]
    tables = [np.uint64(address(x)) + at.astype(np.uint64) for x, at in ((src, from_), (dst, to))]
    return src, dst, tables, want


@pytest.mark.parametrize("where", ["host tables", "device tables"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_bytes_arrive_and_no_others_change(xp, rng, case, where):
    src, dst, tables, want = inputs(xp, rng, **case)
    before = to_numpy(src).copy()
    sizes = case["sizes"]
    size = sizes[0] if len(set(sizes)) == 1 else np.array(sizes, np.int64)
    if where == "device tables":
        tables = [xp.asarray(x.view(np.int64)) for x in tables]
    block_copy.vectorized_copy(*tables, size, device=place(xp))
    assert_same_bits(dst, want)
    assert_same_bits(src, before)


@pytest.mark.parametrize("max_ctas", [1, 2, 7])
@pytest.mark.parametrize("sizes", [[3 * TILE] * 5, [*range(0, 3000, 100)]], ids=["equal", "own"])
def test_any_grid_copies_all(xp, grids, rng, sizes, max_ctas):
    src, dst, tables, want = inputs(xp, rng, sizes, 3, 19, 0)
    sizes = np.array(sizes, np.int64)
    block_copy.vectorized_copy(*tables, sizes, max_ctas=max_ctas, device=place(xp))
    assert_same_bits(dst, want)
    if xp is not np:
        num_tiles = int((-(-sizes // TILE)).sum())
        assert grids == [min(max_ctas, -(-num_tiles // 4))]  # four warps a block


def test_one_large_pair_takes_every_sm(xp, grids, rng):
    size = 300_001 if xp is np or xp.__name__ != "cupy" else 300_000_001
    src, dst = pool(xp, rng, size + 64), pool(xp, rng, size + 64)
    want = to_numpy(dst).copy()
    want[21 : 21 + size] = to_numpy(src)[5 : 5 + size]
    at, to = table(address(src) + 5), table(address(dst) + 21)
    block_copy.vectorized_copy(at, to, size, device=place(xp))
    assert_same_bits(dst, want)
    if xp is not np:
        assert grids[0] == -(-size // block_copy.MANY["TILE"]) > 16  # a warp a block


@without_simt
@pytest.mark.parametrize("by_pair", [False, True])
def test_more_pairs_than_a_grid_has_rows(xp, rng, by_pair):
    C = 65_536 + 70
    sizes = rng.integers(0, 4, C) if by_pair else np.full(C, 3)
    src, dst, tables, want = inputs(xp, rng, sizes.tolist(), 1, 0, 5)
    size = sizes.astype(np.int64) if by_pair else 3
    block_copy.vectorized_copy(*(xp.asarray(x) for x in tables), size, device=place(xp))
    assert_same_bits(dst, want)


@pytest.mark.parametrize(
    "C, max_ctas",
    [
        *((C, max_ctas) for C in (1, 31, 32, 33) for max_ctas in (None, 1)),
        *[(1024, 1), (1025, None)],
        *swept([(1023, None), (1023, 1), (1024, None), (1025, 1), (1100, None), (1100, 1)]),
    ],
)
def test_tiles_find_their_pair(device, rng, C, max_ctas):
    """Among as many pairs as the search takes one, two and three rounds for; of device tables,
    whose empty pairs stay."""
    sizes = rng.integers(0, 3, C) * rng.integers(0, 2, C)
    sizes[rng.integers(C)] = 1
    sizes[rng.integers(0, C, 3)] = [1, TILE + 1, 3 * TILE]
    sizes[-1] = max(sizes[-1], 1)  # which the last round alone finds
    src, dst, tables, want = inputs(device, rng, sizes.tolist(), 0, 0, 4)
    tables = map(device.asarray, tables)
    block_copy.vectorized_copy(*tables, sizes.astype(np.int64), max_ctas=max_ctas)
    assert_same_bits(dst, want)


# Bytes and how many: runs of pairs that share tiles, full ones and not, and of pairs that do not.
RUNS = (
    [(TILE // 4, 9)],
    [(TILE // 4 + 1, 5)],
    [(2 * TILE + 40, 3), (256, 33)],
    [(1, 70), (TILE, 4), (17, 8)],
    [(0, 2), (3 * TILE - 1, 2), (47, 7), (TILE + 1, 5)],
    [(64, 1), (TILE // 4 - 1, 16), (600, 1), (2, 15)],
    [(300, 20), (16, 20), (300, 20), (3, 20)],
    [(5000, 2), (5, 30), (6, 30), (7, 30), (8, 30)],  # one too many
)


@pytest.mark.parametrize("max_ctas", [1, 3, None])
@pytest.mark.parametrize("where", ["device tables", "host tables", "shuffled host tables"])
@pytest.mark.parametrize("runs", RUNS, ids=str)
def test_runs_of_equal_sizes(device, rng, runs, where, max_ctas):
    sizes = np.repeat(*np.array(runs).T)
    if where.startswith("shuffled"):
        rng.shuffle(sizes)
    src, dst, tables, want = inputs(device, rng, sizes.tolist(), 3, 19, 0)
    if where == "device tables":
        tables = map(device.asarray, tables)
    block_copy.vectorized_copy(*tables, sizes, max_ctas=max_ctas)
    assert_same_bits(dst, want)


@pytest.mark.parametrize("src_at, dst_at", [(0, 0), (13, 29), (3, 11), (6, 0), (0, 1), (2, 4)])
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 47, 64, 255, 256, 257, TILE // 4])
def test_small_pairs_share_a_tile(device, rng, size, src_at, dst_at):
    """All widths, sizes from one byte to the largest that shares, heads and tails."""
    src, dst, tables, want = inputs(device, rng, [size] * 37, src_at, dst_at, 0)
    block_copy.vectorized_copy(*map(device.asarray, tables), size, max_ctas=1)
    assert_same_bits(dst, want)


def test_pairs_share_tiles_only_where_warps_are_scarce(device, grids, rng):
    sizes = np.array([*[8] * 63, 9], np.int64)
    _, _, tables, _ = inputs(device, rng, sizes.tolist(), 0, 0, 0)
    for n in (1, 2, 15, 16, None):
        prepare(*tables, sizes, max_ctas=n)
    assert grids == [1, 2, 3, 16, 64]  # nine tiles for four warps a block, or a tile for each pair


def test_runs_are_found():
    assert block_copy._runs(7, 5) == [(0, 5, 7)]
    assert block_copy._runs(np.array([7, 7, 0, 0, 8]), 5) == [(0, 2, 7), (4, 5, 8)]
    assert block_copy._runs(np.array([7, 8, 8, 7, 9]), 5) == [
        *((0, 1, 7), (1, 3, 8), (3, 4, 7), (4, 5, 9))
    ]
    assert block_copy._runs(np.array([7, 8, 7, 8, 7]), 5) == []  # five


@pytest.mark.parametrize("different", [1, 2, 4, 5])
def test_sizes_are_put_side_by_side(rng, different):
    """Each size in the order it had; not where there are too many."""
    sizes = np.concatenate([np.arange(different), rng.integers(0, different, 60)])
    found = block_copy._by_size(np.arange(len(sizes)), -np.arange(len(sizes)), sizes)
    order = sorted(range(len(sizes)), key=lambda i: sizes[i]) if different < 5 else range(65)
    assert found[0].tolist() == list(order)
    assert found[1].tolist() == [-i for i in order]
    assert found[2].tolist() == [sizes[i] for i in order]


def test_tiles_of_small_pairs_come_first():
    """As block_copy.cu takes runs: first tile (not of the first run), pair, end, bytes."""
    runs = [(0, 3, 5000), (3, 20, 16), (20, 22, 512), (22, 23, 513)]
    num_tiles, scalars = block_copy._deal(runs, 512, 2048, 8)
    assert num_tiles == 14
    small = dict(pair_0=3, end_0=20, size_0=16, tile_1=3, pair_1=20, end_1=22, size_1=512)
    large = dict(tile_2=4, pair_2=0, end_2=3, size_2=5000, tile_3=13, pair_3=22, end_3=23)
    assert scalars == {**small, **large, "size_3": 513, "shared_tiles": 4, "num_tiles": 14}
    num_tiles, scalars = block_copy._deal(runs[:1], 0, 2048, 8)
    assert num_tiles == scalars["num_tiles"] == 9 and scalars["shared_tiles"] == 0
    assert [scalars[f"tile_{i}"] for i in (1, 2, 3)] == [9, 9, 9]
    assert [scalars[f"{name}_3"] for name in ("pair", "end", "size")] == [0, 0, 0]


def test_neighbours_become_one_pair(xp, rng):
    """Where source and destination both continue; where one does, they stay apart."""
    src, dst = pool(xp, rng, 1000), pool(xp, rng, 1000)
    want = to_numpy(dst).copy()
    at, to = np.array([0, 100, 200, 300, 500, 600]), np.array([50, 150, 250, 400, 500, 700])
    for a, b in zip(at, to, strict=True):
        want[b : b + 100] = to_numpy(src)[a : a + 100]
    at, to = (table(*(address(x) + i).tolist()) for x, i in ((src, at), (dst, to)))
    block_copy.vectorized_copy(at, to, 100, device=place(xp))
    assert_same_bits(dst, want)
    assert ranges.merge(at, to, 100)[2].tolist() == [300, 100, 100, 100]

    def lengths(*pairs):
        return np.broadcast_to(pairs[2], pairs[0].shape).tolist()

    sizes = np.array([100, 100, 100, 0, 100, 0], np.int64)
    assert lengths(*ranges.merge(at, to, sizes)) == [300, 100]
    assert lengths(*ranges.merge(at[:3], to[:3], 100)) == [300]
    assert lengths(*ranges.merge(at[:3], to[:3], 99)) == [99] * 3
    assert lengths(*ranges.merge(at, to, np.zeros(6, np.int64))) == []


def test_the_first_pairs_of_longer_tables(xp, rng):
    src, dst, tables, want = inputs(xp, rng, [64] * 8, 0, 0, 100)
    untouched = to_numpy(dst).copy()
    at = int(tables[1][7]) - address(dst)
    want[at : at + 64] = untouched[at : at + 64]
    block_copy.vectorized_copy(*tables, 64, 7, device=place(xp))
    assert_same_bits(dst, want)
    dst[...] = xp.asarray(untouched)
    block_copy.vectorized_copy(*tables, np.full(9, 64), np.int32(7), device=place(xp))
    assert_same_bits(dst, want)


@pytest.mark.parametrize("where", ["host tables", "device tables"])
def test_a_prepared_copy_runs_again(xp, rng, where):
    """Nothing is copied before the first call; tables of the host are those of then."""
    sizes = [200, 0, TILE + 3]
    src, dst, tables, want = inputs(xp, rng, sizes, 0, 0, 5000)
    before = to_numpy(dst).copy()
    offsets = [
        (x - np.uint64(address(p))).tolist() for x, p in zip(tables, (src, dst), strict=True)
    ]
    if where == "device tables":
        tables = [xp.asarray(x) for x in tables]
    call = prepare(*tables, np.array(sizes), device=place(xp))
    assert_same_bits(dst, before)
    if where == "host tables":
        tables[0][:] = tables[1][:] = 0
    for _ in range(2):
        dst[...] = xp.asarray(before)
        assert call() is call.result is None
        assert_same_bits(dst, want)
    fresh = rng.integers(0, 256, src.size, np.uint8)
    src[...] = xp.asarray(fresh)
    call()
    for a, b, n in zip(*offsets, sizes, strict=True):
        want[b : b + n] = fresh[a : a + n]
    assert_same_bits(dst, want)


def test_device_tables_are_read_at_each_call(device, rng):
    src, dst, tables, want = inputs(device, rng, [64] * 5, 0, 0, 100)
    untouched = to_numpy(dst).copy()
    at, to = (device.asarray(x) for x in tables)
    call = prepare(at, to, 64, validate=True)
    at[...] = device.asarray(tables[0][::-1].copy())
    to[...] = device.asarray(tables[1][::-1].copy())
    call()
    assert_same_bits(dst, want)
    dst[...] = device.asarray(untouched)
    to[...] = device.asarray(np.full(5, tables[1][0]))
    with pytest.raises(ParameterError, match="overlaps dst_ptrs.*, expected disjoint ranges"):
        call()
    assert_same_bits(dst, untouched)


def test_a_prepared_copy_sorts_its_pairs(device, rng, monkeypatch):
    """By destination, so that shuffled neighbours merge; a plain call takes no time for that."""
    seen, copy = [], block_copy.copy_on_gpu
    spy = lambda op, *pairs: seen.append(pairs[:3]) or copy(op, *pairs)  # noqa: E731
    monkeypatch.setattr(block_copy, "copy_on_gpu", spy)
    src, dst = pool(device, rng, 300), pool(device, rng, 300)
    at, to = (table(*(address(x) + i for i in (200, 0, 100))) for x in (src, dst))
    prepare(at, to, 100)
    block_copy.vectorized_copy(at, to, 100)
    prepared, plain = seen
    assert [len(prepared[0]), prepared[2]] == [1, 300]
    assert len(plain[0]) > 1


@pytest.mark.parametrize("prepared", [False, True])
def test_nothing_to_copy(prepared, monkeypatch):
    """Succeeds on any machine, whatever the tables, before a GPU is looked for."""
    monkeypatch.setattr(cuda, "Launch", None)
    monkeypatch.setattr(cuda, "kernel", None)
    copy = prepare if prepared else block_copy.vectorized_copy
    for device in ("cuda", "cpu"):
        for tables in ((None, None), (table(), table()), (table(1, 2), None)):
            done = [copy(*tables, 0, device=device), copy(*tables, 16, 0, device=device)]
            done += [copy(*tables, np.zeros(2, np.int64), 0, device=device)]
            done += [copy(None, None, np.zeros(7, np.int64), device=device)]
            done += [copy(None, None, 0, -1, device=device)]
            for call in done if prepared else []:
                call()


def test_arrays_say_where_they_are(xp, rng):
    x = [xp.asarray(rng.standard_normal(shape).astype("f4")) for shape in ((3, 4), 7, 0, 1)]
    y = [xp.zeros(shape, np.uint32) for shape in (12, 7, 0, (1, 1))]
    block_copy.copy_arrays(x, y)
    for a, b in zip(x, y, strict=True):
        assert_same_bits(b.ravel(), to_numpy(a).ravel().view(np.uint32))

    y = [xp.zeros(array.shape, np.uint32) for array in x]
    call = cuda.prepare(lambda: block_copy.copy_arrays(x, y))
    want = [to_numpy(a).view(np.uint32).copy() for a in x]
    x.clear()  # the call holds them
    call()
    for a, b in zip(want, y, strict=True):
        assert_same_bits(b, a)
    block_copy.copy_arrays([], [])


def test_every_source_may_be_used_twice(xp, rng):
    src, dst = pool(xp, rng, 64), xp.zeros(128, np.uint8)
    at, to = table(*[address(src)] * 2), table(address(dst) + 64, address(dst))
    block_copy.vectorized_copy(at, to, 64, device=place(xp), validate=True)
    assert_same_bits(dst, np.tile(to_numpy(src), 2))


# --- Errors ---


def test_errors_name_the_argument(xp, rng):
    src, dst, (at, to), _ = inputs(xp, rng, [16] * 3, 0, 0, 0)
    before = to_numpy(dst).copy()

    def copy(at=at, to=to, size=16, num_pairs=None, **options):
        options = {"device": place(xp), **options}
        block_copy.vectorized_copy(at, to, size, num_pairs, **options)

    for name, change in (("src_ptrs", {"at": None}), ("dst_ptrs", {"to": None})):
        with pytest.raises(ParameterError, match=f"{name} is None, expected a table of addr"):
            copy(**change)
    with pytest.raises(ParameterError, match="src_ptrs is None"):
        copy(None, None, num_pairs=-1)  # as upstream: null before all but zero
    with pytest.raises(ParameterError, match="num_pairs is -1, expected at least 0"):
        copy(num_pairs=-1)
    with pytest.raises(ParameterError, match="size is -16, expected at least 0"):
        copy(size=-16)
    with pytest.raises(ParameterError, match=r"size\[2\] is -1, expected at least 0"):
        copy(size=np.array([16, 0, -1]))
    with pytest.raises(ParameterError, match=r"dst_ptrs\[1\] is null"):
        copy(to=to * np.array([1, 0, 1], np.uint64))
    with pytest.raises(ParameterError, match="max_ctas is 0, expected 1 to"):
        copy(max_ctas=0)
    with pytest.raises(ParameterError, match="device is 'gpu', expected one of"):
        copy(device="gpu")
    with pytest.raises(ShapeError, match="dst_ptrs has 2 entries, expected 3 like src_ptrs"):
        copy(to=to[:2])
    with pytest.raises(ShapeError, match="size has 2 entries, expected 3 like src_ptrs"):
        copy(size=np.array([1, 2]))
    with pytest.raises(ShapeError, match="src_ptrs has 3 entries, expected num_pairs=4"):
        copy(num_pairs=4)
    with pytest.raises(ShapeError, match=r"src_ptrs has shape \(3, 1\), expected \[C\]"):
        copy(at=at[:, None])
    with pytest.raises(ShapeError, match="src_ptrs has strides"):
        copy(at=np.repeat(at, 2)[::2])
    with pytest.raises(DtypeError, match="src_ptrs has dtype int32, expected uint64 or int64"):
        copy(at=at.astype(np.int32))
    with pytest.raises(DtypeError, match="dst_ptrs is a list"):
        copy(to=to.tolist())
    with pytest.raises(DtypeError, match="size is a float, expected an integer, or a NumPy array"):
        copy(size=16.0)
    with pytest.raises(DtypeError, match="size has dtype int32, expected int64"):
        copy(size=np.full(3, 16, np.int32))
    assert_same_bits(dst, before)


def test_tables_of_both_kinds_are_refused(device, rng):
    src, dst, (at, to), _ = inputs(device, rng, [16] * 3, 0, 0, 0)
    with pytest.raises(DeviceError, match="dst_ptrs is on a GPU, expected the host like src_ptrs"):
        block_copy.vectorized_copy(at, device.asarray(to), 16)
    with pytest.raises(DeviceError, match="src_ptrs is on a GPU, expected the host like what it"):
        block_copy.vectorized_copy(device.asarray(at), device.asarray(to), 16, device="cpu")
    with pytest.raises(DtypeError, match="size is a ndarray, expected an integer, or a NumPy"):
        block_copy.vectorized_copy(at, to, device.asarray(np.full(3, 16)))


@pytest.mark.parametrize(
    "at, to, size, text",
    [
        ([0, 100], [200, 215], 16, r"dst_ptrs\[0\] overlaps dst_ptrs\[1\]"),
        ([0, 100], [300, 200], [100, 101], r"dst_ptrs\[1\] overlaps dst_ptrs\[0\]"),
        ([0, 100], [200, 115], 16, r"dst_ptrs\[1\] overlaps src_ptrs\[1\]"),
        ([0, 100], [85, 200], 16, r"dst_ptrs\[0\] overlaps src_ptrs\[1\]"),
        ([0, 100], [10, 200], [8, 1], None),
        ([0, 10], [100, 100], [8, 0], None),
        ([0, 100], [200, 216], 16, None),
        ([0, 100, 300], [16, 116, 84], 16, None),
        ([0], [0], 16, r"dst_ptrs\[0\] overlaps src_ptrs\[0\]"),
    ],
)
def test_overlaps_are_found_on_request(xp, rng, at, to, size, text):
    memory = pool(xp, rng, 512)
    at, to = (np.array(x, np.uint64) + np.uint64(address(memory)) for x in (at, to))
    size = np.array(size) if isinstance(size, list) else size
    for tables in ((at, to), (xp.asarray(at), xp.asarray(to))):
        before = to_numpy(memory).copy()
        if text is None:
            block_copy.vectorized_copy(*tables, size, device=place(xp), validate=True)
            continue
        with pytest.raises(ParameterError, match=f"{text}.*, expected disjoint ranges"):
            block_copy.vectorized_copy(*tables, size, device=place(xp), validate=True)
        assert_same_bits(memory, before)


def test_pageable_memory_is_found(device, rng):
    host, other = rng.integers(0, 256, 64, np.uint8), device.zeros(64, np.uint8)
    at, to = table(address(host)), table(address(other))
    with pytest.raises(DeviceError, match=r"src_ptrs\[0\] is in pageable host memory"):
        block_copy.vectorized_copy(at, to, 64, validate=True)
    with pytest.raises(DeviceError, match=r"dst_ptrs\[0\] is in pageable host memory"):
        prepare(to, at, 64, validate=True)
    with pytest.raises(DeviceError, match=r"destinations\[0\] is in pageable .*cupyx.empty_pinned"):
        block_copy.copy_arrays([other], [host])


def test_arrays_must_agree(xp):
    x, y = xp.zeros((4, 4), np.uint8), xp.zeros(17, np.uint8)
    copy = block_copy.copy_arrays
    with pytest.raises(ShapeError, match="destinations has 2 arrays, expected 1 like sources"):
        copy([x], [x, y])
    with pytest.raises(ShapeError, match=r"destinations\[0\] has 17 bytes, expected 16 like sou"):
        copy([x], [y])
    with pytest.raises(ShapeError, match=r"sources\[1\] has strides .*, expected"):
        copy([x, x[:, ::2]], [x, x])
    with pytest.raises(ParameterError, match=r"overlaps src_ptrs\[0\]"):
        copy([x], [x], validate=True)
    with pytest.raises(DtypeError, match=r"sources\[0\] has dtype object, expected no Python obj"):
        copy([np.array([None])], [np.array([None])])
    if xp is np:
        y = np.frombuffer(bytes(16), np.uint8)
        with pytest.raises(ParameterError, match=r"destinations\[0\] is read-only"):
            copy([x], [y])


def test_tiles_fit_an_int(monkeypatch):
    monkeypatch.setattr(cuda, "kernel", None)
    monkeypatch.setattr(cuda, "uses_others", lambda: False)
    with pytest.raises(ParameterError, match="make 4294967296 tiles of 2048 bytes"):
        block_copy.vectorized_copy(table(4096), table(8192), 2**31 * TILE)


# --- What only a GPU shows ---


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("max_ctas", [None, 32])
@pytest.mark.parametrize("offset", [0, 5, 16])
def test_pinned_memory_on_either_side(cupy, rng, max_ctas, offset):
    host = [pinned(rng.integers(0, 256, n, np.uint8)) for n in (4096, 70_001, 3)]
    middle = [cupy.zeros(x.size + offset, np.uint8)[offset:] for x in host]
    back = [pinned(np.zeros_like(x)) for x in host]
    block_copy.copy_arrays(host, middle, max_ctas=max_ctas)
    block_copy.copy_arrays(middle, back, max_ctas=max_ctas, validate=True)
    cupy.cuda.get_current_stream().synchronize()
    for a, b in zip(host, back, strict=True):
        assert_same_bits(b, a)


@pytest.mark.gpu
def test_a_graph_captures_a_call(cupy, rng):
    src, dst, tables, want = inputs(cupy, rng, [3000, 17, TILE], 1, 2, 0)
    before = dst.copy()
    call = prepare(*tables, np.array([3000, 17, TILE]))
    device_tables = [cupy.asarray(x) for x in tables]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        call()
        block_copy.vectorized_copy(*device_tables, 17)  # nothing to upload: can be captured too
        graph = stream.end_capture()
    assert_same_bits(dst, before)
    for _ in range(2):
        dst[...] = before
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert_same_bits(dst, want)
    new = rng.integers(0, 256, src.size, np.uint8)
    src[...] = cupy.asarray(new)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    for a, b, size in zip(*tables, (3000, 17, TILE), strict=True):
        a, b = int(a) - address(src), int(b) - address(dst)
        assert_same_bits(dst[b : b + size], new[a : a + size])


@pytest.mark.gpu
def test_two_streams_at_once(cupy, rng):
    """Prepared on one stream, run on others; one of them computes meanwhile."""
    halves = [inputs(cupy, rng, [50_001] * 40, 3, 3, 0) for _ in range(2)]
    copies = [prepare(*tables, 50_001, max_ctas=8) for _, _, tables, _ in halves]
    x = cupy.asarray(rng.integers(0, 8, (512, 512)).astype(np.float64))  # exact in any order
    want_product = x @ x
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    cupy.cuda.Device().synchronize()
    for _ in range(5):
        for copy, stream in zip(copies, streams, strict=False):
            copy(stream)
        with streams[2]:
            product = x @ x
    cupy.cuda.Device().synchronize()
    for _, dst, _, want in halves:
        assert_same_bits(dst, want)
    assert_same_bits(product, want_product)


@pytest.mark.gpu
def test_a_stream_orders_the_copy(cupy):
    """The upload of tables and the copy wait for what the stream did before."""
    stream = cupy.cuda.Stream(non_blocking=True)
    src, dst = cupy.zeros(1 << 24, np.uint8), cupy.zeros(1 << 24, np.uint8)
    cupy.cuda.Device().synchronize()
    for value in range(1, 4):
        with stream:
            src.fill(value)
        block_copy.vectorized_copy(
            table(address(src)), table(address(dst)), src.size, stream=stream
        )
        stream.synchronize()
        assert bool((dst == value).all())


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("by_pair", [False, True])
def test_sizes_are_64_bit(cupy, rng, by_pair):
    """Pairs of more than 2^32 bytes."""
    size = 2**32 + TILE + 5
    try:
        src, dst = cupy.zeros(2 * size + 1, np.uint8), cupy.zeros(2 * size + 1, np.uint8)
    except cupy.cuda.memory.OutOfMemoryError:
        pytest.skip("needs 17 GiB")
    piece = cupy.asarray(rng.integers(0, 256, 2**24 + 1, np.uint8))  # 2^32 bytes on, all differs
    starts = range(0, 2 * size, piece.size)
    for i in starts:
        src[i : min(i + piece.size, 2 * size)] = piece[: 2 * size - i]
    at = table(address(src) + size, address(src))
    to = table(address(dst) + size, address(dst))
    sizes = np.array([size, size - 1], np.int64) if by_pair else size
    block_copy.vectorized_copy(at, to, sizes)
    if by_pair:
        assert int(dst[size - 1]) == 0
        dst[size - 1] = src[size - 1]
    assert all(bool((dst[i : i + piece.size] == src[i : i + piece.size]).all()) for i in starts)
    assert int(dst[-1]) == 0
