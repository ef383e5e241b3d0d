"""Every exception of pykv.

    PykvError
      ShapeError        (ValueError)           a size, stride or alignment is wrong
      DtypeError        (TypeError)            an element type is wrong
      ParameterError    (ValueError)           a value is out of its range
      CapacityError     (MemoryError)          a pool, a context or a workspace is too small
      UnsupportedError  (NotImplementedError)  a legal request that nothing here covers
      DeviceError       (RuntimeError)         mixed devices, or no usable GPU
      CompileError      (RuntimeError)         NVRTC refused a kernel
      CudaError         (RuntimeError)         a driver call failed
      NumberError       (ArithmeticError)      a model computed NaN or infinities
      FormatError       (ValueError)           the bytes of a file are not what they claim
      FetchError        (RuntimeError)         a model could not be fetched
      TransportError    (RuntimeError)         another process died, is silent, or sent nonsense
      InstallError      (ModuleNotFoundError)  a package of one of pykv's extras is missing

Each has a second, built-in parent, so `except ValueError` works for people who do not know pykv.
Texts read `op: argument has X, expected Y`, on one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

_START, _END = 700, 200  # characters of a long text that are kept: what it is, and was to be
_ENTRIES = 80  # entries of an array above which errors have its dtype and shape
_BRACKETS: dict[Any, str] = {list.__repr__: "[]", tuple.__repr__: "()", dict.__repr__: "{}"}


def quoted(value: object, most: int = 80) -> str:
    """A value as errors quote it: its repr, which ends with "..." where it would be longer than
    `most` characters. What is not shown of lists and texts costs nothing.

    >>> from pykv.errors import quoted
    >>> quoted([1, "a"]), quoted(list(range(1000000)), 10), quoted({"x": 10**5000})
    ("[1, 'a']", '[0, 1, ...', "{'x': an integer of 16610 bits}")
    """
    text = ""
    for piece in _pieces(value, most):
        text += piece
        if len(text) > most:
            return f"{text[: most - 3]}..."
    return text


def a_type(value: object) -> str:
    """The type of a value as errors name it: "an int", "a list"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def _pieces(value: Any, most: int) -> Iterator[str]:
    """The repr of a value, part by part: whoever reads a few need not wait for the others."""
    written: Any = type(value).__repr__
    if written in (str.__repr__, bytes.__repr__):
        yield repr(value[: most + 1])
    elif written is int.__repr__ and value.bit_length() > 256:
        yield f"an integer of {value.bit_length()} bits"  # Python writes none of 5,000 digits
    elif written in _BRACKETS:
        brackets = _BRACKETS[written]
        yield brackets[0]
        for i, entry in enumerate(value.items() if written is dict.__repr__ else value):
            yield ", " * (i > 0)
            if written is dict.__repr__:
                key, entry = entry
                yield from _pieces(key, most)
                yield ": "
            yield from _pieces(entry, most)
        yield "," * (written is tuple.__repr__ and len(value) == 1) + brackets[1]
    elif _is_long(value):
        yield f"{value.dtype}{list(value.shape)}"
    else:
        yield repr(value)


def _is_long(value: Any) -> bool:
    """Whether it is an array, of any library, whose entries would not be seen."""
    shape = getattr(value, "shape", None)
    return isinstance(shape, tuple) and hasattr(value, "dtype") and math.prod(shape) > _ENTRIES


class PykvError(Exception):
    """Parent of every exception that pykv raises on purpose. A value that its text quotes may have
    lines, as arrays do, or be long: it is brought to one line of bounded length."""

    def __init__(self, text: str = "", **details: str) -> None:
        text = re.sub(r"\s*\n\s*", " ", text)
        if len(text) > _START + _END:
            text = f"{text[:_START]}...{text[-_END:]}"
        super().__init__(text, **details)


class ShapeError(PykvError, ValueError):
    """A size, stride or alignment is wrong."""


class DtypeError(PykvError, TypeError):
    """An element type is wrong."""


class ParameterError(PykvError, ValueError):
    """A value is out of its range."""


class CapacityError(PykvError, MemoryError):
    """A pool, a context or a workspace is too small for the request."""


class UnsupportedError(PykvError, NotImplementedError):
    """A legal request that no kernel or reader covers: a head size, an SM, a file's tensor type."""


class DeviceError(PykvError, RuntimeError):
    """Host and device arrays are mixed, or a GPU was needed and none is usable."""


class CompileError(PykvError, RuntimeError):
    """NVRTC refused a kernel; the text carries stem, SM, defines and the compiler's log, which is
    many lines."""

    def __init__(self, text: str) -> None:
        RuntimeError.__init__(self, text)


class CudaError(PykvError, RuntimeError):
    """A driver call failed; the text carries the call and the code."""


class NumberError(PykvError, ArithmeticError):
    """A model computed NaN or infinities; the text says what may help."""


class FormatError(PykvError, ValueError):
    """The bytes of a file or container are not what they claim to be."""


class FetchError(PykvError, RuntimeError):
    """A model could not be fetched; the text names the ways out."""


class TransportError(PykvError, RuntimeError):
    """Another process has died, does not answer, or its pages are not what they claim to be."""


class InstallError(PykvError, ModuleNotFoundError):
    """A package that one of pykv's extras brings is not installed; the text says how to get it."""
