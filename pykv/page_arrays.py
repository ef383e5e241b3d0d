"""The arrays that pages of a cache are made of: what must agree, which pages exist, where they lie.

A cache and dimensions as in pykv/pages.py. Functions take an op's name, for errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda, options, ranges
from pykv.arrays import check_writeable, strided, to_host
from pykv.checker import Dims, checker
from pykv.errors import DtypeError, ParameterError, a_type
from pykv.options import check_type
from pykv.specs import KVSpec, as_spec

Ids = Sequence[int] | Any  # or a NumPy array
ARRAYS = ("k", "v", "k_scales", "v_scales")  # of a cache
_ATTRIBUTES = (*ARRAYS, "spec")


def facts_of(op: str, name: str, cache: Any) -> dict[str, Any]:
    """What two caches must agree in to exchange pages, and `pages`, in which they need not."""
    spec, sizes, _ = check_cache(op, name, cache)
    names = dict(layers="L", page_size="P", heads="H", head_dim="D", pages="N")
    return dict(spec=str(spec)) | {name: sizes[letter] for name, letter in names.items()}


def facts_of_two(op: str, source: Any, target: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`facts_of` two caches, of which one may be on another GPU than the current one.

    Raises:
        DeviceError: neither is on the current GPU.
    """
    facts, homes = [], []
    for name, side in (("source", source), ("target", target)):
        pool = getattr(side, "k", None)
        with cuda.beside(pool):
            facts.append(facts_of(op, name, side))
        homes.append(cuda.homes([(f"{name}.k", pool)]))
    cuda.gpu_pair(op, *homes)
    return facts[0], facts[1]


def check_cache(op: str, name: str, cache: Any) -> tuple[KVSpec, Dims, tuple[Any, ...]]:
    """Check the arrays of a cache: its spec, the sizes of its pools, and what stands for the
    layouts of all arrays."""
    missing = [x for x in _ATTRIBUTES if not hasattr(cache, x)]
    if missing:
        raise DtypeError(
            f"{op}: {name} is {a_type(cache)} without {', '.join(missing)}, expected a "
            "cache, see pykv.pages"
        )
    spec = as_spec(op, cache.spec, f"{name}.spec")
    pools, scales = (cache.k, cache.v), (cache.k_scales, cache.v_scales)
    if spec.granularity == "token":
        sizes = _pages_checker(op, name, spec)(*pools, *scales)
        return spec, sizes, (sizes.layouts,)
    # Pages that were swapped out may have their scales in other memory.
    sizes = _pages_checker(op, name, spec)(*pools)
    of_scales = _scales_checker(op, name, spec, sizes["L"], sizes["H"])(*scales)
    return spec, sizes, (sizes.layouts, of_scales.layouts)


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
    return _arrays(cache, ARRAYS if _has_dynamic_scales(cache) else ARRAYS[:2])


def given_scales(cache: Any) -> dict[str, Any]:
    """The scales that belong to the whole cache."""
    return _arrays(cache, () if _has_dynamic_scales(cache) else ARRAYS[2:])


def _has_dynamic_scales(cache: Any) -> bool:
    return as_spec("pages", cache.spec, "cache.spec").has_dynamic_scales


def _arrays(cache: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: x for name in names if (x := getattr(cache, name)) is not None}


def page_ids(op: str, name: str, pages: Ids, num_pages: int) -> Any:
    """[n] int64, all of them pages."""
    return options.page_ids(op, name, pages, 0, num_pages - 1)


def check_targets(op: str, name: str, ids: Any, num_pages: int) -> None:
    """Check that no page is listed twice in the argument `name`.

    Raises:
        ParameterError: one is.
    """
    is_target = np.zeros(num_pages, bool)  # ten times faster than sorting
    is_target[ids] = True
    if np.count_nonzero(is_target) < len(ids):
        _, first, group = np.unique(ids, return_index=True, return_inverse=True)
        i = int(np.argmax(first[group] != np.arange(len(ids))))
        raise ParameterError(f"{op}: {name}[{i}] is {ids[i]}, expected no page twice")


def check_may_write(op: str, name: str, cache: Any) -> None:
    """Check that pages may be written.

    Raises:
        ParameterError: one of their arrays is read-only.
    """
    for letter, x in moving_arrays(cache).items():
        check_writeable(op, f"{name}.{letter}", x)


