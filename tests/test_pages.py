"""Pages move whole: data and scales, all layers, and nothing besides."""

import gc
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import pykv
from pykv import PagedKVCache, cuda, kinds, pages
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError
from pykv.pages import Pages
from pykv.specs import KVSpec
from pykv.testing import codes
from tests.helpers import assert_same_bits, to_numpy, without_simt

SPECS = (
    *("fp32", "fp16", "bf16", "int8", "int4", "e4m3", "e5m2"),
    *("k8v4", "fp16+int8", "int8:fp32", "int8:HND", "k8v4:head:HND", "e5m2:tensor:fp32"),
)
SIZES = dict(L=3, N=7, P=4, H=2, D=24)
ARRAYS = ("k", "v", "k_scales", "v_scales")


def make(xp, rng, spec, L, N, P, H, D, joint=False):
    """A cache of random bytes; with `joint`, keys and values are views of one tensor."""
    spec = KVSpec.parse(spec)
    made = {}
    page = (P, H) if spec.layout == "NHD" else (H, P)
    for letter, kind in zip("kv", spec.kinds, strict=True):
        shape = (L, N, *page, D // 2 if kind.bits == 4 else D)
        made[letter] = random_bits(xp, rng, shape, kind.dtype)
        scales = {"token": (L, N, *page), "head": (L, H), "tensor": (L, 1)}[spec.granularity]
        dtype = kinds.SCALE_DTYPES[spec.scale_dtype]
        made[f"{letter}_scales"] = random_bits(xp, rng, scales, dtype) if kind.largest else None
    if joint:
        both = random_bits(xp, rng, (L, N, 2, *page, D), spec.kinds[0].dtype)
        made["k"], made["v"] = both[:, :, 0], both[:, :, 1]
    return Pages(**made, spec=spec)


def random_bits(xp, rng, shape, dtype):
    x = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    return xp.asarray(np.ascontiguousarray(x))


def host(cache):
    return {name: to_numpy(x).copy() for name in ARRAYS if (x := getattr(cache, name)) is not None}


def assert_holds(cache, want):
    for name, x in host(cache).items():
        assert_same_bits(x, want[name])


def moved(spec, source, target, source_pages, target_pages):
    """What the target holds after the copy, by a loop over pages."""
    want = {name: x.copy() for name, x in target.items()}
    for name, x in source.items():
        if name in ("k", "v") or spec.has_dynamic_scales:
            for page, to_page in zip(source_pages, target_pages, strict=True):
                want[name][:, to_page] = x[:, page]
    return want


def unequal(a, b):
    return any((a[name].tobytes() != b[name].tobytes()) for name in a)


# --- On the device ---


@pytest.mark.parametrize("spec", SPECS)
def test_zero(xp, rng, spec):
    cache = make(xp, rng, spec, **SIZES)
    want = host(cache)
    for name, x in want.items():
        if name in ("k", "v") or cache.spec.has_dynamic_scales:
            x[:, [5, 0]] = np.zeros((), x.dtype)
    pages.zero_pages(cache, [5, 0])
    pages.zero_pages(cache, [])
    assert_holds(cache, want)
    for name, x in want.items():
        if name in ("k", "v") or cache.spec.has_dynamic_scales:
            x[:, [2, 6]] = np.zeros((), x.dtype)
    before = host(cache)
    call = cuda.prepare(pages.zero_pages, cache, np.array([6, 2, 6]))
    cuda.prepare(pages.zero_pages, cache, [])()
    assert_holds(cache, before)
    call()
    assert_holds(cache, want)


@pytest.mark.parametrize("spec", SPECS)
def test_copy_within_a_cache(xp, rng, spec):
    cache = make(xp, rng, spec, **SIZES)
    before = host(cache)
    want = moved(cache.spec, before, before, [6, 6, 2], [0, 3, 1])
    pages.copy_pages(cache, cache, [6, 6, 2], np.array([0, 3, 1], np.int32))
    assert_holds(cache, want)
    assert unequal(want, before)


@pytest.mark.parametrize("spec", SPECS)
def test_copy_between_caches(xp, rng, spec):
    source = make(xp, rng, spec, **SIZES)
    target = make(xp, rng, spec, **{**SIZES, "N": 5})
    if not source.spec.has_dynamic_scales:
        for name in ("k_scales", "v_scales"):
            if getattr(source, name) is not None:
                getattr(target, name)[...] = getattr(source, name)
    ids = [6, 1, 2, 3], [4, 0, 1, 2]
    before = host(source)
    want = moved(source.spec, before, host(target), *ids)
    pages.copy_pages(source, target, *ids)
    assert_holds(target, want)
    assert_holds(source, before)


def test_pages_of_a_joint_tensor(xp, rng):
    cache = make(xp, rng, "fp16", **SIZES, joint=True)
    want = moved(cache.spec, host(cache), host(cache), [1], [6])
    pages.copy_pages(cache, cache, [1], [6])
    assert_holds(cache, want)


@pytest.mark.parametrize("spec", ["int8", "k8v4:head:HND"])
def test_a_prepared_copy_runs_often(xp, rng, spec):
    """Lists are those of then; what the arrays hold is read anew."""
    cache = make(xp, rng, spec, **SIZES)
    before = host(cache)
    ids, to_ids = [0, 1], np.array([2, 3])
    call = cuda.prepare(pages.copy_pages, cache, cache, ids, to_ids)
    ids[0], to_ids[0] = 5, 6
    assert_holds(cache, before)
    for _ in range(2):
        cache.k[...] = random_bits(xp, rng, cache.k.shape, cache.k.dtype)
        want = moved(cache.spec, host(cache), host(cache), [0, 1], [2, 3])
        assert call() is call.result is None
        assert_holds(cache, want)


@pytest.mark.parametrize("op", ["copy", "zero"])
def test_a_prepared_call_holds_the_arrays_of_then(xp, rng, op):
    """A cache that grows afterwards lets go of them, and the call must not work on freed memory."""
    cache = PagedKVCache(2, 8, 2, 16, page_size=4, spec="fp16", xp=xp)
    cache.k[...] = xp.asarray(rng.standard_normal(cache.k.shape).astype(np.float16))
    want = to_numpy(cache.k).copy()
    if op == "copy":
        call = cuda.prepare(pages.copy_pages, cache, cache, [0], [1])
        want[:, 1] = want[:, 0]
    else:
        call = cuda.prepare(pages.zero_pages, cache, [1])
        want[:, 1] = 0
    then = weakref.ref(cache.k)
    cache.grow(16)
    gc.collect()
    assert then() is not None and then() is not cache.k
    grown = to_numpy(cache.k).copy()
    call()
    assert_same_bits(then(), want)
    assert_same_bits(cache.k, grown)
    del call
    gc.collect()
    assert then() is None


def test_a_prepared_swap_runs_again(xp, rng):
    cache = make(xp, rng, "int8", **SIZES)
    out = cuda.prepare(pages.swap_out, cache, [5, 0])
    store = out.result
    back = cuda.prepare(pages.swap_in, cache, [3, 1], store)
    for _ in range(2):
        cache.k[...] = random_bits(xp, rng, cache.k.shape, cache.k.dtype)
        want = moved(cache.spec, host(cache), host(cache), [5, 0], [3, 1])
        assert out() is store
        back()
        assert_holds(cache, want)


# --- Pages that share memory ---


def arrays_of(cache):
    return [getattr(cache, name) for name in ARRAYS]


def part(cache, first, end):
    """Pages of a cache as a cache of their own, in the same memory."""
    parts = (x if x is None or x.ndim < 4 else x[:, first:end] for x in arrays_of(cache))
    return Pages(*parts, cache.spec)


@pytest.mark.parametrize("spec", ["fp16", "int8", "int8:head"])
@pytest.mark.parametrize("prepared", [False, True])
def test_views_of_one_memory_are_one_cache(xp, rng, spec, prepared):
    """Which page overlaps which is a question of memory, not of who holds it."""
    cache = make(xp, rng, spec, **SIZES)
    before = host(cache)

    def copy(*arguments):
        if prepared:
            cuda.prepare(pages.copy_pages, *arguments)()
        else:
            pages.copy_pages(*arguments)

    text = r"target_pages\[0\] is 1, expected no page of source_pages"
    with pytest.raises(ParameterError, match=text):
        copy(cache, part(cache, 0, None), [0, 1], [1, 0])
    text = r"target_pages\[1\] is 1, which shares memory with source_pages\[0\]"
    with pytest.raises(ParameterError, match=text):
        copy(cache, part(cache, 2, None), [3, 0], [4, 1])
    mixed = Pages(cache.v, cache.k, cache.v_scales, cache.k_scales, cache.spec)
    if not cache.spec.has_scales:
        with pytest.raises(ParameterError, match=r"target_pages\[1\] is 0, which shares memory"):
            copy(cache, mixed, [0, 1], [1, 0])
    assert_holds(cache, before)
    copy(cache, part(cache, 2, None), [0, 1], [4, 1])
    assert_holds(cache, moved(cache.spec, before, before, [0, 1], [6, 3]))


@pytest.mark.parametrize("op", [pages.copy_pages, pages.convert_pages])
def test_keys_and_values_go_to_memory_of_their_own(xp, rng, op):
    source, target = (make(xp, rng, "fp16", **SIZES) for _ in range(2))
    before = host(target)
    both = Pages(target.k, target.k, None, None, target.spec)
    text = r"target_pages\[0\] is 2, which shares memory with target_pages\[0\]"
    with pytest.raises(ParameterError, match=text):
        op(source, both, [0, 1], [2, 3])
    assert_holds(target, before)


def test_joint_tensors_do_not_overlap(xp, rng):
    """Keys and values in turn: where one array ends says nothing."""
    cache = make(xp, rng, "fp16", **SIZES, joint=True)
    before = host(cache)
    pages.copy_pages(cache, part(cache, 1, None), [0], [3])
    assert_holds(cache, moved(cache.spec, before, before, [0], [4]))


@pytest.mark.parametrize("spec", ["fp16", "int8"])
def test_conversions_share_a_page_with_itself_alone(xp, rng, spec):
    cache = make(xp, rng, spec, **SIZES)
    before = host(cache)
    L, N, P, H, _ = cache.k.shape
    turned = (x if x is None else x.reshape(L, N, H, P, *x.shape[4:]) for x in arrays_of(cache))
    turned = Pages(*turned, KVSpec.parse(f"{spec}:HND"))
    for target, ids, to_ids, text in (
        (cache, [0, 1], [1, 0], r"target_pages\[1\] is 0, .* source_pages\[0\]"),
        (part(cache, 0, None), [0, 1], [1, 0], r"target_pages\[1\] is 0, .* source_pages\[0\]"),
        (part(cache, 1, None), [2, 0], [5, 1], r"target_pages\[1\] is 1, .* source_pages\[0\]"),
        (turned, [3], [3], r"target_pages\[0\] is 3, which shares memory with source_pages\[0\]"),
    ):
        with pytest.raises(ParameterError, match=f"convert_pages: {text}"):
            pages.convert_pages(cache, target, ids, to_ids)
        with pytest.raises(ParameterError, match=text):
            cuda.prepare(pages.convert_pages, cache, target, ids, to_ids)
    assert_holds(cache, before)


@pytest.mark.parametrize("specs", [("int8", "fp16"), ("fp16", "k8v4:HND"), ("int8:head", "int8")])
def test_convert(xp, rng, specs):
    """Every layer, by the definition; pages that are no targets stay."""
    source, target = (make(xp, rng, spec, **SIZES) for spec in specs)
    for name in ARRAYS:  # random bits of floats and scales may be NaN
        x = getattr(source, name)
        if x is not None and x.dtype.kind == "f":
            x[...] = xp.asarray(rng.random(x.shape).astype(to_numpy(x).dtype))
    want, before = host(target), host(source)
    ids, to_ids = [5, 0, 6], [1, 2, 6]

    def nhd(spec, x):
        return x if x is None or x.ndim < 4 or spec.layout == "NHD" else x.swapaxes(2, 3)

    for letter, kind, to_kind in zip("kv", source.spec.kinds, target.spec.kinds, strict=True):
        stored, scales = nhd(source.spec, before[letter]), before.get(f"{letter}_scales")
        if scales is not None and scales.ndim == 2:
            scales = np.broadcast_to(scales[:, None, None], stored.shape[:4])
        x = codes.decode(stored, kind.name, scales)[:, ids]
        stored, found = codes.encode(x, to_kind.name)
        nhd(target.spec, want[letter])[:, to_ids] = stored
        if found is not None:
            nhd(target.spec, want[f"{letter}_scales"])[:, to_ids] = found
    pages.convert_pages(source, target, ids, to_ids)
    assert_holds(target, want)
    assert_holds(source, before)


@pytest.mark.parametrize("axis", [1, 2])
def test_convert_to_a_joint_tensor(xp, rng, axis):
    """Keys and values in turn, layer by layer or page by page."""
    source, target = (make(xp, rng, spec, **SIZES) for spec in ("fp16", "fp16:HND"))
    shape = list(target.k.shape)
    both = random_bits(xp, rng, (*shape[:axis], 2, *shape[axis:]), target.spec.kinds[0].dtype)
    joint = [both[:, i] if axis == 1 else both[:, :, i] for i in range(2)]
    target = Pages(*joint, None, None, target.spec)
    want, of_source = host(target), host(source)
    pages.convert_pages(source, target, [5, 0], [1, 2])
    for name, x in want.items():
        x[:, [1, 2]] = of_source[name][:, [5, 0]].swapaxes(2, 3)
    assert_holds(target, want)


@pytest.mark.parametrize("specs", [("fp16", "int8"), ("int8", "fp16:HND"), ("int4", "bf16")])
def test_layers_of_a_page_that_lie_together_take_one_launch(xp, rng, monkeypatch, specs):
    """As those of a pool, one behind the other, do: as source and as target."""
    source, target = (make(xp, rng, spec, **SIZES) for spec in specs)
    ids, to_ids, calls = [5, 0, 6], [1, 2, 6], []
    right = pages.paged_convert.convert
    monkeypatch.setattr(
        pages.paged_convert, "convert", lambda **given: calls.append(right(**given))
    )
    want = by_page(target)
    pages.convert_pages(source, target, ids, to_ids)
    pages.convert_pages(by_page(source), want, ids, to_ids)
    assert len(calls) == 2
    assert_holds(target, host(want))


def by_page(cache):
    """A copy whose pages hold all their layers."""
    arrays = {
        name: None if x is None else x.swapaxes(0, 1).copy().swapaxes(0, 1)
        for name in ARRAYS
        for x in [getattr(cache, name)]
    }
    return Pages(**arrays, spec=cache.spec)


@pytest.mark.parametrize("text", ["int8:head", "e4m3:tensor:fp32", "fp16+int4:head:HND"])
def test_pages_do_not_go_where_scales_are_unset(xp, text):
    """Codes of a scale of 0 are zeros."""
    sizes = dict(layers=2, pages=3, heads=2, head_dim=8, page_size=4, xp=xp)
    source = PagedKVCache(**sizes, spec="fp16")
    target = PagedKVCache(**sizes, spec=text, margin=1.5)
    x = xp.ones((4, 2, 8), np.float32)
    slots = xp.asarray(np.arange(4, dtype=np.int32))
    for cache in (source, target):
        cache.append(0, x, x, slots)
    shared = [scales[1] for scales in (target.k_scales, target.v_scales) if scales is not None]
    for value in (np.inf, np.nan, 0):
        for scales in shared:
            scales[...] = value
        before = host(target)
        for call in (pages.convert_pages, partial(pykv.prepare, pages.convert_pages)):
            with pytest.raises(ParameterError, match=r"convert_pages: target.[kv]_scales are uns"):
                call(source, target, [0], [1])
        assert_holds(target, before)
    pages.convert_pages(source, target, [], [])
    target.append(1, x, x, slots)
    pages.convert_pages(source, target, [0], [1])
    assert_same_bits(target.k[0, 1], target.k[0, 0])


def test_a_store_follows_the_scales_of_a_cache_that_grew(xp):
    """The store was made before they were found."""
    cache = PagedKVCache(1, 2, 2, 8, page_size=4, spec="int8:head", margin=1.5, xp=xp)
    store = pages.host_pages(cache, 1)
    cache.grow(5)
    x = xp.ones((4, 2, 8), np.float32)
    cache.append(0, x, x, xp.asarray(np.arange(4, dtype=np.int32)))
    pages.swap_out(cache, [0], store)
    pages.swap_in(cache, [4], store)
    assert_same_bits(cache.k[0, 4], cache.k[0, 0])
    assert bool((store.k_scales == cache.k_scales).all())


def test_convert_in_place(xp, rng):
    cache = make(xp, rng, "int8", **SIZES)
    for name in ("k_scales", "v_scales"):
        getattr(cache, name)[...] = xp.asarray(np.ones(cache.k_scales.shape, np.float16))
    other = make(xp, rng, "e4m3", **SIZES)
    pages.convert_pages(cache, other)
    views = Pages(
        *(x.view(np.uint8) for x in (cache.k, cache.v)),
        cache.k_scales,
        cache.v_scales,
        KVSpec("e4m3", "e4m3"),
    )
    pages.convert_pages(cache, views)
    assert_holds(views, host(other))


def test_a_prepared_conversion_runs_again(xp, rng):
    source, target, plain = (make(xp, rng, spec, **SIZES) for spec in ("fp16", "int8", "int8"))
    for name in ARRAYS[2:]:
        getattr(plain, name)[...] = getattr(target, name)
    plain.k[...], plain.v[...] = target.k, target.v
    before = host(target)
    call = cuda.prepare(pages.convert_pages, source, target, [5, 0], [1, 2])
    assert_holds(target, before)
    for _ in range(2):
        values = rng.standard_normal(source.k.shape).astype(np.float16)
        source.k[...], source.v[...] = xp.asarray(values), xp.asarray(-values)
        pages.convert_pages(source, plain, [5, 0], [1, 2])
        assert call() is call.result is None
        assert_holds(target, host(plain))


# --- To the host and back ---


@pytest.mark.parametrize("spec", SPECS)
def test_swap(xp, rng, spec):
    cache = make(xp, rng, spec, **SIZES)
    before = host(cache)
    store = pages.swap_out(cache, [5, 0, 6])
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    assert isinstance(store.k, np.ndarray) and store.k.shape[1] == 3
    for name, x in host(store).items():
        moves = name in ("k", "v") or cache.spec.has_dynamic_scales
        assert_same_bits(x, before[name][:, [5, 0, 6]] if moves else before[name])
    pages.zero_pages(cache, range(7))
    assert unequal(host(cache), before)
    pages.swap_in(cache, [5, 0, 6], store)
    pages.swap_in(cache, [1, 2, 3], store)
    whole = ("k", "v", *ARRAYS[2:] * cache.spec.has_dynamic_scales)
    zeros = {name: np.zeros_like(x) if name in whole else x for name, x in before.items()}
    want = moved(cache.spec, before, zeros, [5, 0, 6, 5, 0, 6], [5, 0, 6, 1, 2, 3])
    assert_holds(cache, want)


def test_a_store_may_be_larger(xp, rng):
    cache = make(xp, rng, "k8v4", **SIZES)
    store = pages.host_pages(cache, 4)
    assert pages.swap_out(cache, [3, 1], store) is store
    pages.swap_out(cache, [], store)
    pages.copy_pages(cache, store, [6], [3])
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    for slot, page in ((0, 3), (1, 1), (3, 6)):
        for name, x in host(cache).items():
            assert_same_bits(host(store)[name][:, slot], x[:, page])


@pytest.mark.gpu
def test_pageable_memory_is_refused(rng):
    import cupy

    cache = make(cupy, rng, "int8", **SIZES)
    other = make(np, rng, "int8", **SIZES)
    with pytest.raises(DeviceError, match=r"target.k\[0\] is in pageable host memory"):
        pages.copy_pages(cache, other, [0], [0])


# --- Bad input ---


@without_simt
def test_errors(xp, rng):
    cache = make(xp, rng, "int8", **SIZES)
    before = host(cache)

    def fails(error, text, call, *arguments):
        with pytest.raises(error, match=text):
            call(*arguments)
        assert_holds(cache, before)

    copy, zero = pages.copy_pages, pages.zero_pages
    fails(ParameterError, r"zero_pages: pages\[1\] is 7, expected 0 to 6", zero, cache, [0, 7])
    fails(ParameterError, r"pages\[0\] is -1, expected 0 to 6", zero, cache, [-1])
    fails(ParameterError, "pages is 3, expected a sequence of page ids", zero, cache, 3)
    fails(ParameterError, r"pages is \[0.5\], expected a sequence", zero, cache, [0.5])
    fails(ParameterError, r"target_pages\[2\] is 3, expected no page twice",
          copy, cache, cache, [0, 1, 2], [3, 4, 3])  # fmt: skip
    fails(ParameterError, r"target_pages\[1\] is 0, expected no page of source_pages",
          copy, cache, cache, [0, 1], [3, 0])  # fmt: skip
    fails(ParameterError, "target_pages has 1 page, expected 2 like source_pages",
          copy, cache, cache, [0, 1], [3])  # fmt: skip
    fails(ParameterError, r"source_pages\[0\] is 9, expected 0 to 6", copy, cache, cache, [9], [3])
    for spec, sizes, text in (
        ("int8:HND", {}, "target has spec=int8:HND, expected int8"),
        ("int4", {}, "target has spec=int4, expected int8"),
        ("int8", {"P": 8}, "target has page_size=8, expected 4"),
        ("int8", {"L": 1}, "target has layers=1, expected 3"),
    ):
        other = make(xp, rng, spec, **{**SIZES, **sizes})
        fails(ParameterError, text, copy, cache, other, [0], [0])
    convert = pages.convert_pages
    other = make(xp, rng, "fp16", **{**SIZES, "L": 1})
    fails(ParameterError, "target has layers=3, expected 1", convert, other, cache)
    other = make(xp, rng, "fp16", **SIZES)
    fails(ParameterError, r"target_pages\[1\] is 2, expected no page twice",
          convert, other, cache, [0, 1], [2, 2])  # fmt: skip
    fails(ParameterError, r"source_pages\[0\] is 7", convert, other, cache, [7], [2])
    lost = Pages(cache.k, cache.v, None, cache.v_scales, cache.spec)
    fails(ParameterError, "source.k_scales is missing, expected scales for int8",
          copy, lost, cache, [0], [1])  # fmt: skip
    cut = Pages(cache.k[:, :, :2], cache.v[:, :, :2], None, None, KVSpec("int8", "int8"))
    fails(ParameterError, "k_scales is missing", zero, cut, [0])
    narrow = make(xp, rng, "fp16", **SIZES)
    narrow = Pages(narrow.k[..., :8], narrow.v[..., :8], None, None, KVSpec())
    fails(ShapeError, "cache.k has strides", zero, narrow, [0])
    fails(ParameterError, "num_pages is -1", pages.host_pages, cache, -1)


def test_read_only_pages_are_no_target(rng):
    """Such as views of immutable bytes."""
    cache = make(np, rng, "fp16", **SIZES)
    k, v = (np.frombuffer(bytes(x.nbytes), x.dtype).reshape(x.shape) for x in (cache.k, cache.v))
    frozen = Pages(k, v, None, None, cache.spec)
    for call, arguments in (
        (pages.copy_pages, (cache, frozen, [0], [1])),
        (pages.convert_pages, (cache, frozen)),
        (pages.zero_pages, (frozen, [0])),
    ):
        with pytest.raises(ParameterError, match=r"\.k is read-only"):
            call(*arguments)
    pages.copy_pages(frozen, cache, [0], [1])
    assert not cache.k[:, 1].any()


# --- Specs as texts ---


def test_pages_take_a_text(rng):
    one = make(np, rng, "int8:HND", **SIZES)
    named = Pages(one.k, one.v, one.k_scales, one.v_scales, "int8:HND")
    assert named.spec == one.spec and repr(named) == repr(one)
    pages.copy_pages(named, named, [1], [2])
    pages.zero_pages(named, [3])
    assert_same_bits(named.k[:, 1], named.k[:, 2])
    assert not named.k[:, 3].any()
    with pytest.raises(ParameterError, match="'int9' is no kind"):
        Pages(one.k, one.v, None, None, "int9")
    with pytest.raises(DtypeError, match="Pages: spec is a NoneType, expected a KVSpec or a text"):
        Pages(one.k, one.v, None, None, None)


def test_so_does_any_cache(rng):
    """A cache is any object with the attributes."""
    one, other = make(np, rng, "int8", **SIZES), make(np, rng, "int8:HND", **SIZES)
    as_texts = [SimpleNamespace(**{**vars(x), "spec": str(x.spec)}) for x in (one, other)]
    pages.convert_pages(*as_texts, [1], [2])
    assert_same_bits(other.k[:, 2].swapaxes(1, 2), one.k[:, 1])
    assert pages.swap_out(as_texts[0], [1]).spec == one.spec
    as_texts[0].spec = 8
    with pytest.raises(DtypeError, match="zero_pages: cache.spec is an int, expected a KVSpec"):
        pages.zero_pages(as_texts[0], [1])
