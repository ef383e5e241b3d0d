"""Whole pages of a cache: zero, copy, convert, swap to the host. Scales go with the data. Files of
pages are those of pykv.page_files.

Dimensions: L layers, N pages, P tokens a page, H KV heads, D head size, W elements that D codes
take.

A cache here is any object with the attributes `k`, `v`, `k_scales`, `v_scales` and `spec`, which is
a KVSpec or its text, such as pykv.PagedKVCache or `Pages`: pools [L, N, P, H, W] ([L, N, H, P, W]
where the spec says HND) whose pages are contiguous, and scales [L, N, P, H] likewise, or [L, H] or
[L, 1] where heads or tensors have given ones, or None for kinds of floats. Scales of heads and
tensors belong to the cache, not to its pages: pages may only go where those are the same.

Lists of pages are sequences of integers on the host, such as pykv.blocks makes them.

Prepared (`pykv.prepare`), these functions work on the lists and on the arrays of then, which the
call holds: `grow` gives a cache other arrays, which want a call of their own. Given scales are
compared when the call is prepared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pykv import cuda, ranges
from pykv.arrays import footprint, load_cupy, on_gpu
from pykv.block_memory import check_range
from pykv.errors import ParameterError
from pykv.number_texts import counted
from pykv.ops import block_copy, paged_convert
from pykv.options import check_whole
from pykv.page_arrays import (
    ARRAYS,
    Ids,
    check_apart,
    check_codec,
    check_given_scales,
    check_may_write,
    check_targets,
    facts_of,
    facts_of_two,
    heads_of,
    join_layers,
    moving_arrays,
    page_ids,
    places_of,
)
from pykv.specs import KVSpec, as_spec

if TYPE_CHECKING:
    from pykv.kvtc import Codec


@dataclass(frozen=True, repr=False)
class Pages:
    """Pages that are no cache of their own: on a device, or on the host where they were swapped to.

    Attributes:
        k, v: [L, N, P, H, W], or [L, N, H, P, W] where the spec says HND.
        k_scales, v_scales: as the module says; None for kinds of floats.
        spec: a KVSpec, or a text that KVSpec.parse reads, which becomes one.

    Raises:
        ParameterError, DtypeError: the spec is unknown, or neither.
    """

    k: Any
    v: Any
    k_scales: Any
    v_scales: Any
    spec: KVSpec

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", as_spec("Pages", self.spec))

    def __repr__(self) -> str:
        layers, num_pages, *inner, width = self.k.shape
        page_size, heads = self.spec.page_order(*inner)
        head_dim = width * self.k.itemsize * 8 // self.spec.kinds[0].bits
        return (
            f"Pages(layers={layers}, pages={num_pages}, heads={heads}, head_dim={head_dim}, "
            f'page_size={page_size}, spec="{self.spec}", '
            f"{footprint(self.k, self.v, self.k_scales, self.v_scales)})"
        )


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
    check_may_write(op, "cache", cache)
    arrays = list(moving_arrays(cache).values())
    if not on_gpu(cache.k):
        cuda.run_on_host(lambda: _zero_on_host(arrays, ids), stream=stream)
        return
    places = places_of(arrays, np.unique(ids))  # block_copy refuses equal destinations
    with cuda.on_stream(stream):
        zeros = load_cupy().zeros(max(places.page_bytes), np.uint8)
    cuda.hold(zeros, *arrays)
    to, sizes = places.ranges()
    src = np.full(len(to), ranges.address_of(zeros), np.uint64)  # all read one page
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
        source, target: caches of the same spec, layout and sizes but N; each on a GPU or, where
            the other one is on a GPU, in pinned host memory. One GPU is the current one; for two,
            see "Between GPUs" in pykv/README.md.
        source_pages, target_pages: page ids, as many of one as of the other. No page is a target
            twice, and no target shares memory with a source.
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: specs or sizes differ, a page does not exist or may not be a target, the
            target is read-only, or given scales differ (to see that, the host waits for them).
        ShapeError, DtypeError: a cache's arrays do not fit its spec.
        DeviceError: host memory is pageable where a GPU copies, or neither cache is on the current
            GPU.

    On a GPU only enqueues.

    >>> cache = pykv.PagedKVCache(layers=2, pages=4, heads=1, head_dim=8)
    >>> cache.k[:, 1] = 5
    >>> pykv.pages.copy_pages(cache, cache, [1], [3])
    >>> bool((cache.k[:, 3] == 5).all())
    True
    """
    op = "pages.copy_pages"
    facts, to_facts = facts_of_two(op, source, target)
    for name, fact in facts.items():
        if name != "pages" and to_facts[name] != fact:
            raise ParameterError(f"{op}: target has {name}={to_facts[name]}, expected {fact}")
    ids = page_ids(op, "source_pages", source_pages, facts["pages"])
    to_ids = page_ids(op, "target_pages", target_pages, to_facts["pages"])
    if len(ids) != len(to_ids):
        raise ParameterError(
            f"{op}: target_pages has {counted(len(to_ids), 'page')}, expected {len(ids)} like "
            "source_pages"
        )
    check_targets(op, "target_pages", to_ids, to_facts["pages"])
    check_may_write(op, "target", target)
    places = places_of(list(moving_arrays(source).values()), ids)
    to_places = places_of(list(moving_arrays(target).values()), to_ids)
    check_apart(op, places, to_places)
    if len(ids):
        check_given_scales(op, "target", target, source, stream=stream)

    over_link = on_gpu(source.k) != on_gpu(target.k)
    if over_link:
        name, store = ("target", to_places) if on_gpu(source.k) else ("source", places)
        for letter, at in zip(moving_arrays(source), store.addresses, strict=True):
            ranges.check_reachable(op, f"{name}.{letter}", at[:1], 1)
    cuda.hold(*places.arrays, *to_places.arrays)
    (src, sizes), (dst, _) = places.ranges(), to_places.ranges()
    block_copy.vectorized_copy(
        *(src, dst, sizes),
        device="cuda" if over_link or on_gpu(source.k) else "cpu",
        max_ctas=block_copy.LINK_CTAS if over_link else None,
        stream=stream,
    )


