"""Whole pages of a cache: zero, copy, convert, swap to the host, save. Scales go with the data.

Dimensions: L layers, N pages, P tokens a page, H KV heads, D head size, W elements that D codes
take.

A cache here is any object with the attributes `k`, `v`, `k_scales`, `v_scales` and `spec`, such as
pykv.PagedKVCache or `Pages`: pools [L, N, P, H, W] ([L, N, H, P, W] where the spec says HND) whose
pages are contiguous, and scales [L, N, P, H] likewise, or [L, H] or [L, 1] where heads or tensors
have given ones, or None for kinds of floats. Scales of heads and tensors belong to the cache, not
to its pages: pages may only go where those are the same.

Lists of pages are sequences of integers on the host, such as pykv.blocks makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pykv import cuda
from pykv.arrays import Dims, checker, footprint, load_cupy, on_gpu
from pykv.errors import FormatError, ParameterError
from pykv.kinds import KVSpec
from pykv.ops import block_copy, paged_convert

LINK_CTAS = 32  # thread blocks that fill a link to the host; more keep others from the SMs

Ids = Sequence[int] | Any  # or a NumPy array


@dataclass(frozen=True, repr=False)
class Pages:
    """Pages that are no cache of their own: on a device, or on the host where they were swapped to.

    Attributes:
        k, v: [L, N, P, H, W], or [L, N, H, P, W] where the spec says HND.
        k_scales, v_scales: as the module says; None for kinds of floats.
        spec: a KVSpec.
    """

    k: Any
    v: Any
    k_scales: Any
    v_scales: Any
    spec: KVSpec

    def __repr__(self) -> str:
        layers, num_pages, *inner, width = self.k.shape
        page_size, heads = inner if self.spec.layout == "NHD" else reversed(inner)
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
        ParameterError: a page does not exist.
        ShapeError, DtypeError: the cache's arrays do not fit its spec.
    """
    op = "pages.zero_pages"
    ids = _ids(op, "pages", pages, _facts(op, "cache", cache)["pages"])
    if on_gpu(cache.k):
        with cuda.on_stream(stream):
            tables, _ = _plan_zeros(cache, ids)
            block_copy.vectorized_copy(*tables)
        return
    for array in _moving(cache).values():
        array.view(f"u{array.itemsize}")[:, ids] = 0


def prepare_zero(cache: Any, pages: Ids) -> block_copy.DeviceCopy | block_copy.HostCopy:
    """What `prepare_copy` is to `copy_pages`, to `zero_pages`."""
    op = "pages.prepare_zero"
    tables, zeros = _plan_zeros(
        cache, _ids(op, "pages", pages, _facts(op, "cache", cache)["pages"])
    )
    work = block_copy.prepare(*tables, device="cuda" if on_gpu(cache.k) else "cpu")
    work.arrays = (cache, zeros)
    return work


def copy_pages(
    source: Any, target: Any, source_pages: Ids, target_pages: Ids, *, stream: Any = None
) -> None:
    """Copy page source_pages[i] of one cache to page target_pages[i] of another, or of the same
    one: fork, copy-on-write, and what `swap_out` and `swap_in` do. In all layers, bit for bit.

    Args:
        source, target: caches of the same spec, layout and sizes but N; each on the GPU or, where
            the other one is on a GPU, in pinned host memory.
        source_pages, target_pages: page ids, as many of one as of the other. No page is a target
            twice, or both source and target.
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: specs or sizes differ, a page does not exist or may not be a target, or
            given scales differ (to see that, the host waits for them).
        ShapeError, DtypeError: a cache's arrays do not fit its spec.
        DeviceError: host memory is pageable where a GPU copies.

    On a GPU only enqueues.

    >>> cache = pykv.PagedKVCache(layers=2, pages=4, heads=1, head_dim=8)
    >>> cache.k[:, 1] = 5
    >>> pykv.pages.copy_pages(cache, cache, [1], [3])
    >>> bool((cache.k[:, 3] == 5).all())
    True
    """
    tables, options = _plan("pages.copy_pages", source, target, source_pages, target_pages)
    block_copy.vectorized_copy(*tables, **options, stream=stream)


