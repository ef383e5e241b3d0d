"""Pages of a cache on their way to a file and back, as arrays of pykv.tensor_files.

A cache as in pykv/pages.py. Functions take an op's name, for errors.
"""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import load_cupy, on_gpu, to_host
from pykv.errors import FormatError
from pykv.page_arrays import given_scales, moving_arrays, same_values
from pykv.pages import Pages, host_pages, swap_in, swap_out
from pykv.tensor_files import Header, read_arrays

if TYPE_CHECKING:
    from pykv.kvtc import Codec


class Stored(NamedTuple):
    """Pages of a file, in host memory; `given` scales belong to the whole cache."""

    pages: Pages
    given: dict[str, Any]


def fetch(
    cache: Any,
    ids: Any,
    codec: Codec | None = None,
    tokens: int | None = None,
    hadamard: bool = False,
) -> dict[str, Any]:
    """Arrays of pages on the host, by name: [L, n, ...] and given scales; or with a codec, see
    pages.swap_out, the bytes of a stream. Waits for a GPU."""
    store = swap_out(cache, ids, codec=codec, tokens=tokens, hadamard=hadamard)
    wait(cache)
    if codec is not None:
        return dict(stream=np.frombuffer(store.to_bytes(), np.uint8))
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
    """Read `more` arrays and `count` pages from a file whose facts are those of the cache.

    Raises:
        FormatError: it has other arrays, or is damaged.
    """
    store = host_pages(cache, count)
    given = {name: to_host(x).copy() for name, x in given_scales(cache).items()}
    read_arrays(op, file, path, header, {**more, **moving_arrays(store), **given})
    return Stored(store, given)


def check_scales(op: str, path: Path, stored: Stored, cache: Any) -> None:
    """Check that scales that heads or tensors of a cache share are unset, or those of the file.

    Raises:
        FormatError: they are not.
    """
    for name, x in stored.given.items():
        known = to_host(getattr(cache, name))
        if known.any() and not same_values(x, known):
            raise FormatError(f"{op}: {path} has other {name}, expected those of the cache, or 0")


def put(cache: Any, ids: Any, stored: Stored) -> None:
    """Write pages, and given scales, to pages `ids` of a cache. Waits for a GPU."""
    for name, x in stored.given.items():
        scales = getattr(cache, name)
        scales[...] = load_cupy().asarray(x) if on_gpu(scales) else x
    swap_in(cache, ids, stored.pages)
    wait(cache)


def wait(cache: Any) -> None:
    """Wait for a cache's GPU, if it is on one: for CuPy's current stream."""
    if on_gpu(cache.k):
        cuda.synchronize()