def check_codec(op: str, codec: Any, hadamard: bool, tokens: Any = None) -> None:
    """Check a codec, or where there is none that its options are not given either.

    Raises:
        DtypeError: it is something else, or `hadamard` no flag.
        ParameterError: an option is given without it.
    """
    mixed = options.check_flag(op, "hadamard", hadamard)
    if codec is None:
        if mixed or tokens is not None:
            name = "hadamard" if mixed else "tokens"
            raise ParameterError(f"{op}: {name} is given, expected none without a codec")
        return
    from pykv.kvtc import Codec  # here: few callers have one

    check_type(op, "codec", codec, Codec, "a pykv.kvtc.Codec")


def heads_of(cache: Any, spec: KVSpec, heads: tuple[int, int] | None) -> list[Any]:
    """Keys, values and their scales of heads from the first to the end, as views; None: of all."""

    def part(x: Any) -> Any:
        if x is None or heads is None or (x.ndim == 2 and spec.granularity == "tensor"):
            return x
        axis = 1 if x.ndim == 2 else 2 + spec.page_axes.index("H")
        return x[(slice(None),) * axis + (slice(*heads),)]

    return [part(getattr(cache, letter)) for letter in ARRAYS]


def join_layers(sides: Sequence[list[Any]], ids: list[Any]) -> tuple[list[Any], list[Any]]:
    """The arrays [N, ...] of source and target for each launch, and [n] page ids of both.

    Layers become pages of one pool, so that one launch does it, unless they have given scales, lie
    elsewhere than `_steps` knows, or have more rows than a launch takes; then it is one a layer.

    Args:
        sides: of source and target, arrays [L, N, ...], or None.
        ids: page ids of both.
    """
    L = len(sides[0][0])
    rows = L * len(ids[0]) * math.prod(sides[0][0].shape[2:-1])
    counts = [arrays[0].shape[1] for arrays in sides]
    steps = [_steps(arrays) for arrays in sides]
    if not all(steps) or max(rows, L * max(counts)) >= 2**31:
        alone = [[[x if x is None else x[n] for x in arrays] for arrays in sides] for n in range(L)]
        return alone, ids
    joined = [
        [x if x is None else strided(x, (L * x.shape[1], *x.shape[2:]), _inner(x)) for x in arrays]
        for arrays in sides
    ]
    layers = np.arange(L)
    return [joined], [
        np.add.outer(layers * of_layer, i * of_page).reshape(-1)
        for i, (of_layer, of_page) in zip(ids, steps, strict=True)
    ]


def _steps(arrays: list[Any]) -> tuple[int, ...]:
    """From layer to layer and from page to page of arrays [L, N, ...] as pages of one pool: those
    of a layer follow those of the layer before, or a page's layers each other. Where others lie
    between, such as those of values of all layers, a pool would have them, too: ()."""
    found: set[tuple[int, ...]] = set()
    for x in arrays:
        if x is not None and x.ndim > 2 and x.strides[0] == x.shape[1] * x.strides[1]:
            found.add((x.shape[1], 1))
        elif x is not None and x.ndim > 2 and x.strides[1] == len(x) * x.strides[0]:
            found.add((1, len(x)))
        elif x is not None:
            found.add(())
    return found.pop() if len(found) == 1 else ()


def _inner(x: Any) -> tuple[int, ...]:
    """Strides of [L, N, ...] as pages of one pool."""
    return (min(x.strides[:2]), *x.strides[2:])


class Places(NamedTuple):
    """Where pages, or tokens, lie in the arrays that they are made of."""

    arrays: list[Any]  # None for one that is not there
    ids: Any  # [n] pages, one for each token
    addresses: Any  # [arrays, parts * n] uint64, layer by layer or head by head; 0 for no array
    page_bytes: list[int]  # bytes of a part of a page, for each array

    def ranges(self) -> tuple[Any, Any]:
        """All addresses, and the bytes at each, one integer if all are equal."""
        sizes, count = self.page_bytes, self.addresses.shape[1]
        size = sizes[0] if len(set(sizes)) == 1 else np.repeat(np.array(sizes), count)
        return self.addresses.reshape(-1), size


