"""copy.deepcopy and pickle: what comes out works by itself, or nothing does; no half is shared."""

import copy
import pickle

import numpy as np
import pytest

import pykv
from pykv import PagedKVCache, blocks, cuda
from pykv.blocks import BlockManager
from pykv.errors import PykvError, UnsupportedError
from pykv.ops.mailbox import Mailbox
from pykv.ops.phase_program import OLDEST_SM, PhaseProgram
from pykv.programs.phases import Product
from tests.helpers import assert_same_bits, to_numpy

P = 4
WAYS = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
ways = pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle"])


@ways
def test_a_manager(way):
    manager, told = BlockManager(9, P), []
    manager.on_forget = told.append
    pages = manager.allocate(3 * P)
    manager.publish(pages, list(range(3 * P)))
    fork = manager.fork(pages[:2])
    manager.evict([fork], 1, [P + 1])
    other, (mine, forked) = way((manager, (pages, fork)))

    assert other.num_free == manager.num_free and other.published == manager.published
    found = other.reuse(list(range(2 * P)))
    assert found == pages[:2]
    other.extend(mine, 3 * P, 5 * P)
    with pytest.raises(PykvError, match="pages before evicted rows"):
        other.publish(forked, list(range(2 * P)))
    for sequence in (found, mine, forked):
        other.free(sequence)
    other.allocate(9 * P)  # makes it forget all
    assert other.num_free == 0 and other.num_cached == 0 and told == []
    assert manager.num_free == 9 - 5 and len(pages) == 3  # the first manager is as it was
    with pytest.raises(PykvError, match="in another list"):
        other.free(pages)
    manager.free(pages)


@ways
@pytest.mark.parametrize("spec", ["fp16", "int8", "int4:HND", "int8:head"])
def test_a_cache(way, spec, xp, rng):
    options = dict(margin=1.5) if spec == "int8:head" else {}
    cache = PagedKVCache(2, 6, 2, 8, page_size=P, spec=spec, xp=xp, **options)
    pages = cache.manager.allocate(2 * P)
    rows = [xp.asarray(x) for x in rng.standard_normal((2, P, 2, 8)).astype(np.float32)]
    slots = [xp.asarray(blocks.slots(pages, i * P, (i + 1) * P, P)) for i in range(2)]
    cache.append(0, *rows, slots[0])
    other, mine = way((cache, pages))
    before = [to_numpy(x).copy() for x in (cache.k, cache.v)]

    for layer in range(2):
        other.append(layer, *rows, slots[1])
    other.extend(mine, 2 * P, 3 * P)
    other.grow(8)
    assert mine == [*pages, 2] and cache.manager.num_free == 4
    for x, want in zip((cache.k, cache.v), before, strict=True):
        assert_same_bits(x, want)
    for layer in range(2):
        cache.append(layer, *rows, slots[1])
    query = xp.asarray(rng.standard_normal((1, 2, 8)).astype(np.float32))
    table, lengths = (xp.asarray(np.array(x, np.int32)) for x in ([pages], [2 * P]))
    assert_same_bits(
        other.decode(0, query, table, lengths), to_numpy(cache.decode(0, query, table, lengths))
    )


def refused(xp):
    """What works on arrays that it was made with."""
    x, w = xp.ones((2, 8), np.float32), xp.ones((8, 8), np.float32)
    yield pykv.prepare(pykv.ops.norm.rms_norm, x, w[0])
    yield cuda.graph(lambda: pykv.ops.norm.rms_norm(x, w[0]))
    if xp is np or cuda.current_sm() >= OLDEST_SM:
        yield PhaseProgram([Product(x, w, "F32", xp.zeros((2, 8), np.float32))])
    with Mailbox(x) as box:
        yield box


def test_what_works_on_arrays_of_others_is_no_copy(xp):
    for thing in refused(xp):
        for way in (*WAYS, copy.copy):
            with pytest.raises(UnsupportedError, match="works on the arrays that it was made with"):
                way(thing)


def test_shallow_copies_would_share_half(xp):
    for thing in (BlockManager(2, P), PagedKVCache(1, 2, 1, 8, xp=xp)):
        with pytest.raises(UnsupportedError, match=r"expected deepcopy"):
            copy.copy(thing)