def prepare_copy(
    source: Any, target: Any, source_pages: Ids, target_pages: Ids
) -> block_copy.DeviceCopy | block_copy.HostCopy:
    """What block_copy.prepare is to block_copy.vectorized_copy, to `copy_pages`: the same copy made
    ready to run many times. Waits until its tables are on the GPU."""
    tables, options = _plan("pages.prepare_copy", source, target, source_pages, target_pages)
    work = block_copy.prepare(*tables, **options)
    work.arrays = (source, target)
    return work


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
            0, 1, 2 ...
        stream: see pykv.cuda.on_stream.

    Raises:
        ParameterError: a page does not exist, a target is listed twice, or L differs.
        Others as pykv.ops.paged_convert.convert.

    On a GPU only enqueues, a launch or two for each layer.
    """
    op = "pages.convert_pages"
    facts, to_facts = _facts(op, "source", source), _facts(op, "target", target)
    for name in ("layers", "page_size", "heads", "head_dim"):
        if facts[name] != to_facts[name]:
            raise ParameterError(
                f"{op}: target has {name}={to_facts[name]}, expected {facts[name]}"
            )
    lists: list[Any] = []
    for name, ids, pages in (
        ("source_pages", source_pages, facts["pages"]),
        ("target_pages", target_pages, to_facts["pages"]),
    ):
        lists.append(None if ids is None else _ids(op, name, ids, pages).astype(np.int32))
    if lists[1] is not None:
        _check_targets(op, lists[1][:0], lists[1], to_facts["pages"], False)
    with cuda.on_stream(stream):
        if on_gpu(source.k):
            lists = [None if ids is None else load_cupy().asarray(ids) for ids in lists]
        for layer in range(facts["layers"]):
            of_layer = [
                [x if x is None else x[layer] for x in (c.k, c.v, c.k_scales, c.v_scales)]
                for c in (source, target)
            ]
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
    _facts(op, "cache", cache)
    moving = _moving(cache)
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

    >>> cache = pykv.PagedKVCache(layers=2, pages=4, heads=1, head_dim=8, spec="int8")
    >>> store = pykv.pages.swap_out(cache, [3, 1])
    >>> store
    Pages(layers=2, pages=2, heads=1, head_dim=8, page_size=16, spec="int8", 1.3 kB on cpu)
    >>> pykv.pages.swap_in(cache, [0, 2], store)
    """
    if store is None:
        store = host_pages(cache, len(pages))
    copy_pages(cache, store, pages, np.arange(len(pages)), stream=stream)
    return store


def swap_in(cache: Any, pages: Ids, store: Pages, *, stream: Any = None) -> None:
    """Copy page i of the store to page pages[i] of the cache: `swap_out`, the other way round."""
    copy_pages(store, cache, np.arange(len(pages)), pages, stream=stream)


# --- Arrays and pages -----------------------------------------------------------------------------


def _facts(op: str, name: str, cache: Any) -> dict[str, Any]:
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
    page = "P H" if spec.layout == "NHD" else "H P"
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


def _moving(cache: Any) -> dict[str, Any]:
    """The arrays [L, N, ...] that pages are made of."""
    names = ["k", "v"]
    if cache.spec.finds_scales:
        names += ["k_scales", "v_scales"]
    return {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}


def _given_scales(cache: Any) -> dict[str, Any]:
    """The scales that belong to the whole cache."""
    names = () if cache.spec.finds_scales else ("k_scales", "v_scales")
    return {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}


def _ids(op: str, name: str, pages: Ids, num_pages: int) -> Any:
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


