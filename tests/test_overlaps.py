"""Arrays that share memory, against sets of bytes; what a checker and replayed calls make of it."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from pykv import cuda, overlaps
from pykv.arrays import FLOAT32
from pykv.checker import Dims, checker
from pykv.errors import ParameterError, ShapeError
from pykv.ops import activation
from tests.helpers import assert_same_bits, to_numpy


def some_view(rng, memory):
    """A view of bytes at some strides, forward or backward, elements perhaps at one place."""
    shape = tuple(int(n) for n in rng.integers(0, 4, rng.integers(1, 4)))
    strides = tuple(int(n) for n in rng.integers(-9, 10, len(shape)))
    return as_strided(memory[int(rng.integers(60, 120)) :], shape, strides)


def test_sharing_is_that_of_bytes(rng):
    memory = np.arange(200, dtype=np.uint8)  # each byte says where it is
    met = set()
    for _ in range(3000):
        x, y = (some_view(rng, memory) for _ in range(2))
        want = bool(set(x.ravel().tolist()) & set(y.ravel().tolist()))
        assert overlaps.share(x, y) == want
        pairs = overlaps.pairs_of([x, y], {0: {1: False}})
        addresses = [a.__array_interface__["data"][0] for a in (x, y)]
        assert bool(overlaps.find_shared(pairs, [x, y], addresses)) == want  # by bounds first
        if x.size and y.size and (parts := overlaps._parts(x, y)) is not None:
            assert any(overlaps.share(*pair) for pair in parts) == want  # as for large ones
        if overlaps.repeats(x):
            assert len(set(x.ravel().tolist())) < x.size
        met.add((want, overlaps.repeats(x)))
    assert len(met) == 4


def test_views_of_pools_lie_apart(xp):
    """K and V in one pool, side by side in pages, tokens or heads, and scales behind their rows."""
    N, P, H, D = 3, 4, 2, 32
    pool = xp.zeros((N, 2, P, H, D), np.float16)
    rows = xp.zeros((N, P, 2, H, D + 8), np.float16)
    of_rows = [rows[:, :, i, :, :D] for i in range(2)] + [rows[..., i, :, D:] for i in range(2)]
    for views in ([pool[:, 0], pool[:, 1]], of_rows, [rows[..., 0, :], rows[..., 1, :]]):
        for i, x in enumerate(views):
            assert not overlaps.repeats(x) and overlaps.share(x, x)
            assert not any(overlaps.share(x, y) for y in views[:i])
    assert overlaps.share(pool[:, 0], pool[1:]) and overlaps.share(pool[1:2], pool[:, 1])


def test_pages_of_unlike_rows_lie_apart():
    """K of bytes, V of halves, then scales of rows in one page, of caches as large as they come: no
    search over all elements, of which none is there to be read."""
    L, N, P, H, D = 32, 4000, 16, 8, 128
    page = P * H * (3 * D + 4)

    def view(start, shape, dtype, *steps):
        interface = dict(data=((1 << 40) + start, True), typestr=dtype, version=3)
        interface |= dict(shape=(L, N, P, H, *shape), strides=(N * page, page, *steps))
        return np.asarray(SimpleNamespace(__array_interface__=interface))

    k = view(0, (D,), "|u1", D, P * D, 1)
    v = view(P * H * D, (D,), "<f2", 2 * D, 2 * P * D, 2)
    k_scales, v_scales = (view(P * H * (3 * D + i), (), "<f2", 2, 2 * P) for i in (0, 2))
    arrays = [k, v, k_scales, v_scales]
    apart = [pair for i, x in enumerate(arrays) for y in arrays[:i] for pair in ((x, y), (y, x))]
    apart += [(x[::-1, ::-1], y[:1]) for x, y in apart]
    nearer = view(P * H * D - 2, (D,), "<f2", 2 * D, 2 * P * D, 2)
    shared = [(nearer, k), *((x[:, 1:], x[:, :-1]) for x in arrays), (v[1:], v[:-1, ::-1])]
    found = [[overlaps.share(*pair) for pair in pairs] for pairs in (apart, shared)]
    assert [set(x) for x in found] == [{False}, {True}]


_check = checker(
    "op", ("out", "more"), x=("T | D", FLOAT32), out=("T | D", FLOAT32), more=("T | D", FLOAT32)
)
_in_place = checker(
    "op", (overlaps.Written("out", may_be=("x",)),), x=("T | D", FLOAT32), out=("T | D", FLOAT32)
)


def test_a_known_layout_is_looked_at_for_each_address(xp):
    memory = xp.zeros((8, 16), np.float32)
    x, out, more, none = (memory[i : i + 2] for i in (0, 2, 4, 6))
    for _ in range(2):
        dims = _check(x, out, more)
        assert _check(x, none, more) is dims
        for wrong, text in (
            ((x, x, more), "out shares memory with x"),
            ((x, memory[1:3], more), "out shares memory with x"),
            ((x, out, memory[3:5]), "out shares memory with more"),
            ((x, out, x), "more shares memory with x"),
        ):
            with pytest.raises(ParameterError, match=f"^op: {text}, expected another array$"):
                _check(*wrong)
    assert xp is np or sum(layouts is dims.layouts for layouts, *_ in _check._apart) == 2


def test_what_is_known_of_addresses_takes_little_memory(device):
    """However many layouts come at however many addresses."""
    memory = device.zeros((600, 16), np.float32)
    for T in range(1, 10):
        for i in range(550):
            _in_place(memory[:T], memory[i + 20 : i + 20 + T])
    assert 0 < len(_in_place._apart) <= 4096


def test_the_same_array_is_not_another_layout_of_it(xp):
    memory = xp.zeros((4, 16), np.float32)
    _in_place(memory, memory)
    _in_place(memory[::2], memory[::2])
    _in_place(memory[:1], memory[::4])  # a single row, so its stride does not matter
    text = "out shares memory with x, expected x itself or another array"
    for x, out in (
        (memory[:2], memory[1:3]),
        (memory[:2], memory[::2]),
        (memory[:2], memory[2::-2]),
    ):
        with pytest.raises(ParameterError, match=text):
            _in_place(x, out)


def test_what_is_written_has_a_place_for_each_element(xp):
    x = xp.zeros((2, 16), np.float32)
    folded = xp.broadcast_to(x[0], (2, 16)) if xp is not np else as_strided(x, (2, 16), (0, 4))
    _in_place(folded, x.copy())  # the folded array is only read
    with pytest.raises(ShapeError, match=r"op: out has strides \(0, 4\) .* no two elements at one"):
        _in_place(x, folded)


def test_a_replayed_call_takes_no_arrays_that_overlap(device):
    """The layout is known, the launches would race: the call itself is made, and refuses them."""
    kept, calls = Dims(), []

    def add(x, y):
        def call():
            calls.append(x)
            activation.add(x, y)

        cuda.replayed(kept, None, (x, y), call)

    memory = device.asarray(np.arange(96, dtype=np.float32).reshape(12, 8))
    for i in (0, 2, 4):
        add(memory[i : i + 2], memory[8:10])
    assert len(calls) == 1
    before = to_numpy(memory).copy()
    for _ in range(2):
        with pytest.raises(ParameterError, match="add: x shares memory with y, expected y itself"):
            add(memory[7:9], memory[8:10])
    assert len(calls) == 3
    assert_same_bits(memory, before)
    add(memory[8:10], memory[8:10])  # the op allows out to be x itself
    assert len(calls) == 4
    assert_same_bits(memory[8:10], 2 * before[8:10])
