"""Pages of a cache on their way to a file and back, as arrays of pykv.tensor_files.

A cache as in pykv/pages.py. With a codec the pages are those of a sequence in order, from its
start, and the file has a stream of their coded tokens. Functions take an op's name, for errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import load_cupy, on_gpu, to_host
from pykv.errors import DtypeError, FormatError
from pykv.kvtc.codec import Codec
from pykv.kvtc.stream import Coded, parse
from pykv.options import check_flag
from pykv.page_arrays import given_scales, moving_arrays, same_values
from pykv.pages import Pages, host_pages, swap_in, swap_out
from pykv.tensor_files import Header, read_arrays, shown


class Stored(NamedTuple):
    """Pages of a file, in host memory.

    Attributes:
        num_pages: how many they are.
        pages: as they are in the cache; None if they are coded.
        given: scales that belong to the whole cache.
        coded: as a codec made them, or None.
    """

    num_pages: int
    pages: Pages | None
    given: dict[str, Any]
    coded: Coded | None


def check_codec(op: str, codec: Any, hadamard: Any = False) -> None:
    """Check that a codec is one, or None, and `hadamard` a flag."""
    check_flag(op, "hadamard", hadamard)
    if not isinstance(codec, Codec | None):
        given = type(codec).__name__
        raise DtypeError(f"{op}: codec is a {given}, expected a pykv.kvtc.Codec or None")


def fetch(cache: Any, ids: Any, page_size: int, codec: Any, hadamard: bool) -> dict[str, Any]:
    """Pages as arrays of the host by name: [L, n, ...] and given scales; with a codec the bytes of
    a stream. Waits for a GPU."""
    if codec is not None:
        positions = np.arange(len(ids) * page_size, dtype=np.int32)
        coded = codec.compress(cache, ids.astype(np.int32), positions, hadamard=hadamard)
        return dict(stream=np.frombuffer(coded.to_bytes(), np.uint8))
    store = swap_out(cache, ids)
    if on_gpu(cache.k):
        load_cupy().cuda.get_current_stream().synchronize()
    given = {name: to_host(x) for name, x in given_scales(store).items()}
    return {**moving_arrays(store), **given}


def take(
    op: str,
    file: BufferedReader,
    path: Path,
    header: Header,
    cache: Any,
    count: int,
    more: dict[str, Any],
) -> Stored:
    """Read `count` pages, and `more` arrays before them, from a file whose facts are those of the
    cache.

    Raises:
        FormatError: it has other arrays, or is damaged.
    """
    if "stream" in header.table:
        stream = np.empty(header.length(op, path, "stream"), np.uint8)
        read_arrays(op, file, path, header, {**more, "stream": stream})
        return Stored(count, None, {}, parse(stream))
    store = host_pages(cache, count)
    given = {name: to_host(x).copy() for name, x in given_scales(cache).items()}
    read_arrays(op, file, path, header, {**more, **moving_arrays(store), **given})
    return Stored(count, store, given, None)


def check_given_scales(op: str, path: Path, stored: Stored, cache: Any) -> None:
    """Check that scales that heads or tensors of a cache share are unset, or those of the file.

    Raises:
        FormatError: they are not.
    """
    for name, x in stored.given.items():
        known = to_host(getattr(cache, name))
        if known.any() and not same_values(x, known):
            raise FormatError(f"{op}: {path} has other {name}, expected those of the cache")


def check_coded(
    op: str, path: Path, stored: Stored, cache: Any, page_size: int, codec: Codec | None
) -> None:
    """Check that a codec decodes what is coded.

    Raises:
        FormatError: it was coded otherwise.
    """
    if stored.coded is not None:
        for name, has, want in _differences(
            stored.coded, stored.num_pages * page_size, cache, codec
        ):
            raise FormatError(f"{op}: {path} is coded with {name} {shown(has)}, expected {want}")


def _differences(
    coded: Coded, tokens: int, cache: Any, codec: Codec | None
) -> Iterator[tuple[str, Any, Any]]:
    """What coded tokens have that they should not: what, its value, and what is expected."""
    header = coded.header
    if codec is None:
        yield "artefact", f"{header.artefact} at ratio {header.ratio}", "a codec of these"
        return
    for name, want in vars(codec.header(tokens, cache.spec)).items():
        if getattr(header, name) != want:
            yield name, getattr(header, name), want
    positions = coded.arrays()["positions"]
    if not np.array_equal(positions, np.arange(tokens)):
        yield "positions", positions.tolist(), f"0 to {tokens - 1}"


def put(cache: Any, ids: Any, stored: Stored, codec: Codec | None, hadamard: bool) -> None:
    """Write pages that are checked to pages `ids` of a cache. Waits for a GPU."""
    if codec is not None and stored.coded is not None:
        xp = load_cupy() if on_gpu(cache.k) else np
        table = xp.asarray(ids.astype(np.int32))
        codec.decompress(stored.coded.to(xp), cache, table, hadamard=hadamard)
    for name, x in stored.given.items():
        scales = getattr(cache, name)
        scales[...] = load_cupy().asarray(x) if on_gpu(scales) else x
    if stored.pages is not None:
        swap_in(cache, ids, stored.pages)
    if on_gpu(cache.k):
        cuda.synchronize()
