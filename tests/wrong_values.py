"""Wrong values for an argument, by its annotation and by a value that passes."""

import decimal
import math
import re

import numpy as np

from pykv.layout import BlockShape, Layout
from pykv.plan import Preference

_THING = object()
_ROWS, _LONG = np.ones((2, 2)), "x" * 2000  # of which errors quote a part, on one line
_VIEW = memoryview(np.ones((2, 2)))  # with a shape and strides, but no array
_TIME = np.timedelta64(1, "s")  # an integer to NumPy
_LAYOUTS = (Layout(3), Layout("x"), Layout("NHD", heads=3), Layout("NHD", layers=("a", "b")))
_LAYOUTS += (Layout("NHD", heads=(0.5, 1)), Layout("NHD", token_stride="x"))
_LAYOUTS += (Layout("NHD", head_stride=-1), Layout("universal", token_stride=8))
_SHAPES = (BlockShape(*"HLOPDi"), BlockShape(1, 1, 1, 1.5, 8, 2), BlockShape(1, 1, 1, -1, 8, 2))
_SHAPES += (BlockShape(1, 1, 1, 1, 8, 3), BlockShape(1, 1, 1, 1, 8, None))
_PREFERENCES = (Preference("x"), Preference(1.5), Preference(-1), Preference(None, 3))

# What must be refused, and what may be refused or pass.
WRONG = {
    "array": (([1, 2], 3, "text", np.float32(1), _THING, b"12345678", _VIEW, np.float32), ()),
    "arrays": ((3, "text", [_THING], [3], ["x"], _THING), ([],)),
    "stream": ((_THING, "text", 1.5, [1], True, 2**70, -1, _TIME), ()),
    "xp": ((3, "numpy", math, _THING, None, np.ones(2), np.ones(0)), ()),
    "dtype": (("x", int, _THING, 3, np.float64, "float64", ["f4"], _ROWS, _LONG), ()),
    "int": (
        ("x", 2.0, b"1", [1, 2], _THING, 1j, math.nan, True, np.float32(2), np.ones(2), _TIME),
        (0, -1, 2**31, 2**62, -(2**62), 2**70, -(2**70), 10**5000),
    ),
    "float": (
        (
            "x",
            b"1",
            [1.0, 2.0],
            _THING,
            1j,
            math.nan,
            True,
            np.ones(2),
            decimal.Decimal(1),
            np.float16("inf"),
            _TIME,
        ),
        (0.0, -1.0, math.inf, -math.inf, 1e308, 1e39, 5e-324, 10**400, -(10**5000)),
    ),
    "bool": ((2, "x", [1], _THING, math.nan, _ROWS, _LONG, 1.0), ()),
    "word": ((3, b"x", ["x"], _THING, _ROWS, _LONG, "no such word"), ()),
    "text": ((10**6, ["x"], _THING, np.ones(2)), ("", "no such word", "\ud800", "a\nb")),
    "KVSpec": ((3, "no such kind", np.float16, _THING, b"fp16", ["fp16"], "int8:fp32:fp16"), ()),
    "list": (
        (3, "ab", [1.5, 2], [None, 1], ["x", "y"], _THING, [2**70, 1], [[1], [2]], [1, 2j])
        + (np.array(3),),
        ([-1, 1], [1, True], [2**31, 1], [2**62, 1], [-(2**62), 1], [-(2**70), 1], []),
    ),
    "lists": ((3, "ab", [3], [[1.5]], [["x"]], _THING, [[2**70]]), ([[-1]], [[2**31]], [[]], [])),
    "pair": ((3, "ab", (1,), (1, 2, 3), ("a", "b"), (0.5, 1), _THING), ((0, -1), (0, 2**70))),
    "shape": (("ab", (1.5,), ("x",), _THING, (2**70,), (-1,), 2.5), (3, (), (0,), (2**62,))),
    "function": ((3, "x", _THING), ()),
    "Layout": ((3, "x", _THING, [1], *_LAYOUTS), ()),
    "BlockShape": ((3, "x", _THING, [1], (1, 2), *_SHAPES), ()),
    "Preference": ((3, "x", _THING, [1], *_PREFERENCES), ()),
    "object": ((3, "x", _THING, [1], (1, 2)), ()),
    "stop": ((3, [1], _THING, ("a", 1), b"x"), ("", ("",), "\ud800")),
}

_TEXTS = "text path out model salt folder".split()  # any text passes
_DTYPES = "dtype element cache_element scale_dtype q_dtype".split()
# Sizes of what a call makes: 2^31 would fill the memory.
_MAKES = "num_pages pages max_blocks width N P H layers count nbytes".split()
_OF_ANY_ARRAY = re.compile(  # ops that take any rank, strides or bytes
    r"elastic\.compaction\.|kinds\.|kvtc\.|arrays\.|transfer\.|ops\.(permute|block_copy)\.|"
    r".*hadamard_transform|.*frequencies"
)


