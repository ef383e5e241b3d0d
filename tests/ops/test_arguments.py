"""Options and outputs that ops must refuse; tests/test_arguments.py has what holds of all calls."""

import inspect
import re
from contextlib import suppress

import numpy as np
import pytest

import pykv
from pykv.arrays import as_read_only
from pykv.errors import DtypeError, ParameterError, PykvError
from pykv.ops import (
    activation,
    adjust_logits,
    attention_scores,
    norm,
    paged_convert,
    paged_decode,
    prefill,
)
from tests.helpers import assert_same_bits, to_numpy
from tests.ops.calls import OPS, filled

OUTPUTS = ("out", "lse", "out_lse", "q_out", "table", "lengths", "sums", "k_out", "v_out")
OUTPUTS += ("min_vals", "max_vals", "kept", "vectors", "rows", "old", "budgets")


def copies(given):
    return {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in given.items()}


def with_outputs(op, arguments, rng):
    """A call with all that may be given, arrays of 7 for outputs, and names of what it writes."""
    names = inspect.signature(op).parameters
    given = filled(arguments, rng, np)
    if "advance" in names:
        given["advance"] = True
    result = op(**copies(given))
    results = result if isinstance(result, tuple) else (result,)
    optional = [name for name, x in names.items() if x.default is None and name not in given]
    missing = [name for name in OUTPUTS if name in optional]
    given |= {name: np.full_like(x, 7) for name, x in zip(missing, results, strict=False)}
    after = copies(given)
    op(**after)
    arrays = {n: x for n, x in given.items() if isinstance(x, np.ndarray)}
    return given, [n for n, x in arrays.items() if after[n].tobytes() != x.tobytes()]


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_written_may_not_be_read_only(rng, op, arguments):
    """Every array that a call changes, outputs that are not given among them; refused before any
    is written."""
    given, written = with_outputs(op, arguments, rng)
    assert written
    for name in written:
        frozen = copies(given)
        frozen[name].flags.writeable = False
        with pytest.raises(ParameterError, match=f"{op.__name__}: {name} is read-only, expected"):
            op(**frozen)
        for n, x in given.items():
            if isinstance(x, np.ndarray):
                assert frozen[n].tobytes() == x.tobytes()


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_a_prepared_call_writes_may_not_become_read_only(rng, op, arguments):
    """Refused at the call, before any is written, in place of NumPy's own error."""
    given, written = with_outputs(op, arguments, rng)
    for name in written:
        frozen = copies(given)
        prepared = pykv.prepare(op, **frozen)
        frozen[name].flags.writeable = False
        with pytest.raises(ParameterError, match=f"{op.__name__}: {name} is read-only, expected"):
            prepared()
        for n, x in given.items():
            if isinstance(x, np.ndarray):
                assert frozen[n].tobytes() == x.tobytes()
        frozen[name].flags.writeable = True
        prepared()
        assert frozen[name].tobytes() != given[name].tobytes()