def _plan(
    op: str, source: Any, target: Any, source_pages: Ids, target_pages: Ids
) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """Check, and find what block_copy takes: addresses of both sides and sizes, and its options."""
    facts, to_facts = _facts(op, "source", source), _facts(op, "target", target)
    for name, fact in facts.items():
        if name != "pages" and to_facts[name] != fact:
            raise ParameterError(f"{op}: target has {name}={to_facts[name]}, expected {fact}")
    from_ids = _ids(op, "source_pages", source_pages, facts["pages"])
    to_ids = _ids(op, "target_pages", target_pages, to_facts["pages"])
    if len(from_ids) != len(to_ids):
        raise ParameterError(
            f"{op}: target_pages has {len(to_ids)} pages, expected {len(from_ids)} like "
            "source_pages"
        )
    _check_targets(op, from_ids, to_ids, to_facts["pages"], source.k is target.k)
    for name, scales in _given_scales(source).items():
        others = getattr(target, name)
        if scales is not others and not _same_values(scales, others):
            raise ParameterError(f"{op}: target.{name} differ, expected those of source")

    places = {on_gpu(source.k), on_gpu(target.k)}
    device = "cuda" if True in places else "cpu"
    tables = []
    for name, array in _moving(source).items():
        pair = []
        for side, x, ids in (
            ("source", array, from_ids),
            ("target", getattr(target, name), to_ids),
        ):
            addresses = _page_addresses(x, ids)
            if device == "cuda" and not on_gpu(x):
                block_copy.check_reachable(op, f"{side}.{name}", addresses[:1], array.itemsize)
            pair.append(addresses)
        tables.append((*pair, np.full(pair[0].size, _page_bytes(array), np.int64)))
    over_link = len(places) == 2
    return _joined(tables), dict(device=device, max_ctas=LINK_CTAS if over_link else None)


def _plan_zeros(cache: Any, ids: Any) -> tuple[tuple[Any, Any, Any], Any]:
    """What block_copy takes to copy one page of zeros to all of these, and that page, which a GPU
    reads from its caches only."""
    moving = _moving(cache).values()
    is_target = np.zeros(cache.k.shape[1], bool)
    is_target[ids] = True
    ids = np.flatnonzero(is_target)  # none twice, which block_copy does not allow
    xp = load_cupy() if on_gpu(cache.k) else np
    zeros = xp.zeros(max(map(_page_bytes, moving)), np.uint8)
    tables = []
    for array in moving:
        to = _page_addresses(array, ids)
        size = np.full(to.size, _page_bytes(array), np.int64)
        tables.append((np.full(to.size, _address(zeros), np.uint64), to, size))
    return _joined(tables), zeros


def _joined(tables: list[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    """One table each of sources, destinations and sizes; one size if all are equal."""
    src, dst, sizes = map(np.concatenate, zip(*tables, strict=True))
    same = sizes.size and sizes.min() == sizes.max()
    return src, dst, int(sizes[0]) if same else sizes


def _check_targets(op: str, from_ids: Any, to_ids: Any, num_pages: int, same_cache: bool) -> None:
    is_target = np.zeros(num_pages, bool)  # a tenth of the time that sorting takes
    is_target[to_ids] = True
    if np.count_nonzero(is_target) < len(to_ids):
        _, first, group = np.unique(to_ids, return_index=True, return_inverse=True)
        i = int(np.argmax(first[group] != np.arange(len(to_ids))))
        raise ParameterError(f"{op}: target_pages[{i}] is {to_ids[i]}, expected no page twice")
    if same_cache and is_target[from_ids].any():
        i = int(np.argmax(np.isin(to_ids, from_ids)))
        raise ParameterError(
            f"{op}: target_pages[{i}] is {to_ids[i]}, expected no page of source_pages"
        )


def _page_addresses(array: Any, ids: Any) -> Any:
    """[L * n] uint64."""
    layers = np.arange(len(array), dtype=np.int64) * array.strides[0]
    offsets = np.add.outer(layers, ids * array.strides[1]).reshape(-1)
    return (np.int64(_address(array)) + offsets).view(np.uint64)


def _address(array: Any) -> int:
    return int(array.data.ptr if on_gpu(array) else array.ctypes.data)


def _page_bytes(array: Any) -> int:
    return int(np.prod(array.shape[2:]) * array.itemsize)


def _same_values(a: Any, b: Any) -> bool:
    a, b = (x.get() if on_gpu(x) else x for x in (a, b))
    return bool(np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}")))  # NaN too


def _host_memory(shape: tuple[int, ...], dtype: Any, pinned: bool) -> Any:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if not pinned or nbytes == 0:
        return np.empty(shape, dtype)
    memory = load_cupy().cuda.alloc_pinned_memory(nbytes)
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)


# --- Files ----------------------------------------------------------------------------------------
#
# A file is a safetensors file: 8 bytes with the size of a JSON header, the header, and the arrays
# [L, n, ...] (those of given scales [L, ...]), each contiguous, bfloat16 as its bits. The header's
# "__metadata__" holds the fingerprint and a SHA-256 of it and of all bytes of the arrays. Source:
# https://github.com/huggingface/safetensors#format.

FORMAT = "pykv.pages.1"
_MAX_HEADER = 1 << 20  # bytes; ours take less than 1 KiB
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "U16", "int8": "I8", "uint8": "U8"}


