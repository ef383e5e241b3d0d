"""The arrays that pages of a cache are made of: what must agree, which pages exist, where they lie.

A cache and dimensions as in pykv/pages.py. Functions take an op's name, for errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from pykv import ranges
from pykv.arrays import Dims, checker, on_gpu
from pykv.errors import ParameterError
from pykv.kinds import KVSpec

Ids = Sequence[int] | Any  # or a NumPy array


def facts_of(op: str, name: str, cache: Any) -> dict[str, Any]:
    """What two caches must agree in to exchange pages, and `pages`, in which they need not."""
    spec: KVSpec = cache.spec
    pools, scales = (cache.k, cache.v), (cache.k_scales, cache.v_scales)
    if spec.granularity == "token":
        sizes = _pages_checker(op, name, spec)(*pools, *scales)
    else:  # scales may be elsewhere than pages that were swapped out
        sizes = _pages_checker(op, name, spec)(*pools)
        _scales_checker(op, name, spec, sizes["L"], sizes["H"])(*scales)
    return dict(
        spec=str(spec),
        layers=sizes["L"],
        page_size=sizes["P"],
        heads=sizes["H"],
        head_dim=sizes["D"],
        pages=sizes["N"],
    )


@cache
def _pages_checker(op: str, name: str, spec: KVSpec) -> Callable[..., Dims]:
    """Of what pages are made of: pools, and scales of rows."""
    page = " ".join(spec.page_axes)
    rules: dict[str, Any] = {
        f"{name}.{letter}": (f"L N | {page} {kind.width}", kind.dtype, 1)
        for letter, kind in zip("kv", spec.kinds, strict=True)
    }
    if spec.granularity == "token":
        rules |= spec.rules_of_scales(_scale_names(name), f"L N | {page}")
    return checker(op, **rules)


@cache
def _scales_checker(op: str, name: str, spec: KVSpec, L: int, H: int) -> Callable[..., Dims]:
    """Of scales that belong to the whole cache."""
    dims = f"{L} {H if spec.granularity == 'head' else 1}"
    return checker(op, **spec.rules_of_scales(_scale_names(name), dims))


def _scale_names(name: str) -> tuple[str, str]:
    return f"{name}.k_scales", f"{name}.v_scales"


def moving_arrays(cache: Any) -> dict[str, Any]:
    """The arrays [L, N, ...] that pages are made of."""
    names = ["k", "v"]
    if cache.spec.finds_scales:
        names += ["k_scales", "v_scales"]
    return {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}


def given_scales(cache: Any) -> dict[str, Any]:
    """The scales that belong to the whole cache."""
    names = () if cache.spec.finds_scales else ("k_scales", "v_scales")
    return {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}


def page_ids(op: str, name: str, pages: Ids, num_pages: int) -> Any:
    """[n] int64, all of them pages."""
    ids = np.asarray(pages)
    if ids.size == 0:
        ids = ids.astype(np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ParameterError(f"{op}: {name} is {pages!r}, expected a sequence of page ids")
    wrong = (ids < 0) | (ids >= num_pages)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ParameterError(f"{op}: {name}[{i}] is {ids[i]}, expected 0 to {num_pages - 1}")
    return ids.astype(np.int64)


def check_targets(op: str, ids: Any, num_pages: int) -> None:
    """Check that no page is listed twice.

    Raises:
        ParameterError: one is.
    """
    is_target = np.zeros(num_pages, bool)  # a tenth of the time that sorting takes
    is_target[ids] = True
    if np.count_nonzero(is_target) < len(ids):
        _, first, group = np.unique(ids, return_index=True, return_inverse=True)
        i = int(np.argmax(first[group] != np.arange(len(ids))))
        raise ParameterError(f"{op}: target_pages[{i}] is {ids[i]}, expected no page twice")


def check_writeable(op: str, name: str, cache: Any) -> None:
    """Check that pages may be written.

    Raises:
        ParameterError: one of their arrays is read-only.
    """
    for letter, x in moving_arrays(cache).items():
        ranges.check_writeable(op, f"{name}.{letter}", x)


def check_apart(
    op: str,
    source: tuple[list[Any], Any],
    target: tuple[list[Any], Any],
    *,
    in_place: bool = False,
) -> None:
    """Check that target pages share no memory with source pages.

    Args:
        op: name for messages.
        source, target: arrays [L, N, ...], or None for one that is not there, and page ids.
        in_place: target page i may be all of source page i.
    """
    (arrays, ids), (to_arrays, to_ids) = source, target
    bounds = [[ranges.bounds_of(x) for x in side if x is not None] for side in (arrays, to_arrays)]
    if not any(a < end and begin < b for a, b in bounds[0] for begin, end in bounds[1]):
        return
    if not in_place and all(map(_is_same_memory, arrays, to_arrays)):  # then ids say it all
        shared = np.isin(to_ids, ids)
        if shared.any():
            i = int(np.argmax(shared))
            raise ParameterError(
                f"{op}: target_pages[{i}] is {to_ids[i]}, expected no page of source_pages"
            )
        return
    found = ranges.find_overlap(
        page_ranges(arrays, ids), page_ranges(to_arrays, to_ids), in_place=in_place
    )
    if found is not None:
        i, is_source, j = found[0] % len(to_ids), found[1], found[2]
        name, n = ("source_pages", len(ids)) if is_source else ("target_pages", len(to_ids))
        raise ParameterError(
            f"{op}: target_pages[{i}] is {to_ids[i]}, which shares memory with {name}[{j % n}], "
            "expected memory of its own"
        )


def _is_same_memory(a: Any, b: Any) -> bool:
    return ranges.address_of(a) == ranges.address_of(b) and a.strides == b.strides


def page_ranges(arrays: list[Any], ids: Any) -> tuple[Any, Any]:
    """Addresses [arrays * L * n] uint64 of pages, and their bytes, one integer if all are equal;
    no bytes where there is no array."""
    count = len(arrays[0]) * len(ids)
    addresses = [
        np.zeros(count, np.uint64) if x is None else _page_addresses(x, ids) for x in arrays
    ]
    sizes = [0 if x is None else page_bytes(x) for x in arrays]
    one = len(set(sizes)) == 1
    return np.concatenate(addresses), sizes[0] if one else np.repeat(np.array(sizes), count)


def _page_addresses(array: Any, ids: Any) -> Any:
    """[L * n] uint64."""
    layers = np.arange(len(array), dtype=np.int64) * array.strides[0]
    offsets = np.add.outer(layers, ids * array.strides[1]).reshape(-1)
    return (np.int64(ranges.address_of(array)) + offsets).view(np.uint64)


def page_bytes(array: Any) -> int:
    return int(np.prod(array.shape[2:]) * array.itemsize)


def same_values(a: Any, b: Any) -> bool:
    a, b = (x.get() if on_gpu(x) else x for x in (a, b))
    return bool(np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}")))  # NaN too
