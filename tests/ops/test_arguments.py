"""Options and outputs that ops must refuse; tests/test_arguments.py has what holds of all calls."""

import inspect
from contextlib import suppress

import numpy as np
import pytest

from pykv.arrays import as_read_only
from pykv.errors import DtypeError, ParameterError, PykvError
from pykv.ops import attention_scores, kv_select, paged_decode, prefill
from tests.ops.calls import OPS, filled

OUTPUTS = ("out", "lse", "out_lse", "q_out", "table", "lengths", "sums", "k_out", "v_out")
OUTPUTS += ("min_vals", "max_vals", "kept", "vectors", "rows", "old", "budgets")


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_written_may_not_be_read_only(rng, op, arguments):
    """Every array that a call changes, outputs that are not given among them; refused before any
    is written."""
    names = inspect.signature(op).parameters
    given = filled(arguments, rng, np)
    if "advance" in names:
        given["advance"] = True
    result = op(
        **{name: np.copy(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    )
    results = result if isinstance(result, tuple) else (result,)
    optional = [name for name, x in names.items() if x.default is None and name not in given]
    missing = [name for name in OUTPUTS if name in optional]
    given |= {name: np.full_like(x, 7) for name, x in zip(missing, results, strict=False)}

    def copies():
        return {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in given.items()}

    after = copies()
    before = {n: x.copy() for n, x in after.items() if isinstance(x, np.ndarray)}
    op(**after)
    written = [n for n, x in before.items() if after[n].tobytes() != x.tobytes()]
    assert written
    for name in written:
        frozen = copies()
        frozen[name].flags.writeable = False
        with pytest.raises(ParameterError, match=f"{op.__name__}: {name} is read-only, expected"):
            op(**frozen)
        for n, x in given.items():
            if isinstance(x, np.ndarray):
                assert frozen[n].tobytes() == x.tobytes()


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_no_number_is_warned_of(rng, op, arguments, value):
    """On the host as little as on a GPU: where warnings are errors, a row would fail a call."""
    given = filled(arguments, rng, np)
    for x in given.values():
        if isinstance(x, np.ndarray) and x.dtype.kind in "fV" and x.dtype.itemsize > 1:
            with np.errstate(over="ignore"):
                x.reshape(-1)[::2] = np.array(value).astype(x.dtype)
    with suppress(PykvError):  # which some refuse
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


NO_NUMBERS = ("1", [1], np.ones(2), 1j)
WRONG_NUMBERS = (*NO_NUMBERS, True, np.nan, np.inf, 1e39, 10**400)
WRONG_SIZES = (*NO_NUMBERS, True, 4.0, np.float32(4), np.nan, 0, -1)
WRONG_FLAGS = (*NO_NUMBERS, None, "no", 2, 1.0)
WRONG_WORDS = ("other", 1, None, True, ["half"], np.ones(2))
WRONG = {
    **dict.fromkeys(("scale", "offset"), WRONG_NUMBERS),
    **dict.fromkeys(("logits_soft_cap", "eps"), (*WRONG_NUMBERS, 0, -1.0, 1e-60)),
    **dict.fromkeys(("window", "width", "page_size"), WRONG_SIZES),
    "fixed_split": (*WRONG_SIZES, 33),
    **dict.fromkeys(("causal", "advance", "accumulate", "hadamard"), WRONG_FLAGS),
    **dict.fromkeys(("pairing", "lse_base", "gemm", "counts", "layout", "kind"), WRONG_WORDS),
    "dtype": ("float64", "x", int, None, object()),
}
PASSED_ON = ("scale", "window", "logits_soft_cap", "causal")  # by prefill_contiguous


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_wrong_options_are_refused(xp, op, arguments):
    given = {
        name: xp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()
    }
    names = inspect.signature(op).parameters
    options = WRONG.keys() & names.keys()
    if op is kv_select.select:
        options -= {"counts"}  # an array
    for name in PASSED_ON if "options" in names else options:
        for x in WRONG[name]:
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
