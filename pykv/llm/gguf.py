"""Read GGUF model files: metadata as Python values, tensors as bytes that are read when asked for.

The header is parsed here because the `gguf` package makes NumPy views of every string in it:
opening takes 2.0 s with 49 152 tokens and 9.5 s with 262 144, here 0.03 s and 0.1 s. Its table of
tensor types and its dequantisers are used. Tensors are read, not mapped: of a mapped file that
somebody cuts short the next access ends the process (SIGBUS). The header is mapped, for the
fraction of a second in which it is parsed.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pykv.errors import FormatError
from pykv.llm.gguf_cursor import Cursor, plain, stamp
from pykv.number_texts import counted
from pykv.terminal import visible

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_RANK = 4
# First bytes of other files that people take for models.
OTHERS = {
    b"vers": "a pointer of Git LFS: `git lfs pull` fetches the file itself",
    b"GGJT": "a format before GGUF, of 2023",
    b"PK\x03\x04": "a zip, as PyTorch's models are",
    **dict.fromkeys((b"<!DO", b"<!do", b"<htm"), "a page, not what it links to"),
}


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

    `shape` is in NumPy's order: the last dimension is contiguous and is what blocks pack; `rows` is
    the product of the others. A type that the package gguf does not know is called "type 99"; it is
    one row, of all bytes up to the next tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: int
    row_bytes: int
    path: Path
    start: int  # in the file
    stamp: tuple[int, ...]  # identifies the file as it was when its header was read

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def blocks(self) -> NDArray[np.uint8]:
        """[rows, row_bytes], read anew each time. FormatError if the file is not what it was."""
        return self.first_bytes(self.nbytes).reshape(self.rows, self.row_bytes)

    def first_bytes(self, most: int) -> NDArray[np.uint8]:
        """As many of the first bytes, read anew each time. FormatError as for `blocks`."""
        data = np.empty(min(most, self.nbytes), np.uint8)
        self.read(data)
        return data

    def read(self, data: NDArray[np.uint8], first: int = 0) -> None:
        """Fill contiguous bytes with those from `first` on. FormatError as for `blocks`."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start + first)
                size = file.readinto(data.data)
                found = stamp(file.fileno())  # after reading, since somebody may write meanwhile
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read ({error})") from None
        if found != self.stamp or size != data.nbytes:
            raise FormatError(
                f"{self.path}: has changed since its header was read, in which tensor "
                f"{plain(self.name)} has bytes {self.start} to {self.start + self.nbytes}"
            )


