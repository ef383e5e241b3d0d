"""Coded tokens, and their bytes in a file or on a wire.

Dimensions: T tokens: the first S (sinks) are float16, the last X (window) int8, the C between them
are coded rows; B bytes of a row, L layers, H KV heads, D head size.

A stream, little-endian; each section begins at a multiple of 128 bytes, with zeros between:

    header         offset  type     field
                        0  8s       magic, b"\\x89PYKVTS\\n"
                        8  u32      version, 2
                       12  u32      CRC-32 of the stream, computed with zeros here
                       16  u64      bytes of the stream
                       24  32s      SHA-256 that identifies the artefact, see loaded.identify
                       56  u32 each ratio, L, H, D, T, S, X, B
                       88  32s      KVSpec of the source cache, ASCII, padded with zeros
    positions      i32 [T]                 ascending
    sinks          f16 [S, 2, L, H, D]     rotated keys, then values; Hadamard rotation undone
    window         i8 [X, 2, L, H, D]      codes of heads times hadamard_matrix(D)
    window_scales  f16 [X, 2, L, H]
    rows           u8 [C, B]               see pykv.ops.kvtc_code, for each group of layers in order

Every row has B bytes and is independent of the others, so any token can be decoded alone. Version
1, whose codes had no NaN, is refused.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import check_module, is_array, to_host
from pykv.errors import (
    CapacityError,
    DtypeError,
    FormatError,
    ParameterError,
    PykvError,
    ShapeError,
    a_type,
    quoted,
)
from pykv.number_texts import counted
from pykv.options import check_type, check_whole, hold_python_numbers
from pykv.specs import KVSpec, as_spec

MAGIC = b"\x89PYKVTS\n"
VERSION = 2
ALIGNMENT = 128
_HEADER = struct.Struct("<8s2IQ32s8I32s")
_MOST = 1 << 14  # limit of layers, heads and head size, and of the ratio


class Section(NamedTuple):
    """An array of a stream.

    Attributes:
        offset: in bytes, from the header's end.
        shape, dtype: of the array.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """The header of a stream.

    Attributes:
        artefact: the SHA-256 that identifies the artefact, in hexadecimal.
        ratio: of the plans that coded the rows.
        layers, heads, head_dim: of the model.
        tokens, sinks, window: all tokens, and the first and last ones not coded as rows.
        row_bytes: of a coded row.
        spec: text of the KVSpec of the source cache.
    """

    artefact: str
    ratio: int
    layers: int
    heads: int
    head_dim: int
    tokens: int
    sinks: int
    window: int
    row_bytes: int
    spec: str

    def __post_init__(self) -> None:
        hold_python_numbers(self)

    def sections(self) -> dict[str, Section]:
        """All sections, in order."""
        T, S, X, L, H, D = (
            *(self.tokens, self.sinks, self.window),
            *(self.layers, self.heads, self.head_dim),
        )
        shapes: dict[str, tuple[tuple[int, ...], Any]] = dict(
            positions=((T,), np.int32),
            sinks=((S, 2, L, H, D), np.float16),
            window=((X, 2, L, H, D), np.int8),
            window_scales=((X, 2, L, H), np.float16),
            rows=((T - S - X, self.row_bytes), np.uint8),
        )
        found, end = {}, 0
        for name, (shape, dtype) in shapes.items():
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            found[name] = Section(begin, shape, np.dtype(dtype).newbyteorder("<"))
            end = begin + found[name].nbytes
        return found

    def pack(self, crc: int) -> bytes:
        """The header's bytes in a stream.

        Args:
            crc: CRC-32 of the stream.
        """
        size = ALIGNMENT + self.nbytes
        counts = (
            *(self.ratio, self.layers, self.heads, self.head_dim),
            *(self.tokens, self.sinks, self.window, self.row_bytes),
        )
        facts = MAGIC, VERSION, crc, size, bytes.fromhex(self.artefact), *counts
        return _HEADER.pack(*facts, self.spec.encode("ascii")).ljust(ALIGNMENT, b"\0")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all sections, without the header.

        Raises:
            ParameterError: a field is out of range.
            DtypeError: a field has another type.
        """
        op = "Header"
        if not isinstance(self.artefact, str) or not re.fullmatch("[0-9a-f]{64}", self.artefact):
            expected = "64 hexadecimal digits"
            raise ParameterError(f"{op}: artefact is {quoted(self.artefact)}, expected {expected}")
        for name in ("ratio", "layers", "heads", "head_dim"):
            check_whole(op, name, getattr(self, name), 1, _MOST)
        for name in ("tokens", "sinks", "window", "row_bytes"):
            check_whole(op, name, getattr(self, name), 0, 2**32 - 1)
        if self.sinks + self.window > self.tokens:
            raise ParameterError(
                f"{op}: sinks and window are {self.sinks} and {self.window}, expected at most the "
                f"{counted(self.tokens, 'token')}"
            )
        as_spec(op, self.spec)
        last = self.sections()["rows"]
        return last.offset + last.nbytes


@dataclass(frozen=True, eq=False)
class Coded:
    """Coded tokens of a sequence.

    Attributes:
        header: their Header.
        data: [header.nbytes] uint8, all sections, a NumPy or CuPy array.

    Raises:
        DtypeError: `header` is no Header, or `data` no array of uint8.
        ShapeError, CapacityError: `data` has another shape, or too few bytes.
        ParameterError: a field of the header is out of range.
    """

    header: Header
    data: Any

    def __post_init__(self) -> None:
        check_type("Coded", "header", self.header, Header, "a pykv.kvtc.Header")
        check_bytes("Coded", "data", self.data, self.header.nbytes)

    def arrays(self) -> dict[str, Any]:
        """Views of the sections by name."""
        return {
            name: self.data[of.offset : of.offset + of.nbytes].view(of.dtype).reshape(of.shape)
            for name, of in self.header.sections().items()
        }

    def to(self, xp: Any) -> Coded:
        """The same tokens as an array of `xp`, `numpy` or `cupy`; copies to NumPy wait for the GPU.

        Raises:
            DtypeError: `xp` is another module.
        """
        xp = check_module("Coded.to", xp)
        return Coded(self.header, to_host(self.data) if xp is np else xp.asarray(self.data))

    def to_bytes(self) -> bytes:
        """The stream. Waits for the GPU if `data` is there; pinned host data must be complete."""
        header, data = self.header, to_host(self.data)
        stream = bytearray(ALIGNMENT + header.nbytes)
        for of in header.sections().values():
            at = ALIGNMENT + of.offset
            stream[at : at + of.nbytes] = memoryview(data[of.offset : of.offset + of.nbytes])
        stream[:ALIGNMENT] = header.pack(0)
        stream[:ALIGNMENT] = header.pack(_crc(stream))
        return bytes(stream)


def check_bytes(op: str, name: str, x: Any, nbytes: int) -> None:
    """Check a contiguous array of at least `nbytes` uint8.

    Args:
        op, name: for messages.
        x: the array.
        nbytes: bytes needed.

    Raises:
        DtypeError, ShapeError, CapacityError: it has another dtype or shape, or is too small.
    """
    if not is_array(x) or x.dtype != np.uint8:
        given = getattr(x, "dtype", type(x).__name__)
        raise DtypeError(f"{op}: {name} is of {given}, expected an array of uint8")
    if x.ndim != 1 or not x.flags.c_contiguous:
        raise ShapeError(f"{op}: {name} has shape {x.shape}, expected [{nbytes}], contiguous")
    if x.size < nbytes:
        raise CapacityError(f"{op}: {name} has {x.size} bytes, expected at least {nbytes}")


def parse(stream: Any) -> Coded:
    """Parse a stream and check all of it.

    Args:
        stream: `bytes`, or another object with a buffer of bytes.

    Returns:
        Coded; its data is a read-only view of `stream`, in NumPy.

    Raises:
        FormatError: it is no stream, is damaged, or has another version; the text names the field.
        DtypeError: it has no buffer of bytes.
    """
    op = "stream.parse"
    try:
        data = np.frombuffer(stream, np.uint8)
    except (TypeError, ValueError, BufferError):
        raise DtypeError(f"{op}: stream is {a_type(stream)}, expected bytes") from None
    data.flags.writeable = False

    def wrong(name: str, has: Any, expected: Any) -> FormatError:
        return FormatError(f"{op}: stream has {name} {quoted(has)}, expected {expected}")

    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise wrong("magic", bytes(data[: len(MAGIC)]), MAGIC)
    if len(data) < ALIGNMENT:
        raise wrong("bytes", len(data), f"at least {ALIGNMENT}")
    _, version, crc, size, *facts, text = _HEADER.unpack(bytes(data[: _HEADER.size]))
    if version != VERSION:
        raise wrong("version", version, VERSION)
    if size != len(data):
        raise wrong("bytes", len(data), f"the {size} of its header")
    if crc != _crc(data):
        raise FormatError(f"{op}: stream is damaged: its CRC-32 does not hold")
    try:
        spec = str(KVSpec.parse(text.rstrip(b"\0").decode("ascii")))
    except (UnicodeDecodeError, PykvError):
        raise wrong("spec", text, "the text of a KVSpec") from None
    header = Header(*[facts[0].hex(), *facts[1:], spec])
    for name in ("ratio", "layers", "heads", "head_dim"):
        if not 1 <= getattr(header, name) <= _MOST:
            raise wrong(name, getattr(header, name), f"1 to {_MOST}")
    if header.sinks + header.window > header.tokens:
        has = f"{header.sinks} and {header.window}"
        raise wrong("sinks and window", has, f"at most the {header.tokens} tokens")
    if header.row_bytes % 4:
        raise wrong("row_bytes", header.row_bytes, "a multiple of 4")
    if ALIGNMENT + header.nbytes != size:
        raise wrong("bytes", size, f"{ALIGNMENT + header.nbytes}, as its counts have it")
    if header.pack(crc) != bytes(data[:ALIGNMENT]):
        raise wrong("header", bytes(data[_HEADER.size : ALIGNMENT]), "zeros after its fields")
    coded = Coded(header, data[ALIGNMENT:])
    _check_sections(op, coded)
    return coded


def _check_sections(op: str, coded: Coded) -> None:
    """Check that sections have zeros between them, and that positions rise."""
    end = 0
    for name, of in coded.header.sections().items():
        if coded.data[end : of.offset].any():
            raise FormatError(f"{op}: stream has bytes before {name}, expected zeros")
        end = of.offset + of.nbytes
    positions = coded.arrays()["positions"]
    if (np.diff(positions) <= 0).any() or (positions < 0).any():
        raise FormatError(f"{op}: stream has positions that fall or are negative")


def _crc(stream: Any) -> int:
    """CRC-32 of a stream, with zeros in place of the checksum."""
    return zlib.crc32(stream[16:], zlib.crc32(bytes(4), zlib.crc32(stream[:12])))