def save(
    path: str | os.PathLike[str], cache: Any, pages: Ids | None = None, *, model: str = ""
) -> None:
    """Write pages to a file, which any reader of safetensors opens.

    Args:
        path: of the file; replaced at once, when all is written.
        cache: see the module.
        pages: page ids; None: all.
        model: whatever tells whose cache this is; `load` compares it.

    Raises:
        ParameterError: a page does not exist.
        OSError: the file cannot be written; what was there before is still there.

    Waits for CuPy's current stream. Needs host memory for the pages.

    >>> import tempfile
    >>> cache = pykv.PagedKVCache(layers=2, pages=4, heads=1, head_dim=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pykv.pages.save(f"{folder}/prefix", cache, [1, 2], model="mine")
    ...     pykv.pages.load(f"{folder}/prefix", cache, [0, 3], model="mine")
    2
    """
    op = "pages.save"
    facts = _facts(op, "cache", cache)
    ids = _ids(op, "pages", range(facts["pages"]) if pages is None else pages, facts["pages"])
    store = swap_out(cache, ids)
    if on_gpu(cache.k):
        load_cupy().cuda.get_current_stream().synchronize()
    tensors = {**_moving(store), **{name: _host(x) for name, x in _given_scales(store).items()}}
    metadata, table = _metadata(facts, len(ids), model), _table(tensors)
    metadata["sha256"] = _digest(metadata, table, tensors)
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for x in tensors.values():
                file.write(_bytes(x))
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise


