"""Rows of keys and values that a model computes from texts, and the file that keeps them.

A row is the keys, or the values, of one token in all layers, [layer, head, dim]. Keys have their
rotation undone: they then depend little on the position, so that rows of all positions share a
basis.

A file of rows begins with a line: "pykv.rows.1 " and, as JSON, the facts that the rows depend on.
The windows follow, little-endian: float16 keys [n, F], values [n, F], and the u32 CRC-32 of both.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pykv import whole_files
from pykv.arrays import to_host
from pykv.errors import NumberError, ParameterError
from pykv.llm.model import Batch, forward
from pykv.llm.weights import Model
from pykv.ops import paged_qkv, rope
from pykv.pool import PagedKVCache

STEP = 512  # tokens of a forward step; bounds the scratch memory
PAGE_SIZE = 16
_MARK = b"pykv.rows.1 "


class Window(NamedTuple):
    """Tokens that a model reads from an empty cache, and the index of their text."""

    ids: list[int]
    text: int


def windows_of(texts: list[list[int]], length: int, bos: int | None) -> list[Window]:
    """Split each text into windows of equal size, at most `length`; each begins with `bos`, if
    any."""
    found = []
    for i, ids in enumerate(texts):
        room = length - (bos is not None)
        count = -(-len(ids) // room)
        for part in np.array_split(np.array(ids), count) if ids else ():
            start = [] if bos is None else [bos]
            found.append(Window(start + part.tolist(), i))
    return found


def read(
    model: Model, ids: list[int], xp: Any, queries: Any = None, squares: Any = None
) -> PagedKVCache:
    """A float32 cache of tokens, in order, on the model's device. `queries` and `squares`, see
    llm.model.forward, are filled for as many last tokens as they hold, at most STEP."""
    config, n = model.config, len(ids)
    last = 0 if squares is None else squares.shape[1]
    pages = -(-n // PAGE_SIZE)
    sizes = config.num_layers, pages, config.kv_heads, config.head_dim
    cache = PagedKVCache(*sizes, page_size=PAGE_SIZE, spec="fp32", xp=xp)
    table = xp.arange(pages, dtype=np.int32)[None]
    tokens, positions = xp.asarray(np.array(ids, np.int32)), xp.arange(n, dtype=np.int32)
    edges = [*range(0, n - last, STEP), n - last, n] if last else [*range(0, n, STEP), n]
    for start, stop in pairwise(edges):
        here, ends = positions[start:stop], np.array([0, stop - start, stop], np.int32)
        q_starts, lengths = xp.asarray(ends[:2]), xp.asarray(ends[2:])
        batch = Batch(tokens[start:stop], here, here, q_starts, table, lengths)
        asked = dict(queries=queries, squares=squares) if last and stop == n else {}
        forward(model, batch, cache, xp.asarray(ends[1:2] - 1), **asked)
    return cache


def collect(model: Model, ids: list[int], xp: Any) -> tuple[Any, Any]:
    """The keys and values of tokens, both [len(ids), L, H, D] float32 on the model's device; keys
    are before their rotation, and neither is Hadamard-rotated."""
    config, n = model.config, len(ids)
    cache = read(model, ids, xp)
    sizes, positions = (config.kv_heads, config.head_dim), xp.arange(n, dtype=np.int32)
    pools = (x.reshape(config.num_layers, -1, *sizes)[:, :n] for x in (cache.k, cache.v))
    k, v = (xp.ascontiguousarray(x.swapaxes(0, 1)) for x in pools)
    if model.hadamard:
        mixing = xp.asarray(paged_qkv.hadamard_matrix(config.head_dim).astype(np.float32))
        k, v = k @ mixing, v @ mixing
    back = -positions
    for i, layer in enumerate(model.layers):
        keys = xp.ascontiguousarray(k[:, i])
        rope.rotate(keys, keys[:, :0], back, layer.inv_freq, pairing=config.kind.pairing)
        k[:, i] = keys
    return k, v


def _hold(path: Path) -> BinaryIO:
    """Open and lock a file, so that only this run writes to it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        if not whole_files.lock(file):
            file.close()
            raise ParameterError(f"kvtc.calibrate: out: another process is writing {path}")
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # another run removed it between open and lock


class Rows:
    """Rows of windows, in memory, or in a file with which a later run continues.

    Args:
        features: F, elements of a row.
        counts: rows of each window.
        path: of the file; None keeps rows in memory.
        of: the facts that rows depend on, as JSON values; rows of other facts are replaced.

    Raises:
        ParameterError: another process writes to the file, or it is no file of rows.
        OSError: the file cannot be written.
    """

    def __init__(
        self, features: int, counts: list[int], path: Path | None = None, of: Any = None
    ) -> None:
        self.features, self._path = features, path
        self._held: list[Any] = []  # [2, n, F] of each window so far
        self._file: BinaryIO | None = None
        if path is None:
            return
        self._file = _hold(path)
        first = _MARK + json.dumps(of, sort_keys=True).encode() + b"\n"
        found = self._file.read(len(first))
        if found[: len(_MARK)] != _MARK[: len(found)]:  # another program's file: keep it
            self._file.close()
            raise ParameterError(
                f"kvtc.calibrate: {path} is no file of rows, expected none, or one of an "
                "interrupted run"
            )
        same = found == first
        self._end = len(first)
        if same:
            self._take(counts)
        self._file.truncate(self._end if same else 0)
        if not same:
            self._file.seek(0)
            self._file.write(first)
            self._file.flush()

    def _take(self, counts: list[int]) -> None:
        """Map the windows that are complete and intact in the file."""
        assert self._path is not None
        size = os.stat(self._path).st_size
        for count in counts:
            nbytes = 4 * count * self.features
            if self._end + nbytes + 4 > size:
                return
            rows = np.memmap(self._path, "<f2", "r", self._end, (2, count, self.features))
            stored = np.memmap(self._path, "<u4", "r", self._end + nbytes, (1,))
            if zlib.crc32(rows.data) != int(stored[0]):
                return
            self._held.append(rows)
            self._end += nbytes + 4

    def __len__(self) -> int:
        """The number of windows so far."""
        return len(self._held)

    def append(self, k: Any, v: Any) -> None:
        """Add the rows of the next window, [n, F] each.

        Raises:
            NumberError: a value is not finite in float16.
        """
        with np.errstate(over="ignore"):
            rows = np.stack([to_host(x).astype(np.float16) for x in (k, v)])
        if not np.isfinite(rows).all():
            raise NumberError(
                "kvtc.calibrate: the model's keys or values are not finite in float16; weights of "
                "bf16 reach further (--weights bf16)"
            )
        if self._file is not None and self._path is not None:
            self._file.seek(self._end)
            self._file.write(rows.data)
            self._file.write(zlib.crc32(rows.data).to_bytes(4, "little"))
            self._file.flush()
            begin, self._end = self._end, self._file.tell()
            rows = np.memmap(self._path, "<f2", "r", begin, rows.shape)
        self._held.append(rows)

    def blocks(self, side: int, columns: Any, select: list[slice], most: int) -> Iterator[Any]:
        """Blocks of keys (0) or values (1): float16 [n <= most, len(columns)], from the rows that
        `select` names in each window."""
        for rows, chosen in zip(self._held, select, strict=True):
            of_side = rows[side, chosen]
            for start in range(0, len(of_side), most):
                yield of_side[start : start + most, columns]

    def remove(self) -> None:
        """Delete the file."""
        self._held.clear()
        if self._file is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()

    def close(self) -> None:
        """Close the file and keep it for a later run."""
        if self._file is not None:
            self._file.close()