def places_of(arrays: list[Any], ids: Any) -> Places:
    """Of pages `ids` in arrays, the first of which is there."""
    addresses = np.zeros((len(arrays), len(arrays[0]) * len(ids)), np.int64)
    for row, x in zip(addresses, arrays, strict=True):
        if x is not None:
            layers = np.arange(len(x)) * x.strides[0] + ranges.address_of(x)
            row[:] = np.add.outer(layers, ids * x.strides[1]).reshape(-1)
    sizes = [0 if x is None else math.prod(x.shape[2:]) * x.itemsize for x in arrays]
    return Places(arrays, ids, addresses.view(np.uint64), sizes)


def check_apart(op: str, source: Places, target: Places, *, in_place: bool = False) -> None:
    """Check that target pages share no memory with source pages, nor their keys with their values;
    `in_place`, that target page i shares none but all of source page i.

    Raises:
        ParameterError: one does.
    """
    ids, to_ids = source.ids, target.ids
    if not len(ids) or not len(to_ids):
        return
    if not in_place and all(map(_is_same_memory, source.arrays, target.arrays)):
        is_source = np.zeros(max(ids.max(), to_ids.max()) + 1, bool)  # comparing ids is enough
        is_source[ids] = True
        shared = is_source[to_ids]
        if shared.any():
            i = int(np.argmax(shared))
            raise ParameterError(
                f"{op}: target_pages[{i}] is {to_ids[i]}, expected no page of source_pages"
            )
        return
    found = find_shared(source, target, in_place=in_place)
    if found is not None:
        other, name = (source, "source_pages") if found[1] else (target, "target_pages")
        i, j = found[0] % len(to_ids), found[2] % len(other.ids)
        raise not_apart(op, f"target_pages[{i}] is {to_ids[i]}, which", f"{name}[{j}]")


def find_shared(source: Places, target: Places, *, in_place: bool) -> tuple[int, bool, int] | None:
    """The first target address where another's memory is: which one, whether the other is a source,
    and which one of those. `in_place`, target i may be source i, all of it."""
    begin, end = _bounds(source)
    to_begin, to_end = _bounds(target)
    meets_source = (begin[:, None] < to_end) & (to_begin < end[:, None])
    meets_target = (to_begin[:, None] < to_end) & (to_begin < to_end[:, None])
    if not (meets_source.any() or np.triu(meets_target, 1).any()):
        return None
    return ranges.find_overlap(source.ranges(), target.ranges(), in_place=in_place)


def not_apart(op: str, target: str, other: str) -> ParameterError:
    """The error where what is written shares memory with another."""
    return ParameterError(f"{op}: {target} shares memory with {other}, expected memory of its own")


def _is_same_memory(a: Any, b: Any) -> bool:
    return a is b or (ranges.address_of(a) == ranges.address_of(b) and a.strides == b.strides)


def _bounds(places: Places) -> tuple[Any, Any]:
    """The first address of each array's pages, and the one behind their last byte."""
    sizes = np.array(places.page_bytes, np.uint64)
    return places.addresses.min(1), places.addresses.max(1) + sizes


def check_given_scales(
    op: str, name: str, target: Any, source: Any = None, *, stream: Any = None
) -> None:
    """Check that scales that heads or tensors share in `target`, the argument `name`, are those of
    `source`; without a source, that they are set, so that pages can be encoded with them.

    Raises:
        ParameterError: they are not.
        UnsupportedError: a CUDA graph is being captured.

    Waits for a GPU, unless both are the same arrays.
    """
    for side, scales in given_scales(target).items():
        expected = None if source is None else getattr(source, side)
        if scales is expected:
            continue
        with cuda.on_stream(stream, scales):
            cuda.refuse_capture(op, "it looks at scales; prepare the call before")
            if expected is None and not are_set(to_host(scales)).all():
                expects = "positive and finite ones, set or found by an append"
                raise ParameterError(f"{op}: {name}.{side} are unset, expected {expects}")
            if expected is not None and not same_values(scales, expected):
                raise ParameterError(f"{op}: {name}.{side} differ, expected those of source")


def are_set(scales: Any) -> Any:
    """Which of these scales, on the host, rows can be stored with."""
    return (scales > 0) & np.isfinite(scales)


def same_values(a: Any, b: Any) -> bool:
    a, b = map(to_host, (a, b))
    return bool(np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}")))  # NaN, too
