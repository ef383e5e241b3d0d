"""A region of memory that other processes read: pages by key, in rows, with a table of them.

    header   128 bytes, little-endian
             offset  type     field
                  0  8s       magic, b"\\x89PYKVTR\\n"
                  8  u32      version, 1
                 12  u32      CRC-32 of the header, computed with zeros here
                 16  u64 x2   rows, and bytes of each
                 32  32s      SHA-256 of the facts that contents depend on
    table    64 bytes for each row: key 16s, generation u64, CRC-32 u32, zeros
    rows     from a multiple of 4,096 bytes on, one behind the other

A row's generation counts how often it was filled; its CRC-32 is that of key, generation and bytes.
Nobody locks: a reader that was late sees another key or generation, or bytes that do not fit.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pykv.errors import TransportError

MAGIC = b"\x89PYKVTR\n"
VERSION = 1
HEADER_BYTES = 128
_HEADER = struct.Struct("<8s2I2Q32s")
_ENTRY = np.dtype([("key", "V16"), ("generation", "<u8"), ("crc", "<u4"), ("zeros", "V36")])
_NO_KEY = bytes(16)
_MOST = 1 << 40  # rows, and bytes of one

Read = Callable[[int, Any], None]


def size_of(count: int, nbytes: int) -> int:
    """Bytes of a region with so many rows, of so many bytes each."""
    return _begin(count) + count * nbytes


class Region:
    """A region of this process.

    Args:
        memory: [size_of(count, nbytes)] uint8 of the host, which others can read.
        count, nbytes: of the rows.
        facts: all that contents depend on, by name.

    Attributes:
        rows: [count, nbytes] uint8; whoever fills one calls `drop` before, and `put` behind.
    """

    def __init__(self, memory: Any, count: int, nbytes: int, facts: dict[str, str]) -> None:
        begin = _begin(count)
        self._table = memory[HEADER_BYTES : HEADER_BYTES + count * _ENTRY.itemsize].view(_ENTRY)
        self._table[...] = np.zeros((), _ENTRY)
        self.rows = memory[begin : begin + count * nbytes].reshape(count, nbytes)
        header = _pack(count, nbytes, digest(facts))
        memory[:HEADER_BYTES] = np.frombuffer(header, np.uint8)

    def drop(self, slot: int) -> None:
        """Say that a row holds nothing."""
        self._table["key"][slot] = _NO_KEY

    def put(self, key: bytes, slot: int) -> None:
        """Offer what a row holds."""
        entry = self._table[slot : slot + 1]
        generation = int(entry["generation"][0]) + 1
        entry["generation"] = generation
        entry["crc"] = _crc(key, generation, self.rows[slot])
        entry["key"] = np.void(key)


class PeerRegion:
    """A region of another process, none of which is believed.

    Args:
        peer: its name, for messages.
        read: fills an array from an offset of the region on.
        size: bytes of the region.
        facts, nbytes: of this process's own pages.

    Raises:
        TransportError: it is no region, of another version, of other pages, or other rows.
    """

    def __init__(
        self, peer: str, read: Read, size: int, facts: dict[str, str], nbytes: int
    ) -> None:
        self._peer, self._read, self._nbytes = peer, read, nbytes
        if size < HEADER_BYTES:
            raise TransportError(f"transport: {peer} has {size} bytes, expected a region of pages")
        header = np.empty(HEADER_BYTES, np.uint8)
        read(0, header)
        self._count = _check_header(peer, header.tobytes(), size, digest(facts), nbytes)
        self._slots: dict[bytes, tuple[int, int, int]] = {}

    def exists(self, keys: list[bytes]) -> list[bytes]:
        """The first of these keys, until one is not there now."""
        table = np.empty(self._count, _ENTRY)
        self._read(HEADER_BYTES, table.view(np.uint8))
        names, numbers = table["key"].tobytes(), zip(table["generation"], table["crc"], strict=True)
        self._slots = {
            names[16 * i : 16 * i + 16]: (i, int(generation), int(crc))
            for i, (generation, crc) in enumerate(numbers)
        }
        self._slots.pop(_NO_KEY, None)
        there = [key in self._slots for key in keys]
        return keys[: there.index(False)] if False in there else keys

    def get(self, key: bytes, row: Any) -> bool:
        """Fill a row; False where the peer has it no longer.

        Args:
            key: of a page that `exists` found.
            row: [nbytes] uint8; holds anything unless the page was right.

        Raises:
            TransportError: it is not what its entry says.
        """
        slot, generation, crc = self._slots[key]
        self._read(_begin(self._count) + slot * self._nbytes, row)
        if _crc(key, generation, row) == crc:
            return True
        self._slots.pop(key)
        entry = np.empty(1, _ENTRY)
        self._read(HEADER_BYTES + slot * _ENTRY.itemsize, entry.view(np.uint8))
        if entry["key"][0].tobytes() != key or int(entry["generation"][0]) != generation:
            return False  # filled with another page meanwhile
        raise TransportError(
            f"transport: {self._peer} has a page {key.hex()} that is damaged: its CRC-32 does not "
            "hold"
        )


def digest(facts: dict[str, str]) -> bytes:
    """SHA-256 of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _check_header(peer: str, header: bytes, size: int, facts: bytes, nbytes: int) -> int:
    """Rows of a region, whose header is right."""
    magic, version, crc, count, row_bytes, sha256 = _HEADER.unpack(header[: _HEADER.size])

    def wrong(name: str, has: Any, expected: Any) -> TransportError:
        return TransportError(f"transport: {peer} has {name} {has!r:.80}, expected {expected}")

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
    if not 0 < count < _MOST or size_of(count, nbytes) > size:
        raise wrong("rows", count, f"as many as its {size} bytes hold")
    return int(count)


def _pack(count: int, nbytes: int, facts: bytes) -> bytes:
    header = _HEADER.pack(MAGIC, VERSION, 0, count, nbytes, facts).ljust(HEADER_BYTES, b"\0")
    crc = _header_crc(header)
    return _HEADER.pack(MAGIC, VERSION, crc, count, nbytes, facts).ljust(HEADER_BYTES, b"\0")


def _header_crc(header: bytes) -> int:
    return zlib.crc32(header[16:], zlib.crc32(bytes(4), zlib.crc32(header[:12])))


def _crc(key: bytes, generation: int, row: Any) -> int:
    return zlib.crc32(row, zlib.crc32(key + generation.to_bytes(8, "little")))


def _begin(count: int) -> int:
    return -(-(HEADER_BYTES + count * _ENTRY.itemsize) // 4096) * 4096
