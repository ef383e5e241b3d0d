"""Checks of an op's plain arguments: numbers, flags and words.

Each takes the op's and the argument's name, for errors, and returns the value as kernels have it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from numbers import Real
from typing import Any

import numpy as np

from pykv.arrays import FLOATS
from pykv.errors import DtypeError, ParameterError

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
_BY_TYPE: dict[type, np.dtype[Any]] = {dtype.type: dtype for dtype in FLOATS}


def check_whole(op: str, name: str, value: Any, least: int, most: int | None = None) -> int:
    """Check a size, a count or an index, and return it as an int.

    Raises:
        DtypeError: it is no integer; a bool is none.
        ParameterError: it is below `least` or above `most`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        given = type(value).__name__
        raise DtypeError(f"{op}: {name} is a {given}, expected a whole number") from None
    if whole < least or (most is not None and whole > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise ParameterError(f"{op}: {name} is {whole}, expected {bounds}")
    return whole


def check_number(
    op: str, name: str, value: Any, *, positive: bool = False, infinite: bool = False
) -> float:
    """Check a number that kernels have in float32, and return it as a float.

    Raises:
        DtypeError: it is no number; a bool is none.
        ParameterError: it is NaN, or, unless `infinite`, not finite in float32, or, if `positive`,
            not above 0 there.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if infinite and is_number and abs(value) == math.inf:
        return float(value)
    if is_number and (_SMALLEST if positive else -_LARGEST) <= value <= _LARGEST:
        return float(value)
    expected = f"expected a {'positive ' * positive}{'finite ' * (not infinite)}number"
    if is_number:
        raise ParameterError(f"{op}: {name} is {value}, {expected} of float32")
    raise DtypeError(f"{op}: {name} is a {type(value).__name__}, {expected}")


def check_flag(op: str, name: str, value: Any) -> bool:
    """Check what is True or False, as which 1 and 0 pass, and return it as a bool.

    Raises:
        DtypeError: it is something else.
    """
    if value is True or value is False:
        return value
    if not isinstance(value, (int, np.bool_)) or value not in (0, 1):
        raise DtypeError(f"{op}: {name} is {value!r}, expected True or False")
    return bool(value)


def check_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Check a word.

    Raises:
        ParameterError: it is none of `choices`.
    """
    if not isinstance(value, str) or value not in choices:
        raise ParameterError(f"{op}: {name} is {value!r}, expected one of {choices}")
    return value


def check_float_dtype(
    op: str, name: str, value: Any, dtypes: Collection[np.dtype[Any]] = FLOATS
) -> np.dtype[Any]:
    """Check what names an element type, and return that.

    Raises:
        DtypeError: it is none of `dtypes`; None is none.
    """
    known = _BY_TYPE.get(value) if isinstance(value, type) else None
    if known is not None and known in dtypes:  # a tenth of the time that what follows takes
        return known
    try:
        dtype: np.dtype[Any] | None = None if value is None else np.dtype(value)
    except (TypeError, ValueError, AttributeError):
        dtype = None
    if dtype is None or dtype not in dtypes:
        given = repr(value) if dtype is None else dtype
        *others, last = map(str, dtypes)
        raise DtypeError(f"{op}: {name} is {given}, expected {', '.join(others)} or {last}")
    return dtype
