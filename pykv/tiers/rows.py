"""Rows of host memory: the forms of their pages, and their way to files and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import load_cupy, on_gpu
from pykv.errors import ParameterError
from pykv.kvtc import Codec
from pykv.pool import PagedKVCache
from pykv.tiers.coded import CodedForm
from pykv.tiers.disk import DiskTier
from pykv.tiers.forms import Form, form_of, plain_form
from pykv.tiers.host import HostTier, allocate
from pykv.tiers.moves import Moved, Moves
from pykv.tiers.sizes import Limit, artefact_of

Opener = Callable[[str, str, Any], Codec]  # (name of the argument, "FILE:RATIO", array module)
EXACT_SHARE = 4  # with an artefact, 1 / 4 of host memory holds the first pages, uncoded


class Rows:
    """Rows of host memory that hold pages of one form.

    Attributes:
        form, file_form: of rows, and of the files written from them.
        is_coded: whether rows are coded by KVTC; then one move takes only pages of ascending
            places.
        host: which page is in which row.
        moves: copies between rows and the cache.
        places: for each row, where in its sequence its page is.
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
        """Record the page that a claimed row now holds."""
        self.host.add(key, slot)
        self.places[slot] = place

    def file_form_at(self, place: int) -> Any:
        """The form of a page in a file, by its place."""
        return self.form if place < self._exact_pages else self.file_form

    def write(self, files: DiskTier, key: bytes, slot: int, moved: Moved) -> float:
        """Write a row to a file once `moved` has filled it. Runs in a thread. Returns seconds.

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
        """Read a file into a claimed row once `before`, copies out of it, is done. Runs in a
        thread. Returns seconds; None if the file is gone.

        Raises:
            FormatError, OSError: the file is damaged, or cannot be read.
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


class Forms(NamedTuple):
    """The forms of pages in tiers.

    Attributes:
        plain: without a codec.
        rows: of host memory.
        files: of the disk tier; equals `rows` without one.
    """

    plain: Form
    rows: Form | CodedForm
    files: Form | CodedForm

    @property
    def exact_pages(self) -> int:
        """How many first pages of a sequence stay plain."""
        return max(x.exact_pages for x in (self.rows, self.files))


def choose_forms(
    cache: PagedKVCache,
    host: Limit,
    disk: Limit | None,
    open_codec: Opener | None,
    hadamard: bool,
) -> Forms:
    """The forms for the codecs of both tiers.

    Raises:
        ParameterError: a codec is unavailable, or would save nothing.
    """

    def form(name: str, codec: str, xp: Any) -> Form | CodedForm:
        if artefact_of(codec) is None:
            return form_of("Tiers", name, cache, codec)
        if open_codec is None:
            raise ParameterError(f"Tiers: {name}'s codec is {codec!r}, expected a model's")
        return CodedForm("Tiers", name, open_codec(name, codec, xp), cache, hadamard)

    plain = plain_form(cache)
    rows = form("host_cache", host.codec, load_cupy() if on_gpu(cache.k) else np)
    if disk is None or disk.codec == host.codec:
        return Forms(plain, rows, rows)
    files = form("disk_cache", disk.codec, np)
    is_smaller = files.nbytes < rows.nbytes
    if not is_smaller and disk.codec != "none":
        raise ParameterError(
            f"Tiers: disk_cache has the codec {disk.codec}, {files.nbytes:,} bytes a page, "
            f"expected none or one of less than the {rows.nbytes:,} of host_cache's {host.codec}: "
            "what that lost does not come back"
        )
    if is_smaller and isinstance(rows, CodedForm):
        raise ParameterError(
            f"Tiers: disk_cache has the codec {disk.codec}, expected none or {host.codec}: "
            "what an artefact coded is not coded again"
        )
    return Forms(plain, rows, files if is_smaller else rows)


def counts_of(limit: Limit, forms: Forms) -> list[int]:
    """How many rows of each form fit into host memory; the plain form first if rows are coded.

    Raises:
        ParameterError: no row fits.
    """
    plain, form = forms.plain, forms.rows
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
        ParameterError: a page is larger.
    """
    if limit < nbytes:
        raise ParameterError(
            f"Tiers: {name} is {limit:,} bytes, expected at least the {nbytes:,} of a page"
        )
