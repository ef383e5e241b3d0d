"""Read GGUF model files: metadata as Python values, tensors as views of the mapped file.

The header is parsed here because the `gguf` package makes NumPy views of every string in it:
opening takes 2.0 s with 49 152 tokens and 9.5 s with 262 144, here 0.03 s and 0.1 s. Its table of
tensor types and its dequantisers are used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pykv.errors import FormatError, UnsupportedError
from pykv.llm.gguf_cursor import Cursor

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_RANK = 4


class TensorType(NamedTuple):
    """A row is a whole number of blocks; each packs `elements` values into `size` bytes."""

    kind: str
    elements: int
    size: int


@cache
def tensor_types() -> dict[int, TensorType]:
    """The types of GGUF tensors by their code in files."""
    from gguf import GGML_QUANT_SIZES

    return {
        int(kind): TensorType(kind.name, elements, size)
        for kind, (elements, size) in GGML_QUANT_SIZES.items()
    }


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """One tensor of a file.

    `shape` is in NumPy's order: the last dimension is contiguous and is what blocks pack. `blocks`
    is [rows, row_bytes] uint8, read-only, a view of the mapped file; rows is the product of all
    dimensions but the last.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    blocks: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


@dataclass(frozen=True, eq=False)
class ModelFile:
    """An open model file; the mapping lives as long as this object or any tensor view does."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, default: Any = None, kind: type | tuple[type, ...] = object) -> Any:
        """The value of `key`, or `default`. FormatError if it is present but no `kind`."""
        value = self.metadata.get(key, default)
        if key in self.metadata and not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise FormatError(
                f"{self.path}: key {key} has {_brief(value)} ({type(value).__name__}), "
                f"expected {' or '.join(k.__name__ for k in kinds)}"
            )
        return value

    def require(self, key: str, kind: type | tuple[type, ...] = object) -> Any:
        """The value of `key`. FormatError if it is missing, or no `kind`."""
        if key not in self.metadata:
            raise FormatError(f"{self.path}: key {key} is missing")
        return self.get(key, kind=kind)

    def tensor(self, *names: str) -> TensorInfo:
        """The first tensor present among `names`. FormatError naming them all if none is."""
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise FormatError(f"{self.path}: tensor {' or '.join(names)} is missing")


def read(path: str | os.PathLike[str]) -> ModelFile:
    """Map a GGUF file and parse its header; tensor bytes are not touched.

    Raises:
        FormatError: the file is missing, cut short, or anything in it contradicts the format.
        UnsupportedError: a tensor type, a nested array or a split file that this reader lacks.
    """
    path = Path(path)
    cursor = Cursor.open(path)
    if (magic := cursor.take(4, "the magic")) != b"GGUF":
        raise FormatError(f"{path}: has magic {magic!r}, expected b'GGUF'")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        order = f" (version {swapped} in big-endian order)" if swapped in VERSIONS else ""
        raise FormatError(f"{path}: has GGUF version {version}{order}, expected 2 or 3")
    num_tensors = cursor.count("the tensor count", item_bytes=8 + 4 + 8 + 4 + 8)
    num_keys = cursor.count("the key count", item_bytes=8 + 4 + 1)

    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a key")
        if key in metadata:
            raise FormatError(f"{path}: key {key} occurs twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of key {key}"), f"key {key}")

    tensors = _tensors(cursor, num_tensors, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise UnsupportedError(f"{path}: is one of {parts} parts, expected a file joined to one")
    return ModelFile(path, version, metadata, tensors)


def _tensors(cursor: Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    """Parse the tensor table, and check that the tensors lie in the file side by side."""
    path, size = cursor.path, len(cursor.data)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(
            f"{path}: key general.alignment has {_brief(alignment)}, expected a power of two"
        )
    table = [_entry(cursor) for _ in range(count)]
    data_start = -(-cursor.at // alignment) * alignment
    mapped = np.frombuffer(cursor.data, np.uint8)
    tensors: dict[str, TensorInfo] = {}
    end_of_previous, previous = 0, ""
    for name, block, shape, offset in sorted(table, key=lambda entry: entry[3]):
        rows, row_bytes = prod(shape[:-1]), shape[-1] // block.elements * block.size
        start, nbytes = data_start + offset, rows * row_bytes
        if name in tensors:
            raise FormatError(f"{path}: tensor {name} occurs twice")
        if offset % alignment:
            raise FormatError(
                f"{path}: tensor {name} has offset {offset}, expected a multiple of {alignment}"
            )
        if start + nbytes > size:
            raise FormatError(
                f"{path}: tensor {name} ({block.kind} {shape}) has bytes {start} to "
                f"{start + nbytes}, the file has {size}"
            )
        if offset < end_of_previous:
            raise FormatError(f"{path}: tensor {name} overlaps tensor {previous}")
        end_of_previous, previous = offset + nbytes, name
        blocks = mapped[start : start + nbytes].reshape(rows, row_bytes)
        tensors[name] = TensorInfo(name, block.kind, shape, blocks)
    return {entry[0]: tensors[entry[0]] for entry in table}


def _entry(cursor: Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
    """One row of the tensor table: name, type, shape, offset in the data section."""
    path, name = cursor.path, cursor.string("a tensor's name")
    rank = cursor.number("I", f"the rank of tensor {name}")
    if not 1 <= rank <= MAX_RANK:
        raise FormatError(f"{path}: tensor {name} has rank {rank}, expected 1 to {MAX_RANK}")
    shape = tuple(reversed(cursor.numbers("Q", rank, f"the shape of tensor {name}")))
    code = cursor.number("I", f"the type of tensor {name}")
    if code not in tensor_types():
        raise UnsupportedError(f"{path}: tensor {name} has type {code}, which this reader lacks")
    block = tensor_types()[code]
    if 0 in shape or shape[-1] % block.elements:
        raise FormatError(
            f"{path}: tensor {name} has shape {shape}, expected no zero and "
            f"rows of a multiple of {block.elements} ({block.kind})"
        )
    return name, block, shape, cursor.number("Q", f"the offset of tensor {name}")


def describe(file: ModelFile) -> str:
    """What `pykv inspect` prints: metadata, tensors, and totals by kind."""
    tensors = list(file.tensors.values())
    sections: list[list[tuple[str, ...]]] = [
        [(_plain(key), _brief(value)) for key, value in file.metadata.items()],
        [
            (_plain(t.name), t.kind, " x ".join(map(str, t.shape)), f"{t.nbytes} bytes")
            for t in tensors
        ],
        [
            (kind, f"{len(of_kind)} tensors", f"{sum(t.nbytes for t in of_kind)} bytes")
            for kind in sorted({t.kind for t in tensors})
            for of_kind in [[t for t in tensors if t.kind == kind]]
        ],
    ]
    title = (
        f"{file.path}: GGUF version {file.version}, {len(file.metadata)} keys, "
        f"{len(tensors)} tensors of {sum(t.nbytes for t in tensors)} bytes"
    )
    return "\n\n".join([title, *(_table(rows) for rows in sections if rows)])


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _plain(name: str) -> str:
    """A name without control characters, which a terminal would obey."""
    return repr(name)[1:-1]


def _brief(value: Any) -> str:
    """A value in one short line."""
    if isinstance(value, list):
        shown = [_brief(item) for item in value[:4]] + ["..."] * (len(value) > 4)
        return f"[{len(value)}] {', '.join(shown)}"
    if isinstance(value, str) and len(value) > 60:
        return f"{value[:60]!r}... ({len(value)} characters)"
    return repr(value)
