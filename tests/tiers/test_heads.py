"""Files of pages that caches of another layout, or ranks with other heads, read bit for bit."""

import numpy as np
import pytest

from pykv import PagedKVCache
from pykv.errors import DtypeError, ParameterError
from pykv.page_arrays import moving_arrays
from pykv.tiers import Tiers, disk
from pykv.tiers.disk import Heads
from tests.tiers.made import KVTC, World

L, H, D, P, PAGES = 2, 4, 32, 4, 3
TOKENS = list(range(PAGES * P))


def opened(folder, spec, first=0, count=H, codec="none", heads=True):
    cache = PagedKVCache(L, PAGES, count, D, page_size=P, spec=spec)
    given = (first, H) if heads else None
    return cache, Tiers(cache, host="100KB", disk=f"{folder}:1MB:{codec}", heads=given)


def some_of(cache, whole, first, count):
    """Views [L, N, P, heads, ...] of a cache, and what these heads hold in the whole."""
    for name, x in moving_arrays(cache).items():
        view = np.swapaxes(x, 2, 3) if cache.spec.layout == "HND" else x
        yield view, whole[name][:, :, :, first : first + count]


def written(rng, folder, spec, ranks):
    """The whole that so many ranks wrote."""
    plain = moving_arrays(PagedKVCache(L, PAGES, H, D, page_size=P, spec=spec.replace(":HND", "")))
    whole = {}
    for name, x in plain.items():
        numbers = rng.random(x.shape).astype(x.dtype)
        bits = rng.integers(0, 256, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape)
        whole[name] = numbers if "scales" in name else bits
    count = H // ranks
    for first in range(0, H, count):
        cache, tiers = opened(folder, spec, first, count, heads=ranks > 1)
        pages = cache.manager.allocate(len(TOKENS))
        for view, held in some_of(cache, whole, first, count):
            view[...] = held
        cache.manager.publish(pages, TOKENS)
        tiers.flush()
    return whole


def found(folder, spec, whole, first, count):
    """Pages that a rank finds; these must be right."""
    cache, tiers = opened(folder, spec, first, count)
    tiers.fetch(TOKENS)
    pages = cache.manager.reuse(TOKENS)
    for view, held in some_of(cache, whole, first, count):
        assert view[:, pages].tobytes() == held[:, : len(pages)].tobytes()
    tiers.flush()
    return len(pages)


@pytest.mark.parametrize("spec", ["fp16", "bf16:HND", "int8", "int4:HND", "k8v4:fp32"])
@pytest.mark.parametrize("wrote", [1, 2, 4])
def test_any_rank_and_layout_reads_what_others_wrote(rng, tmp_path, spec, wrote):
    whole = written(rng, tmp_path, spec, wrote)
    other = spec.replace(":HND", "") if "HND" in spec else f"{spec}:HND"
    for ranks in (1, 2, 4):
        for first in range(0, H, H // ranks):
            assert found(tmp_path, other, whole, first, H // ranks) == PAGES
    assert len(disk.entries(tmp_path)) == PAGES * wrote  # nothing was written again


def test_a_rank_reads_its_heads_alone(rng, tmp_path):
    """Damage elsewhere is not seen, and a file of other heads is not enough."""
    whole = written(rng, tmp_path, "fp16", 1)
    for entry in disk.entries(tmp_path):
        text = bytearray(entry.path.read_bytes())
        text[-1] ^= 1  # a byte of the last head
        entry.path.write_bytes(text)
    assert found(tmp_path, "fp16", whole, 0, 2) == PAGES
    assert found(tmp_path, "fp16", whole, 2, 2) == 0
    whole = written(rng, tmp_path, "fp16", 2)
    for entry in disk.entries(tmp_path):
        if entry.path.stem.endswith("-2-2"):
            entry.path.unlink()
    assert found(tmp_path, "fp16", whole, 0, 2) == PAGES
    assert found(tmp_path, "fp16", whole, 0, 4) == 0


def test_a_file_of_other_heads_under_our_name_is_damaged(rng, tmp_path):
    whole = written(rng, tmp_path, "fp16", 2)
    for entry in disk.entries(tmp_path):
        if entry.path.stem.endswith("-2-2"):
            entry.path.replace(str(entry.path).replace("-2-2", "-0-2"))
    assert found(tmp_path, "fp16", whole, 0, 2) == 0


def test_parts_that_hold_heads():
    assert Heads(0, 4, 4).covers() == [[(0, 4)], [(0, 2), (2, 2)], [(0, 1), (1, 1), (2, 1), (3, 1)]]
    assert Heads(2, 2, 4).covers() == [[(2, 2)], [(0, 4)], [(2, 1), (3, 1)]]
    assert Heads(1, 1, 3).covers() == [[(1, 1)], [(0, 3)]]
    assert Heads(1, 2, 6).covers() == [[(1, 2)], [(0, 6)], [(0, 3)], [(1, 1), (2, 1)]]


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(heads=(0, 0)), r"heads\[1\] is 0, expected 1 to 65536"),
        (dict(heads=(1, 1)), r"heads\[1\] is 1, expected 2 to 65536"),
        (dict(heads=(0, 1 << 40)), r"heads\[1\] is 1099511627776, expected 1 to 65536"),
        (dict(heads=(0, 2), spec="int8:head"), "expected None with scales that are shared"),
        (dict(heads=(0, 2), host=f"1MB:{KVTC}", head_dim=64), "with a codec that mixes heads"),
    ],
)
def test_heads_that_cannot_be_told_apart(tmp_path, options, text):
    with pytest.raises(ParameterError, match=text):
        World(disk=f"{tmp_path / 'tier'}:1MB", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("heads", [3, (0,), "ab", (0.0, 8)])
def test_heads_that_are_no_pair(tmp_path, heads):
    with pytest.raises(DtypeError, match="Tiers: heads"):
        World(disk=f"{tmp_path / 'tier'}:1MB", heads=heads)


def test_heads_without_files_mean_nothing():
    with pytest.raises(
        ParameterError, match=r"heads is \(0, 4\), expected None without a disk_cache"
    ):
        World(host="1MB", heads=(0, 4))


@pytest.mark.parametrize(
    "identity, error",
    [("x", DtypeError), (dict(a=b"3"), DtypeError), (dict(form="x"), ParameterError)],
    ids=str,
)
def test_an_identity_is_texts_by_names_of_their_own(identity, error):
    with pytest.raises(error, match="Tiers: identity"):
        Tiers(PagedKVCache(1, 2, 1, 8), host="1MB", identity=identity)
