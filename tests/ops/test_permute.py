"""permute: elements land where the formulas of pykv/layout.py say, and nothing else changes."""

import gc
import weakref

import numpy as np
import pytest

from pykv import block_memory, cuda
from pykv.arrays import strided
from pykv.block_memory import Given
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.layout import AXES, NAMES, STACKS, BlockShape, Layout
from pykv.ops import permute
from tests.helpers import assert_same_bits, bits, dtype_of, to_numpy, without_simt

BASE = dict(N=3, H=3, L=2, O=2, P=4, D=5, dtype="float16")  # the sizes of kvbm's tests
CHANGES = (
    *({"dtype": dtype} for dtype in ("uint8", "bfloat16", "float32", "float64")),
    *({"D": 8}, {"D": 64, "dtype": "uint8"}, {"D": 80}, {"D": 576, "H": 1, "O": 1}),  # MLA
    *({"N": 1}, {"N": 70}, {"H": 1}, {"P": 1}, {"P": 17}, {"L": 1, "O": 1}, {"D": 1}),
    {"H": 1, "P": 1, "D": 1, "dtype": "uint8"},
    {"N": 1, "H": 8, "L": 1, "O": 1, "P": 64, "dtype": "uint8"},  # three turns, byte by byte
    {"N": 1, "H": 8, "L": 1, "P": 16, "D": 128, "dtype": "float64"},  # 8 tiles a chunk
    {"N": 1, "H": 3, "L": 1, "O": 1, "P": 43, "D": 80, "dtype": "float32"},  # no whole tile
)
CASES = [BASE, *({**BASE, **change} for change in CHANGES)]
DIRECTIONS = [
    *((a, b) for a in ("NHD", "HND") for b in NAMES if a != b),
    *((b, a) for a in ("NHD", "HND") for b in ("operational_NHD", "operational_HND", "universal")),
    ("universal", "operational_HND"),
]


def offset(name, h, l, o, t, d, H, L, O, P, D):
    """(chunk or None, element) by the formulas, written out."""
    return {
        "NHD": (l * O + o, (t * H + h) * D + d),
        "HND": (l * O + o, (h * P + t) * D + d),
        "operational_NHD": (None, (((l * O + o) * P + t) * H + h) * D + d),
        "operational_HND": (None, (((l * O + o) * H + h) * P + t) * D + d),
        "universal": (None, (((h * L + l) * O + o) * P + t) * D + d),
    }[name]


def poison(shape, dtype):
    return (
        np.frombuffer(b"\xde" * int(np.prod(shape)) * dtype.itemsize, dtype).reshape(shape).copy()
    )


def flat_blocks(name, N, H, L, O, P, D, dtype):
    """Poisoned memory [N, allocations, elements] of a layout."""
    if name in ("NHD", "HND"):
        return poison((N, L * O, P * H * D), dtype)
    return poison((N, 1, L * O * P * H * D), dtype)


def expected(dst, src, src_blocks, N, H, L, O, P, D, heads=None, layers=None, want=None):
    """The move, one element at a time."""
    sizes = (H, L, O, P, D)
    want = flat_blocks(dst, N, *sizes, src_blocks.dtype) if want is None else want
    for h in range(*(heads or (0, H))):
        for l in range(*(layers or (0, L))):
            for o, t, d in np.ndindex(O, P, D):
                to, i = offset(dst, h, l, o, t, d, *sizes)
                of, j = offset(src, h, l, o, t, d, *sizes)
                want[:, to or 0, i] = src_blocks[:, of or 0, j]
    return want


def random_blocks(rng, name, N, H, L, O, P, D, dtype):
    """Random bytes: NaN with payloads, infinities and subnormals among them."""
    shape = flat_blocks(name, N, H, L, O, P, D, dtype).shape
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def shaped(flat, name, N, H, L, O, P, D):
    sizes = dict(N=N, H=H, L=L, O=O, P=P, D=D, I=P * H * D)
    return flat.reshape([sizes[letter] for letter in AXES[name]])


def addresses(blocks):
    """The table of an array [N, allocations, elements]."""
    n, m, i = blocks.shape
    step = i * blocks.dtype.itemsize
    first = blocks.ctypes.data if isinstance(blocks, np.ndarray) else blocks.data.ptr
    return (first + np.arange(n * m) * step).astype(np.uint64)


def place(xp):
    return "cpu" if xp is np else "cuda"


# --- Every layout to every other ------------------------------------------------------------------


def check_arrays(xp, rng, dst, src, sizes, dtype, move=None):
    """That `move(to, of)` brings arrays of `sizes` from the layout `src` into `dst`."""
    given = random_blocks(rng, src, *sizes, dtype)
    want = expected(dst, src, given, *sizes)
    to = xp.asarray(shaped(flat_blocks(dst, *sizes, dtype), dst, *sizes))
    of = xp.asarray(shaped(given, src, *sizes))
    move(to, of) if move else permute.permute(to, dst, of, src)
    assert_same_bits(to.reshape(want.shape), want)
    assert_same_bits(of.reshape(given.shape), given)


