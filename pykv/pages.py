(
    ""
    """Whole pages of a cache: zero, copy, convert, swap to the host. Scales go with the data.

Dimensions: L layers, N pages, P tokens a page, H KV heads, D head size, W elements that D codes
take.

A cache here is any object with the attributes `k`, `v`, `k_scales`, `v_scales` and `spec`, such as
pykv.PagedKVCache or `Pages`: pools [L, N, P, H, W] ([L, N, H, P, W] where the spec says HND) whose
pages are contiguous, and scales [L, N, P, H] likewise, or [L, H] or [L, 1] where heads or tensors
have given ones, or None for kinds of floats. Scales of heads and tensors belong to the cache, not
to its pages: pages may only go where those are the same.

Lists of pages are sequences of integers on the host, such as pykv.blocks makes them.

Prepared (`pykv.prepare`), these functions work on the lists and on the arrays of then, which the
call holds: `enlarge` gives a cache other arrays, which want a call of their own. Given scales are
compared when the call is prepared.
"""
)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pykv import cuda, ranges
from pykv.arrays import Dims, checker, load_cupy, on_gpu
from pykv.errors import ParameterError
from pykv.kinds import KVSpec
from pykv.ops import block_copy, paged_convert

LINK_CTAS = 32  # thread blocks that fill a link to the host; more keep others from the SMs
ARRAYS = ("k", "v", "k_scales", "v_scales")

Ids = Sequence[int] | Any  # or a NumPy array


@dataclass(frozen=True)
class Pages:
    """Pages that are no cache of their own: on a device, or on the host where they were swapped to.

    Attributes: see the module.
    """

    k: Any
    v: Any
    k_scales: Any
    v_scales: Any
    spec: KVSpec


def zero_pages(cache: Any, pages: Ids, *, stream: Any = None) -> None:
    """Fill pages with zeros, and the scales of their rows: they decode to zeros.

    Args:
        cache: see the module.
        pages: page ids.
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: a page does not exist, or the cache is read-only.
        ShapeError, DtypeError: the cache's arrays do not fit its spec.

    On a GPU only enqueues.
    """
    op = "pages.zero_pages"
    ids = page_ids(op, "pages", pages, facts_of(op, "cache", cache)["pages"])
    check_writeable(op, "cache", cache)
    arrays = list(moving_arrays(cache).values())
    if not on_gpu(cache.k):
        cuda.run_on_host(lambda: _zero_on_host(arrays, ids))
        return
    ids = np.unique(ids)  # block_copy allows no destination twice
    with cuda.on_stream(stream):
        zeros = load_cupy().zeros(max(map(_page_bytes, arrays)), np.uint8)
    cuda.hold(zeros, *arrays)
    to, sizes = _ranges(arrays, ids)
    src = np.full(len(to), ranges.address_of(zeros), np.uint64)  # a page that caches hold
    block_copy.vectorized_copy(src, to, sizes, stream=stream)


def _zero_on_host(arrays: list[Any], ids: Any) -> None:
    for array in arrays:
        array.view(f"u{array.itemsize}")[:, ids] = 0


