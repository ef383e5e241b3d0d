"""A batch of sequences in one cache, addressed by columns, as libraries with padded batches do.

Column c is the c-th token given to every sequence. Padding is not stored: later tokens of the
sequence move up, and `seen` records which columns it has. So padding takes no memory, and attention
needs no mask.

Dimensions: B sequences, n new columns, T = B * n rows less those of padding, H KV heads, HQ query
heads, D head size, M pages a sequence can have.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from pykv import interrupts
from pykv.arrays import module_of
from pykv.blocks import page_table, slots
from pykv.errors import CapacityError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import paged_convert
from pykv.pool import PagedKVCache


class Step:
    """New columns, which all layers append one after the other. Arrays are on the cache's device,
    and are made at their first use.

    Args:
        pool: the cache.
        pages: of each sequence, with room for these columns.
        start: the first new column.
        seen: [B, stop] bool, on the host; which columns below `stop` each sequence has.

    Attributes:
        start, stop, seen: as given.
        is_whole: whether every sequence has all columns.
        tensors: for the caller: tensors derived from this step.
    """

    def __init__(self, pool: PagedKVCache, pages: list[list[int]], start: int, seen: Any):
        self._pool, self._pages, self._xp = pool, list(map(list, pages)), module_of(pool.k)
        self.start, self.seen, self.stop = start, seen, seen.shape[1]
        self.is_whole = bool(seen.all())
        self.tensors: Any = None

    @cached_property
    def run(self) -> tuple[int, int] | None:
        """The first page and the distance between sequences, if the pages of each sequence are
        contiguous and all distances are equal; else None."""
        num_pages = self._pool.manager.pages_for(self.stop)
        first = [pages[0] for pages in self._pages if pages]
        step = first[1] - first[0] if len(first) > 1 else 0
        if not self.is_whole or not first or step < 0:
            return None
        for b, pages in enumerate(self._pages):
            begin = first[0] + b * step
            if pages[:num_pages] != list(range(begin, begin + num_pages)):
                return None
        return first[0], step

    @cached_property
    def rows(self) -> Any:
        """[T] the rows of [B * n] that are stored; None: all."""
        new = self.seen[:, self.start :]
        return None if new.all() else self._xp.asarray(np.flatnonzero(new))

    @cached_property
    def slots(self) -> Any:
        """[T] int32; the slots of the stored rows."""
        starts, stops = (tokens_of(self.seen, n) for n in (self.start, self.stop))
        sequences = zip(self._pages, starts, stops, strict=True)
        flat = [slots(*x, self._pool.page_size) for x in sequences]
        return self._xp.asarray(np.concatenate(flat))

    @cached_property
    def table(self) -> Any:
        """[B, M] int32, the page table."""
        return self._xp.asarray(page_table(self._pages, max(map(len, self._pages))))

    @cached_property
    def pages(self) -> Any:
        """[B * m] int32: the pages up to column `stop`, sequence by sequence; only if the step is
        whole."""
        num_pages = self._pool.manager.pages_for(self.stop)
        return self._xp.ascontiguousarray(self.table[:, :num_pages]).reshape(-1)

    @cached_property
    def lengths(self) -> Any:
        """[B] int32, the tokens of each sequence."""
        return self._xp.asarray(self.seen.sum(1, dtype=np.int32))

    @cached_property
    def starts(self) -> Any:
        """[B + 1] int32; the offset of each sequence's rows in T."""
        counts = self.seen[:, self.start :].sum(1)
        return self._xp.asarray(np.append(0, np.cumsum(counts)).astype(np.int32))


