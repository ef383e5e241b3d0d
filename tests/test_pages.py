"""Pages move whole: data and scales, all layers, and nothing besides."""

import json

import numpy as np
import pytest

from pykv import kinds, pages
from pykv.errors import DeviceError, FormatError, ParameterError, ShapeError
from pykv.kinds import KVSpec
from pykv.pages import Pages
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
        if name in ("k", "v") or spec.finds_scales:
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
        if name in ("k", "v") or cache.spec.finds_scales:
            x[:, [5, 0]] = np.zeros((), x.dtype)
    pages.zero_pages(cache, [5, 0])
    pages.zero_pages(cache, [])
    assert_holds(cache, want)
    for name, x in want.items():
        if name in ("k", "v") or cache.spec.finds_scales:
            x[:, [2, 6]] = np.zeros((), x.dtype)
    work = pages.prepare_zero(cache, np.array([6, 2, 6]))
    pages.prepare_zero(cache, []).run()
    work.run()
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
    if not source.spec.finds_scales:
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


def test_a_prepared_copy_runs_often(xp, rng):
    cache = make(xp, rng, "int8", **SIZES)
    work = pages.prepare_copy(cache, cache, [0, 1], [2, 3])
    page = 4 * 2 * (24 + 2)
    assert work.num_bytes == 2 * 2 * SIZES["L"] * page and work.num_pairs == 4 * SIZES["L"]
    for _ in range(2):
        cache.k[...] = xp.asarray(rng.integers(-127, 127, cache.k.shape, np.int8))
        want = moved(cache.spec, host(cache), host(cache), [0, 1], [2, 3])
        work.run()
        assert_holds(cache, want)


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
        moves = name in ("k", "v") or cache.spec.finds_scales
        assert_same_bits(x, before[name][:, [5, 0, 6]] if moves else before[name])
    pages.zero_pages(cache, range(7))
    assert unequal(host(cache), before)
    pages.swap_in(cache, [5, 0, 6], store)
    pages.swap_in(cache, [1, 2, 3], store)
    whole = ("k", "v", *ARRAYS[2:] * cache.spec.finds_scales)
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


# --- Files ---


@without_simt
@pytest.mark.parametrize("spec", SPECS)
def test_save_and_load(xp, rng, tmp_path, spec):
    path = tmp_path / "x.safetensors"
    cache = make(xp, rng, spec, **SIZES)
    before = host(cache)
    pages.save(path, cache, [5, 0, 6], model="m")
    assert_holds(cache, before)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]

    other = make(xp, rng, spec, **{**SIZES, "N": 4})
    for name in ("k_scales", "v_scales"):
        if not cache.spec.finds_scales and getattr(cache, name) is not None:
            getattr(other, name)[...] = getattr(cache, name)
    want = moved(cache.spec, before, host(other), [5, 0, 6], [3, 1, 0])
    assert pages.load(path, other, [3, 1, 0], model="m") == 3
    assert_holds(other, want)


@without_simt
@pytest.mark.parametrize("spec", SPECS)
def test_a_whole_cache(xp, rng, tmp_path, spec):
    """Given scales come back with it."""
    cache, other = (make(xp, rng, spec, **SIZES) for _ in range(2))
    pages.save(tmp_path / "x", cache)
    assert pages.load(tmp_path / "x", other) == SIZES["N"]
    assert_holds(other, host(cache))


