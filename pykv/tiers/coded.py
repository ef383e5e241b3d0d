"""Pages outside their cache as coded tokens of KVTC: rows of bytes, of a codec of pykv.kvtc.

Dimensions: P tokens a page, B bytes of a coded token.

    row  coded tokens [P, B], see pykv.kvtc.stream; none of them is kept otherwise

Keys are coded without their rotation, so it matters where in its sequence a page is: its `place`,
how many pages come before it. Pages of the first tokens, of which KVTC keeps some as they are, are
no business of this form: see `exact_pages`.
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
    """Rows of this form.

    Attributes:
        rows: [N, P * B] uint8, of the host, or behind `head` bytes of a device's memory.
        memory: [head + N * P * B] uint8 of the device, None of the host.
    """

    def __init__(self, rows: Any, memory: Any = None) -> None:
        self.rows, self.memory = rows, memory

    def data(self, count: int, nbytes: int) -> Any:
        """Memory for so many bytes of Coded.data, the last of which are the first `count` rows
        where these are on a device."""
        if self.memory is None:
            return np.empty(nbytes, np.uint8)
        end = self.memory.size - self.rows[count:].size
        return self.memory[end - nbytes : end]


class CodedForm:
    """How pages of a cache lie in rows.

    Args:
        op, name: for messages, the latter of the argument that names the codec.
        codec: of the cache's model.
        cache: whose pages these are.
        hadamard: as of Codec.compress.

    Attributes:
        name: what tells its rows from those of other forms.
        nbytes: of a row.
        exact_pages: the first pages of a sequence, which another form keeps.

    Raises:
        ParameterError: heads or tensors of the cache share scales.

    Calls may come from several threads: the codec has them take turns.
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
        """Of a page in a file: one, as a token's code mixes its heads."""
        return 1, self.nbytes

    def to_heads(self, row: np.ndarray) -> np.ndarray:
        """The bytes [1, nbytes] of a row."""
        return row[None]

    def from_heads(self, heads: np.ndarray, row: np.ndarray) -> None:
        """Fill a row."""
        row[...] = heads[0]

    def view(self, rows: np.ndarray, cache: Any) -> CodedRows:
        """Rows [N, nbytes] uint8 of the host."""
        return CodedRows(rows)

    def staging(self, cache: Any, count: int) -> tuple[Any, CodedRows]:
        """Rows of the device for so many pages, and as this form sees them."""
        size, tokens = count * self.nbytes, count * self._page_size
        whole = self._header(tokens, cache.spec).nbytes
        memory = load_cupy().empty(whole, np.uint8)
        rows = memory[whole - size :].reshape(count, self.nbytes)
        return rows, CodedRows(rows, memory)

    def put(
        self, source: Any, target: CodedRows, ids: list[int], slots: list[int], places: list[int]
    ) -> None:
        """Code pages of a cache, whose places rise, to rows; of a device to its first ones."""
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
        """Decode rows, of a device its first ones, to pages of a cache, whose places rise."""
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
        """A page table that has pages at their places, of a length that is a power of two, for few
        layouts; and the positions of their tokens."""
        table = np.zeros(1 << places[-1].bit_length(), np.int32)
        table[places] = ids
        offsets = np.arange(self._page_size, dtype=np.int32)
        first = np.array(places, np.int32) * np.int32(self._page_size)
        return table, (first[:, None] + offsets).reshape(-1)


def rising(
    pages: Sequence[tuple[bytes, int]], place_of: Callable[[int], int]
) -> list[list[tuple[bytes, int]]]:
    """Pages in groups, in each of which places rise; as few as can be."""
    groups: list[list[tuple[bytes, int]]] = []
    seen: Counter[int] = Counter()
    for key, page in sorted(pages, key=lambda pair: place_of(pair[1])):
        place = place_of(page)
        if seen[place] == len(groups):
            groups.append([])
        groups[seen[place]].append((key, page))
        seen[place] += 1
    return groups
