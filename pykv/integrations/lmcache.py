"""A serde of LMCache that stores keys and values as int8 or int4 codes.

LMCache's storage adapters pass chunks through a serde on their way to a disk or another machine.
`Serde` is its Serializer and Deserializer in one. `register()` registers two of them with LMCache,
as "pykv-int8" and "pykv-int4", for `"serde": {"type": "pykv-int8"}` of an adapter. Each row of D
elements becomes codes and a float16 scale, as in pykv.kinds: D + 2 bytes, or D / 2 + 2.

A serde learns neither the positions of a chunk's tokens nor their rotation; an object's key is a
hash. KVTC needs the positions, so it is not offered.

Interface: lmcache.v1.distributed.serde of LMCache 0.5, whose package requires torch for CUDA. Tests
call these classes through its documented signatures, without it; tools/try_lmcache.py runs them
inside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from pykv import kinds
from pykv.arrays import FLOATS, is_numpy
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError, quoted
from pykv.foreign import named_array
from pykv.integrations.tensors import place_of  # its error names the missing extra
from pykv.options import check_type, check_whole

from torch import is_tensor  # isort: skip

SCALE_BYTES = 2  # a float16


class Serde:
    """Codes of one kind for LMCache's memory objects; uses only their attribute `tensor`.

    Args:
        kind: "int8" or "int4".

    Raises:
        ParameterError: another kind.

    The codes of all rows come first, then their scales. A row is the last dimension: one head, or
    all heads, which then share a scale. Runs on the CPU, as LMCache's adapters do; tensors on other
    devices raise a DeviceError, on a GPU a DtypeError. Thread-safe.

    >>> Serde("int4").nbytes([(2, 4, 256, 1024)])  # K and V, layers, tokens, heads * D
    1052672
    """

    def __init__(self, kind: str):
        if kind not in ("int8", "int4"):
            raise ParameterError(f"lmcache.Serde: kind is {kind!r}, expected int8 or int4")
        self._kind = kinds.KINDS[kind]

    def serialize(self, src: Any, dst: Any, key: Any = None) -> int:
        """Write the codes of `src`, floats of any shape, to the bytes of `dst`; returns the number
        of bytes.

        Raises:
            DtypeError: `src` holds no floats, or `dst` no bytes.
            ShapeError: rows have an odd size.
            CapacityError: `dst` is smaller than `estimate_serialized_size`.
        """
        op = "lmcache.serialize"
        with _on_host(op, src, dst):
            x, out = (named_array(op, name, y.tensor) for name, y in (("src", src), ("dst", dst)))
            codes, scales = self._parts(op, "src", _bytes_of(op, "dst", out), x)
            rows = x.reshape(len(scales), x.shape[-1])
            codes[...], scales[...] = kinds.quantize(rows, self._kind)
        return int(codes.nbytes + scales.nbytes)

    def deserialize(self, src: Any, dst: Any, key: Any = None) -> None:
        """Fill `dst`, floats of the shape that was serialized, from the bytes of `src`.

        Raises:
            DtypeError: `src` holds no bytes, or `dst` no floats.
            CapacityError: `src` has too few bytes for the shape of `dst`.
            ShapeError: it has too many, or rows have an odd size.
        """
        op = "lmcache.deserialize"
        with _on_host(op, src, dst):
            x, out = (named_array(op, name, y.tensor) for name, y in (("src", src), ("dst", dst)))
            raw = _bytes_of(op, "src", x)
            codes, scales = self._parts(op, "dst", raw, out)
            used = codes.nbytes + scales.nbytes
            if raw.size != used:  # scales follow all codes, so their place depends on the size
                raise ShapeError(f"{op}: src has {raw.size} bytes, expected {used} for {out.shape}")
            out[...] = kinds.dequantize(codes, self._kind, scales).reshape(out.shape)

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """The exact bytes that objects of a MemoryLayoutDesc take."""
        return self.nbytes(layout_desc.shapes)

    def nbytes(self, shapes: Iterable[Any]) -> int:
        """Bytes that arrays of these shapes take.

        Raises:
            DtypeError: one is not a list of whole numbers.
            ParameterError, ShapeError: a size is negative, or rows have an odd size, or none.
        """
        check_type("lmcache.Serde", "shapes", shapes, Iterable, "a list of shapes")
        return sum(self._size("lmcache.Serde", "shapes", shape) for shape in shapes)

    def _size(self, op: str, name: str, shape: Any) -> int:
        if not isinstance(shape, tuple | list):
            raise DtypeError(f"{op}: {name} has {quoted(shape)}, expected a tuple of sizes")
        sizes = [check_whole(op, name, n, 0) for n in shape]
        if not sizes or sizes[-1] % 2 or not sizes[-1]:
            expected = "an even last dimension above 0"
            raise ShapeError(f"{op}: {name} has shape {tuple(sizes)}, expected {expected}")
        return math.prod(sizes[:-1]) * (self._kind.row_bytes(sizes[-1]) + SCALE_BYTES)

    def _parts(self, op: str, name: str, raw: Any, floats: Any) -> tuple[Any, Any]:
        """Views of codes [rows, W] and scales [rows] in the bytes `raw`, for an array of floats
        called `name`."""
        if floats.dtype not in FLOATS:
            expected = " or ".join(map(str, FLOATS))
            raise DtypeError(f"{op}: {name} has dtype {floats.dtype}, expected {expected}")
        shape = floats.shape
        size, rows = self._size(op, name, shape), math.prod(shape[:-1])
        if raw.size < size:
            raise CapacityError(f"{op}: {raw.size} bytes are given, expected {size} for {shape}")
        end = size - rows * SCALE_BYTES
        codes = raw[:end].view(self._kind.dtype).reshape(rows, self._kind.row_width(shape[-1]))
        return codes, raw[end:size].view(np.float16)


def _on_host(op: str, src: Any, dst: Any) -> Any:
    for name, x in (("src", src), ("dst", dst)):
        if not is_tensor(getattr(x, "tensor", None)):
            raise DtypeError(f"{op}: {name} has no tensor, expected a MemoryObj that holds one")
    return place_of(op, src=src.tensor, dst=dst.tensor)


def _bytes_of(op: str, name: str, array: Any) -> Any:
    if not is_numpy(array) or array.itemsize != 1 or not array.flags.c_contiguous:
        raise DtypeError(f"{op}: {name} is not of contiguous bytes on the host")
    return array.reshape(-1).view(np.uint8)


def register() -> None:
    """Register the kinds with LMCache, as "pykv-int8" and "pykv-int4". `max_workers` besides `type`
    in an adapter's "serde" is the number of threads. Further calls change nothing.

    Raises:
        ImportError: LMCache is not installed, or has no such interface.
        ParameterError: later, if an adapter passes an unknown option.
    """
    from lmcache.v1.distributed.serde import async_processor, factory

    known = factory.get_registered_serde_types()
    for kind in ("int8", "int4"):

        def make(words: dict[str, Any], kind: str = kind) -> Any:
            if unknown := words.keys() - {"max_workers"}:
                names = ", ".join(sorted(unknown))
                raise ParameterError(f"lmcache: {names} unknown, expected max_workers")
            serde, workers = Serde(kind), words.get("max_workers", 1)
            workers = check_whole("lmcache", "max_workers", workers, 1)
            return async_processor.AsyncSerdeProcessor(serde, serde, max_workers=workers)

        if f"pykv-{kind}" not in known:  # LMCache refuses to register a name twice
            factory.register_serde_factory(f"pykv-{kind}", make)