def test_a_file_is_what_the_format_says(rng, tmp_path):
    """Read by hand, as safetensors' documentation defines it."""
    cache = make(np, rng, "bf16+int8", **SIZES)
    pages.save(tmp_path / "x", cache, [2, 4])
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    facts = header.pop("__metadata__")
    assert size % 8 == 0 and all(isinstance(text, str) for text in facts.values())
    assert facts.pop("sha256")
    assert facts == dict(
        format="pykv.pages.1",
        spec="bf16+int8",
        layers="3",
        page_size="4",
        heads="2",
        head_dim="24",
        pages="2",
        model="",
    )
    dtypes = dict(U16=np.uint16, I8=np.int8, F16=np.float16)
    for name, want in (
        ("k", cache.k.view(np.uint16)), ("v", cache.v), ("v_scales", cache.v_scales)
    ):  # fmt: skip
        entry = header.pop(name)
        begin, end = (8 + size + at for at in entry["data_offsets"])
        x = np.frombuffer(data[begin:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
        assert_same_bits(x, want[:, [2, 4]])
    assert not header and end == len(data)


def test_the_library_reads_it(rng, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    cache = make(np, rng, "int8:fp32", **SIZES)
    pages.save(tmp_path / "x", cache)
    found = safetensors.load_file(tmp_path / "x")
    for name, x in host(cache).items():
        assert_same_bits(found[name], x)


SMALL = dict(L=2, N=2, P=1, H=1, D=8)


@without_simt
def test_every_damaged_byte_is_found(xp, rng, tmp_path):
    """One bit of each byte of header and data; the cache stays as it is."""
    path = tmp_path / "x"
    pages.save(path, make(xp, rng, "int8", **SMALL))
    good = path.read_bytes()
    other = make(xp, rng, "int8", **SMALL)
    before = host(other)
    for at in range(len(good)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            pages.load(path, other)
        except FormatError:
            continue
        size = int.from_bytes(good[:8], "little")  # another blank in the header means the same
        assert 8 <= at < 8 + size and json.loads(damaged[8 : 8 + size]) == json.loads(
            good[8 : 8 + size]
        )
    assert_holds(other, before)


@without_simt
@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1, -40])
def test_a_file_cut_short_or_too_long(xp, rng, tmp_path, keep):
    path = tmp_path / "x"
    cache = make(xp, rng, "int8", **SMALL)
    pages.save(path, cache)
    good = path.read_bytes()
    cache.k[...] = xp.zeros(cache.k.shape, np.int8)
    before = host(cache)
    for data in (good[:keep], good + b"\0", b"", b"GGUF" + good):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            pages.load(path, cache)
    assert_holds(cache, before)


@without_simt
@pytest.mark.parametrize(
    "saved, sizes, options, text",
    [
        ("fp16", {}, {}, "has spec=fp16, expected int8"),
        ("int8:fp32", {}, {}, "has spec=int8:fp32, expected int8"),
        ("int8:HND", {}, {}, "has spec=int8:HND, expected int8"),
        ("int8", {"P": 8}, {}, "has page_size=8, expected 4"),
        ("int8", {"L": 2}, {}, "has layers=2, expected 3"),
        ("int8", {"H": 1}, {}, "has heads=1, expected 2"),
        ("int8", {"D": 16}, {}, "has head_dim=16, expected 24"),
        ("int8", {"N": 6}, {}, "has 6 pages, expected all 7, or a list of pages"),
        ("int8", {}, {"pages": [0, 1]}, "has 7 pages, expected 2 like pages"),
        ("int8", {}, {"model": "other"}, "has model=m, expected other"),
    ],
    ids=str,
)
def test_a_file_of_another_cache(xp, rng, tmp_path, saved, sizes, options, text):
    path = tmp_path / "x"
    pages.save(path, make(xp, rng, saved, **{**SIZES, **sizes}), model="m")
    cache = make(xp, rng, "int8", **SIZES)
    before = host(cache)
    with pytest.raises(FormatError, match=text):
        pages.load(path, cache, **options)
    assert_holds(cache, before)


@without_simt
def test_pages_for_other_given_scales_are_refused(xp, rng, tmp_path):
    cache, other = (make(xp, rng, "int8:head", **SIZES) for _ in range(2))
    pages.save(tmp_path / "x", cache, [1])
    before = host(other)
    with pytest.raises(FormatError, match="has other k_scales, expected those of the cache"):
        pages.load(tmp_path / "x", other, [0])
    with pytest.raises(ParameterError, match="target.k_scales differ, expected those of source"):
        pages.copy_pages(cache, other, [0], [0])
    assert_holds(other, before)


def test_a_save_that_fails_leaves_the_old_file(rng, tmp_path, monkeypatch):
    path = tmp_path / "x"
    cache = make(np, rng, "fp16", **SIZES)
    pages.save(path, cache)
    good = path.read_bytes()
    monkeypatch.setattr(pages.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        pages.save(path, make(np, rng, "fp16", **SIZES))
    assert path.read_bytes() == good and [x.name for x in tmp_path.iterdir()] == ["x"]


def test_other_files_are_refused(rng, tmp_path):
    cache = make(np, rng, "fp16", **SIZES)
    for header in ("{}", "[]", "3", "{", '{"__metadata__": 3}', '{"__metadata__": {}}'):
        text = header.encode()
        (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(FormatError, match="is no file of pages"):
            pages.load(tmp_path / "x", cache)
    text = b'{"__metadata__": {"format": "pt"}}'
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FormatError, match="has format 'pt', expected 'pykv.pages.1'"):
        pages.load(tmp_path / "x", cache)


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
    fails(ParameterError, "target_pages has 1 pages, expected 2 like source_pages",
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