def convert_pages(
    source: Any,
    target: Any,
    source_pages: Ids | None = None,
    target_pages: Ids | None = None,
    *,
    heads: tuple[int, int] | None = None,
    target_heads: tuple[int, int] | None = None,
    stream: Any = None,
) -> None:
    """Write pages of one cache to pages of another of other kinds, layout or scales, in all layers.

    Args:
        source, target: caches of the same L, P, H and D. `target` may be views of the source's
            memory, to convert in place, as pykv.ops.paged_convert.convert says. Each is on the host
            or each on a GPU, of which one is the current one; for two GPUs, see "Between GPUs" in
            pykv/README.md.
        source_pages, target_pages: page ids, as many of one as of the other, no target twice; None:
            0, 1, 2 ... A target may share memory with the page that becomes it, and no other.
        heads, target_heads: (first, end) of the source's heads, and of the target's that these
            become, as many: what a rank of tensor parallelism holds. None: all. The target's other
            heads stay as they are; with either, pages of the two share no memory.
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: a page or head does not exist, a target is listed twice, shares memory with
            another page's source or is read-only, L differs, or scales that heads or tensors of the
            target share are unset or not finite.
        DeviceError: neither cache is on the current GPU.
        Others as pykv.ops.paged_convert.convert.

    On a GPU only enqueues, a launch or two, for each layer where layers have given scales or do not
    follow each other, but waits to see shared scales.
    """
    op = "pages.convert_pages"
    facts, to_facts = facts_of_two(op, source, target)
    for facts_of_one, name, given in (
        (facts, "heads", heads),
        (to_facts, "target_heads", target_heads),
    ):
        if given is not None:
            check_range(op, name, given, (0, facts_of_one["heads"]), "")
            facts_of_one["heads"] = given[1] - given[0]
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
        lists.append(page_ids(op, name, range(count) if ids is None else ids, count))
        arrays = moving_arrays(side)
        sides.append(places_of([arrays.get(letter) for letter in ARRAYS], lists[-1]))
    if len(sides[0].ids) != len(sides[1].ids):
        raise ParameterError(
            f"{op}: target_pages has {counted(len(sides[1].ids), 'page')}, expected "
            f"{len(sides[0].ids)} like source_pages"
        )
    check_targets(op, "target_pages", sides[1].ids, to_facts["pages"])
    check_may_write(op, "target", target)
    if len(sides[1].ids):
        check_given_scales(op, "target", target, stream=stream)
    # In place, rows that move within a page would overwrite rows that are still to be read.
    spec, out_spec = as_spec(op, source.spec), as_spec(op, target.spec)
    in_place = spec.layout == out_spec.layout and heads is None and target_heads is None
    check_apart(op, *sides, in_place=in_place)
    views = heads_of(source, spec, heads), heads_of(target, out_spec, target_heads)
    is_all = source_pages is None, target_pages is None
    _convert(op, views, lists, is_all, dict(spec=spec, out_spec=out_spec, stream=stream))