def overlapping(given, written, other, shift, xp):
    """The call on a machine, with what is written `shift` bytes behind the begin of another array,
    and the memory that both share."""
    starts = {written: max(shift, 0), other: max(-shift, 0)}
    memory = xp.zeros(sum(given[name].nbytes for name in starts) + 32, np.uint8)
    call = {n: xp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    for name, start in starts.items():  # what is read last, so that it is right
        x = given[name]
        call[name] = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
        call[name][...] = xp.asarray(x)
    return call, memory


IN_PLACE = {  # what may be what: a docstring says each
    (activation.add, "x", "y"),
    (adjust_logits.adjust, "out", "logits"),
    (norm.rms_norm, "out", "x"),
    *((paged_convert.convert, f"{x}_out", f"{x}_pool") for x in "kv"),
    *((paged_convert.convert, f"{x}_out_scales", f"{x}_scales") for x in "kv"),
}


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_written_shares_no_memory(xp, rng, op, arguments):
    """Each array that a call changes, against each other one: they begin together, or overlap. The
    same elements are refused too, unless the op takes them and then does as with arrays of its own.
    """
    given, written = with_outputs(op, arguments, rng)
    if op is paged_convert.convert:  # its pools may be the same array if their pages differ
        given["check"] = True
    for name in written:
        others = [n for n, x in given.items() if isinstance(x, np.ndarray) and x.size and n != name]
        for other in others:
            x = given[other]
            shifts = [0] + [16] * (x.nbytes > 16) + [-16] * (given[name].nbytes > 16)
            for shift in shifts:
                call, memory = overlapping(given, name, other, shift, xp)
                before = to_numpy(memory).copy()
                if shift == 0 and (op, name, other) in IN_PLACE:
                    alone = copies(given) | {name: x.copy()}
                    want = {
                        n: xp.asarray(a) if isinstance(a, np.ndarray) else a
                        for n, a in alone.items()
                    }
                    op(**want)
                    op(**call)
                    assert_same_bits(call[name], want[name])
                    continue
                with pytest.raises(ParameterError, match=" shares memory with ") as caught:
                    op(**call)
                assert {name, other} <= set(re.findall(r"\w+", str(caught.value)))
                assert_same_bits(memory, before)


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_no_number_is_warned_of(rng, op, arguments, value):
    """On the host as little as on a GPU: where warnings are errors, a row would fail a call."""
    given = filled(arguments, rng, np)
    for x in given.values():
        if isinstance(x, np.ndarray) and x.dtype.kind in "fV" and x.dtype.itemsize > 1:
            with np.errstate(over="ignore"):
                x.reshape(-1)[::2] = np.array(value).astype(x.dtype)
    with suppress(PykvError):  # some ops refuse the values
        op(**given)


def test_a_read_only_workspace_is_refused(xp, rng):
    """Which is written on a GPU alone, and no output."""
    kept = xp.zeros(1 << 16, np.float32)
    if xp is np:
        kept.flags.writeable = False
    else:
        kept = as_read_only(kept)
    with pytest.raises(ParameterError, match="decode: workspace is read-only, expected"):
        paged_decode.decode(**filled(dict(OPS)[paged_decode.decode], rng, xp), workspace=kept)


@pytest.mark.parametrize("op", [paged_decode.decode, prefill.prefill, attention_scores.score])
def test_scores_at_the_limits_of_their_options(xp, op):
    """A kernel gives what the reference does, which multiplies in another order."""
    given, on_host = (filled(dict(OPS)[op], np.random.default_rng(5), x) for x in (xp, np))
    for options in (
        dict(logits_soft_cap=1e-5),
        dict(scale=-1e15),
        dict(scale=1e15, logits_soft_cap=1e15),
        dict(scale=1e15, logits_soft_cap=1e-5),
    ):
        got, want = to_numpy(op(**given | options)), op(**on_host | options)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    with pytest.raises(ParameterError, match=r"scale is 2e\+16, expected -1e\+15 to 1e\+15"):
        op(**given, scale=2e16)


NOT_FINITE = (np.inf, 1e39, 10**400)  # as a float32
OUT_OF_RANGE = {
    **dict.fromkeys(("offset", "scale"), NOT_FINITE),
    "logits_soft_cap": (*NOT_FINITE, 0, -1.0, 9e-6, 2e15),
    "eps": (*NOT_FINITE, 0, -1.0, 1e-60),
    **dict.fromkeys(("window", "width", "page_size"), (0, -1)),
    "fixed_split": (0, -1, 33),
}
PASSED_ON = ("scale", "window", "logits_soft_cap")  # by prefill_contiguous


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_options_out_of_range_are_refused(xp, op, arguments):
    given = {
        name: xp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()
    }
    names = inspect.signature(op).parameters
    for name in PASSED_ON if "options" in names else OUT_OF_RANGE.keys() & names.keys():
        for x in OUT_OF_RANGE[name]:
            with pytest.raises(PykvError, match=f": {name} "):
                op(**{**given, name: x})


@pytest.mark.parametrize("op", [attention_scores.score, paged_decode.decode, prefill.prefill])
def test_options_that_equal_those_that_passed_are_refused(rng, op):
    """What was checked once is kept; 1.0 and True are equal to 1."""
    arguments = filled(dict(OPS)[op], rng, np)
    op(**arguments, window=1, scale=1)
    for name, x in (("window", 1.0), ("window", True), ("scale", True)):
        with pytest.raises(DtypeError, match=f": {name} is a {type(x).__name__}, expected a "):
            op(**arguments | {"window": 1, "scale": 1, name: x})
