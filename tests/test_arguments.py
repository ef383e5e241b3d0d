"""Wrong arguments of every public function raise typed errors that name the argument, before
anything is launched or written."""

import inspect
import re
import warnings

import numpy as np
import pytest

from pykv.errors import DeviceError, PykvError
from tests.public import CALLS, call_of
from tests.wrong_values import OUTPUTS, accepted, kind_of, wrong_values

SEEN = {}


def state(thing, depth=4):
    """All that an object holds, to be compared."""
    if hasattr(thing, "shape") and hasattr(thing, "strides"):
        x = np.asarray(thing.get() if hasattr(thing, "get") else thing)
        return x.shape, x.tobytes()
    if isinstance(thing, (list, tuple)):
        return [state(x, depth) for x in thing]
    if isinstance(thing, dict):
        return {key: state(x, depth) for key, x in thing.items()}
    if type(thing).__module__.startswith("pykv.") and hasattr(thing, "__dict__") and depth:
        return state(vars(thing), depth - 1)
    return thing


def base_of(name, xp):
    """A call with its outputs given, too."""
    function, given = call_of(name, xp)
    names = inspect.signature(function).parameters
    wanted = [n for n in names if n in OUTPUTS and n not in given and names[n].default is None]
    if wanted and name.startswith("ops."):
        options = dict(return_lse=True) if "return_lse" in names else {}
        found = function(**given, **options)
        parts = found if isinstance(found, tuple) else (found,)
        if found is not None:
            given |= dict(zip(wanted, parts))
    return function, given


def raised_by(function, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            function(**given)
        except Exception as error:
            return error
    return None


def violations(name, xp):
    function, base = base_of(name, xp)
    names = inspect.signature(function).parameters
    found = []
    error = raised_by(function, base)
    needs_gpu = isinstance(error, DeviceError)
    if error is not None and not needs_gpu:
        return [f"the valid call raises {error!r}"]
    for argument, parameter in names.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            continue
        if argument in ("op", "name") and "paged_check" in name:
            continue
        if argument in base:
            value = base[argument]
        else:
            value = None if parameter.default is parameter.empty else parameter.default
        must, may = wrong_values(argument, parameter, value)
        for wrong, has_to in [*((x, True) for x in must), *((x, False) for x in may)]:
            function, given = base_of(name, xp)
            given = given | {argument: wrong}
            held = getattr(function, "__self__", None)
            before = state([held, given])
            error = raised_by(function, given)
            what = f"{argument}={describe(wrong)}"
            if error is None:
                if has_to:
                    found.append(f"{what} passes")
                continue
            if not isinstance(error, PykvError):
                found.append(f"{what} raises {type(error).__name__}: {ascii(str(error))[:80]}")
            elif not named(argument, str(error), given, wrong) and not (needs_gpu and not has_to):
                found.append(f"{what}: {argument} is not named: {ascii(str(error))[:100]}")
            if state([held, given]) != before:
                found.append(f"{what}: changes something")
        for other in accepted(kind_of(argument, parameter, value), value):
            function, given = base_of(name, xp)
            error = raised_by(function, given | {argument: other})
            if error is not None and not needs_gpu:
                found.append(f"{argument}={describe(other)} raises {type(error).__name__}: {ascii(str(error))[:80]}")
    return found


def named(argument, text, given, wrong):
    names = [argument, *given] if hasattr(wrong, "shape") else [argument]
    return any(re.search(rf"\b{re.escape(x)}\b", text) for x in names)


def describe(x):
    if hasattr(x, "strides") and hasattr(x, "shape"):
        return f"{type(x).__name__}{x.shape} {x.dtype} {x.strides}"
    return f"{type(x).__name__} {ascii(x)[:30]}" if type(x) is not object else "object()"


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_refused(name):
    assert not violations(name, np)
