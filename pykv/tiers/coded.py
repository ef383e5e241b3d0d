"""The form of pages coded by KVTC (pykv.kvtc): rows of bytes.

Dimensions: P tokens a page, B bytes of a coded token.

    row  coded tokens [P, B], see pykv.kvtc.stream; no token is stored uncoded

KVTC removes the rotation of keys before it codes them, so coding needs a page's `place`: the number
of pages before it in its sequence. It stores the first tokens of a sequence uncoded; their pages
keep the plain form, see `exact_pages`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pykv.arrays import load_cupy
from pykv.errors import ParameterError
from pykv.kvtc import Codec, Coded, stream
from pykv.number_texts import counted
from pykv.pool import PagedKVCache


class CodedRows:
    """Rows of coded tokens.

    Attributes:
        rows: [N, P * B] uint8 on the host, or the end of `memory`.
        memory: [header + N * P * B] uint8 on the device; None on the host.
    """

    def __init__(self, rows: Any, memory: Any = None) -> None:
        self.rows, self.memory = rows, memory

    def data(self, count: int, nbytes: int) -> Any:
        """Memory for `nbytes` of Coded.data. On a device it ends with the first `count` rows, so
        the codec reads and writes them in place."""
        if self.memory is None:
            return np.empty(nbytes, np.uint8)
        end = self.memory.size - self.rows[count:].size
        return self.memory[end - nbytes : end]


class CodedForm:
    """The layout of a coded page in a row; the same methods as Form.

    Args:
        op, name: for messages; `name` is the argument that names the codec.
        codec: of the cache's model.
        cache: the cache.
        hadamard: see Codec.compress.

    Attributes:
        name: the form's name in the identity of files.
        nbytes: of a row.
        exact_pages: how many first pages of a sequence keep the plain form.

    Raises:
        ParameterError: heads or tensors of the cache share scales.

    Thread-safe: the codec serialises calls.
    """

    def __init__(
        self, op: str, name: str, codec: Codec, cache: PagedKVCache, hadamard: bool
    ) -> None:
        if cache.spec.has_given_scales:
            raise ParameterError(
                f"{op}: {name} has an artefact, expected none: the cache holds {cache.spec}"
            )
        self._codec, self._hadamard, self._page_size = codec, hadamard, cache.page_size
        self.nbytes = cache.page_size * codec.row_bytes
        self.exact_pages = -(-codec.sinks // cache.page_size)
        how = f"{stream.VERSION} {codec.artefact} {codec.ratio}"
        self.name = f"kvtc {how} after {counted(self.exact_pages, 'page')}"

    @property
    def heads_shape(self) -> tuple[int, int]:
        """One head of all bytes: a token's code mixes its heads."""
        return 1, self.nbytes

    def to_heads(self, row: np.ndarray) -> np.ndarray:
        """A row as [1, nbytes]."""
        return row[None]

    def from_heads(self, heads: np.ndarray, row: np.ndarray) -> None:
        """Fill a row."""
        row[...] = heads[0]

    def view(self, rows: np.ndarray, cache: Any) -> CodedRows:
        """Rows [N, nbytes] uint8 of the host."""
        return CodedRows(rows)

    def staging(self, cache: Any, count: int) -> tuple[Any, CodedRows]:
        """New rows on the device for `count` pages, and their view."""
        size, tokens = count * self.nbytes, count * self._page_size
        whole = self._header(tokens, cache.spec).nbytes
        memory = load_cupy().empty(whole, np.uint8)
        rows = memory[whole - size :].reshape(count, self.nbytes)
        return rows, CodedRows(rows, memory)

    def put(
        self, source: Any, target: CodedRows, ids: list[int], slots: list[int], places: list[int]
    ) -> None:
        """Code pages of a cache, of ascending places, into rows; on a device into the first
        ones."""
        table, positions = self._sequence(ids, places)
        header = self._header(len(positions), source.spec)
        how: dict[str, Any] = dict(sinks=0, window=0, hadamard=self._hadamard, check=False)
        out = target.data(len(ids), header.nbytes)
        coded = self._codec.compress(source, table, positions, out=out, **how)
        if target.memory is None:
            target.rows[slots] = coded.arrays()["rows"].reshape(len(ids), self.nbytes)

    def take(
        self, source: CodedRows, target: Any, slots: list[int], ids: list[int], places: list[int]
    ) -> None:
        """Decode rows, on a device the first ones, into pages of a cache, of ascending places."""
        table, positions = self._sequence(ids, places)
        header = self._header(len(positions), target.spec)
        coded = Coded(header, source.data(len(ids), header.nbytes))
        arrays = coded.arrays()
        if source.memory is None:
            arrays["positions"][...] = positions
            arrays["rows"].reshape(len(ids), self.nbytes)[...] = source.rows[slots]
        else:
            arrays["positions"][...] = load_cupy().asarray(positions)
        how: dict[str, Any] = dict(hadamard=self._hadamard, check=False)
        self._codec.decompress(coded, target, table, **how)

    def _header(self, tokens: int, spec: Any) -> Any:
        return self._codec.header(tokens, spec, sinks=0, window=0)

    def _sequence(self, ids: list[int], places: list[int]) -> tuple[Any, Any]:
        """A page table with the pages at their places, and the positions of their tokens. Its
        length is a power of two, so that few layouts are made."""
        table = np.zeros(1 << places[-1].bit_length(), np.int32)
        table[places] = ids
        offsets = np.arange(self._page_size, dtype=np.int32)
        first = np.array(places, np.int32) * np.int32(self._page_size)
        return table, (first[:, None] + offsets).reshape(-1)


def rising(
    pages: Sequence[tuple[bytes, int]], place_of: Callable[[int], int]
) -> list[list[tuple[bytes, int]]]:
    """Pages in as few groups as possible, with strictly ascending places in each."""
    groups: list[list[tuple[bytes, int]]] = []
    seen: Counter[int] = Counter()
    for key, page in sorted(pages, key=lambda pair: place_of(pair[1])):
        place = place_of(page)
        if seen[place] == len(groups):
            groups.append([])
        groups[seen[place]].append((key, page))
        seen[place] += 1
    return groups