def is_array(x):
    return isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "strides")


def kind_of(name, parameter, value):
    """The key of WRONG for a parameter, of which a value passes."""
    annotation = str(parameter.annotation)
    words = set(re.findall(r"\w+", annotation))
    if name in ("stream", "xp"):
        return name
    if name in _DTYPES and "str" not in words:
        return "dtype"
    if isinstance(value, list) and value and is_array(value[0]):
        return "arrays"
    if is_array(value) or (words == {"Any"} and value is None):
        return "array"
    if name == "stop" and "str" in words:
        return name
    if "Mapping" in words and "Sequence[int]" in annotation:
        return "list"  # token ids, or messages
    if "Mapping" in words or "SamplingParams" in words:
        return "object"
    if words & {"Ids", "Sequence", "Several", "list"}:
        return "lists" if annotation.count("list[") + annotation.count("Sequence[") > 1 else "list"
    if "float | tuple[" in annotation:  # one, or one for each layer
        return "float"
    if "tuple" in words or "Range" in words:
        return "shape" if name == "shape" else "pair"
    if "Callable" in words:
        return "function"
    for word in ("KVSpec", "Layout", "BlockShape", "Preference", "bool", "float", "int"):
        if word in words:
            return word
    if words == {"Any"}:
        return "int" if isinstance(value, int) else "object"
    if words & {"str", "PathLike"}:
        return "text" if name in _TEXTS else "word"
    return "object"


def wrong_values(call, name, parameter, value):
    """Of argument `name` of a call: values that must be refused, and values that may be."""
    kind = kind_of(name, parameter, value)
    must, may = map(list, WRONG[kind])
    if name in _MAKES:
        may = [x for x in may if type(x) is not int or x != 2**31]
    if name == "size":  # the size of memory that would be read
        must, may = [x for x in must if not isinstance(x, list)], [-1, -(2**70), 2**70]
    if name in ("threshold", "fill"):  # may be infinite
        must = [x for x in must if not (isinstance(x, np.floating) and np.isinf(x))]
    if name.endswith("_ptrs"):  # may be a list
        must = [x for x in must if not isinstance(x, list)]
    may.append(None)
    if "None" not in str(parameter.annotation) and parameter.default is not None:
        must.append(None)
    takes_any = _OF_ANY_ARRAY.match(call)
    if "str" in re.findall(r"\w+", str(parameter.annotation)) and kind in ("list", "lists"):
        must = [x for x in must if not isinstance(x, str)]  # a prompt may be a text
    if takes_any:
        must = [x for x in must if not is_array(x)]  # np.float32(1) may be a scale
    if is_array(value):
        unlike = _unlike(value, strided=name.endswith("scales"))
        of_any = name == "blocks"  # any floats
        (may if takes_any else must).extend(
            x for x in unlike if not of_any or x.dtype != np.float64
        )
        may.extend(_other(value))
    return must, may


def _unlike(x, strided):
    """Arrays of another rank or element type, or unless `strided`, of rows with gaps."""
    yield x[..., None]
    yield x[0]
    yield x.astype(np.float64 if x.dtype != np.float64 else np.float32)
    if isinstance(x, np.ndarray):
        yield x.astype(object)
        yield x.astype(complex)
        yield np.ma.masked_array(x)
        if x.itemsize > 1:
            yield x.astype(x.dtype.newbyteorder())
        if x.shape[-1] > 1 and not strided:
            yield np.repeat(x, 2, -1)[..., ::2]


def _other(x):
    """Arrays of another size, or none; reversed; at addresses that are no multiples of elements."""
    if not isinstance(x, np.ndarray):
        return
    for axis in range(x.ndim):
        before = (slice(None),) * axis
        yield np.concatenate([x, x], axis)
        yield x[(*before, slice(0, 0))]
        yield x[(*before, slice(0, 1))]
        yield x[(*before, slice(None, None, -1))]
    odd = np.ndarray(x.shape, x.dtype, bytearray(x.nbytes + 1), 1)
    odd[...] = x
    yield odd


def other_spellings(kind, name, value):
    """A value as other packages have it, which must pass."""
    if kind == "int" and type(value) is int:
        narrow = [np.uint8(value)] if 0 <= value < 256 else []  # not of -1, which would become 255
        one = [np.array(value)] if name != "size" else []  # of memory: an array of sizes
        return [*narrow, np.int32(value), np.int64(value), np.uint64(value), *one]
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return [np.float32(value), np.float64(value)]
    if kind == "bool" and isinstance(value, bool):
        return [np.bool_(value)]
    return []
