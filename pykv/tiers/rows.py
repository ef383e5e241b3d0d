"""Rows of host memory with pages of one form, and what threads do with them and files."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from pykv.arrays import load_cupy, on_gpu
from pykv.errors import ParameterError
from pykv.pool import PagedKVCache
from pykv.tiers.coded import CodedForm
from pykv.tiers.disk import DiskTier
from pykv.tiers.forms import Form
from pykv.tiers.host import HostTier, allocate
from pykv.tiers.moves import Moved, Moves
from pykv.tiers.sizes import Limit

EXACT_SHARE = 4  # with a codec, 1 / 4 of host memory holds exact first pages


class Rows:
    """Rows of host memory of one form.

    Attributes:
        form, file_form: of the rows, and of files that are made of them.
        is_coded: only pages whose places rise can go at once.
        host: which pages are in them.
        moves: to the cache and back.
        places: of the page in each row.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        form: Any,
        file_form: Any,
        count: int,
        *,
        exact_pages: int,
        policy: str,
    ) -> None:
        xp = load_cupy() if on_gpu(cache.k) else np
        self.form, self.file_form = form, file_form
        self._cache, self._exact_pages = cache, exact_pages
        self.is_coded = isinstance(form, CodedForm)
        rows = allocate("Tiers", "host_cache", xp, count, form.nbytes)
        self.host = HostTier(rows, policy)
        self.moves = Moves(cache, form, self.host.rows)
        self.places = [0] * count

    def add(self, key: bytes, slot: int, place: int) -> None:
        """Note the page that a claimed row holds now."""
        self.host.add(key, slot)
        self.places[slot] = place

    def file_form_at(self, place: int) -> Any:
        """The form of a page in a file, by its place."""
        return self.form if place < self._exact_pages else self.file_form

    def write(self, files: DiskTier, key: bytes, slot: int, moved: Moved) -> float:
        """Write a row to a file, of a thread, once it was moved there. Returns seconds.

        Raises:
            OSError: the system refuses.
        """
        moved.wait()
        began = time.perf_counter()
        row, place = self.host.rows[slot], self.places[slot]
        form = self.file_form_at(place)
        if form is not self.form:
            row = np.zeros(form.nbytes, np.uint8)
            view = form.view(row[None], self._cache)
            form.put(self.moves.view, view, [slot], [0], [place])
        files.write(key, form.to_heads(row), place)
        return time.perf_counter() - began

    def read(
        self, files: DiskTier, key: bytes, slot: int, place: int, before: Moved
    ) -> float | None:
        """Read a file into a claimed row, of a thread, once what was copied there `before` is.
        Returns seconds; None if there is no file any more.

        Raises:
            FormatError, OSError: it is damaged, or cannot be read.
        """
        before.wait()
        began = time.perf_counter()
        form = self.file_form_at(place)
        heads = np.empty(form.heads_shape, np.uint8)
        found = files.read(key, heads, place)
        if found and form is self.form:
            form.from_heads(heads, self.host.rows[slot])
        elif found:
            row = np.zeros(form.nbytes, np.uint8)
            form.from_heads(heads, row)
            form.take(form.view(row[None], self._cache), self.moves.view, [0], [slot], [place])
        return time.perf_counter() - began if found else None


def counts_of(limit: Limit, plain: Form, form: Form | CodedForm) -> list[int]:
    """Rows that host memory has room for; where they are coded, of pages as they are first.

    Raises:
        ParameterError: none.
    """
    if not isinstance(form, CodedForm):
        check_fits("host_cache", limit.nbytes, form.nbytes)
        return [limit.nbytes // form.nbytes]
    share = limit.nbytes // EXACT_SHARE
    least = EXACT_SHARE * plain.nbytes
    if share < plain.nbytes or limit.nbytes - share < form.nbytes:
        raise ParameterError(
            f"Tiers: host_cache is {limit.nbytes:,} bytes, expected at least {least:,}, of which "
            f"1/{EXACT_SHARE} keeps first pages as they are"
        )
    return [share // plain.nbytes, (limit.nbytes - share) // form.nbytes]


def check_fits(name: str, limit: int, nbytes: int) -> None:
    """Check that a tier has room for a page.

    Raises:
        ParameterError: it has not.
    """
    if limit < nbytes:
        raise ParameterError(
            f"Tiers: {name} is {limit:,} bytes, expected at least the {nbytes:,} of a page"
        )
