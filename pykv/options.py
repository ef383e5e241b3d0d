"""Checks of an op's plain arguments: objects, numbers, flags and words.

Each takes the op's and the argument's name, for errors, and returns the value as kernels have it:
callers go on with that one, as NumPy's own numbers wrap around where Python's grow.
"""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Collection
from dataclasses import fields
from numbers import Real
from typing import Any

import numpy as np

from pykv.arrays import FLOATS, is_numpy
from pykv.errors import DtypeError, ParameterError, a_type, quoted
from pykv.terminal import meant

_BOOLS = {bool, np.bool_}
_LARGEST_SIZE = 2**63 - 1  # upper bound of every size and count
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
_BY_TYPE: dict[type, np.dtype[Any]] = {dtype.type: dtype for dtype in FLOATS}


def check_type(op: str, name: str, value: Any, types: Any, expected: str = "") -> None:
    """Check the class of an object.

    Args:
        types: a class, or several as `isinstance` takes them.
        expected: what it should be, in words; "a" and the name of the class where empty.

    Raises:
        DtypeError: it is of another class.
    """
    if not isinstance(value, types):
        expected = expected or f"a {types.__name__}"
        raise DtypeError(f"{op}: {name} is {a_type(value)}, expected {expected}")


def hold_python_numbers(record: Any) -> None:
    """Make Python's numbers of NumPy's, and of arrays without dimensions, in the fields of a
    dataclass and tuples there: -np.uint8(1) is 255."""
    for field in fields(record):
        value = getattr(record, field.name)
        if (held := _as_python(value)) is not value:
            object.__setattr__(record, field.name, held)


def _as_python(value: Any) -> Any:
    if isinstance(value, np.generic) or (is_numpy(value) and value.ndim == 0):
        return value.item()
    return tuple(map(_as_python, value)) if type(value) is tuple else value


def check_whole(op: str, name: str, value: Any, least: int, most: int = _LARGEST_SIZE) -> int:
    """Check a size, a count or an index, and return it as an int.

    Raises:
        DtypeError: it is no integer; a bool is none.
        ParameterError: it is below `least` or above `most`.
    """
    whole: int = value
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            whole = operator.index(value)
        except TypeError:
            raise DtypeError(f"{op}: {name} is {a_type(value)}, expected a whole number") from None
    if not least <= whole <= most:
        is_open = most == _LARGEST_SIZE and whole < least
        bounds = f"at least {least}" if is_open else f"{least} to {most}"
        raise ParameterError(f"{op}: {name} is {quoted(whole)}, expected {bounds}")
    return whole


def check_number(
    op: str,
    name: str,
    value: Any,
    *,
    positive: bool = False,
    infinite: bool = False,
    least: float = -_LARGEST,
    most: float = _LARGEST,
) -> float:
    """Check a number that kernels have in float32, and return it as a float.

    Raises:
        DtypeError: it is no number; a bool is none.
        ParameterError: it is not finite in float32 (infinities pass if `infinite`), below `least`
            or above `most`, or, if `positive`, not above 0 there.
    """
    if not isinstance(value, Real) or isinstance(value, bool | np.timedelta64):
        raise DtypeError(f"{op}: {name} is {a_type(value)}, expected a number")
    if isinstance(value, np.generic):  # else comparing would round the bounds to its dtype
        value = value.item()
    number: Any = value
    if infinite and abs(number) == math.inf:
        return float(number)
    if least <= number <= most and (number > _SMALLEST / 2 or not positive):
        return float(number)
    expected = f"a {'positive ' * positive}{'finite ' * (not infinite)}number of float32"
    if least > -_LARGEST:
        expected = f"{least:g} to {most:g}"
    elif most < _LARGEST:
        expected = f"a {'positive ' * positive}number up to {most:g}"
    raise ParameterError(f"{op}: {name} is {quoted(value)}, expected {expected}")


def check_flag(op: str, name: str, value: Any) -> bool:
    """Check what is True or False, as which 1 and 0 pass, and return it as a bool.

    Raises:
        DtypeError: it is something else.
    """
    if value is True or value is False:
        return value
    if not isinstance(value, (int, np.bool_)) or value not in (0, 1):
        raise DtypeError(f"{op}: {name} is {quoted(value)}, expected True or False")
    return bool(value)


def chosen(variable: str, *choices: str) -> str:
    """The value of a variable of the environment; empty if it is not set, or is none of `choices`.
    The latter is only warned of, as no program shall fail to import for it."""
    value = os.environ.get(variable, "")
    if not value or value in choices:
        return value
    warnings.warn(f"{variable} is {quoted(value)}, expected {' or '.join(choices)}", stacklevel=3)
    return ""


def check_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Check a word.

    Raises:
        ParameterError: it is none of `choices`.
    """
    if not isinstance(value, str) or value not in choices:
        near = meant(value, choices) if isinstance(value, str) else ""
        expected = f"one of {', '.join(choices)}{near}"
        raise ParameterError(f"{op}: {name} is {quoted(value)}, expected {expected}")
    return value


def check_float_dtype(
    op: str, name: str, value: Any, dtypes: Collection[np.dtype[Any]] = FLOATS
) -> np.dtype[Any]:
    """Check what names an element type, and return that.

    Raises:
        DtypeError: it is none of `dtypes`; None is none.
    """
    known = _BY_TYPE.get(value) if isinstance(value, type) else None
    if known is not None and known in dtypes:  # ten times faster than the general way below
        return known
    try:
        dtype: np.dtype[Any] | None = None if value is None else np.dtype(value)
    except (TypeError, ValueError, AttributeError):
        dtype = None
    if dtype is None or dtype not in dtypes:
        given = quoted(value) if dtype is None else dtype
        *others, last = map(str, dtypes)
        raise DtypeError(f"{op}: {name} is {given}, expected {', '.join(others)} or {last}")
    return dtype


def page_ids(op: str, name: str, pages: Any, least: int, most: int, *, first: int = 0) -> Any:
    """Page ids as [n] int64.

    Args:
        op, name: for messages, which count entries from `first` on.
        pages: a sequence or array of integers, none of them a bool or masked.
        least, most: page ids.

    Raises:
        ParameterError: it is no such sequence, or an id is out of its range.
    """
    expected = "a sequence of page ids"
    try:
        ids = np.asarray(pages)
    except Exception:  # sequences of several lengths; other libraries may raise anything
        ids, expected = np.empty((0, 0)), f"{expected} on the host"
    if ids.ndim == 1 and not ids.size:
        return ids.astype(np.int64)
    holds_bools = isinstance(pages, list | tuple) and not _BOOLS.isdisjoint(map(type, pages))
    is_masked = isinstance(pages, np.ma.MaskedArray)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or holds_bools or is_masked:
        raise ParameterError(f"{op}: {name} is {quoted(pages)}, expected {expected}")
    check_entries(op, name, ids, least, most, first=first)
    return ids.astype(np.int64)


def check_entries(
    op: str, name: str, values: Any, least: int, most: int, expected: str = "", *, first: int = 0
) -> None:
    """Check integers [n] of the host.

    Args:
        op, name: for messages, which count entries from `first` on.
        expected: what they should be, in words; that range where empty.

    Raises:
        ParameterError: one is below `least` or above `most`; the text names the first.
    """
    wrong = (values < least) | (values > most)
    if wrong.any():
        i, expected = int(np.argmax(wrong)), expected or f"{least} to {most}"
        raise ParameterError(f"{op}: {name}[{first + i}] is {values[i]}, expected {expected}")