def copy_pages(
    source: Any, target: Any, source_pages: Ids, target_pages: Ids, *, stream: Any = None
) -> None:
    """Copy page source_pages[i] of one cache to page target_pages[i] of another, or of the same
    one: fork, copy-on-write, and what `swap_out` and `swap_in` do. In all layers, bit for bit.

    Args:
        source, target: caches of the same spec, layout and sizes but N; each on the GPU or, where
            the other one is on a GPU, in pinned host memory.
        source_pages, target_pages: page ids, as many of one as of the other. No page is a target
            twice, and no target shares memory with a source.
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: specs or sizes differ, a page does not exist or may not be a target, the
            target is read-only, or given scales differ (to see that, the host waits for them).
        ShapeError, DtypeError: a cache's arrays do not fit its spec.
        DeviceError: host memory is pageable where a GPU copies.

    On a GPU only enqueues.
    """
    op = "pages.copy_pages"
    facts, to_facts = facts_of(op, "source", source), facts_of(op, "target", target)
    for name, fact in facts.items():
        if name != "pages" and to_facts[name] != fact:
            raise ParameterError(f"{op}: target has {name}={to_facts[name]}, expected {fact}")
    ids = page_ids(op, "source_pages", source_pages, facts["pages"])
    to_ids = page_ids(op, "target_pages", target_pages, to_facts["pages"])
    if len(ids) != len(to_ids):
        raise ParameterError(
            f"{op}: target_pages has {len(to_ids)} pages, expected {len(ids)} like source_pages"
        )
    check_targets(op, to_ids, to_facts["pages"])
    check_writeable(op, "target", target)
    arrays, to_arrays = (list(moving_arrays(c).values()) for c in (source, target))
    _check_apart(op, (arrays, ids), (to_arrays, to_ids))
    for name, scales in given_scales(source).items():
        others = getattr(target, name)
        if scales is not others and not same_values(scales, others):
            raise ParameterError(f"{op}: target.{name} differ, expected those of source")

    over_link = on_gpu(source.k) != on_gpu(target.k)
    if over_link:
        name, store, at = (
            ("source", source, ids) if on_gpu(target.k) else ("target", target, to_ids)
        )
        for letter, x in moving_arrays(store).items():
            first = _page_addresses(x, at)[:1]
            ranges.check_reachable(op, f"{name}.{letter}", first, x.itemsize)
    cuda.hold(*arrays, *to_arrays)
    src, sizes = _ranges(arrays, ids)
    dst, _ = _ranges(to_arrays, to_ids)
    block_copy.vectorized_copy(
        *(src, dst, sizes),
        device="cuda" if over_link or on_gpu(source.k) else "cpu",
        max_ctas=LINK_CTAS if over_link else None,
        stream=stream,
    )


def convert_pages(
    source: Any,
    target: Any,
    source_pages: Ids | None = None,
    target_pages: Ids | None = None,
    *,
    stream: Any = None,
) -> None:
    """Write pages of one cache to pages of another of other kinds, layout or scales, in all layers.

    Args:
        source, target: caches of the same L, P, H and D, on one device. `target` may be views of
            the source's memory, to convert in place, as pykv.ops.paged_convert.convert says.
        source_pages, target_pages: page ids, as many of one as of the other, no target twice; None:
            0, 1, 2 ... A target may share memory with the page that becomes it, and no other.
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: a page does not exist, a target is listed twice, shares memory with another
            page's source or is read-only, or L differs.
        Others as pykv.ops.paged_convert.convert.

    On a GPU only enqueues, a launch or two for each layer.
    """
    op = "pages.convert_pages"
    facts, to_facts = facts_of(op, "source", source), facts_of(op, "target", target)
    for name in ("layers", "page_size", "heads", "head_dim"):
        if facts[name] != to_facts[name]:
            raise ParameterError(
                f"{op}: target has {name}={to_facts[name]}, expected {facts[name]}"
            )
    lists: list[Any] = []
    sides = []
    for name, side, ids, count in (
        ("source_pages", source, source_pages, facts["pages"]),
        ("target_pages", target, target_pages, to_facts["pages"]),
    ):
        pages = page_ids(op, name, range(count) if ids is None else ids, count)
        lists.append(None if ids is None else pages.astype(np.int32))
        sides.append(([moving_arrays(side).get(letter) for letter in ARRAYS], pages))
    check_targets(op, sides[1][1], to_facts["pages"])
    check_writeable(op, "target", target)
    # Rows of another layout have other places in a page, so that one would overwrite another.
    _check_apart(op, *sides, in_place=source.spec.layout == target.spec.layout)
    if on_gpu(source.k):
        with cuda.on_stream(stream):
            lists = [None if ids is None else load_cupy().asarray(ids) for ids in lists]
    for layer in range(facts["layers"]):
        of_layer = (
            [x if x is None else x[layer] for x in (c.k, c.v, c.k_scales, c.v_scales)]
            for c in (source, target)
        )
        (k, v, k_scales, v_scales), (k_out, v_out, k_out_scales, v_out_scales) = of_layer
        paged_convert.convert(
            *(k, v, k_out, v_out),
            spec=source.spec,
            out_spec=target.spec,
            k_scales=k_scales,
            v_scales=v_scales,
            k_out_scales=k_out_scales,
            v_out_scales=v_out_scales,
            pages=lists[0],
            out_pages=lists[1],
            check=False,
            stream=stream,
        )


