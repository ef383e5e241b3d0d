"""A batch of sequences of one cache, addressed by columns as libraries of padded batches do.

Column c is the c-th token that every sequence was given. Where a sequence was padded, nothing is
stored: its later tokens move up, and `seen` remembers which columns it has. Padding so takes no
memory, and attention needs no mask.

Dimensions: B sequences, n new columns, T = B * n rows less those of padding, H KV heads, HQ query
heads, D head size, M pages a sequence can have.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykv.arrays import module_of
from pykv.blocks import page_table, slots
from pykv.errors import CapacityError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import paged_convert
from pykv.pool import PagedKVCache


@dataclass
class Step:
    """Columns that all layers get one after the other, as arrays where the cache is.

    Attributes:
        start, stop: the columns.
        seen: [B, stop] bool, on the host; which columns up to `stop` each sequence has.
        is_whole: whether they have all.
        rows: [T] which rows of [B * n] are stored; None: all.
        slots: [T] int32; where they are stored.
        table, lengths: [B, M] and [B] int32, of the sequences with these columns.
        starts: [B + 1] int32; where each sequence's rows begin among T.
    """

    start: int
    stop: int
    seen: Any
    is_whole: bool
    rows: Any
    slots: Any
    table: Any
    lengths: Any
    starts: Any


class Batch:
    """The sequences of a batch, and the cache that holds them, which forks share.

    Args:
        pool: the cache; may be that of other batches.
        size: B.
        grows: whether the cache may take more memory when its pages are used up.

    Attributes:
        seen: [B, columns] bool; which columns each sequence has.
        columns: of each layer, how many it was given.

    Gives its pages back when nothing refers to it any more, and somebody asks for free ones.
    """

    def __init__(self, pool: PagedKVCache, size: int, *, grows: bool):
        self.pool, self._grows = pool, grows
        self.columns = [0] * pool.sizes[0]
        self.seen = np.zeros((size, 0), bool)
        self._pages: list[list[int]] = [[] for _ in range(size)]
        self._step: Step | None = None
        weakref.finalize(self, _free, pool.manager.free_later, self._pages)

    @property
    def size(self) -> int:
        """B, the number of sequences."""
        return len(self._pages)

    def begin(self, op: str, layer: int, n: int, new: Any = None, *, past: Any = None) -> Step:
        """Make room for columns of a layer; the layers behind it share what is made for the first.

        Args:
            op: of the caller, for errors.
            layer: its number.
            n: new columns of every sequence.
            new: [B, n] bool, which of them hold tokens; None: all.
            past: [B, columns] bool, what the caller takes the earlier ones for; None: not checked.

        Raises:
            UnsupportedError: `past` is not what was stored.
            ParameterError: the layer was given fewer columns than another one.
            CapacityError: the cache is full and does not grow, or the memory cannot be had.
        """
        start = self.columns[layer]
        if past is not None and (past != self.seen[:, :start]).any():
            raise UnsupportedError(
                f"{op}: attention_mask shows or hides tokens that the cache holds, expected what "
                "it said when they came"
            )
        step = self._step
        is_next = step is not None and (step.start, step.stop) == (start, start + n)
        if step is not None and is_next and new is None and step.rows is None:
            return step  # most layers share one step
        new = np.ones((self.size, n), bool) if new is None else new
        seen = np.concatenate((self.seen[:, :start], new), axis=1)
        if step is not None and is_next and np.array_equal(step.seen, seen):
            return step
        if start < max(self.columns):
            raise ParameterError(
                f"{op}: layer {layer} has {start} tokens and is given {n}, expected as others, "
                f"which have {max(self.columns)}; after a failed call crop or reset the cache"
            )
        self._step = self._new_step(start, seen)
        self.seen = seen
        return self._step

    def _new_step(self, start: int, seen: Any) -> Step:
        counts = seen.sum(1).tolist()
        before = seen[:, :start].sum(1).tolist()
        new = seen[:, start:]
        for pages, first, last in zip(self._pages, before, counts, strict=True):
            self._extend(pages, first, last)
        P, xp = self.pool.page_size, module_of(self.pool.k)
        flat = [slots(*x, P) for x in zip(self._pages, before, counts, strict=True)]
        width = max(map(len, self._pages))
        return Step(
            start=start,
            stop=seen.shape[1],
            seen=seen,
            is_whole=bool(seen.all()),
            rows=None if new.all() else xp.asarray(np.flatnonzero(new)),
            slots=xp.asarray(np.concatenate(flat)),
            table=xp.asarray(page_table(self._pages, width)),
            lengths=xp.asarray(np.array(counts, np.int32)),
            starts=xp.asarray(np.append(0, np.cumsum(new.sum(1))).astype(np.int32)),
        )

    def _extend(self, pages: list[int], start: int, stop: int) -> None:
        try:
            self.pool.extend(pages, start, stop)
        except CapacityError:
            if not self._grows:
                raise
            manager = self.pool.manager
            self.pool.grow(2 * manager.num_pages + manager.pages_for(stop))
            self.pool.extend(pages, start, stop)

    def append(self, layer: int, k: Any, v: Any, step: Step) -> None:
        """Store rows [T, H, D] of a layer."""
        self.pool.append(layer, k, v, step.slots)
        self.columns[layer] = step.stop

    def gather(self, layer: int, k_out: Any, v_out: Any, step: Step) -> None:
        """Read a layer's first pages of each sequence, of a step that is whole, into
        [B, M, P, H, D] of floats."""
        pool, xp, outs = self.pool, module_of(step.table), (k_out, v_out)
        pages = xp.ascontiguousarray(step.table[:, : k_out.shape[1]]).reshape(-1)
        outs = tuple(x.reshape(-1, *x.shape[2:]) for x in outs)
        if xp is np and pool.spec.layout == "NHD" and _kept(pool, outs):
            for array, out in zip(pool.layers[layer], outs, strict=True):
                bits = f"u{out.itemsize}"
                array.view(bits).take(pages, 0, out.view(bits), "clip")  # twice as fast as gather
            return
        paged_convert.gather(**pool.pools(layer), pages=pages, k_out=outs[0], v_out=outs[1])

    # --- Sequences that come and go ---

    def crop(self, columns: int) -> None:
        """Forget all columns from this one on; their pages stay set aside."""
        self.columns = [min(n, columns) for n in self.columns]
        self.seen, self._step = self.seen[:, :columns], None

    def select(self, indices: Any) -> None:
        """Make sequence i what sequence indices[i] was; pages are shared until they are written."""
        if len(indices) and not (0 <= min(indices) and max(indices) < self.size):
            raise ShapeError(
                f"Batch.select: indices are {indices}, expected sequences below {self.size}"
            )
        old = list(self._pages)
        self._pages[:] = [self._fork(old[i]) for i in indices]
        _free(self.pool.manager.free, old)
        self.seen, self._step = self.seen[indices], None

    def fork(self) -> Batch:
        """A second batch of the same tokens, in the same pages until either writes to them."""
        other = Batch(self.pool, 0, grows=self._grows)
        other._pages += map(self._fork, self._pages)
        other.seen, other.columns = self.seen.copy(), list(self.columns)
        return other

    def _fork(self, pages: list[int]) -> list[int]:
        return self.pool.manager.fork(pages) if pages else []


def rows_of(x: Any, rows: Any) -> Any:
    """Rows of an array, by their numbers; as bits, since CuPy computes with no bfloat16."""
    return x.view(f"u{x.itemsize}")[rows].view(x.dtype)


def set_rows(x: Any, rows: Any, values: Any) -> None:
    """Write rows of an array, by their numbers; values of its dtype, likewise."""
    bits = f"u{x.itemsize}"
    x.view(bits)[rows] = values.view(bits)


def _free(free: Callable[[list[int]], None], sequences: list[list[int]]) -> None:
    for pages in sequences:
        free(pages)


def _kept(pool: PagedKVCache, outs: tuple[Any, ...]) -> bool:
    """Whether arrays are of the very elements that a pool holds."""
    kinds = pool.spec.kinds
    return all(
        not kind.largest and kind.dtype == x.dtype for kind, x in zip(kinds, outs, strict=True)
    )
