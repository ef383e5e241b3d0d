"""Wrong arguments of every public function raise typed errors that name the argument, before
anything is launched or written."""

import inspect
import re
import warnings
from functools import cache, cached_property

import ml_dtypes
import numpy as np
import pytest

import pykv
from pykv import cuda
from pykv.arrays import FLOATS, INTS
from pykv.errors import CapacityError, DeviceError, DtypeError, ParameterError, PykvError
from pykv.eviction import Streaming, evict
from pykv.eviction.block_selection import BlockSelection
from pykv.kvtc.stream import Header
from pykv.layout import BlockShape, Layout, strides
from pykv.options import page_ids
from pykv.specs import POOLS
from tests.helpers import to_numpy
from tests.public import CALLS, OPTIONS, call_of
from tests.wrong_values import is_array, kind_of, other_spellings, wrong_values

OUTPUTS = "out q_out table rows k_out v_out lengths lse out_lse top_ids top_logprobs"
OUTPUTS = OUTPUTS.split()  # in the order of results
SLOW = ("llm.generate.LLM", "llm.generate.LLM.chat", "llm.generate.LLM.chat_ids")
SLOW += tuple(f"kvtc.calibration.{x}" for x in ("calibrate", "compare_coders", "v0_configs"))
FREE = {  # values that no function can tell from right ones
    "foreign.asarray": "x",
    "foreign.from_pointer": "owner dtype",
    **{f"ops.paged_check.{name}": "op name" for name in "check_pages check_slots".split()},
    "ops.paged_check.check_starts": "op name",
    "ops.paged_check.check_positions": "op",
    "ops.paged_check.check_page_table": "op",
    "ops.paged_check.check_table": "op last_page_len",
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a text may be the path of a file
    # A model is read or run for each value that passes, and a process begun for each chat.
    assert not list(violations(name, np, with_limits=name not in SLOW))


@pytest.mark.simt
@pytest.mark.parametrize("xp", ["simt"], indirect=True)
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("ops.")])
def test_wrong_arguments_are_refused_for_kernels(xp, name):
    assert not list(violations(name, xp, with_limits=False))


MOST = 2**31 - 1
CONTENTS = {  # entries that lead out of arrays
    "slots": [MOST],
    "page_table": [MOST, -1],
    "lengths": [MOST],
    "indices": [MOST],
    "batch_indices": [MOST],
    "ids": [MOST, -1],
    "bias_ids": [MOST, -1],
    **dict.fromkeys(("tally_rows", "mask_rows"), [MOST, -2]),
    **dict.fromkeys(("indptr", "append_indptr", "q_starts", "starts", "bias_indptr"), [MOST, -1]),
}
UNREAD = {"page_table": 3}  # an entry past the length of its sequence
NOT_FOLLOWED = {  # entries that calls write, copy or cut off, or that another check has passed
    "ops.compaction.compress": "indices",
    "ops.contiguous_append.append": "lengths",
    "ops.block_scores.score": "lengths",
    "ops.page_table.from_lists": "indices",
    "ops.paged_check.check_positions": "indptr",
}
WITH_CONTENTS = [
    name
    for name in CALLS
    if name.startswith(("ops.", "pool.")) and name not in ("ops.rope.rotate", "ops.sample.sample")
]


@pytest.mark.parametrize("name", WITH_CONTENTS)
def test_entries_that_lead_out_of_arrays_are_refused(xp, name):
    """On the host always, on a GPU if asked."""
    function, given = call_of(name, xp)
    checks = "check" in parameters_of(name, function)
    if xp is not np and not (checks or "paged_check" in name):
        return
    for argument in (CONTENTS.keys() & given.keys()) - {NOT_FOLLOWED.get(name)}:
        for i in range(given[argument].size):
            for wrong in CONTENTS[argument] if UNREAD.get(argument) != i else ():
                function, new = call_of(name, xp)
                array = to_numpy(new[argument]).copy()
                array.flat[i] = wrong
                new[argument] = xp.asarray(array)
                error, changed = outcome(function, new | (dict(check=True) if checks else {}))
                assert isinstance(error, PykvError), (argument, i, wrong, error)
                assert re.search(rf"\b{argument}\b", str(error)) and not changed, error


