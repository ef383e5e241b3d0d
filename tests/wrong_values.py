"""Wrong values for an argument, by its annotation and by a value that passes."""

import decimal
import inspect
import math
import re

import numpy as np

OUTPUTS = "out q_out table k_out v_out lse lengths out_lse".split()
TEXTS = "text path model op name".split()  # any text passes
DTYPES = "dtype element cache_element scale_dtype q_dtype".split()
MAKES = "num_pages pages max_blocks width N P H".split()  # 2^31 of them would fill the memory

_THING = object()
_NO_ARRAY = ([1, 2], 3, "text", np.float32(1), _THING, b"12345678")
WRONG = {  # words of an annotation: what must be refused, and what may be refused or pass
    "array": (_NO_ARRAY, ()),
    "stream": ((_THING, "text", 1.5, [1], True, 2**70, -1), ()),
    "xp": ((3, "numpy", None, math, _THING), ()),
    "dtype": (("x", int, _THING, 3, np.float64, "float64", ["f4"]), ()),
    "int": (
        ("x", 2.5, b"1", [1, 2], _THING, 1j, math.nan, True, np.float32(2), np.ones(2)),
        (0, -1, 2**31, 2**62, -(2**62), 2**70, -(2**70)),
    ),
    "float": (
        ("x", b"1", [1.0, 2.0], _THING, 1j, math.nan, True, np.ones(2), decimal.Decimal(1)),
        (0.0, -1.0, math.inf, -math.inf, 1e308, 1e39, 5e-324, 10**400, -(10**400)),
    ),
    "bool": ((2, "x", [1], _THING, math.nan, np.ones(2), 1.0), ()),
    "str": ((3, b"x", ["x"], _THING, np.ones(2), "no such word"), ()),
    "text": ((3, ["x"], _THING, np.ones(2)), ("", "no such word", "\ud800", "a\nb")),
    "KVSpec": ((3, "no such kind", np.float16, _THING, b"fp16", ["fp16"], "int8:fp32:fp16"), ()),
    "list": (
        (3, "ab", [1.5], [None], ["x"], _THING, [2**70], [[1]], [True]),
        ([-1], [2**31], [2**62], [-(2**62)], [-(2**70)], []),
    ),
    "lists": ((3, "ab", [3], [[1.5]], [["x"]], _THING, [[2**70]]), ([[-1]], [[2**31]], [[]], [])),
    "arrays": ((3, "text", [_THING], [3], ["x"], _THING), ([],)),
    "pair": ((3, "ab", (1,), (1, 2, 3), ("a", "b"), (0.5, 1), _THING), ((0, -1), (5, 2), (0, 2**70))),
    "shape": (("ab", (1.5,), ("x",), _THING, (2**70,), (-1,), 2.5), (3, (), (0,), (2**62,))),
    "function": ((3, "x", _THING), ()),
    "object": ((3, "x", _THING, [1], (1, 2)), ()),
}


def kind_of(name, parameter, value):
    """The key of WRONG for a parameter, and a value of it that passes."""
    words = set(re.findall(r"\w+", str(parameter.annotation)))
    if name in ("stream", "xp"):
        return name
    if name in DTYPES and "str" not in words:
        return "dtype"
    if hasattr(value, "shape") or (words == {"Any"} and value is None):
        return "array"
    if isinstance(value, list) and value and hasattr(value[0], "shape"):
        return "arrays"
    if words & {"Ids", "Sequence", "list"}:
        return "lists" if str(parameter.annotation).count("list") > 1 else "list"
    if "KVSpec" in words:
        return "KVSpec"
    if "tuple" in words or "Range" in words:
        return "shape" if name == "shape" else "pair"
    if "Callable" in words:
        return "function"
    for word in ("bool", "float", "int"):
        if word in words:
            return word
    if words == {"Any"} and isinstance(value, int):
        return "int"
    if words & {"str", "PathLike"} and "Layout" not in words:
        return "text" if name in TEXTS else "str"
    return "object"


def wrong_values(name, parameter, value):
    """Values that must be refused, and values that may be."""
    kind = kind_of(name, parameter, value)
    must, may = WRONG[kind]
    if name in MAKES:
        may = [x for x in may if type(x) is not int or x != 2**31]
    if name == "size":  # of memory that would be read
        may = [x for x in may if x < 1]
    may = list(may) + [None]
    if parameter.default is inspect.Parameter.empty and "None" not in str(parameter.annotation):
        must = [*must, None]
    if isinstance(value, np.ndarray) and value.dtype.kind == "u" and value.ndim == 1:
        must = [x for x in must if not isinstance(x, list)]  # addresses may be a list
    if kind == "array" and hasattr(value, "shape"):
        must = [*must, *_wrong_arrays(value)]
        may += _other_arrays(value)
    return must, may


def _wrong_arrays(x):
    """Of another rank or element type; with rows that are not contiguous."""
    yield x[..., None]
    yield x[0]
    yield x.astype(np.float64 if x.dtype != np.float64 else np.float32)
    if isinstance(x, np.ndarray):
        yield x.astype(object)
        yield x.astype(complex)
        if x.itemsize > 1:
            yield x.astype(x.dtype.newbyteorder())
    if x.shape[-1] > 1:
        yield np.repeat(x, 2, -1)[..., ::2] if isinstance(x, np.ndarray) else x[..., ::-1]


def _other_arrays(x):
    """Of another size, or none; reversed; at addresses that are no multiples of elements."""
    for axis in range(x.ndim):
        longer = [2 if i == axis else 1 for i in range(x.ndim)]
        yield (np.tile(x, longer) if isinstance(x, np.ndarray) else x.repeat(2, axis))
        yield x[(slice(None),) * axis + (slice(0, 0),)]
        yield x[(slice(None),) * axis + (slice(None, None, -1),)]
        yield x[(slice(None),) * axis + (slice(0, 1),)]
    if isinstance(x, np.ndarray):
        yield np.ndarray(x.shape, x.dtype, bytearray(x.nbytes + 1), 1)


def accepted(kind, value):
    """The same value as other packages have it."""
    if kind == "int" and type(value) is int:
        return [np.int32(value), np.int64(value), np.uint64(value)]
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return [np.float32(value), np.float64(value)]
    if kind == "bool" and isinstance(value, bool):
        return [np.bool_(value), int(value)]
    return []