def host_pages(cache: Any, num_pages: int) -> Pages:
    """Uninitialised host memory for pages of a cache, pinned if the cache is on a GPU.

    Raises:
        ParameterError: `num_pages` is negative.
        MemoryError: the host has not as much that can be pinned.
    """
    op = "pages.host_pages"
    if num_pages < 0:
        raise ParameterError(f"{op}: num_pages is {num_pages}, expected at least 0")
    facts_of(op, "cache", cache)
    moving = moving_arrays(cache)
    made = {}
    for name in ("k", "v", "k_scales", "v_scales"):
        array = getattr(cache, name)
        if name in moving:
            shape = (len(array), num_pages, *array.shape[2:])
            made[name] = _host_memory(shape, array.dtype, on_gpu(cache.k))
        else:
            made[name] = array  # given scales are shared
    return Pages(**made, spec=cache.spec)


def swap_out(cache: Any, pages: Ids, store: Pages | None = None, *, stream: Any = None) -> Pages:
    """Copy pages to host memory: page pages[i] of the cache becomes page i of the store.

    Args:
        cache: see the module.
        pages: page ids.
        store: what `host_pages` made; None: made, of len(pages) pages.
        stream: see pykv.cuda.on_stream.

    Returns:
        The store. On a GPU the copy is only enqueued: the host may read it, and the cache's pages
        may go to others on other streams, when the stream has passed.

    Raises: as `copy_pages`.
    """
    if store is None:
        store = host_pages(cache, len(pages))
    copy_pages(cache, store, pages, np.arange(len(pages)), stream=stream)
    return store


def swap_in(cache: Any, pages: Ids, store: Pages, *, stream: Any = None) -> None:
    """Copy page i of the store to page pages[i] of the cache: `swap_out`, the other way round."""
    copy_pages(store, cache, np.arange(len(pages)), pages, stream=stream)


# --- Arrays and pages -----------------------------------------------------------------------------


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


def _check_apart(
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
    found = ranges.find_overlap(_ranges(arrays, ids), _ranges(to_arrays, to_ids), in_place=in_place)
    if found is not None:
        i, is_source, j = found[0] % len(to_ids), found[1], found[2]
        name, n = ("source_pages", len(ids)) if is_source else ("target_pages", len(to_ids))
        raise ParameterError(
            f"{op}: target_pages[{i}] is {to_ids[i]}, which shares memory with {name}[{j % n}], "
            "expected memory of its own"
        )


def _is_same_memory(a: Any, b: Any) -> bool:
    return ranges.address_of(a) == ranges.address_of(b) and a.strides == b.strides


def _ranges(arrays: list[Any], ids: Any) -> tuple[Any, Any]:
    """Addresses [arrays * L * n] uint64 of pages, and their bytes, one integer if all are equal;
    no bytes where there is no array."""
    count = len(arrays[0]) * len(ids)
    addresses = [
        np.zeros(count, np.uint64) if x is None else _page_addresses(x, ids) for x in arrays
    ]
    sizes = [0 if x is None else _page_bytes(x) for x in arrays]
    one = len(set(sizes)) == 1
    return np.concatenate(addresses), sizes[0] if one else np.repeat(np.array(sizes), count)


def _page_addresses(array: Any, ids: Any) -> Any:
    """[L * n] uint64."""
    layers = np.arange(len(array), dtype=np.int64) * array.strides[0]
    offsets = np.add.outer(layers, ids * array.strides[1]).reshape(-1)
    return (np.int64(ranges.address_of(array)) + offsets).view(np.uint64)


def _page_bytes(array: Any) -> int:
    return int(np.prod(array.shape[2:]) * array.itemsize)


def same_values(a: Any, b: Any) -> bool:
    a, b = (x.get() if on_gpu(x) else x for x in (a, b))
    return bool(np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}")))  # NaN too


def _host_memory(shape: tuple[int, ...], dtype: Any, pinned: bool) -> Any:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if not pinned or nbytes == 0:
        return np.empty(shape, dtype)
    memory = load_cupy().cuda.alloc_pinned_memory(nbytes)
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)