def _convert(
    op: str, views: Any, lists: list[Any], is_all: tuple[bool, bool], options: dict[str, Any]
) -> None:
    """Convert listed pages of arrays [L, N, ...] of two caches; `is_all`: all of one, in order."""
    layers, ids = join_layers(views, lists)
    stream = options["stream"]
    from_ids, to_ids = (
        _beside(op, side[0], at, known, stream)
        for side, at, known in zip(views, ids, is_all, strict=True)
    )
    options |= dict(check=False)
    options |= dict(pages=from_ids, out_pages=to_ids)
    names = "k_pool v_pool k_scales v_scales k_out v_out k_out_scales v_out_scales".split()
    for arrays, outs in layers:
        paged_convert.convert(**dict(zip(names, (*arrays, *outs), strict=True)), **options)


def _beside(op: str, array: Any, ids: Any, is_all: bool, stream: Any) -> Any:
    """[n] int32 page ids on the device of an array; None if they are all there are, in order."""
    if is_all and len(ids) and ids[-1] + 1 == len(ids):
        return None
    ids = ids.astype(np.int32)
    if not on_gpu(array):
        return ids
    with cuda.on_stream(stream), cuda.beside(array):
        cuda.refuse_capture(op, cuda.UPLOADS)
        return load_cupy().asarray(ids)


def move_known(source: Any, target: Any, source_pages: list[int], target_pages: list[int]) -> None:
    """`copy_pages`, or `convert_pages` where specs differ, without their checks, which take longer
    than a link takes for some MiB: of caches that fit, on one device, and pages that exist."""
    lists = [np.array(pages) for pages in (source_pages, target_pages)]
    if source.spec != target.spec:
        specs = dict(spec=source.spec, out_spec=target.spec, stream=None)
        views = [[getattr(side, name) for name in ARRAYS] for side in (source, target)]
        _convert("pages.convert_pages", views, lists, (False, False), specs)
        return
    sides = [list(moving_arrays(side).values()) for side in (source, target)]
    if not on_gpu(source.k):
        for x, y in zip(*sides, strict=True):
            y[:, target_pages] = x[:, source_pages]
        return
    places, to_places = map(places_of, sides, lists)
    (src, sizes), (dst, _) = places.ranges(), to_places.ranges()
    block_copy.vectorized_copy(src, dst, sizes)


def host_pages(cache: Any, num_pages: int) -> Pages:
    """Uninitialised host memory for pages of a cache, pinned if the cache is on a GPU. Scales that
    heads or tensors share are the cache's own arrays: whoever changes them changes both.

    Raises:
        ParameterError: `num_pages` is negative.
        MemoryError: the host has not as much that can be pinned.
    """
    op = "pages.host_pages"
    num_pages = check_whole(op, "num_pages", num_pages, 0, 2**31 - 1)
    facts_of(op, "cache", cache)
    made = {name: getattr(cache, name) for name in ARRAYS}  # given scales are shared
    for name, array in moving_arrays(cache).items():
        shape = (len(array), num_pages, *array.shape[2:])
        made[name] = _host_memory(shape, array.dtype, on_gpu(cache.k))
    return Pages(**made, spec=cache.spec)


