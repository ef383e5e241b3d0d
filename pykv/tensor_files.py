"""Files of arrays and of facts about them.

A file is a safetensors file: 8 bytes with the size of a JSON header, the header, and the arrays,
each contiguous, bfloat16 as its bits. The header's "__metadata__" holds texts: "format", a name
with a version; whatever else tells what the arrays are; and a SHA-256 of all these and of all bytes
of the arrays; or, of files that are read in part, of the former and of a SHA-256 of each row.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pykv import whole_files
from pykv.errors import FormatError, quoted
from pykv.number_texts import whole_of

_MAX_HEADER = 1 << 20  # bytes; ours take less than 2 KiB
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "U16", "int8": "I8", "uint8": "U8"}
_CODES["int32"] = "I32"
_ROWS = "rows_sha256"  # metadata of files whose rows are checked one by one


def write(
    path: Path,
    metadata: dict[str, str],
    arrays: dict[str, Any],
    *,
    private: bool = False,
    durable: bool = True,
    by_row: bool = False,
) -> None:
    """Write a file, whole or not at all; NumPy's arrays, contiguous, little-endian; `private` and
    `durable` as of whole_files.replace; `by_row` for `read_rows`, of one array of two dimensions,
    each row of which has a checksum of its own."""
    table = _table(arrays)
    if by_row:
        (rows,) = arrays.values()
        metadata = metadata | {_ROWS: " ".join(hashlib.sha256(x).hexdigest() for x in rows)}
    metadata = metadata | {"sha256": _digest(metadata, table, {} if by_row else arrays)}
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8
    first = len(text).to_bytes(8, "little") + text
    whole_files.replace(
        path, [first, *map(_bytes, arrays.values())], private=private, durable=durable
    )


class Header(NamedTuple):
    """What a file says of itself, unchecked but for the types of `metadata`.

    Attributes:
        metadata: texts by name.
        table: what each array is, by name.
        begin, size: where arrays begin, and the bytes of the file.
    """

    metadata: dict[str, str]
    table: dict[str, Any]
    begin: int
    size: int

    def number(self, op: str, path: Path, name: str) -> int:
        """A fact that is a whole number."""
        text = self.metadata.get(name, "")
        number = whole_of(text, most=10**9 - 1)
        if number is None:
            raise FormatError(f"{op}: {path} has {name}={shown(text)}, expected a whole number")
        return number

    def length(self, op: str, path: Path, name: str) -> int:
        """Of an array of one dimension, no more than the file has room for; 0 if there is none."""
        entry = self.table.get(name)
        shape = entry.get("shape") if isinstance(entry, dict) else entry
        n = 0 if entry is None else shape[0] if isinstance(shape, list) and len(shape) == 1 else -1
        if type(n) is not int or not 0 <= n <= self.size:
            raise FormatError(f"{op}: {path} has {name}={shown(entry)}, expected one dimension")
        return n


def read_header(op: str, file: BufferedReader, path: Path, kind: str, expected: str) -> Header:
    """The header of a file of one format, which messages call a `kind`."""
    first = file.read(8)
    size = int.from_bytes(first, "little")
    if len(first) < 8 or size > _MAX_HEADER:
        raise FormatError(f"{op}: {path} is no {kind}: {first!r} is no size of a header")
    try:
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__")
        found = metadata["format"]
        is_text = all(isinstance(fact, str) for fact in metadata.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{op}: {path} is no {kind}: its header is damaged") from error
    if found != expected:
        raise FormatError(f"{op}: {path} has format {quoted(found)}, expected {expected!r}")
    if not is_text:
        raise FormatError(f"{op}: {path} has metadata that is no text")
    if "sha256" not in metadata:
        raise FormatError(f"{op}: {path} is no {kind}: its header is damaged")
    return Header(metadata, header, 8 + size, os.fstat(file.fileno()).st_size)


def check_facts(
    op: str, path: Path, header: Header, expected: dict[str, str], free: Collection[str]
) -> None:
    """Check that a file says so of itself, but for what is `free`."""
    for name, want in expected.items():
        if name not in free and header.metadata.get(name) != want:
            has = shown(header.metadata.get(name))
            raise FormatError(f"{op}: {path} has {name}={has}, expected {want}")


def read_arrays(
    op: str, file: BufferedReader, path: Path, header: Header, arrays: dict[str, Any]
) -> None:
    """Fill arrays, which must be those that the file has, and see that its checksum holds."""
    expected = _table(arrays)
    for name in {**expected, **header.table}:
        if header.table.get(name) != expected.get(name):
            has = f"{shown(name)}={shown(header.table.get(name))}"
            raise FormatError(f"{op}: {path} has {has}, expected {expected.get(name)}")
    want = header.begin + sum(x.nbytes for x in arrays.values())
    if header.size != want:
        raise FormatError(f"{op}: {path} has {header.size} bytes, expected {want}")
    file.seek(header.begin)
    for x in arrays.values():
        file.readinto(_bytes(x))  # a short read fails the checksum below
    if _digest(header.metadata, header.table, arrays) != header.metadata["sha256"]:
        raise FormatError(f"{op}: {path} is damaged: its checksum does not hold")


def read_rows(
    op: str, file: BufferedReader, path: Path, header: Header, name: str, first: int, rows: Any
) -> None:
    """Fill `rows` [n, B] uint8 with those of the file's only array from row `first` on, and see
    that the checksums of these hold; others are not read."""
    sums, (n, size) = header.metadata.get(_ROWS, "").split(" "), rows.shape
    expected = _table({name: np.broadcast_to(np.uint8(0), (len(sums), size))})
    if header.table != expected or first + n > len(sums):
        has = f"{shown(name)}={shown(header.table.get(name))}"
        raise FormatError(f"{op}: {path} has {has}, expected {first + n} rows of {size} bytes")
    want = header.begin + len(sums) * size
    if header.size != want:
        raise FormatError(f"{op}: {path} has {header.size} bytes, expected {want}")
    file.seek(header.begin + first * size)
    file.readinto(_bytes(rows))  # a short read fails the checksums below
    found = [hashlib.sha256(row).hexdigest() for row in rows]
    is_whole = _digest(header.metadata, header.table, {}) == header.metadata["sha256"]
    if not is_whole or found != sums[first : first + n]:
        raise FormatError(f"{op}: {path} is damaged: its checksum does not hold")


def shown(value: Any) -> str:
    """What a file holds, for a message of one line: a terminal must not obey it."""
    is_short = isinstance(value, str) and value.isprintable() and len(value) <= 80
    return value if is_short else quoted(value)


def _bytes(x: Any) -> memoryview:
    return memoryview(x.reshape(-1).view(np.uint8))


def _table(arrays: dict[str, Any]) -> dict[str, Any]:
    """The header of a file with these arrays."""
    table: dict[str, Any] = {}
    end = 0
    for name, x in arrays.items():
        begin, end = end, end + x.nbytes
        table[name] = dict(
            dtype=_CODES[x.dtype.name], shape=list(x.shape), data_offsets=[begin, end]
        )
    return table


def _digest(metadata: dict[str, str], table: dict[str, Any], arrays: dict[str, Any]) -> str:
    facts = {name: text for name, text in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps([facts, table], sort_keys=True).encode())
    for x in arrays.values():
        digest.update(_bytes(x))
    return digest.hexdigest()