@pytest.mark.parametrize("dst, src", DIRECTIONS)
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_arrays_move(xp, rng, case, dst, src):
    if dst.startswith("op") and src.startswith("op"):
        pytest.skip("arrays of neither side tell the sizes of a chunk")
    *sizes, dtype = case.values()
    check_arrays(xp, rng, dst, src, sizes, dtype_of(dtype))


@pytest.mark.parametrize("dst, src", [("universal", "NHD"), ("NHD", "universal"), ("HND", "NHD")])
@pytest.mark.parametrize("case", CASES[6:], ids=str)
def test_sizes_of_all_kinds_move(xp, rng, case, dst, src):
    *sizes, dtype = case.values()
    check_arrays(xp, rng, dst, src, sizes, dtype_of(dtype))


@pytest.mark.parametrize("on_device", [False, True], ids=["numpy tables", "device tables"])
@pytest.mark.parametrize("dst, src", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_addresses_move(xp, rng, dst, src, dtype, on_device):
    sizes, dtype = (3, 3, 2, 2, 4, 5), np.dtype(dtype)
    given = random_blocks(rng, src, *sizes, dtype)
    to = xp.asarray(flat_blocks(dst, *sizes, dtype))
    of = xp.asarray(given)
    tables = [addresses(to).view(np.int64), addresses(of)]
    if on_device:
        tables = [xp.asarray(t) for t in tables]
    shape = BlockShape(*sizes[1:], dtype.itemsize)
    permute.permute(tables[0], dst, tables[1], src, shape, device=place(xp), validate=True)
    assert_same_bits(to, expected(dst, src, given, *sizes))


NAMED = {  # function: (destination, source)
    permute.universal_from_block: ("universal", None),
    permute.block_from_universal: (None, "universal"),
    permute.operational_from_block: ("operational_{}", None),
    permute.block_from_operational: (None, "operational_{}"),
}


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("function", NAMED, ids=lambda f: f.__name__)
def test_named_functions(xp, rng, function, layout):
    dst, src = (name.format(layout) if name else layout for name in NAMED[function])
    sizes, dtype = (3, 3, 2, 2, 4, 5), np.dtype(np.float32)
    check_arrays(xp, rng, dst, src, sizes, dtype, lambda *x: function(*x, layout=layout))


@pytest.mark.parametrize("function", [permute.nhd_to_hnd, permute.hnd_to_nhd])
def test_chunks_change_their_order(xp, rng, function):
    src, dst = ("NHD", "HND") if function is permute.nhd_to_hnd else ("HND", "NHD")
    check_arrays(xp, rng, dst, src, (2, 3, 2, 2, 4, 5), np.dtype(np.float16), function)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_lists_of_blocks_and_chunks(xp, rng, layout):
    """As kvbm's Python tests give them: a list of blocks, each a list of L * O chunks."""
    sizes, dtype = (3, 3, 2, 2, 4, 5), dtype_of("bfloat16")
    N, H, L, O, P, D = sizes
    given = random_blocks(rng, layout, *sizes, dtype)
    chunk = (P, H, D) if layout == "NHD" else (H, P, D)
    blocks = [[xp.asarray(x.reshape(chunk)) for x in block] for block in given]
    universal = [xp.asarray(poison((H, L, O, P, D), dtype)) for _ in range(N)]
    permute.universal_from_block(universal, blocks, layout=layout)
    for got, want in zip(universal, expected("universal", layout, given, *sizes), strict=True):
        assert_same_bits(got.reshape(1, -1), want)

    back = [[xp.asarray(poison(chunk, dtype)) for _ in range(L * O)] for _ in range(N)]
    permute.block_from_universal(back, universal, layout=layout)
    for got, want in zip(sum(back, []), given.reshape(N * L * O, *chunk), strict=True):
        assert_same_bits(got, want)

    other = [[xp.asarray(poison((H, P, D), dtype)) for _ in range(L * O)] for _ in range(N)]
    if layout == "NHD":
        permute.nhd_to_hnd(other, blocks)
        want = expected("HND", "NHD", given, *sizes).reshape(N * L * O, H, P, D)
        for got, chunk in zip(sum(other, []), want, strict=True):
            assert_same_bits(got, chunk)


def test_strides_of_single_rows_do_not_matter(xp, rng):
    """A list of chunks with one token and one head each, cut from arrays of other widths."""
    pools = [rng.integers(0, 256, (1, n, 8), np.uint8) for n in (1, 2, 3)]
    chunks = [xp.asarray(pool)[:, -1:] for pool in pools]
    out = xp.zeros((3, 1, 1, 1, 1, 8), np.uint8)
    permute.universal_from_block(out, [[chunk] for chunk in chunks])
    assert_same_bits(out.reshape(3, 8), np.array([pool[0, -1] for pool in pools]))


def test_positions_by_hand(xp):
    """A block whose elements are numbered: chunk, token, head."""
    chunks = np.arange(2 * 2 * 3).reshape(1, 2, 1, 2, 3, 1).astype(np.int64)  # L=2, P=2, H=3
    universal = xp.zeros((1, 3, 2, 1, 2, 1), np.int64)
    permute.universal_from_block(universal, xp.asarray(chunks))
    want = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert_same_bits(universal.reshape(-1), np.array(want))


def test_nan_payloads_stay(xp):
    for dtype, nan in (("float16", 0x7D01), ("bfloat16", 0xFFA5), ("float32", 0x7FA00001)):
        dtype = dtype_of(dtype)
        x = np.full((1, 1, 1, 2, 2, 8), nan, f"u{dtype.itemsize}").view(dtype)
        out = xp.zeros((1, 2, 1, 1, 2, 8), dtype)
        permute.universal_from_block(out, xp.asarray(x))
        assert (bits(out) == nan).all()


def test_dtypes_of_one_size_mix(xp, rng):
    """FP8 codes that one side keeps as uint8."""
    x = rng.integers(0, 256, (2, 1, 2, 3, 2, 16), np.uint8)
    out = xp.zeros((2, 2, 1, 2, 3, 16), np.int8)
    permute.universal_from_block(out, xp.asarray(x))
    assert_same_bits(out, x.transpose(0, 4, 1, 2, 3, 5).view(np.int8))


# --- Parts of blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, layers", [((1, 3), None), (None, (1, 2)), ((2, 3), (0, 2))])
@pytest.mark.parametrize("dst, src", DIRECTIONS)
def test_ranges_leave_the_rest_untouched(device, rng, dst, src, heads, layers):
    sizes, dtype = (2, 4, 3, 2, 3, 8), np.dtype(np.float16)
    given = random_blocks(rng, src, *sizes, dtype)
    to, of = device.asarray(flat_blocks(dst, *sizes, dtype)), device.asarray(given)
    permute.permute(
        *(addresses(to), dst, addresses(of), src, BlockShape(*sizes[1:], 2)),
        heads=heads,
        layers=layers,
    )
    want = expected(dst, src, given, *sizes, heads=heads, layers=layers)
    assert_same_bits(to, want)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_ranges_of_arrays(xp, rng, layout):
    sizes, dtype = (2, 4, 3, 2, 3, 5), np.dtype(np.uint8)
    given = random_blocks(rng, layout, *sizes, dtype)
    to = xp.asarray(shaped(flat_blocks("universal", *sizes, dtype), "universal", *sizes))
    blocks = xp.asarray(shaped(given, layout, *sizes))
    permute.universal_from_block(to, blocks, layout=layout, heads=(1, 3), layers=(2, 3))
    want = expected("universal", layout, given, *sizes, heads=(1, 3), layers=(2, 3))
    assert_same_bits(to.reshape(want.shape), want)

    sliced = xp.asarray(shaped(flat_blocks("universal", *sizes, dtype), "universal", *sizes))
    part = blocks[:, 2:3, :, :, 1:3] if layout == "NHD" else blocks[:, 2:3, :, 1:3]
    permute.universal_from_block(sliced[:, 1:3, 2:3], part, layout=layout)
    assert_same_bits(sliced.reshape(want.shape), want)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_ranks_and_stages_hold_parts(xp, rng, layout):
    """Two ranks of two heads each and two pipeline stages share a universal block."""
    sizes, dtype = (2, 4, 3, 2, 3, 8), np.dtype(np.float32)
    N, H, L, O, P, D = sizes
    given = random_blocks(rng, layout, *sizes, dtype)
    whole = shaped(given, layout, *sizes)
    to = xp.asarray(shaped(flat_blocks("universal", *sizes, dtype), "universal", *sizes))
    back = []
    for heads in ((0, 2), (2, 4)):
        for layers in ((0, 1), (1, 3)):
            held = whole[:, slice(*layers)]
            axis = 4 if layout == "NHD" else 3
            held = np.take(held, range(*heads), axis)
            part = Layout(layout, heads=heads, layers=layers)
            permute.universal_from_block(to, xp.asarray(held), layout=part)
            back.append((part, held))
    want = expected("universal", layout, given, *sizes)
    assert_same_bits(to.reshape(want.shape), want)
    for part, held in back:
        got = xp.asarray(poison(held.shape, dtype))
        permute.block_from_universal(got, to, layout=part)
        assert_same_bits(got, held)


def test_addresses_of_the_host_are_no_table_of_a_gpu(device):
    tables = [device.asarray(np.full(1, 256, np.uint64)) for _ in range(2)]
    with pytest.raises(DeviceError, match="hnd is on a GPU, expected the host like what it names"):
        permute.nhd_to_hnd(*tables, BlockShape(1, 1, 1, 1, 8, 2), device="cpu")


def test_parts_by_address(xp, rng):
    """A rank's heads and a stage's layers between tables."""
    sizes, dtype = (2, 4, 3, 2, 3, 8), np.dtype(np.float16)
    N, H, L, O, P, D = sizes
    given = random_blocks(rng, "universal", *sizes, dtype)
    whole = shaped(given, "universal", *sizes)
    held = poison((N, 2 * O, P * 3 * D), dtype)  # layers 1, 2 and heads 1 .. 3
    to, of = xp.asarray(held), xp.asarray(given)
    part = Layout("NHD", heads=(1, 4), layers=(1, 3))
    tables, shape = (addresses(to), addresses(of)), BlockShape(*sizes[1:], 2)
    permute.block_from_universal(*tables, shape, part, heads=(2, 4), device=place(xp))
    want = held.reshape(N, 2, O, P, 3, D)
    want[..., 1:, :] = whole[:, 2:4, 1:3].transpose(0, 2, 3, 4, 1, 5)
    assert_same_bits(to.reshape(want.shape), want)


def test_parts_that_do_not_meet_move_nothing(xp):
    of, to = (xp.asarray(poison((1, 2, 1, 1, 4, 8), np.dtype(np.uint8))) for _ in range(2))
    to[...] = 1
    layouts = Layout("universal", heads=(0, 2)), Layout("universal", heads=(2, 4))
    permute.permute(to, layouts[0], of, layouts[1])
    assert bool((to == 1).all())


@pytest.mark.parametrize("strides", [(40, None), (None, 39), (50, 16), (9, 200)], ids=str)
@pytest.mark.parametrize("into_chunks", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_strided_chunks(device, rng, layout, into_chunks, strides):
    """Chunks as views into a larger pool; what lies between stays as it is."""
    N, H, L, O, P, D = sizes = (2, 3, 2, 1, 4, 8)
    token, head = strides
    if layout == "NHD":
        head = D if head is None else head
        token = H * head if token is None else token
    else:
        token = D if token is None else token
        head = P * token if head is None else head
    extent = (P - 1) * token + (H - 1) * head + D
    dtype = np.dtype(np.float16)
    pool = rng.integers(0, 2**16, (N, L * O, extent + 3), np.uint16).view(dtype)
    universal = random_blocks(rng, "universal", *sizes, dtype)
    want_pool, want_universal = pool.copy(), universal.copy()
    for n, h, l, o, t, d in np.ndindex(*sizes):
        i = offset("universal", h, l, o, t, d, *sizes[1:])[1]
        at = n, l * O + o, t * token + h * head + d
        if into_chunks:
            want_pool[at] = universal[n, 0, i]
        else:
            want_universal[n, 0, i] = pool[at]
    on_device = device.asarray(pool), device.asarray(universal)
    tables = [addresses(x) for x in on_device]
    part = Layout(layout, token_stride=strides[0], head_stride=strides[1])
    shape = BlockShape(*sizes[1:], 2)
    if into_chunks:
        permute.block_from_universal(*tables, shape, part)
    else:
        permute.universal_from_block(*tables[::-1], shape, part)
    assert_same_bits(on_device[0], want_pool)
    assert_same_bits(on_device[1], want_universal)


@pytest.mark.parametrize(
    "nudge", [(0, 1), (1, 0), (2, 6), (4, 4), (8, 8), (12, 4), (0, 8)], ids=str
)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_misaligned_memory(device, rng, layout, nudge):
    """Every width of a piece, with guard bytes around the destination."""
    N, H, L, O, P, D = sizes = (2, 2, 1, 2, 3, 16)
    given = random_blocks(rng, layout, *sizes, np.dtype(np.uint16))
    chunk, block = P * H * D * 2, L * O * P * H * D * 2
    pool = poison((N * L * O, chunk + 32), np.dtype(np.uint8))
    pool[:, nudge[1] : nudge[1] + chunk] = given.view(np.uint8).reshape(N * L * O, chunk)
    out = poison((N, block + 32), np.dtype(np.uint8))
    of, to = device.asarray(pool), device.asarray(out)
    of_table = (of.data.ptr + nudge[1] + np.arange(N * L * O) * (chunk + 32)).astype(np.uint64)
    to_table = (to.data.ptr + nudge[0] + np.arange(N) * (block + 32)).astype(np.uint64)
    permute.universal_from_block(to_table, of_table, BlockShape(*sizes[1:], 2), layout)
    want = expected("universal", layout, given, *sizes).reshape(N, -1).view(np.uint8)
    out[:, nudge[0] : nudge[0] + block] = want
    assert_same_bits(to, out)


@pytest.mark.parametrize("max_ctas, grid", [(None, 12), (99, 12), (5, 5)])
def test_few_blocks_of_threads_take_all_tiles(device, rng, monkeypatch, max_ctas, grid):
    sizes, dtype = (3, 3, 2, 2, 4, 5), np.dtype(np.float16)
    given = random_blocks(rng, "NHD", *sizes, dtype)
    to, of = device.asarray(flat_blocks("universal", *sizes, dtype)), device.asarray(given)
    grids, configure = [], cuda.launch.driver.configure
    monkeypatch.setattr(
        *(cuda.launch.driver, "configure"),
        lambda kernel, grid, *rest: grids.append(grid) or configure(kernel, grid, *rest),
    )
    permute._launch.cache_clear()  # else a launch of another test would be reused
    tables = addresses(to), "universal", addresses(of), "NHD"
    permute.permute(*tables, BlockShape(*sizes[1:], 2), max_ctas=max_ctas)
    assert grids == [grid]
    assert_same_bits(to, expected("universal", "NHD", given, *sizes))


@pytest.mark.parametrize(
    "dst, src, want",
    [  # bytes of a run, sizes of the loops, strides of the outer and of the inner one
        ("universal", "HND", (4096, 1, 8, (0, 0), (655360, 4096))),
        ("HND", "universal", (4096, 1, 8, (0, 0), (4096, 655360))),
        ("universal", "NHD", (256, 8, 16, (655360, 256), (256, 2048))),
        ("NHD", "universal", (256, 16, 8, (2048, 256), (256, 655360))),
        ("NHD", "HND", (256, 16, 8, (2048, 256), (256, 4096))),
        ("operational_NHD", "NHD", (32768, 1, 1, (0, 0), (0, 0))),
        ("operational_HND", "HND", (32768, 1, 1, (0, 0), (0, 0))),
    ],
)
def test_loops_follow_the_destination_and_melt(dst, src, want):
    shape = BlockShape(H=8, L=80, O=2, P=16, D=128, itemsize=2)
    tables = {name: table_of(1 if name not in STACKS else 160) for name in (dst, src)}
    sides = [
        block_memory.side_by_address("op", Given(name, tables[name], Layout(name)), shape)
        for name in (dst, src)
    ]
    assert permute.nest(*sides, shape) == want


# --- Nothing to move ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", NAMED, ids=lambda f: f.__name__)
def test_nothing_succeeds_even_with_null_tables(function):
    shape = BlockShape(3, 2, 2, 4, 5, 2)
    function(None, None, shape, num_blocks=0)
    for field in ("H", "L", "O", "P", "D"):
        function(None, None, shape._replace(**{field: 0}))
        function(None, None, shape._replace(**{field: 0}), num_blocks=7)
    no_addresses = np.empty(0, np.uint64)
    function(no_addresses, no_addresses, shape)


def test_empty_arrays(xp):
    permute.universal_from_block([], [])
    permute.nhd_to_hnd([], [])
    for N, L in ((0, 2), (2, 0)):
        universal, blocks = xp.zeros((N, 3, L, 2, 4, 5)), xp.zeros((N, L, 2, 4, 3, 5))
        permute.universal_from_block(universal, blocks)
        permute.block_from_universal(blocks, universal)


# --- Prepared moves -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["arrays", "lists", "tables", "device tables"])
def test_a_prepared_move_runs_again(xp, rng, form):
    """Nothing moves before the first call; arrays and tables of the host are those of then."""
    sizes, dtype = (2, 3, 2, 2, 4, 5), np.dtype(np.float32)
    first, second = (random_blocks(rng, "NHD", *sizes, dtype) for _ in range(2))
    blocks = xp.asarray(first.copy())
    to = xp.asarray(flat_blocks("universal", *sizes, dtype))
    before = to.copy()
    sides = [shaped(to, "universal", *sizes), shaped(blocks, "NHD", *sizes)]
    shape = None
    if form == "lists":
        sides = [list(side) for side in sides]
    elif form != "arrays":
        sides, shape = [addresses(to), addresses(blocks)], BlockShape(*sizes[1:], 4)
        if form == "device tables":
            sides = [xp.asarray(side) for side in sides]
    options = dict(device=place(xp))
    call = cuda.prepare(permute.permute, sides[0], "universal", sides[1], "NHD", shape, **options)
    assert_same_bits(to, before.get() if xp is not np else before)
    if form == "lists":
        arrays = [weakref.ref(x) for side in sides for x in side]
        sides[0].clear(), sides[1].clear()
        gc.collect()
        assert xp is np or all(array() is not None for array in arrays)
    elif form == "tables":
        sides[0][:] = sides[1][:] = 0
    for given in (first, second):
        blocks[...] = xp.asarray(given)
        assert call() is call.result is None
        assert_same_bits(to, expected("universal", "NHD", given, *sizes))


def test_device_tables_are_validated_at_each_call(device, rng):
    sizes, dtype = (2, 3, 2, 2, 4, 5), np.dtype(np.float32)
    to = device.asarray(flat_blocks("universal", *sizes, dtype))
    of = device.asarray(random_blocks(rng, "NHD", *sizes, dtype))
    tables = [device.asarray(addresses(x)) for x in (to, of)]
    shape = BlockShape(*sizes[1:], dtype.itemsize)
    sides = tables[0], "universal", tables[1], "NHD"
    call = cuda.prepare(permute.permute, *sides, shape, validate=True)
    call()
    before = to.get()
    tables[0][...] = device.asarray(np.full(2, addresses(to)[1]))
    with pytest.raises(ParameterError, match=r"dst\[0\] overlaps dst\[1\], expected disjoint"):
        call()
    assert_same_bits(to, before)


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [True, False])
def test_moves_are_captured_in_a_graph(rng, prepared):
    import cupy

    sizes, dtype = (2, 3, 2, 2, 4, 5), np.dtype(np.float16)
    given = random_blocks(rng, "NHD", *sizes, dtype)
    of, to = cupy.zeros(given.shape, dtype), cupy.asarray(flat_blocks("universal", *sizes, dtype))
    tables = cupy.asarray(addresses(to)), cupy.asarray(addresses(of))
    shape = BlockShape(*sizes[1:], 2)
    call = cuda.prepare(permute.permute, tables[0], "universal", tables[1], "NHD", shape)
    call()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        if prepared:
            call()
        else:  # tables of the device need no upload
            permute.universal_from_block(*tables, shape)
        graph = stream.end_capture()
        of[...] = cupy.asarray(given)
        graph.launch(stream)
        stream.synchronize()
    assert_same_bits(to, expected("universal", "NHD", given, *sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_universal_blocks_may_be_pinned_host_memory(rng, layout):
    import cupy

    sizes, dtype = (2, 4, 3, 2, 16, 64), np.dtype(np.float16)
    given = random_blocks(rng, layout, *sizes, dtype)
    of = cupy.asarray(given)
    want = expected("universal", layout, given, *sizes)
    memory = cupy.cuda.alloc_pinned_memory(want.nbytes)
    host = np.frombuffer(memory, dtype, want.size).reshape(want.shape)
    host[...] = 0
    at = (host.ctypes.data + np.arange(2) * want[0].nbytes).astype(np.uint64)
    shape = BlockShape(*sizes[1:], 2)
    permute.universal_from_block(at, addresses(of), shape, layout, max_ctas=8)
    cupy.cuda.get_current_stream().synchronize()
    assert_same_bits(host, want)
    of[...] = 0
    permute.block_from_universal(addresses(of), at, shape, layout, max_ctas=8)
    assert_same_bits(of, given)


@without_simt  # which has no memory that is too large to fill
@pytest.mark.slow
def test_offsets_are_64_bit(xp, rng):
    """Heads of a universal block 2^31 bytes apart, and chunks past that."""
    N, H, L, O, P, D = 1, 2, 2**19 + 2, 1, 1, 4096
    try:
        universal = xp.zeros((N, H, L, O, P, D), np.uint8)
    except MemoryError:
        pytest.skip("needs 4 GiB")
    last = xp.asarray(rng.integers(0, 256, (N, 1, O, P, H, D), np.uint8))
    part = Layout("NHD", layers=(L - 1, L))
    permute.universal_from_block(universal, last, layout=part)
    assert_same_bits(universal[0, :, -1, 0, 0], last[0, 0, 0, 0])
    assert not bool(universal[0, :, :-1].any())


# --- Bad input ------------------------------------------------------------------------------------

SHAPE = BlockShape(3, 2, 2, 4, 5, 2)


def table_of(count):
    return np.arange(1, count + 1, dtype=np.uint64) * 256


@pytest.mark.parametrize(
    "error, text, change",
    [
        (ParameterError, "layout is 'DHN', expected NHD or HND", {"layout": "DHN"}),
        (ParameterError, "layout is 'universal', expected NHD or HND", {"layout": "universal"}),
        (DtypeError, "layout is an int, expected a Layout or its name", {"layout": 1}),
        (
            ParameterError,
            "itemsize is 3, expected 1, 2, 4 or 8",
            {"shape": SHAPE._replace(itemsize=3)},
        ),
        (ParameterError, "shape.L is -1, expected 0 to", {"shape": SHAPE._replace(L=-1)}),
        (ParameterError, "num_blocks is -1, expected at least 0", {"num_blocks": -1}),
        (ParameterError, "max_ctas is 0, expected 1 to", {"max_ctas": 0}),
        (ParameterError, r"heads is \(1, 4\), expected a range in 0 .. 3", {"heads": (1, 4)}),
        (ParameterError, r"heads is \(2, 1\), expected a range", {"heads": (2, 1)}),
        (ParameterError, r"layers is \(-1, 1\), expected a range in 0 .. 2", {"layers": (-1, 1)}),
        (
            ParameterError,
            r"heads is \(0, 2\), expected a range in 1 .. 3 as blocks holds them",
            {"heads": (0, 2), "layout": Layout("NHD", heads=(1, 3))},
        ),
        (
            ParameterError,
            r"layers of blocks is \(1, 3\), expected a range in 0 .. 2",
            {"layout": Layout("NHD", layers=(1, 3))},
        ),
        (
            ParameterError,
            "blocks has strides of 14 between tokens and 5 between heads, which overlap",
            {"layout": Layout("NHD", token_stride=14)},
        ),
        (
            ParameterError,
            "head_stride of layout is -20, expected 0 to",
            {"layout": Layout("HND", head_stride=-20)},
        ),
        (ParameterError, "universal is None, expected a table of addresses", {"universal": None}),
        (ParameterError, "blocks is None, expected a table", {"blocks": None}),
        (ParameterError, "universal is None", {"universal": None, "blocks": None}),
        (
            ParameterError,
            r"universal\[1\] is a null address",
            {"universal": np.array([256, 0, 256], np.uint64)},
        ),
        (
            ShapeError,
            r"blocks has 11 addresses, expected 12 \(3 blocks of 4\)",
            {"blocks": table_of(11)},
        ),
        (ShapeError, "universal has 3 addresses, expected 2", {"num_blocks": 2}),
        (ShapeError, r"blocks has shape \(3, 4\)", {"blocks": table_of(12).reshape(3, 4)}),
        (DtypeError, "universal has dtype int32, expected", {"universal": np.ones(3, np.int32)}),
        (DtypeError, "universal is an int, expected a NumPy or CuPy array", {"universal": 4096}),
        (DtypeError, "shape is an int, expected a BlockShape", {"shape": 7}),
        (
            UnsupportedError,
            "a chunk has 2147483648 bytes",
            {"shape": BlockShape(1, 2, 2, 1, 2**30, 2)},
        ),
    ],
    ids=str,
)
def test_bad_addresses(device, error, text, change):
    arguments = dict(universal=table_of(3), blocks=table_of(12), shape=SHAPE) | change
    with pytest.raises(error, match=f"permute.universal_from_block: .*{text}"):
        permute.universal_from_block(**arguments)


def test_bad_arrays(xp):
    universal, blocks = xp.zeros((1, 3, 2, 2, 4, 8), "f2"), xp.zeros((1, 2, 2, 4, 3, 8), "f2")
    move = permute.universal_from_block
    with pytest.raises(ShapeError, match="universal has N=1, expected N=2 like blocks"):
        move(universal, xp.zeros((2, 2, 2, 4, 3, 8), "f2"))
    with pytest.raises(ShapeError, match="universal has P=4, expected P=3 like blocks"):
        move(universal, blocks, layout="HND")
    with pytest.raises(ShapeError, match="universal has 3 heads, expected 2 like blocks, or a Lay"):
        move(universal, blocks[..., :2, :])
    with pytest.raises(ShapeError, match=r"blocks has 3 heads, expected .* \(0, 2\)"):
        move(universal, blocks, layout=Layout("NHD", heads=(0, 2)))
    with pytest.raises(ParameterError, match=r"layers is \(1, 3\), expected a range in 0 .. 2"):
        move(universal, blocks, layers=(1, 3))
    with pytest.raises(ParameterError, match="blocks has strides of its own"):
        move(universal, blocks, layout=Layout("NHD", token_stride=64))
    with pytest.raises(DtypeError, match="elements of 2 bytes, expected 4 like blocks"):
        move(universal, blocks.astype("f4"))
    with pytest.raises(DtypeError, match="dtype complex128, expected elements of 1, 2, 4 or 8"):
        move(universal, blocks.astype("c16"))
    if xp is np:  # an array of Python objects holds references, which no copy of bits counts
        with pytest.raises(DtypeError, match="dtype object, expected elements of 1, 2, 4 or 8"):
            move(universal.astype(object), blocks.astype(object))
        with pytest.raises(DtypeError, match="blocks has dtype >f2, .* bytes in little-endian"):
            move(universal, blocks.astype(">f2"))
    with pytest.raises(ShapeError, match="expected a contiguous last dimension"):
        move(universal[..., ::2], blocks[..., ::2])
    with pytest.raises(ShapeError, match=r"blocks has shape .*, expected \[P H D\]"):
        move(universal, [list(blocks[0])])
    with pytest.raises(ShapeError, match="blocks has 3 chunks, expected"):
        move(universal, [[blocks[0, 0, 0]] * 3])
    with pytest.raises(ShapeError, match="expected one shape, element size"):
        move(universal, [[blocks[0, 0, 0]] * 3 + [blocks[0, 0, 0, :2]]])
    with pytest.raises(ShapeError, match="operational has I=95, expected a multiple of P .* 4 . 8"):
        permute.operational_from_block(xp.zeros((1, 2, 2, 95), "f2"), blocks)
    with pytest.raises(ShapeError, match="dst has no dimensions P and D"):
        joined = xp.zeros((1, 2, 2, 96), "f2")
        permute.permute(joined, "operational_NHD", joined, "operational_NHD")
    with pytest.raises(ParameterError, match="dst_layout is 'NDH', expected NHD or HND or oper"):
        permute.permute(universal, "NDH", blocks, "NHD")
    with pytest.raises(ParameterError, match="src_layout has head_stride, expected it for NHD"):
        permute.permute(blocks, "NHD", universal, Layout("universal", head_stride=8))
    with pytest.raises(DtypeError, match="universal has an int, expected .*addresses need a shape"):
        move(4096, blocks)
    with pytest.raises(ShapeError, match=r"expected \[N H L O P D\]; addresses need a shape"):
        move(table_of(1), blocks)
    assert not bool(universal.any())


def test_destinations_lie_apart(xp):
    """From sources, of arrays without being asked; sources need not lie apart from each other."""
    x = xp.arange(72, dtype=np.float32)
    hnd, universal = (1, 1, 1, 2, 3, 4), (1, 2, 1, 1, 3, 4)
    for first in (0, 8, 23):
        with pytest.raises(ParameterError, match="dst shares memory with src, expected another"):
            dst = x[first : first + 24].reshape(universal)
            permute.permute(dst, "universal", x[:24].reshape(hnd), "HND")
    block = x[:24].reshape(universal[1:])
    other = xp.zeros((2, *hnd[1:]), np.float32)
    permute.permute(other, "HND", [block, block], "universal")
    permute.permute(x[24:48].reshape(universal), "universal", x[:24].reshape(hnd), "HND")
    assert_same_bits(other[0], other[1])


def test_read_only_destinations():
    universal, blocks = np.zeros((1, 1, 1, 1, 1, 8)), np.zeros((1, 1, 1, 1, 1, 8))
    universal.flags.writeable = False
    with pytest.raises(ParameterError, match="universal is read-only"):
        permute.universal_from_block(universal, blocks)


def test_host_and_device_do_not_mix(device):
    universal, blocks = np.zeros((1, 3, 2, 2, 4, 8), "f2"), device.zeros((1, 2, 2, 4, 3, 8), "f2")
    with pytest.raises(DeviceError, match="universal is on the host, expected a GPU like blocks"):
        permute.universal_from_block(universal, blocks)


def test_arrays_of_another_gpu_are_refused(device, monkeypatch):
    shape = (1, 1, 1, 1, 1, 8)
    universal, blocks = device.zeros(shape, "f2"), device.zeros(shape, "f2")
    here = cuda.current_device()
    monkeypatch.setattr(cuda.peers, "current_device", lambda: here + 1)
    with pytest.raises(DeviceError, match=f"blocks is on GPU {here}, expected the current one"):
        permute.universal_from_block(universal, blocks)


def test_bad_memory_is_found_on_request(device, rng):
    """Overlapping blocks and pageable memory, before anything is written."""
    sizes, dtype = (3, 3, 2, 2, 4, 5), np.dtype(np.float32)
    shape = BlockShape(*sizes[1:], dtype.itemsize)
    to = device.asarray(flat_blocks("universal", *sizes, dtype))
    of = device.asarray(random_blocks(rng, "NHD", *sizes, dtype))
    before = to.copy()
    universal, blocks = addresses(to), addresses(of)

    def move(universal, blocks, **options):
        sides = (universal, "universal", blocks, options.pop("layout", "NHD"))
        permute.permute(*sides, shape, validate=True, **options)

    close = universal.copy()
    close[2] = close[1] + 8
    with pytest.raises(ParameterError, match=r"dst\[1\] overlaps dst\[2\], expected disjoint"):
        move(close, blocks)
    with pytest.raises(ParameterError, match=r"dst\[2\] overlaps dst\[1\]|dst\[1\] overlaps dst"):
        move(device.asarray(close), blocks)
    inside = blocks.copy()
    inside[7] = universal[0] + 4
    with pytest.raises(ParameterError, match=r"dst\[0\] overlaps src\[7\]"):
        move(universal, inside)
    pageable = rng.integers(0, 9, to[0].size, np.int32)
    universal[1] = pageable.ctypes.data
    with pytest.raises(DeviceError, match=r"dst\[1\] is in pageable host memory, expected memory"):
        move(universal, blocks)
    assert_same_bits(to, before)
    move(addresses(to), blocks)
    assert_same_bits(to, expected("universal", "NHD", of.get(), *sizes))


def of_pool(xp, layers=4):
    """Blocks of a pool, [2, L, 1, 3, 2, 8] in NHD and HND."""
    pool = xp.asarray(np.arange(2 * layers * 48, dtype=np.float32).reshape(2, layers, 1, 3, 2, 8))
    return pool, pool.reshape(2, layers, 1, 2, 3, 8)


@pytest.mark.parametrize("in_lists", [False, True])
def test_what_is_written_shares_no_memory(xp, in_lists):
    """With what is read, or with itself; refused before anything moves."""
    pool, hnd = of_pool(xp)
    before = to_numpy(pool).copy()
    for dst, src, text in (
        (hnd, pool, "dst shares memory with src, expected another array"),
        (hnd[:, 1:3], pool[:, :2], "dst shares memory with src"),
        ([hnd[0], hnd[0]], pool.copy(), "dst shares memory with dst"),
    ):
        if in_lists and not isinstance(dst, list):
            dst, src = list(dst), [list(block.reshape(-1, *block.shape[2:])) for block in src]
        with pytest.raises(ParameterError, match=f"permute.permute: {text}"):
            permute.permute(dst, "HND", src, "NHD")
    of_one = strided(hnd, hnd.shape, (0, *hnd.strides[1:]))
    with pytest.raises(ShapeError, match="permute: dst has strides .* no two elements at one"):
        permute.permute(of_one, "HND", pool.copy(), "NHD")
    assert_same_bits(pool, before)


def test_parts_of_one_pool_may_lie_apart(xp):
    """Layers of one that become others, and K and V that interleave."""
    pool, hnd = of_pool(xp)
    want = to_numpy(pool).copy()
    want[:, 2:] = want[:, :2].swapaxes(3, 4).reshape(want[:, :2].shape)
    permute.permute(hnd[:, 2:], "HND", pool[:, :2], "NHD")
    assert_same_bits(pool, want)
    # Of arrays that overlap, the layers that move lie apart.
    permute.permute(hnd[:, 1:], "HND", pool[:, :3], "NHD", layers=(2, 3))
    want[:, 3] = want[:, 2].swapaxes(2, 3).reshape(want[:, 2].shape)
    assert_same_bits(pool, want)
