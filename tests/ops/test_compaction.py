"""compaction: what exceeds a threshold stays in order, what does not leaves no trace."""

import math

import ml_dtypes
import numpy as np
import pytest

import pykv
from pykv import cuda
from pykv.errors import CapacityError, DeviceError, DtypeError, ParameterError, ShapeError
from pykv.number_texts import counted
from pykv.ops import compaction
from tests.faults import misread, with_argument, with_option
from tests.helpers import assert_same_bits, launch, product, to_numpy, without_simt
from tests.simt import machine

DTYPES = ["float32", "float16", ml_dtypes.bfloat16]
UNUSUAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 0.1, -0.1, 1e-40, -1e-40, 1e-45, 3e38]
TILE = 512 * 16  # elements of float32 that a block takes at a time on the SIMT machine's GPU
SIZES = [0, 1, 31, 32, 33, 255, 256, 257, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]
THRESHOLDS = [0.1, -1.0, 0.0, -0.0, 1e-45, 65504.0, math.inf, -math.inf]


def numbers(rng, n, dtype):
    """Random, with all that is unusual in between."""
    x = rng.standard_normal(n)
    some = rng.permutation(n)[: n // 3]
    x[some] = rng.choice(UNUSUAL, some.size)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def kept_by_loop(x, threshold, mode="gt"):
    """Indices, element by element; float64 holds every element and float32 threshold."""
    threshold = float(np.float32(threshold))
    numbers = [abs(number) for number in x.astype(np.float64).tolist()]
    both = (lambda a: a >= threshold) if mode == "ge" else (lambda a: a > threshold)
    return [i for i, a in enumerate(numbers) if both(a)]


def assert_kept(got, x, kept):
    """Of a result: the kept elements of x and where they stood."""
    assert_same_bits(got.count, np.array([len(kept)]))
    values, indices = got.trimmed()
    assert_same_bits(values, x[kept])
    assert_same_bits(indices, np.array(kept, np.int32))


@pytest.mark.parametrize(
    "n, threshold, dtype, mode",
    product([2 * TILE + 5, *SIZES[:-1]], THRESHOLDS, DTYPES, ["gt", "ge"]),
)
def test_what_exceeds_is_kept_in_order(xp, rng, n, threshold, dtype, mode):
    x = numbers(rng, n, dtype)
    kept = kept_by_loop(x, threshold, mode)
    given = xp.asarray(x)
    assert_kept(compaction.compress(given, threshold, mode=mode), x, kept)
    assert to_numpy(compaction.count(given, threshold, mode=mode)).tolist() == [len(kept)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_arrays_may_start_anywhere(xp, rng, start, dtype):
    """Outputs as well, each in its own way; what lies around them stays."""
    x = numbers(rng, TILE + 100, dtype)
    kept = kept_by_loop(x[start:], 0.3)
    n = x.size - start
    values, indices = xp.full(n + 20, 7, dtype), xp.full(n + 20, 7, np.int32)
    got = compaction.compress(
        xp.asarray(x)[start:], 0.3, out=values[9 : 9 + n], indices=indices[start : start + n]
    )
    assert_kept(got, x[start:], kept)
    for array, at in ((values, 9), (indices, start)):
        around = np.delete(to_numpy(array), slice(at, at + len(kept)))
        assert (around == 7).all()


@pytest.mark.parametrize("room", [0, 1, 500, TILE, 2 * TILE])
def test_no_more_than_there_is_room_for(xp, rng, room):
    """The count says what would have been needed; nothing is written past the end."""
    x = np.abs(rng.standard_normal(3 * TILE)).astype(np.float32) + 1
    values, indices = xp.full(room + 8, 7, np.float32), xp.full(room + 8, 7, np.int32)
    arrays = dict(out=values[:room], indices=indices[:room])
    message = f"compress: out has room for {counted(room, 'element')}, expected {x.size:,}"
    with pytest.raises(CapacityError, match=message):
        compaction.compress(xp.asarray(x), 0.5, **arrays, check=True)
    assert (to_numpy(values[room:]) == 7).all() and (to_numpy(indices[room:]) == 7).all()
    if xp is np:
        assert (values == 7).all() and (indices == 7).all()
        return
    assert_same_bits(values[:room], x[:room])
    got = compaction.compress(xp.asarray(x), 0.5, **arrays)
    assert to_numpy(got.count)[0] == x.size
    for read in (got.kept, got.trimmed):
        with pytest.raises(CapacityError, match=message):
            read()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_tiles_that_keep_nothing_write_nothing(xp, dtype, first):
    """Between tiles that keep some, and where there is no room left."""
    x = np.zeros(5 * TILE, dtype)
    x[:first], x[4 * TILE :][:5] = 1, 2
    for room in (first + 5,) if xp is np else (first + 5, first):
        values, indices = xp.full(room + 9, 7, dtype), xp.full(room + 9, 7, np.int32)
        got = compaction.compress(xp.asarray(x), 0.5, out=values[:room], indices=indices[:room])
        assert to_numpy(got.count)[0] == first + 5
        assert (to_numpy(values[room:]) == 7).all() and (to_numpy(indices[room:]) == 7).all()
        want = np.array([1] * first + [2] * 5, dtype)[:room]
        assert_same_bits(values[:room], want)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_two_blocks_of_every_sm_have_the_memory(size, indexed):
    """For tiles and positions, and each 512 bytes of its own."""
    for sm, most in machine.SHARED.items():
        tile = compaction._tile(size, compaction._shape(sm, size, indexed))
        if sm < compaction.LOOK_BACK_SM:
            assert tile * (size + 2) + 512 <= most << 10
            continue
        block = compaction._staged_bytes(tile, size, indexed) + 512
        system = 1 << 10 if sm >= 80 else 0
        assert block <= most << 10 and 2 * (block + system) <= cuda.sm_shared_bytes(sm), sm


def test_only_what_is_wanted(xp, rng):
    x = numbers(rng, 3000, "float32")
    given, kept = xp.asarray(x), kept_by_loop(x, 0.5)
    got = compaction.compress(given, 0.5, indices=False)
    assert got.indices is None and got.kept() == len(kept)
    assert_same_bits(got.trimmed()[0], x[kept])
    wide = xp.full(3000, -1, np.int64)
    got = compaction.compress(given, 0.5, indices=wide, check=True)
    assert got.indices is wide and to_numpy(wide[: len(kept)]).tolist() == kept
    out, number = xp.zeros(len(kept), np.float32), xp.zeros(1, np.int64)
    got = compaction.compress(given, 0.5, out=out, count=number, check=True)
    assert got.values is out and got.count is number and len(got.indices) == len(kept)
    assert_same_bits(out, x[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 100, TILE, 2 * TILE + 5])
def test_expand_restores_what_exceeds(xp, rng, n, dtype):
    x = numbers(rng, n + 3, dtype)[3:]
    got = compaction.compress(xp.asarray(x), 0.4)
    want = np.full(n, -2, dtype)
    for i in kept_by_loop(x, 0.4):
        want[i] = x[i]
    guarded = xp.full(n + 10, 7, dtype)
    out = compaction.expand(*got[:2], n, -2, count=got.count, out=guarded[5:-5], check=True)
    assert_same_bits(out, want)
    assert (to_numpy(guarded[::-1])[[0, 1, 2, 3, 4, -1, -2, -3, -4, -5]] == 7).all()
    assert_same_bits(compaction.expand(*got.trimmed(), n, -2), want)


def test_nothing_expands_to_fill(xp):
    nothing, nowhere = xp.zeros(0, np.float16), xp.zeros(0, np.int64)
    got = compaction.expand(nothing, nowhere, 9, math.inf)
    assert_same_bits(got, np.full(9, np.inf, np.float16))
    assert compaction.expand(nothing, nowhere, 0).size == 0


def test_the_sign_of_zero_fills(xp):
    """Whichever came first with these layouts."""
    values, indices = xp.ones(1, np.float32), xp.zeros(1, np.int32)
    for fill in (0.0, -0.0, 0.0):
        got = compaction.expand(values, indices, 3, fill)
        assert_same_bits(got, np.array([1, fill, fill], np.float32))


# --- The kernels' two ways ------------------------------------------------------------------------


def needs_look_back():
    if cuda.current_sm() < compaction.LOOK_BACK_SM:
        pytest.skip("the kernel of one pass is not for this SM")


def fits(sm, x, own):
    """Whether an SM has the memory for another one's tiles with positions."""
    tile = compaction._tile(x.itemsize, compaction._shape(sm, x.itemsize, True))
    staged = compaction._staged_bytes(tile, x.itemsize, True)
    return staged + 512 <= machine.SHARED.get(own, 99) << 10


def run_kernels(xp, x, threshold, sm, words=None):
    """The launches of an SM, by hand; `words` are those that the kernels find."""
    room = x.size
    size, launches = compaction._launches(x, room, np.dtype(np.int32), threshold, sm)
    arrays = dict(values=xp.zeros(room, x.dtype), indices=xp.zeros(room, np.int32), x=x)
    arrays |= dict(count=xp.zeros(1, np.int64), words=xp.zeros(size, np.uint64))
    if words is not None:
        arrays["words"] = words
    for call in launches:
        call({name: arrays[name] for name in call.kernel.arrays})
    return [call.kernel.label for call in launches], arrays


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_and_three_leave_the_same_bits(device, rng, dtype):
    """By the shapes of all SMs that this one has the memory for."""
    needs_look_back()
    x = numbers(rng, 2 * TILE + 777, dtype)
    kept, own = kept_by_loop(x, 0.2), cuda.current_sm()
    others = {compaction._shape(sm, x.itemsize, True)["BLOCK"]: sm for sm in (75, 80, 89, 90)}
    others = [sm for sm in others.values() if fits(sm, x, own)]
    for sm, number in ((52, 3), *((sm, 1) for sm in {own, *others})):
        labels, arrays = run_kernels(device, device.asarray(x), 0.2, sm)
        assert len(labels) == number
        assert_same_bits(arrays["count"], np.array([len(kept)]))
        assert_same_bits(arrays["values"][: len(kept)], x[kept])
        assert to_numpy(arrays["indices"][: len(kept)]).tolist() == kept


@pytest.mark.parametrize("before", [5, 32, 45, 1088, 1100])
@pytest.mark.parametrize("nearest", [1, 2, 31, 32, 33, 34, 35])
def test_the_look_back_sums_what_other_blocks_left(device, rng, before, nearest):
    """Tiles before the ticket have their counts and so have their rows; the row that is `nearest`
    rows before the ticket's says what is kept up to its end: what the block would find had others
    taken these tiles. It looks at 32 rows at once."""
    needs_look_back()
    sm = cuda.current_sm()
    tile = compaction._tile(4, compaction._shape(sm, 4, True))
    x = device.zeros(before * tile + 9, np.float32)
    x[before * tile :] = 1  # what is left for this block
    counts = rng.integers(0, tile + 1, before)
    rows = [counts[i : i + 32] for i in range(0, before + 1, 32)]
    words = [(len(row) << 32) + int(row.sum()) for row in rows]
    row, base = before // 32, 2**40 + 5  # more than 32 bits hold
    prefix = int(counts.sum())
    if nearest <= row:
        words[row - nearest] = 1 << 63 | base
        prefix = base + int(counts[(row - nearest + 1) * 32 :].sum())
    words = np.array([before, *(counts + 1), 0, *words], np.uint64)
    _, arrays = run_kernels(device, x, 0.5, sm, device.asarray(words))
    assert to_numpy(arrays["count"])[0] == prefix + 9
    kept = to_numpy(arrays["values"])  # past the output, where there is a base
    assert kept[prefix : prefix + 9].all() and not kept[:prefix].any()
    left = to_numpy(arrays["words"])[before + 2 :]
    if before % 32 == 0:
        assert left[row - 1] == 1 << 63 | prefix
    assert left[row] == words[before + 2 + row] + np.uint64((1 << 32) + 9)


@pytest.mark.parametrize("tiles", [1, 8, 2048, 2049, 4500])
def test_counts_of_tiles_become_sums(device, rng, tiles):
    """Of more tiles than the scan has threads, and more elements than 32 bits count."""
    counts = rng.integers(0, 2**33, tiles)
    words = device.asarray(np.array([5, *counts], np.uint64))
    count = device.zeros(1, np.int64)
    kernel = cuda.kernel(
        "compaction", "compaction_scan", **compaction._shape(52, 4, False), X_T="float", I_T="int"
    )
    launch(kernel, 1, 256, words, count, tiles)
    sums = np.cumsum([0, *counts])
    assert to_numpy(words).tolist() == [5, *sums[:-1]] and to_numpy(count)[0] == sums[-1]


# --- Calls ----------------------------------------------------------------------------------------


def test_a_given_workspace_may_hold_anything(device, rng):
    x = numbers(rng, TILE + 9, "float32")
    size = compaction.workspace_size(x.size, 4)
    workspace = device.full(size, 2**64 - 1, np.uint64)
    for threshold in (0.2, 0.9):
        got = compaction.compress(device.asarray(x), threshold, workspace=workspace)
        assert_kept(got, x, kept_by_loop(x, threshold))
        count = compaction.count(device.asarray(x), threshold, workspace=workspace)
        assert to_numpy(count)[0] == got.kept()
    with pytest.raises(CapacityError, match=f"workspace has {size - 1} elements, expected {size}"):
        compaction.compress(device.asarray(x), 0.2, workspace=workspace[:-1])


def test_prepared_and_graphed_calls_follow_the_contents(xp, rng):
    x = xp.asarray(numbers(rng, TILE + 1, "float32"))
    call = cuda.prepare(compaction.compress, x, 0.5)
    step = pykv.graph(lambda: compaction.compress(x, 0.5))
    call()
    back = cuda.prepare(compaction.expand, *call.result[:2], x.size, count=call.result.count)
    for _ in range(4):
        new = numbers(rng, x.size, "float32")
        x[...] = xp.asarray(new)
        kept = kept_by_loop(new, 0.5)
        assert_kept(call(), new, kept)
        assert_kept(step(), new, kept)
        want = np.zeros_like(new)
        want[kept] = new[kept]
        assert_same_bits(back(), want)


def test_a_prepared_call_checks_its_room(xp):
    x = xp.asarray(np.array([1, 0, 0], np.float32))
    call = cuda.prepare(compaction.compress, x, 0.5, out=xp.zeros(2, np.float32), check=True)
    assert call().kept() == 1
    x[...] = 1
    with pytest.raises(CapacityError, match="out has room for 2 elements, expected 3"):
        call()


# --- Large ----------------------------------------------------------------------------------------


@without_simt
@pytest.mark.parametrize("n", [524288, 524289, 2**24 + 3])
def test_large_arrays_are_read_to_their_end(xp, n):
    x = np.arange(n, dtype=np.float32) % 5
    want = np.arange(n)[x > 2]
    values, indices = compaction.compress(xp.asarray(x), 2.5).trimmed()
    assert_same_bits(indices, want.astype(np.int32))
    assert_same_bits(values, x[want])
    assert want[-1] > n - 6
    assert_same_bits(compaction.expand(values, indices, n), np.where(x > 2, x, np.float32(0)))


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("n", [2**31, 2**31 + 9])
def test_indices_of_64_bits(n):
    """From 2^31 + 1 elements on; of every 1000th element, and the last."""
    import cupy

    if cupy.cuda.Device().mem_info[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")
    x = cupy.zeros(n, np.float16)
    x[::1000] = 3
    x[-1] = 5
    want = cupy.append(cupy.arange(0, n, 1000), n - 1)
    dtype = np.int32 if n == 2**31 else np.int64
    room = cupy.empty(want.size, np.float16)
    got = compaction.compress(x, 1, out=room, check=True)
    assert got.indices.dtype == dtype and bool((got.indices == want).all())
    assert bool((compaction.expand(*got[:2], n) == x).all())
    if dtype == np.int64:
        short = cupy.empty(want.size, np.int32)
        with pytest.raises(DtypeError, match="indices has dtype int32, expected int64 for"):
            compaction.compress(x, 1, out=room, indices=short)


@pytest.mark.slow
@pytest.mark.gpu
def test_every_run_leaves_the_same_bits_under_load(rng):
    """While another stream keeps the GPU's SMs and memory busy."""
    import cupy

    x = cupy.asarray(rng.standard_normal(2**24 + 3).astype(np.float32))
    first = compaction.compress(x, 0.7, check=True)
    want = [array.get() for array in first.trimmed()]
    other, noise = cupy.cuda.Stream(non_blocking=True), cupy.ones((64, 2**20), np.float32)
    for _ in range(100):
        with other:
            for _ in range(5):
                noise *= 1.0001
        values, indices = compaction.compress(x, 0.7).trimmed()
        assert_same_bits(values, want[0])
        assert_same_bits(indices, want[1])
    other.synchronize()


# --- Errors ---------------------------------------------------------------------------------------


def test_errors_name_the_argument(xp):
    x = xp.zeros(8, np.float32)
    for threshold, given in ((math.nan, "nan"), (1e39, r"1e\+39")):
        with pytest.raises(ParameterError, match=f"compress: threshold is {given}, expected a"):
            compaction.compress(x, threshold)
    with pytest.raises(DtypeError, match="threshold is a str, expected a number"):
        compaction.count(x, "1")
    with pytest.raises(ParameterError, match="mode is 'lt', expected one of"):
        compaction.compress(x, 1, mode="lt")
    with pytest.raises(DtypeError, match="x has dtype float64, expected float32 or float16 or"):
        compaction.compress(x.astype(np.float64), 1)
    with pytest.raises(ShapeError, match=r"x has strides \(8,\) for shape \(4,\), expected a cont"):
        compaction.compress(x[::2], 1)
    with pytest.raises(ShapeError, match=r"x has shape \(2, 4\), expected \[n\]"):
        compaction.compress(x.reshape(2, 4), 1)
    with pytest.raises(ShapeError, match="indices has C=7, expected C=8"):
        compaction.compress(x, 1, out=x, indices=xp.zeros(7, np.int32))
    with pytest.raises(ParameterError, match="n is -1, expected 0 to"):
        compaction.expand(x, xp.zeros(8, np.int32), -1)
    with pytest.raises(ParameterError, match="n is 9, expected the 8 elements of out"):
        compaction.expand(x, xp.zeros(8, np.int32), 9, out=xp.zeros(8, np.float32))


@pytest.mark.parametrize("indices, at", [([0, 1, 1], 2), ([2, 1, 3], 1), ([0, 1, 9], 2)])
def test_indices_that_do_not_ascend_are_refused_if_asked(xp, indices, at):
    values, given = xp.zeros(3, np.float32), xp.asarray(np.array(indices, np.int32))
    message = rf"indices\[{at}\] is {indices[at]}, expected ascending indices from 0 to 8"
    with pytest.raises(ParameterError, match=message):
        compaction.expand(values, given, 9, check=True)
    count = xp.asarray(np.array([at]))
    compaction.expand(values, given, 9, count=count, check=True)
    if xp is not np and len(set(indices)) == 3:  # what is wrong stays inside of the result
        assert compaction.expand(values, given, 9).size == 9


def test_host_and_device_do_not_mix(device):
    x = device.zeros(8, np.float32)
    with pytest.raises(DeviceError, match="out is on the host, expected a GPU like x"):
        compaction.compress(x, 1, out=np.zeros(8, np.float32))
    with pytest.raises(DeviceError, match="indices is on the host, expected a GPU like values"):
        compaction.expand(x, np.zeros(8, np.int32), 8)


# Faults that `pykv verify` must see, in the functions and in their references.
FAULTS = {
    "compress: a larger threshold": (compaction, "compress", with_argument(1, lambda t: t + 0.01)),
    "compress: always gt": (compaction, "compress", with_option(mode="gt")),
    "count: always gt": (compaction, "count", with_option(mode="gt")),
    "expand: another fill": (compaction, "expand", with_argument(3, lambda fill: 0)),
    "expand: one too few": (
        *(compaction, "expand"),
        misread(count=lambda count: None if count is None else count - 1),
    ),
}
REFERENCE_FAULTS = [
    (compaction, "reference", lambda op: lambda x, *args: op(x, *args)[1:]),
    (compaction, "reference_expand", lambda op: lambda *args: op(*args) + 1),
]