@pytest.mark.parametrize("name", [name for name in CALLS if name not in SLOW])
def test_numbers_at_the_ends_of_their_kind_give_no_warnings(name):
    """Whether all elements of an array are such numbers, or one of them."""
    function, given = with_outputs(name, np)
    for argument, x in given.items():
        if not is_array(x) or x.dtype not in FLOATS or not x.size:
            continue
        kind = ml_dtypes.finfo(x.dtype)
        for value in (np.nan, np.inf, -np.inf, kind.max, -kind.max, kind.smallest_subnormal, 0):
            for places in (slice(None), slice(x.size // 2, x.size // 2 + 1)):
                function, new = with_outputs(name, np)
                new[argument].reshape(-1)[places] = value
                error, _ = outcome(function, new)
                assert error is None or isinstance(error, PykvError), (argument, value, error)


@pytest.mark.parametrize("name", WITH_CONTENTS)
def test_prepared_calls_look_at_entries_again(name):
    """On the host always: they raise what a plain call does."""
    function, given = with_outputs(name, np)
    try:
        call = pykv.prepare(function, **given)
    except PykvError:  # it cannot be prepared
        return
    for argument, x in given.items():
        if not is_array(x) or x.dtype not in INTS or argument in OUTPUTS:
            continue
        for i, right in enumerate(x.reshape(-1).tolist()):
            for wrong in (MOST, -1, -MOST - 1):
                x.flat[i] = wrong
                plain, _ = outcome(function, given)
                again, _ = outcome(call, {})
                x.flat[i] = right
                assert (type(again), str(again)) == (type(plain), str(plain)), (argument, i, wrong)


@pytest.mark.parametrize("name", ["append_decode", "append_ragged", "append_indexed"])
def test_two_rows_for_a_slot_are_refused_if_asked(xp, name):
    function, given = call_of(f"ops.paged_append.{name}", xp)
    given["indices"] = xp.asarray(np.array([2, 2], np.int32))
    positions = "positions" if name == "append_indexed" else "last_page_len"
    given[positions] = xp.asarray(np.array([1, 1], np.int32))
    error, changed = outcome(function, given | dict(check=True))
    assert isinstance(error, ParameterError) and not changed
    assert "indices: the slot of row[1] is 5, expected no slot twice" in str(error)


def test_a_stream_means_nothing_on_the_host():
    """Whatever stream, or none: not even CuPy is asked for."""
    for name in CALLS:
        function, given = call_of(name, np)
        if "stream" in inspect.signature(function).parameters and "stream" not in given:
            error, _ = outcome(function, given | dict(stream=1))
            assert error is None, (name, error)


def test_no_driver_is_a_device_error():
    """Also where CuPy is installed."""
    cupy = pytest.importorskip("cupy")
    if cuda.has_driver():
        pytest.skip("there is a driver")
    addresses = [np.array([16], np.uint64)] * 2
    calls = [
        lambda: pykv.transfer.memcpy_batch(*addresses, 4),
        lambda: pykv.ops.block_copy.vectorized_copy(*addresses, 4),
        lambda: pykv.ops.paged_decode.workspace_size(1, 1, 1, 64, 64),
        lambda: pykv.from_pointer(256, (1,), np.float32),
        lambda: pykv.plan.PagedDecodePlan.select(DECODE, np.float16, xp=cupy),
    ]
    for call in calls:
        with pytest.raises(DeviceError):
            call()


DECODE = pykv.plan.PagedDecodeDescriptor(1, 1, pykv.plan.PagedCacheDescriptor(2, 2, 1, 64))


# --- Judging a call -------------------------------------------------------------------------------


def violations(name, xp, with_limits=True):
    """What is wrong with the answers to wrong arguments of a call, one line each."""
    function, base = with_outputs(name, xp)
    error, _ = outcome(function, base)
    needs_gpu = isinstance(error, DeviceError)
    if error is not None and not needs_gpu:
        yield f"the valid call raises {error!r}"
    for argument, parameter in parameters_of(name, function).items():
        if argument in FREE.get(name, "").split():
            continue
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        value = base.get(argument, default)
        must, may = wrong_values(name, argument, parameter, value)
        for i, wrong in enumerate([*must, *(may if with_limits else ())]):
            function, given = with_outputs(name, xp)
            error, changed = outcome(function, given | {argument: wrong})
            what = f"{argument}={described(wrong)}"
            # Sizes disagree with another argument, which may be the one that is named.
            names = [argument, *given, *POOLS] if i >= len(must) or is_array(wrong) else [argument]
            if error is None and i < len(must):
                yield f"{what} passes"
            elif isinstance(error, OSError) and argument == "path":
                continue
            elif error is not None and not isinstance(error, PykvError):
                yield f"{what} raises {type(error).__name__}: {ascii(str(error))}"
            elif isinstance(error, (CapacityError, DeviceError)) and i >= len(must):
                continue
            elif error is not None and not any(
                re.search(rf"\b{x.removesuffix('s')}s?\b", str(error)) for x in names
            ):
                yield f"{what} is not named: {ascii(str(error))}"
            if error is not None and changed:
                yield f"{what} is refused, but something changed"
            if error is not None and ("\n" in str(error) or len(str(error)) > 1000):
                yield f"{what} is refused in a text of {len(str(error))} characters, or of lines"
        for other in other_spellings(kind_of(argument, parameter, value), argument, value):
            made = made_by(name, xp, argument, other)
            if isinstance(made, Exception) and not needs_gpu:
                yield f"{argument}={described(other)} raises {made!r}"
            elif xp is np and not needs_gpu and is_unlike(made, name, argument, other.item()):
                yield f"{argument}={described(other)} gives something else than {other.item()}"


def parameters_of(name, function):
    """Those of a call, with the options that it passes on."""
    own = inspect.signature(function).parameters
    passed_on = inspect.signature(OPTIONS[name]).parameters if name in OPTIONS else {}
    named = {n: p for n, p in own.items() if p.kind != p.VAR_KEYWORD}
    return named | {n: p for n, p in passed_on.items() if p.kind == p.KEYWORD_ONLY and n not in own}


def with_outputs(name, xp):
    """A call whose outputs are given, too."""
    function, given = call_of(name, xp)
    own = inspect.signature(function).parameters
    outputs = [n for n in OUTPUTS if n in own and own[n].default is None and n not in given]
    if "table" not in own:
        outputs = [n for n in outputs if n != "lengths"]
    if not outputs or not name.startswith("ops."):
        return function, given
    made = (xp.array(x) for x in results(name, xp))
    return function, given | dict(zip(outputs, made, strict=True))


@cache
def results(name, xp):
    """What the valid call returns, on the host: a launch for each wrong value would take longer
    than all checks."""
    function, given = call_of(name, xp)
    if "return_lse" in inspect.signature(function).parameters:
        given["return_lse"] = True
    made = function(**given)
    return [to_numpy(x) for x in (made if isinstance(made, tuple) else (made,))]


def outcome(function, given):
    """The error of a call, or None, and whether arguments or the method's object changed."""
    held = [getattr(function, "__self__", None), given]
    before = state(held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            function(**given)
        except Exception as error:
            return error, state(held) != before
    return None, False


def made_by(name, xp, argument, other):
    """All that a call gives and leaves, with another value for an argument; or its error."""
    function, given = with_outputs(name, xp)
    try:
        result = function(**given | {argument: other})
    except Exception as error:
        return error
    given.pop(argument, None)
    return state([result, getattr(function, "__self__", None), given], name=type)


def is_unlike(made, name, argument, value):
    """Whether a call gave something else than it does with this value, where that is always one."""
    timed = ("elastic.rates.", "elastic.compaction.compress")
    if name.startswith(("kvtc.codec.Codec", *timed)):  # any workspace; times
        return False
    expected = made_by(name, np, argument, value)
    return made != expected and expected == made_by(name, np, argument, value)


def state(thing, depth=4, name=id):
    """All that a value holds, to be compared; other objects by their `name`."""
    if is_array(thing):
        return thing.shape, to_numpy(thing).tobytes()
    if isinstance(thing, (list, tuple)):
        return [state(x, depth, name) for x in thing]
    if isinstance(thing, dict):
        keys = [key if isinstance(key, str) else name(key) for key in thing]
        return keys, [state(x, depth, name) for x in thing.values()]
    of_cache = type(thing).__module__.startswith("pykv.") and not isinstance(thing, pykv.LLM)
    if of_cache and hasattr(thing, "__dict__") and depth:
        kept = {k: v for k, v in vars(thing).items() if not is_found_out(type(thing), k)}
        return state(kept, depth - 1, name)
    return thing if isinstance(thing, (int, float, str, bytes)) else name(thing)


def is_found_out(owner, name):
    """Whether an attribute appears when it is first asked for, which changes nothing."""
    return isinstance(getattr(owner, name, None), cached_property)


def described(x):
    if isinstance(x, np.ndarray):
        return f"array {x.dtype}{list(x.shape)}, strides {x.strides}"
    if isinstance(x, int) and x.bit_length() > 10_000:  # Python writes no more digits
        return f"int of {x.bit_length()} bits"
    return f"{type(x).__name__} {ascii(x)[:40]}"


U8 = np.uint8


@pytest.mark.parametrize("whole", [U8, lambda n: np.array(n, U8)])
def test_records_hold_numbers_that_do_not_wrap_around(whole):
    """Of 8 bits, or an array without dimensions: 200 * 2 would be 144, and 200 + 100 be 44."""
    shape = BlockShape(H=2, L=1, O=2, P=4, D=8, itemsize=2)
    stack = Layout("NHD", heads=(whole(0), whole(2)), token_stride=whole(200))
    assert strides(stack, shape).token == 400
    assert hash(stack) == hash(Layout("NHD", heads=(0, 2), token_stride=200))
    counts = map(whole, (16, 2, 2, 8, 50, 200, 100, 16))
    with pytest.raises(ParameterError, match="sinks and window are 200 and 100"):
        _ = Header("0" * 64, *counts, "fp16").nbytes
    assert hash(BlockSelection(blocks=whole(200))) == hash(BlockSelection(blocks=200))
    assert Streaming(sinks=whole(200), recent=whole(100)).budget == 300


def test_what_a_mask_hides_is_not_read():
    """NumPy's asarray forgets masks: what they hide would be an address, a page or a value."""
    masked = np.ma.array([1, 2], mask=[0, 1])
    with pytest.raises(DtypeError, match="asarray: x is a MaskedArray"):
        pykv.asarray(masked)
    with pytest.raises(ParameterError, match="op: pages is masked_array"):
        page_ids("op", "pages", masked, 0, 9)
    tables = np.array([16, 32], np.uint64)
    for given in ((masked, tables, 4), (tables, masked, 4), (tables, tables, masked)):
        with pytest.raises(DtypeError, match="is a MaskedArray, expected integers"):
            pykv.transfer.memcpy_batch(*given)
    cache = pykv.PagedKVCache(1, 4, 2, 8, page_size=4)
    with pytest.raises(DtypeError, match="lengths is a MaskedArray"):
        evict(cache, [cache.manager.allocate(2) for _ in range(2)], masked, Streaming(recent=1))