@dataclass(frozen=True, eq=False)
class ModelFile:
    """What the header of a model file says."""

    path: Path
    version: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)

    def get(self, key: str, default: Any = None, kind: type | tuple[type, ...] = object) -> Any:
        """The value of `key`, or `default`. FormatError if it is present but no `kind`."""
        value = self.metadata.get(key, default)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        fits = isinstance(value, kinds) and (int not in kinds or type(value) is not bool)
        if key in self.metadata and not fits:
            raise FormatError(
                f"{self.path}: key {key} has {brief(value)} ({type(value).__name__}), "
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
    """Parse the header of a GGUF file; tensor bytes are not touched. Of a model that is split into
    several files this reads the one that is given; `read_model` reads them all.

    Raises:
        FormatError: the file is missing, cut short, or anything in it contradicts the format.
        UnsupportedError: a nested array.
    """
    path = Path(path)
    cursor = Cursor.open(path)
    if (magic := cursor.take(4, "the magic")) != b"GGUF":
        raise FormatError(f"{path}: {wrong_magic(magic)}")
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
            raise FormatError(f"{path}: key {plain(key)} occurs twice")
        code = cursor.number("I", f"the type of key {plain(key)}")
        metadata[key] = cursor.value(code, f"key {plain(key)}")

    tensors = _tensors(cursor, num_tensors, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    return ModelFile(path, version, metadata, tensors)


def wrong_magic(magic: bytes) -> str:
    """What an error says of the first four bytes of a file that is no GGUF."""
    what = f" ({OTHERS[magic]})" if magic in OTHERS else ""
    return f"has magic {magic!r}{what}, expected b'GGUF'"


def read_model(path: str | os.PathLike[str]) -> ModelFile:
    """A model in one file or in several, of which any may be given: `read`'s result, with the
    metadata of the first part and the tensors of all.

    Raises:
        FormatError: as `read`; a part is missing, or the parts do not belong together.
        UnsupportedError: as `read`.
    """
    given = read(path)
    count = given.get("split.count", 1, int)
    if count in (0, 1):
        return given
    named = re.fullmatch(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", given.path.name, re.DOTALL)
    if not named or int(named[3]) != count:
        raise FormatError(
            f"{given.path}: is one of {count} parts, expected a name like "
            f"model-00001-of-{count:05}.gguf"
        )
    paths = [
        given.path.with_name(f"{named[1]}-{n:05}-of-{named[3]}.gguf") for n in range(1, count + 1)
    ]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise FormatError(
            f"{given.path}: is one of {count} parts, and {len(missing)} of them are missing: "
            f"{', '.join(missing[:4])}{', ...' if missing[4:] else ''}"
        )
    tensors: dict[str, TensorInfo] = {}
    parts = [read(part) for part in paths]
    for n, part in enumerate(parts):
        for key, expected in (("split.no", n), ("split.count", count)):
            if part.require(key, int) != expected:
                raise FormatError(
                    f"{part.path}: key {key} has {part.metadata[key]}, expected {expected}"
                )
        for key, value in part.metadata.items():
            is_of_part = key.startswith("split.") or key == "general.alignment"
            if not is_of_part and value != parts[0].metadata.get(key):
                raise FormatError(
                    f"{part.path}: key {plain(key)} has {brief(value)}, expected "
                    f"{brief(parts[0].metadata.get(key))} as the first part has it"
                )
        for name in part.tensors.keys() & tensors:
            raise FormatError(f"{part.path}: tensor {plain(name)} is in an earlier part, too")
        tensors |= part.tensors
    total = parts[0].get("split.tensors.count", len(tensors), int)
    if total != len(tensors):
        raise FormatError(
            f"{parts[0].path}: key split.tensors.count has {total}, but the parts hold "
            f"{counted(len(tensors), 'tensor')}"
        )
    return replace(parts[0], tensors=tensors)


def _tensors(cursor: Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    """Parse the tensor table, and check that the tensors lie in the file side by side."""
    path, size = cursor.path, len(cursor.data)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(
            f"{path}: key general.alignment has {brief(alignment)}, expected a power of two"
        )
    table = [_entry(cursor) for _ in range(count)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end_of_previous, previous = 0, ""
    in_order = sorted(table, key=lambda entry: entry[3])
    following = [*(entry[3] for entry in in_order[1:]), size - data_start]
    for (name, block, shape, offset), end in zip(in_order, following, strict=False):
        if block.size:
            rows, row_bytes = prod(shape[:-1]), shape[-1] // block.elements * block.size
        else:
            rows, row_bytes = 1, max(0, end - offset)
        start, nbytes = data_start + offset, rows * row_bytes
        if name in tensors:
            raise FormatError(f"{path}: tensor {plain(name)} occurs twice")
        if offset % alignment:
            raise FormatError(
                f"{path}: tensor {plain(name)} has offset {offset}, "
                f"expected a multiple of {alignment}"
            )
        if start + nbytes > size:
            raise FormatError(
                f"{path}: tensor {plain(name)} ({block.kind} {shape}) has bytes {start} to "
                f"{start + nbytes}, the file has {size}"
            )
        if offset < end_of_previous:
            raise FormatError(f"{path}: tensor {plain(name)} overlaps tensor {plain(previous)}")
        end_of_previous, previous = offset + nbytes, name
        place = (path.absolute(), start, cursor.stamp)
        tensors[name] = TensorInfo(name, block.kind, shape, rows, row_bytes, *place)
    return {entry[0]: tensors[entry[0]] for entry in table}


def _entry(cursor: Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
    """One row of the tensor table: name, type, shape, offset in the data section."""
    path, name = cursor.path, cursor.string("a tensor's name")
    what = f"tensor {plain(name)}"
    rank = cursor.number("I", f"the rank of {what}")
    if not 1 <= rank <= MAX_RANK:
        raise FormatError(f"{path}: {what} has rank {rank}, expected 1 to {MAX_RANK}")
    shape = tuple(reversed(cursor.numbers("Q", rank, f"the shape of {what}")))
    code = cursor.number("I", f"the type of {what}")
    block = tensor_types().get(code, TensorType(f"type {code}", 1, 0))
    if 0 in shape or shape[-1] % block.elements:
        raise FormatError(
            f"{path}: {what} has shape {shape}, expected no zero and "
            f"rows of a multiple of {block.elements} ({block.kind})"
        )
    return name, block, shape, cursor.number("Q", f"the offset of {what}")


def describe(file: ModelFile) -> str:
    """What `pykv inspect` prints: metadata, tensors, and totals by kind."""
    tensors = list(file.tensors.values())
    sections: list[list[tuple[str, ...]]] = [
        [(plain(key), brief(value)) for key, value in file.metadata.items()],
        [
            (plain(t.name), t.kind, " x ".join(map(str, t.shape)), counted(t.nbytes, "byte"))
            for t in tensors
        ],
        [
            (kind, counted(len(of_kind), "tensor"), counted(sum(t.nbytes for t in of_kind), "byte"))
            for kind in sorted({t.kind for t in tensors})
            for of_kind in [[t for t in tensors if t.kind == kind]]
        ],
    ]
    title = (
        f"{visible(str(file.path))}: GGUF version {file.version}, "
        f"{counted(len(file.metadata), 'key')}, "
        f"{counted(len(tensors), 'tensor')} of {counted(sum(t.nbytes for t in tensors), 'byte')}"
    )
    return "\n\n".join([title, *(_table(rows) for rows in sections if rows)])


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def brief(value: Any) -> str:
    """A value in one short line."""
    if isinstance(value, list):
        shown = [brief(item) for item in value[:4]] + ["..."] * (len(value) > 4)
        return f"[{len(value)}] {', '.join(shown)}"
    if isinstance(value, str) and len(value) > 60:
        return f"{value[:60]!r}... ({len(value)} characters)"
    return repr(value)
