"""A region of memory that other processes read: rows that hold pages, and a table of their keys.

    header   128 bytes, little-endian
             offset  type     field
                  0  8s       magic, b"\\x89PYKVTR\\n"
                  8  u32      version, 3
                 12  u32      CRC-32 of the header, computed with zeros here
                 16  u64 x2   number of rows, and bytes of each, a multiple of 8
                 32  32s      SHA-256 of the facts that page contents depend on
    table    64 bytes for each row: key 16s, generation u64, checksum u64, zeros
    rows     contiguous, from the next multiple of 4,096 bytes

A row's generation counts how often it was filled. Its checksum, modulo 2^64, is the sum of its u64
words, each times one of 1,021 odd constants in turn, plus the CRC-32 of key and generation. It
detects any change of one word; of other damage, one in 2^63 passes by chance. The number of
constants is prime, so swapped words are detected too, unless their distance is a multiple of 8,168
bytes, as that of no blocks of pages is. (Multilinear hashing: Carter and Wegman 1979; Lemire and
Kaser 2014.) There are no locks: a late reader finds another key or generation, or bytes that do not
match the checksum.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np

from pykv.arrays import UINT8, check_writeable, is_numpy
from pykv.checker import checker
from pykv.errors import (
    CapacityError,
    DtypeError,
    ParameterError,
    ShapeError,
    TransportError,
    quoted,
)
from pykv.number_texts import counted
from pykv.options import check_type, check_whole
from pykv.ranges import check_overlaps
from pykv.transport.messages import check_facts

MAGIC = b"\x89PYKVTR\n"
VERSION = 3
HEADER_BYTES = 128
_HEADER = struct.Struct("<8s2I2Q32s")
_ENTRY = np.dtype([("key", "V16"), ("generation", "<u8"), ("checksum", "<u8"), ("zeros", "V32")])
_NO_KEY = bytes(16)
MOST_ROWS = 1 << 22  # bounds the table that a reader allocates to 256 MiB
# The same in all processes: NumPy guarantees the streams of its bit generators.
_CONSTANTS = np.random.PCG64(2024).random_raw(1021) | np.uint64(1)

Read = Callable[[list[tuple[int, Any]]], Generator[Any, None, None]]


def size_of(count: int, nbytes: int) -> int:
    """Bytes of a region with `count` rows of `nbytes` each."""
    return _begin(count) + count * nbytes


def check_region(op: str, count: Any, nbytes: Any, facts: Any) -> tuple[int, int]:
    """Check for `op` the `count` of rows, their `nbytes` and the `facts` of a region before its
    memory is allocated; returns the numbers as ints.

    Raises:
        ParameterError: a number is out of range, or `nbytes` is not a multiple of 8.
        DtypeError: one is not a whole number, or `facts` is not a dict that JSON can hold.
    """
    count = check_whole(op, "count", count, 1, MOST_ROWS)
    nbytes = check_whole(op, "nbytes", nbytes, 1, 1 << 40)
    if nbytes % 8:
        raise ParameterError(f"{op}: nbytes is {nbytes}, expected a multiple of 8")
    check_facts(op, facts)
    return count, nbytes


class Region:
    """A region of this process.

    Args:
        memory: at least [size_of(count, nbytes)] uint8 on the host, which others can read.
        count, nbytes: of the rows.
        facts: all that page contents depend on, by name.

    Attributes:
        rows: [count, nbytes] uint8; call `drop` before filling a row, and `put` after.

    Raises:
        DtypeError, ShapeError, CapacityError, ParameterError: `memory` is not such an array, too
            small or read-only.
        Otherwise as check_region.
    """

    def __init__(self, memory: Any, count: int, nbytes: int, facts: dict[str, str]) -> None:
        count, nbytes = check_region("Region", count, nbytes, facts)
        checker("Region", ("memory",), memory=("n", UINT8))(memory)
        if (needed := size_of(count, nbytes)) > memory.size:
            raise CapacityError(f"Region: memory has {memory.size} bytes, expected {needed}")
        begin = _begin(count)
        self._table = memory[HEADER_BYTES : HEADER_BYTES + count * _ENTRY.itemsize].view(_ENTRY)
        self._table[...] = np.zeros((), _ENTRY)
        self.rows = memory[begin : begin + count * nbytes].reshape(count, nbytes)
        header = _pack(count, nbytes, digest(facts))
        memory[:HEADER_BYTES] = np.frombuffer(header, np.uint8)

    def drop(self, slot: int) -> None:
        """Mark row `slot` as empty.

        Raises:
            ParameterError, DtypeError: there is no such row.
        """
        slot = check_whole("Region.drop", "slot", slot, 0, len(self.rows) - 1)
        self._table["key"][slot] = _NO_KEY

    def put(self, key: bytes, slot: int) -> None:
        """Offer the page in row `slot` under `key`.

        Raises:
            ParameterError, DtypeError: there is no such row, or `key` is not 16 bytes, or all
                zeros, which mark an empty row.
        """
        op = "Region.put"
        slot = check_whole(op, "slot", slot, 0, len(self.rows) - 1)
        _check_keys(op, "key", [key])
        if key == _NO_KEY:
            raise ParameterError(f"{op}: key is {key!r}, expected one that is not all zeros")
        entry = self._table[slot : slot + 1]
        generation = int(entry["generation"][0]) + 1
        entry["generation"] = generation
        entry["checksum"] = _checksum(key, generation, self.rows[slot])
        entry["key"] = np.void(key)


class PeerRegion:
    """A region of another process; nothing in it is trusted.

    Args:
        peer: its name, for messages.
        read: takes (offset, array) pairs, fills each array from its offset in the region, and
            yields it once it is full.
        size: bytes of the region.
        facts, nbytes: of this process's own pages.

    Raises:
        TransportError: it is not a region, or has another version, other facts or rows of another
            size.
    """

    def __init__(
        self, peer: str, read: Read, size: int, facts: dict[str, str], nbytes: int
    ) -> None:
        self._peer, self._read, self._nbytes = peer, read, nbytes
        if size < HEADER_BYTES:
            raise TransportError(f"transport: {peer} has {size} bytes, expected a region of pages")
        header = np.empty(HEADER_BYTES, np.uint8)
        self._fill(0, header)
        self._count = _check_header(peer, header.tobytes(), size, digest(facts), nbytes)
        self._slots: dict[bytes, tuple[int, int, int]] = {}

    def exists(self, keys: list[bytes]) -> list[bytes]:
        """The first of these keys, up to the first that the region lacks now.

        Raises:
            DtypeError: they are not a list of keys of 16 bytes.
            TransportError: the region cannot be read.
            CapacityError: there is no memory for the peer's table.
        """
        _check_keys("PeerRegion.exists", "keys", keys)
        try:
            table = np.empty(self._count, _ENTRY)
        except MemoryError as error:
            raise CapacityError(f"PeerRegion.exists: a table of {self._count} rows") from error
        self._fill(HEADER_BYTES, table.view(np.uint8))
        words = np.ascontiguousarray(table["key"]).view("<u8")[::2]  # prefilter by half a key: fast
        found = np.flatnonzero(np.isin(words, np.frombuffer(b"".join(keys), "<u8")[::2]))
        entries = zip(found.tolist(), table[found].tolist(), strict=True)
        self._slots = {entry[0]: (i, entry[1], entry[2]) for i, entry in entries}
        self._slots.pop(_NO_KEY, None)
        there = [key in self._slots for key in keys]
        return keys[: there.index(False)] if False in there else keys

    def get(self, keys: list[bytes], rows: list[Any]) -> int:
        """Fill rows with pages.

        Args:
            keys: of pages that the last call of `exists` found.
            rows: an array [nbytes] uint8 for each; undefined for pages that are not received.

        Returns:
            How many pages were received, from the first on, up to one that the peer has
            overwritten.

        Raises:
            TransportError: a page does not match its checksum.
            ParameterError: `exists` has not found a key, or rows share memory.
            ShapeError, DtypeError: rows and keys differ in number, or a row is not such an array.
        """
        self._check(keys, rows)
        if not keys:
            return 0
        begin, known = _begin(self._count), [self._slots[key] for key in keys]
        starts = [begin + slot * self._nbytes for slot, _, _ in known]
        coming = self._read(list(zip(starts, rows, strict=True)))
        with ThreadPoolExecutor(1) as pool, closing(coming):  # a page is verified beside the next
            sums = [
                pool.submit(_checksum, key, of[1], row)
                for key, of, row in zip(keys, known, coming, strict=True)
            ]
        for i, (key, (slot, generation, checksum)) in enumerate(zip(keys, known, strict=True)):
            if sums[i].result() == checksum:
                continue
            entry = np.empty(1, _ENTRY)
            self._fill(HEADER_BYTES + slot * _ENTRY.itemsize, entry.view(np.uint8))
            if entry["key"][0].tobytes() != key or int(entry["generation"][0]) != generation:
                return i  # the slot holds another page by now
            raise TransportError(
                f"transport: {self._peer} has a page {key.hex()} that is damaged: its checksum "
                "does not hold"
            )
        return len(keys)

    def _fill(self, at: int, out: Any) -> None:
        """Fill an array from an offset in the region."""
        for _ in self._read([(at, out)]):
            pass

    def _check(self, keys: Any, rows: Any) -> None:
        """Check the arguments of `get`."""
        op = "PeerRegion.get"
        _check_keys(op, "keys", keys)
        for key in keys:
            if key not in self._slots:
                raise ParameterError(f"{op}: keys has {key.hex()}, expected those of `exists`")
        check_type(op, "rows", rows, list | tuple, "a list of arrays")
        if len(rows) != len(keys):
            raise ShapeError(
                f"{op}: rows has {counted(len(rows), 'array')}, expected {len(keys)} as keys"
            )
        for row in rows:
            if not is_numpy(row) or row.dtype != np.uint8:
                given = getattr(row, "dtype", type(row).__name__)
                raise DtypeError(f"{op}: rows has {given}, expected NumPy arrays of uint8")
            if row.shape != (self._nbytes,) or not row.flags.c_contiguous:
                expected = f"[{self._nbytes}], contiguous"
                raise ShapeError(f"{op}: rows has shape {row.shape}, expected {expected}")
            check_writeable(op, "rows", row)
        addresses = np.array([row.ctypes.data for row in rows], np.uint64)
        check_overlaps(op, ("rows", addresses[:0], 0), ("rows", addresses, self._nbytes))


def _check_keys(op: str, name: str, keys: Any) -> None:
    is_list = isinstance(keys, list | tuple)
    if not is_list or not all(isinstance(key, bytes) and len(key) == 16 for key in keys):
        raise DtypeError(f"{op}: {name} is {quoted(keys)}, expected 16 bytes each")


def digest(facts: dict[str, str]) -> bytes:
    """SHA-256 of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _check_header(peer: str, header: bytes, size: int, facts: bytes, nbytes: int) -> int:
    """Check a region's header; returns its number of rows."""
    magic, version, crc, count, row_bytes, sha256 = _HEADER.unpack(header[: _HEADER.size])

    def wrong(name: str, has: Any, expected: Any) -> TransportError:
        return TransportError(f"transport: {peer} has {name} {quoted(has)}, expected {expected}")

    if magic != MAGIC:
        raise wrong("magic", magic, MAGIC)
    if version != VERSION:
        raise wrong("version", version, VERSION)
    if crc != _header_crc(header):
        raise TransportError(f"transport: {peer} has a damaged header: its CRC-32 does not hold")
    if sha256 != facts:
        raise wrong("pages of facts", sha256.hex()[:16], f"those of {facts.hex()[:16]}, see facts")
    if row_bytes != nbytes:
        raise wrong("rows of bytes", row_bytes, nbytes)
    if not 0 < count <= MOST_ROWS or size_of(count, nbytes) > size:
        raise wrong("rows", count, f"as many as its {size} bytes hold, {MOST_ROWS} at most")
    return int(count)


def _pack(count: int, nbytes: int, facts: bytes) -> bytes:
    header = _HEADER.pack(MAGIC, VERSION, 0, count, nbytes, facts).ljust(HEADER_BYTES, b"\0")
    crc = _header_crc(header)
    return _HEADER.pack(MAGIC, VERSION, crc, count, nbytes, facts).ljust(HEADER_BYTES, b"\0")


def _header_crc(header: bytes) -> int:
    return zlib.crc32(header[16:], zlib.crc32(bytes(4), zlib.crc32(header[:12])))


def _checksum(key: bytes, generation: int, row: Any) -> int:
    words, count = row.view("<u8"), len(_CONSTANTS)
    whole = len(words) // count * count
    sums = words[:whole].reshape(-1, count).sum(axis=0)  # add first: faster than multiplying all
    sums[: len(words) - whole] += words[whole:]
    first = zlib.crc32(key + generation.to_bytes(8, "little"))
    return (int(np.dot(sums, _CONSTANTS)) + first) % 2**64


def _begin(count: int) -> int:
    return -(-(HEADER_BYTES + count * _ENTRY.itemsize) // 4096) * 4096
