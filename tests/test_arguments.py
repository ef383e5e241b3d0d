"""Wrong arguments of every public function raise typed errors that name the argument, before
anything is launched or written."""

import inspect
import re
import warnings

import numpy as np
import pytest

import pykv
from pykv.errors import CapacityError, DeviceError, PykvError
from pykv.kinds import POOLS
from tests.helpers import to_numpy
from tests.public import CALLS, OPTIONS, call_of
from tests.wrong_values import is_array, kind_of, other_spellings, wrong_values

OUTPUTS = "out q_out table k_out v_out lengths lse out_lse".split()  # in the order of results
FREE = {  # values that no function can tell from right ones
    "arrays.asarray": "x",
    "arrays.from_pointer": "owner dtype",
    **{f"ops.paged_check.{name}": "op name" for name in "check_pages check_slots".split()},
    "ops.paged_check.check_starts": "op name",
    "ops.paged_check.check_positions": "op",
    "ops.paged_check.check_page_table": "op",
    "ops.paged_check.check_table": "op last_page_len",
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_refused(name):
    assert not list(violations(name, np))


@pytest.mark.simt
@pytest.mark.parametrize("xp", ["simt"], indirect=True)
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("ops.")])
def test_wrong_arguments_are_refused_for_kernels(xp, name):
    assert not list(violations(name, xp, with_limits=False))


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
            elif error is not None and not isinstance(error, PykvError):
                yield f"{what} raises {type(error).__name__}: {ascii(str(error))}"
            elif isinstance(error, (CapacityError, DeviceError)) and i >= len(must):
                continue
            elif error is not None and not any(re.search(rf"\b{x}\b", str(error)) for x in names):
                yield f"{what} is not named: {ascii(str(error))}"
            if error is not None and changed:
                yield f"{what} is refused, but something changed"
        for other in other_spellings(kind_of(argument, parameter, value), value):
            function, given = with_outputs(name, xp)
            error, _ = outcome(function, given | {argument: other})
            if error is not None and not needs_gpu:
                yield f"{argument}={described(other)} raises {error!r}"


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
    options = dict(return_lse=True) if "return_lse" in own else {}
    made = function(**given, **options)
    parts = made if isinstance(made, tuple) else (made,)
    return function, given | dict(zip(outputs, parts, strict=True))


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


def state(thing, depth=4):
    """All that a value holds, to be compared."""
    if is_array(thing):
        return thing.shape, to_numpy(thing).tobytes()
    if isinstance(thing, (list, tuple)):
        return [state(x, depth) for x in thing]
    if isinstance(thing, dict):
        return {key: state(x, depth) for key, x in thing.items()}
    of_cache = type(thing).__module__.startswith("pykv.") and not isinstance(thing, pykv.LLM)
    if of_cache and hasattr(thing, "__dict__") and depth:
        return state(vars(thing), depth - 1)
    return thing if isinstance(thing, (int, float, str, bytes)) else id(thing)


def described(x):
    if isinstance(x, np.ndarray):
        return f"array {x.dtype}{list(x.shape)}, strides {x.strides}"
    return f"{type(x).__name__} {ascii(x)[:40]}"