def swap_out(
    cache: Any,
    pages: Ids,
    store: Any = None,
    *,
    codec: Codec | None = None,
    tokens: int | None = None,
    hadamard: bool = False,
    stream: Any = None,
) -> Any:
    """Copy pages to host memory: page pages[i] of the cache becomes page i of the store.

    Args:
        cache: see the module.
        pages: page ids.
        store: what `host_pages` made; None: made, of len(pages) pages. With a codec uint8 of pinned
            memory, see Codec.compress.
        codec: a pykv.kvtc.Codec, by which the pages, those of a sequence in order, become coded
            tokens, many times smaller and not exact.
        tokens: of the sequence, with a codec; None: all that the pages hold.
        hadamard: as of Codec.compress.
        stream: see pykv.cuda.on_stream.

    Returns:
        The store, or with a codec pykv.kvtc.Coded. On a GPU the copy is only enqueued: the host may
        read it, and the cache's pages may go to others on other streams, when the stream has
        passed.

    Raises: as `copy_pages`, or as Codec.compress; ParameterError also for `tokens` or `hadamard`
        without a codec.

    >>> cache = pykv.PagedKVCache(layers=2, pages=4, heads=1, head_dim=8, spec="int8")
    >>> store = pykv.pages.swap_out(cache, [3, 1])
    >>> store
    Pages(layers=2, pages=2, heads=1, head_dim=8, page_size=16, spec="int8", 1.3 kB on cpu)
    >>> pykv.pages.swap_in(cache, [0, 2], store)
    """
    op = "pages.swap_out"
    facts = facts_of(op, "cache", cache)
    pages = page_ids(op, "pages", pages, facts["pages"])
    check_codec(op, codec, hadamard, tokens)
    if codec is not None:
        most = len(pages) * facts["page_size"]
        count = most if tokens is None else check_whole(op, "tokens", tokens, 0, most)
        header = codec.header(count, cache.spec)
        if store is None:
            store = _host_memory((header.nbytes,), np.dtype(np.uint8), on_gpu(cache.k))
        how = dict(out=store, hadamard=hadamard, stream=stream)
        return codec.compress(cache, pages.astype(np.int32), range(count), **how)
    if store is None:
        store = host_pages(cache, len(pages))
    facts_of(op, "store", store)
    copy_pages(cache, store, pages, np.arange(len(pages)), stream=stream)
    return store


def swap_in(
    cache: Any,
    pages: Ids,
    store: Any,
    *,
    codec: Codec | None = None,
    hadamard: bool = False,
    stream: Any = None,
) -> None:
    """Copy page i of the store to page pages[i] of the cache: `swap_out`, the other way round, with
    the same codec, or one like it. On a GPU the copy is only enqueued: keep the store until the
    stream has passed, as others get its pinned memory at once."""
    op = "pages.swap_in"
    num_pages = facts_of(op, "cache", cache)["pages"]
    pages = page_ids(op, "pages", pages, num_pages)
    check_targets(op, "pages", pages, num_pages)
    check_codec(op, codec, hadamard)
    if codec is not None:
        table = pages.astype(np.int32)
        codec.decompress(store, cache, table, hadamard=hadamard, stream=stream)
        return
    facts_of(op, "store", store)
    copy_pages(store, cache, np.arange(len(pages)), pages, stream=stream)


def _host_memory(shape: tuple[int, ...], dtype: Any, pinned: bool) -> Any:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if not pinned or nbytes == 0:
        return np.empty(shape, dtype)
    memory = load_cupy().cuda.alloc_pinned_memory(nbytes)
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)