def load(
    path: str | os.PathLike[str], cache: Any, pages: Ids | None = None, *, model: str | None = None
) -> int:
    """Read what `save` wrote into pages of a cache.

    Args:
        path: of the file.
        cache: of the spec and sizes that the file was saved with, but any N.
        pages: page ids, as many as the file has; its page i becomes page pages[i], and given scales
            must be those of the file. None: the file has all N pages of the cache, and given scales
            are replaced by the file's.
        model: what the file must have been saved with; None: anything.

    Returns:
        How many pages there are.

    Raises:
        FormatError: this is no such file, it is damaged, or of another spec, size or model. The
            cache is as before.
        ParameterError: a page does not exist, or is listed twice.
        OSError: the file cannot be read.

    Waits for CuPy's current stream. Needs host memory for the pages.
    """
    op = "pages.load"
    facts = _facts(op, "cache", cache)
    with open(path, "rb") as file:
        metadata, table, begin = _read_header(op, file, os.fspath(path))
        count = _check_metadata(op, path, metadata, facts, model)
        if pages is None and count != facts["pages"]:
            raise FormatError(
                f"{op}: {path} has {count} pages, expected all {facts['pages']}, or a list of pages"
            )
        ids = _ids(op, "pages", range(count) if pages is None else pages, facts["pages"])
        _check_targets(op, ids[:0], ids, facts["pages"], False)
        if len(ids) != count:
            raise FormatError(f"{op}: {path} has {count} pages, expected {len(ids)} like pages")
        store = host_pages(cache, count)
        given = {name: _host(x).copy() for name, x in _given_scales(cache).items()}
        tensors = {**_moving(store), **given}
        expected = _table(tensors)
        for name in {**expected, **table}:
            if table.get(name) != expected.get(name):
                raise FormatError(
                    f"{op}: {path} has {name}={table.get(name)}, expected {expected.get(name)}"
                )
        size = os.fstat(file.fileno()).st_size
        want = begin + sum(x.nbytes for x in tensors.values())
        if size != want:
            raise FormatError(f"{op}: {path} has {size} bytes, expected {want}")
        for x in tensors.values():
            file.readinto(_bytes(x))  # too few show in the checksum
    if _digest(metadata, table, tensors) != metadata["sha256"]:
        raise FormatError(f"{op}: {path} is damaged: its checksum does not hold")
    for name, x in given.items():
        if pages is None:
            scales = getattr(cache, name)
            scales[...] = load_cupy().asarray(x) if on_gpu(scales) else x
        elif not _same_values(x, getattr(cache, name)):
            raise FormatError(f"{op}: {path} has other {name}, expected those of the cache")
    swap_in(cache, ids, store)
    if on_gpu(cache.k):
        load_cupy().cuda.get_current_stream().synchronize()
    return count


def _host(x: Any) -> Any:
    return x.get() if on_gpu(x) else x


def _bytes(x: Any) -> memoryview:
    return memoryview(x.reshape(-1).view(np.uint8))


def _table(tensors: dict[str, Any]) -> dict[str, Any]:
    """The header of a file with these arrays."""
    table: dict[str, Any] = {}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        table[name] = dict(
            dtype=_CODES[x.dtype.name], shape=list(x.shape), data_offsets=[begin, end]
        )
    return table


def _metadata(facts: dict[str, Any], count: int, model: str) -> dict[str, str]:
    """The fingerprint; safetensors takes text alone."""
    found = {name: str(fact) for name, fact in facts.items()}
    return {**found, "format": FORMAT, "pages": str(count), "model": model}


def _digest(metadata: dict[str, str], table: dict[str, Any], tensors: dict[str, Any]) -> str:
    facts = {name: text for name, text in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps([facts, table], sort_keys=True).encode())
    for x in tensors.values():
        digest.update(_bytes(x))
    return digest.hexdigest()


def _read_header(op: str, file: BinaryIO, path: str) -> tuple[dict[str, str], dict[str, Any], int]:
    """Metadata, tensors, and where the arrays begin."""
    first = file.read(8)
    size = int.from_bytes(first, "little")
    if len(first) < 8 or size > _MAX_HEADER:
        raise FormatError(f"{op}: {path} is no file of pages: its header has {size} bytes")
    try:
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise FormatError(
                f"{op}: {path} has format {metadata['format']!r}, expected {FORMAT!r}"
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{op}: {path} is no file of pages: its header is damaged") from error
    return metadata, header, 8 + size


def _check_metadata(
    op: str, path: Any, metadata: dict[str, str], facts: dict[str, Any], model: str | None
) -> int:
    """Hold the fingerprint against the cache; returns the number of pages."""
    wanted = {name: str(fact) for name, fact in facts.items() if name != "pages"}
    if model is not None:
        wanted["model"] = model
    for name, want in wanted.items():
        if metadata.get(name) != want:
            raise FormatError(f"{op}: {path} has {name}={metadata.get(name)}, expected {want}")
    count = metadata.get("pages", "")
    if not (
        isinstance(count, str) and count.isdecimal() and isinstance(metadata.get("sha256"), str)
    ):
        raise FormatError(f"{op}: {path} is no file of pages: its header is damaged")
    return int(count)
