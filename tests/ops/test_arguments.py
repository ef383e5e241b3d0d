"""No op answers an argument of a wrong kind with another error than one of pykv's own."""

import inspect

import numpy as np
import pytest

from pykv.errors import DtypeError, PykvError
from pykv.ops import attention_scores, paged_decode, prefill
from tests.ops.calls import OPS, filled


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_no_such_array_is_refused(xp, op, arguments):
    given = {
        name: xp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()
    }
    for name, array in given.items():
        if not hasattr(array, "shape"):
            continue
        other = np.float64 if array.dtype != np.float64 else np.float32
        wrong = [None, [1, 2], 3, "text", np.float32(1), object()]
        wrong += [array[..., None], array[0], array.astype(other)]
        for x in wrong:
            with pytest.raises(PykvError, match=f"{op.__name__}: "):
                op(**{**given, name: x})


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
    for name in PASSED_ON if "options" in names else WRONG.keys() & names:
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