class Batch:
    """The sequences of a batch, and their cache, which forks share.

    Args:
        pool: the cache; other batches may use it too.
        size: B.
        grows: whether the cache may grow when its pages are used up.
        in_runs: whether to divide all pages among the sequences, so that each has contiguous pages;
            ends when sequences share a page, or at a fork.

    Attributes:
        seen: [B, columns] bool; which columns each sequence has.
        columns: how many columns each layer was given.

    Once nothing refers to it any more, its pages are freed at the next request for free pages.
    """

    def __init__(self, pool: PagedKVCache, size: int, *, grows: bool, in_runs: bool = False):
        self.pool, self._grows, self._in_runs = pool, grows, in_runs
        self.columns = [0] * pool.sizes[0]
        self.seen = np.zeros((size, 0), bool)
        self._pages: list[list[int]] = [[] for _ in range(size)]
        self._step: Step | None = None
        weakref.finalize(self, _free, pool.manager.free_later, self._pages)
        self._share_out()

    @property
    def size(self) -> int:
        """B, the number of sequences."""
        return len(self._pages)

    def begin(self, op: str, layer: int, n: int, new: Any = None, *, past: Any = None) -> Step:
        """Make room for new columns of a layer; later layers share the first layer's step.

        Args:
            op: of the caller, for errors.
            layer: its index.
            n: new columns of every sequence.
            new: [B, n] bool, which of them hold tokens; None: all.
            past: [B, columns] bool, the caller's mask of the earlier ones; None: not checked.

        Raises:
            UnsupportedError: `past` differs from the stored columns.
            ParameterError: the layer was given fewer columns than another one.
            CapacityError: the cache is full and may not grow, or its memory cannot be allocated.
        """
        start = self.columns[layer]
        if past is not None and (past != self.seen[:, :start]).any():
            raise UnsupportedError(
                f"{op}: attention_mask shows or hides tokens that the cache holds, expected as in "
                "the call that added them"
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
        self._step = None  # frees its tensors before the cache may grow
        starts, stops = tokens_of(self.seen, start), tokens_of(seen, seen.shape[1])
        for pages, first, last in zip(self._pages, starts, stops, strict=True):
            self._extend(pages, first, last)
        self._step, self.seen = Step(self.pool, self._pages, start, seen), seen
        return self._step

    def _extend(self, pages: list[int], start: int, stop: int) -> None:
        try:
            self.pool.extend(pages, start, stop)
        except CapacityError:
            if not self._grows:
                raise
            manager = self.pool.manager
            wanted = self.size * manager.pages_for(stop)
            self.pool.grow(manager.num_pages + max(manager.num_pages, wanted))
            self._share_out()
            self.pool.extend(pages, start, stop)

    @interrupts.finished
    def _share_out(self) -> None:
        """Give each sequence an equal, contiguous part of all pages, if no other batch has any."""
        pool, manager, old = self.pool, self.pool.manager, sum(self._pages, [])
        if not self._in_runs or manager.num_free + len(old) < manager.num_pages:
            return
        counts, new = list(map(len, self._pages)), []
        _free(manager.free, self._pages)
        part = manager.num_pages // self.size
        parts = [range(i * part, (i + 1) * part) for i in range(self.size)]
        parts[-1] = range(parts[-1].start, manager.num_pages)
        for pages, numbers in zip(self._pages, parts, strict=True):
            manager.extend(pages, 0, len(numbers) * pool.page_size)
        for pages, numbers, n in zip(self._pages, parts, counts, strict=True):
            pages[:] = numbers  # together they hold all pages, so any assignment is valid
            new += pages[:n]
        for array in (*pool.k, *pool.v):  # by layer: the right side is a copy
            array[new] = array[old]

    def append(self, layer: int, k: Any, v: Any, step: Step) -> None:
        """Store rows [T, H, D] of a layer."""
        self.pool.append(layer, k, v, step.slots)
        self.columns[layer] = step.stop

    def gather(self, layer: int, k_out: Any, v_out: Any, step: Step) -> None:
        """Read the pages of a layer up to column `stop`, of a whole step, into [B, M, P, H, D]
        floats."""
        k_out, v_out = (x.reshape(-1, *x.shape[2:]) for x in (k_out, v_out))
        pools = self.pool.pools(layer)
        paged_convert.gather(**pools, pages=step.pages, k_out=k_out, v_out=v_out)

    # --- Sequences that come and go ---

    def crop(self, columns: int) -> None:
        """Forget all columns from `columns` on; their pages stay with the sequences."""
        self.columns = [min(n, columns) for n in self.columns]
        self.seen, self._step = self.seen[:, :columns], None

    def reset(self, layer: int) -> None:
        """Forget a layer's columns; `begin` gives it others once all layers were reset."""
        self.columns[layer], self._step = 0, None

    def select(self, indices: Any) -> None:
        """Replace sequence i by sequence indices[i]; pages are shared until they are written."""
        if len(indices) and not (0 <= min(indices) and max(indices) < self.size):
            raise ShapeError(
                f"Batch.select: indices are {indices}, expected sequences below {self.size}"
            )
        old, self._in_runs = list(self._pages), False
        self._pages[:] = self._forks(indices)
        _free(self.pool.manager.free, old)
        self.seen, self._step = self.seen[indices], None

    def fork(self) -> Batch:
        """A copy of the batch, which shares pages until either writes to them."""
        other = Batch(self.pool, 0, grows=self._grows)
        other._pages += self._forks(range(self.size))
        other.seen, other.columns = self.seen.copy(), list(self.columns)
        self._in_runs = False
        return other

    def _forks(self, indices: Any) -> list[list[int]]:
        """New sequences that share the used pages of sequences `indices`."""
        used = self._used()
        return [self.pool.manager.fork(used[i]) if used[i] else [] for i in indices]

    def _used(self) -> list[list[int]]:
        """The pages of each sequence that hold tokens."""
        pages_for, tokens = self.pool.manager.pages_for, tokens_of(self.seen, self.seen.shape[1])
        return [pages[: pages_for(n)] for pages, n in zip(self._pages, tokens, strict=True)]

    @property
    def used_pages(self) -> list[int]:
        """Pages that hold tokens, each once."""
        return sorted({page for pages in self._used() for page in pages})


def rows_of(x: Any, rows: Any) -> Any:
    """Rows of an array, by index; moved as integers, for CuPy's limited bfloat16 support."""
    return x.view(f"u{x.itemsize}")[rows].view(x.dtype)


def set_rows(x: Any, rows: Any, values: Any) -> None:
    """Write `values`, of the array's dtype, to rows of an array, by index; see `rows_of`."""
    bits = f"u{x.itemsize}"
    x.view(bits)[rows] = values.view(bits)


def tokens_of(seen: Any, columns: int) -> list[int]:
    """The number of tokens of each sequence in the first `columns` of `seen` [B, ...]."""
    counts: list[int] = seen[:, :columns].sum(1).tolist()
    return counts


def _free(free: Callable[[list[int]], None], sequences: list[list[int]]) -> None:
    for pages in sequences:
        free(pages)
